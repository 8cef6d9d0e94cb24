"""A model made ready for the units of an experiment, in this process or in a worker's."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from kvpolicy.errors import CompareError, KvpolicyError
from kvpolicy.experiment.experiment import Experiment
from kvpolicy.experiment.names import ATTENTION, EXACT
from kvpolicy.experiment.prepared import seen_of
from kvpolicy.experiment.run import Runner
from kvpolicy.experiment.work import Finished, Item, Said, Wanted, Worker, cause_of
from kvpolicy.hf.cache import make_cache
from kvpolicy.hf.layer import TieredLayer
from kvpolicy.hf.models import attached, load_model
from kvpolicy.hf.source import ModelSource
from kvpolicy.recipe.load import Recipe, load_yaml
from kvpolicy.words import quoted


@dataclass(frozen=True)
class Terms:
    """What a worker must know of an experiment besides its arms and samples."""

    attach: bool
    batch: int
    watch: bool
    """Whether attention is measured, where the model can be attached."""
    generate: bool

    @classmethod
    def of(cls, experiment: Experiment) -> Terms:
        """Those of an experiment."""
        measures = set(experiment.measures)
        watch = bool(measures & set(ATTENTION)) and experiment.batch == 1
        return cls(experiment.attach, experiment.batch, watch, "score" in measures)


class Bench:
    """Runs units with a model. Made by `bench`.

    Args:
        model: a causal language model of transformers.
        reads: whether it is attached.
        tokenizer: its tokenizer.
        arms: their recipes, the exact cache first.
        terms: of the experiment.
        warn: told, once, of a sample whose answer the exact cache itself finds impossible.
    """

    def __init__(
        self, model: Any, reads: bool, tokenizer: Any, arms: Mapping[str, Recipe], terms: Terms,
        warn: Callable[[str], None],
    ) -> None:  # fmt: skip
        if terms.batch > 1 and not reads:
            raise CompareError(
                f"batch must be 1 where the model is not attached, found {terms.batch}: only an attached model "
                "tells caches which tokens are padding; attach it, or run samples one by one (--batch 1)"
            )
        self.reads = reads
        self.caches = {name: _cache(name, recipe, model, reads) for name, recipe in arms.items()}
        self.runner = Runner(model, tokenizer, terms.watch and reads, terms.generate)
        self.worker = Worker(self.runner, self.caches, warn)

    @contextmanager
    def ready(self) -> Iterator[None]:
        """The model in evaluation mode, and warm."""
        with self.runner.ready():
            try:
                self.runner.warm_up(copy.deepcopy(self.caches[EXACT]))
            except Exception as error:
                raise CompareError(f"the exact cache: the model can't be run: {cause_of(error)}") from error
            yield

    def run(self, unit: Sequence[Item], wanted: Wanted, said: Said) -> Iterator[Finished]:
        """The rows that are wanted of a unit, within `ready`."""
        return self.worker.run(unit, wanted, said)


@contextmanager
def bench(
    model: Any, tokenizer: Any, arms: Mapping[str, Recipe], terms: Terms, warn: Callable[[str], None]
) -> Iterator[Bench]:
    """A bench whose model is attached until the end, if it can and shall be.

    Raises:
        CompareError: the experiment needs a model that is attached.
        RecipeError: a recipe does not fit the model.
    """
    with attached(model, terms.attach) as reads:
        yield Bench(model, reads, tokenizer, arms, terms, warn)


@dataclass(frozen=True)
class Job:
    """Everything that a worker needs before it is given units, as plain data."""

    source: ModelSource
    arms: Mapping[str, str]
    """Recipes as YAML. A worker knows the plugins that are installed where it runs."""
    terms: Terms
    threads: int
    """Of torch, where the model is on the CPU."""


@contextmanager
def open_job(job: Job, warn: Callable[[str], None]) -> Iterator[tuple[Bench, dict[str, Any]]]:
    """The bench of a worker, and what it sees of its model.

    Raises:
        CompareError: the model can't be loaded or run.
        RecipeError: a recipe does not fit it, or a plugin is not installed here.
    """
    import torch

    arms = {name: load_yaml(text) for name, text in job.arms.items()}
    model, tokenizer = load_model(job.source)
    if model.device.type == "cpu":
        torch.set_num_threads(job.threads)
    with ExitStack() as stack:
        made = stack.enter_context(bench(model, tokenizer, arms, job.terms, warn))
        yield made, {**seen_of(model, tokenizer, job.source.shown), "attached": made.reads}


def _cache(name: str, recipe: Recipe, model: Any, attached: bool) -> Any:
    try:
        return fitting_cache(recipe, model, attached)
    except KvpolicyError as error:
        raise type(error)(f"arm {quoted(name)}: {error}") from None


def fitting_cache(recipe: Recipe, model: Any, attached: bool) -> Any:
    """A cache for a model that is attached or not; refused where the recipe needs one that is."""
    cache = make_cache(recipe, model)
    for layer in cache.layers:
        if isinstance(layer, TieredLayer) and not attached:
            layer.check_attached()
    return cache
