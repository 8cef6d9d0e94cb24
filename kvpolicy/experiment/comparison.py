"""Compares recipes on the same samples, each against the exact cache."""

from __future__ import annotations

import copy
import json
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

from kvpolicy.arguments import RESULTS, check_comparison, check_results, check_room
from kvpolicy.errors import CompareError, KvpolicyError
from kvpolicy.experiment.result import EXACT, Comparison, is_exact
from kvpolicy.experiment.run import Encoded, Run, Runner, encode, row, unlikely
from kvpolicy.hf.cache import make_cache
from kvpolicy.hf.layer import TieredLayer
from kvpolicy.hf.models import attached, check_model, load_model, one_thread, positions_of
from kvpolicy.recipe.load import Recipe, load_recipe
from kvpolicy.recipe.source import refuse_misplaced
from kvpolicy.tasks.load import check_task, load_task
from kvpolicy.words import in_words, quoted


def compare(
    arms: Iterable[Any] | Mapping[str, Any],
    *,
    model: Any = None,
    tokenizer: Any = None,
    task: str | os.PathLike[str] = "lines",
    n: int = 16,
    seed: int = 0,
    tokens: int | None = None,
    out: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    device: str | None = None,
    progress: bool = True,
    attach: bool = True,
    errors: bool = True,
) -> Comparison:
    """Run recipes on the same samples in the same order, each against the exact cache.

    Each arm reads the prompt at once and then the answer token by token through its cache; from there come the
    negative log-likelihood of the answer (`nll`), the Kullback-Leibler divergence of the exact cache's prediction
    from the arm's (`kl`, in nats) and how often their most likely tokens agree (`top1`), over the answer's tokens
    after the first: the first is predicted by the prefill, which reads no stored token (`nll_first`). `score` rates
    greedy decoding. The exact cache runs once per sample, whether or not it is an arm.

    Of an attached model also the attention over the same tokens: relative errors of its outputs (`l1`, `l2`) against
    exact attention of the same queries over all keys and values that the layer was given in this run, and the shares
    of exact attention on tokens that the arm keeps exactly, quantized, or dropped (`exact_mass`, `quantized_mass`,
    `dropped_mass`), as means over the compressed layers; None where a model computes on keys and values itself.

    Args:
        arms: recipes, each as `load_recipe` takes it; a mapping gives them names of its own.
        model: a causal language model of transformers, or the path of a local model directory; by default the
            bundled model. Its training mode is restored.
        tokenizer: the tokenizer of a model given as an object.
        task: `lines`, `arithmetic`, `code`, or the path of a JSON Lines file with `prompt` and `answer`.
        n: samples; fewer if the file has fewer rows.
        seed: seed of the samples.
        tokens: approximate length of a generated sample, by default the task's own.
        out: directory for samples.jsonl (one row per arm and sample, appended as they are made), summary.json,
            comparison.png, and attention.png where attention was watched.
        overwrite: replace what an earlier comparison left in `out`.
        device: where a model given by its path is loaded, such as `cpu`; by default CUDA where there is one.
        progress: show a progress bar on stderr.
        attach: let the model read the compressed stores directly, as `kvpolicy.attach` does, and detach it in the end.
            A model that can't be attached runs unattached, with a warning; one that is attached already stays so.
        errors: watch the attention of an attached model. That keeps an exact copy of keys and values beside the cache
            of the arm that runs, which is not counted in its bytes, nor is the work in its times.

    Returns:
        The rows, means with confidence intervals, paired differences; printable.

    Raises:
        CompareError: an argument is not valid, or every arm failed. An arm that fails midway is reported in
            `failures`, and the others go on.
        RecipeError: a recipe is not valid, or does not fit the model.
        TaskError: the task is unknown, or its file is not valid.
    """
    check_comparison(n, seed, tokens, task, out)
    directory = None if out is None else check_results(Path(out), overwrite)
    bundled, name = model is None, os.fspath(task)
    check_task(name, n, tokens)
    recipes = _recipes(arms)
    check_room(tokens, limit_of(model))
    samples = load_task(name, n, seed, tokens)
    model, tokenizer, shown = load_given(model, tokenizer, device)
    items = encode(samples, tokenizer, model.config)
    settings = {"task": name, "n": len(items), "seed": seed, "tokens": tokens, **about(model, shown)}
    with attached(model, attach) as reads:
        caches = {name: _cache(name, recipe, model, reads) for name, recipe in recipes.items()}
        result = Comparison(recipes, [], {**settings, "attached": reads, "errors": errors})
        with _rows_file(directory) as file, one_thread(bundled):
            try:
                _run(Runner(model, tokenizer, errors and reads), caches, items, result, file, progress)
            finally:
                if directory is not None and result.rows:
                    result.write_summary(directory / RESULTS[1])
    if directory is not None:
        result.plot(directory / RESULTS[2])
        if result.distances.layers:
            result.plot_attention(directory / RESULTS[3])
    return result


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


def _run(
    runner: Runner, caches: dict[str, Any], items: list[Encoded], result: Comparison, file: IO[str] | None, show: bool
) -> None:
    exact, warned = make_cache("full", runner.model), False
    with runner.ready(), progress_bar(len(items) * (len(caches) + 1), show) as advance:
        _guard("the exact cache", lambda: runner.warm_up(copy.deepcopy(exact)))
        for number, item in enumerate(items):
            advance(f"sample {number + 1} of {len(items)}: exact cache", 0)
            reference = _guard(
                f"the exact cache, sample {number}", lambda item=item: runner.run(copy.deepcopy(exact), item)
            )
            if not warned and (said := unlikely(number, item, reference, runner.tokenizer)):
                warnings.warn(said, stacklevel=3)
                warned = True
            if reference.attention is not None:
                result.distances.merge(reference.attention.distances)
            advance("", 1)
            for name, cache in caches.items():
                if name in result.failures:
                    continue
                advance(f"sample {number + 1} of {len(items)}: {name}", 0)
                try:
                    same = is_exact(result.arms[name])
                    run: Run = reference if same else runner.run(copy.deepcopy(cache), item)
                    record = row(number, name, item, run, reference)
                except Exception as error:
                    advance("", len(items) - number)
                    _fail(result, name, number, error)
                    continue
                result.rows.append(record)
                _write(file, record)
                advance("", 1)


def _write(file: IO[str] | None, record: dict[str, Any]) -> None:
    if file is None:
        return
    try:
        file.write(json.dumps(record, allow_nan=False) + "\n")
        file.flush()
    except OSError as error:
        raise CompareError(f"{file.name}: the row can't be written: {error}") from error


def _guard(what: str, call: Any) -> Any:
    try:
        return call()
    except Exception as error:
        raise CompareError(f"{what}: the model can't be run: {cause_of(error)}") from error


def cause_of(error: Exception) -> str:
    """An error in a line; of one that was not raised on purpose its type, too."""
    return str(error) if isinstance(error, KvpolicyError) else f"{type(error).__name__}: {error}"


def _fail(result: Comparison, name: str, number: int, error: Exception) -> None:
    result.failures[name] = f"sample {number}: {cause_of(error)}"
    if len(result.failures) == len(result.arms):
        every = "; ".join(f"{arm}, {cause}" for arm, cause in result.failures.items())
        raise CompareError(f"every arm failed: {every}") from error
    warnings.warn(f"arm {quoted(name)} failed and is left out from here on: {result.failures[name]}", stacklevel=4)


def _recipes(arms: Any) -> dict[str, Recipe]:
    if isinstance(arms, str | os.PathLike | Recipe):
        arms = [arms]
    if not isinstance(arms, Iterable):
        raise CompareError(f"arms must be recipes in a list, or by name in a mapping, found {in_words(arms)}")
    named = list(arms.items()) if isinstance(arms, Mapping) else [(None, arm) for arm in arms]
    if not named:
        raise CompareError("a comparison needs at least one arm, found none; give a recipe such as 'logquant'")
    refuse_misplaced(source for label, source in named if label is None and isinstance(source, str))
    found: dict[str, Recipe] = {}
    for label, source in named:
        recipe = load_recipe(source)
        name = str(label) if label is not None else _label(source, recipe)
        if name in found:
            raise CompareError(
                f"arms must have different names, found {quoted(name)} twice; leave one out (from Python, a mapping "
                "gives them names)"
            )
        if name == EXACT and not is_exact(recipe):
            raise CompareError(f"an arm must not be named {EXACT!r}, which stands for the exact cache; rename it")
        found[name] = recipe
    return found


def _label(source: Any, recipe: Recipe) -> str:
    return os.fspath(source) if isinstance(source, str | os.PathLike) else recipe.name


def limit_of(model: Any) -> int | None:
    """The positions of a model that is given as `compare` takes it, where its config says how many."""
    if model is None or isinstance(model, str | os.PathLike):
        return check_model(model)
    return positions_of(model) if hasattr(getattr(model, "config", None), "get_text_config") else None


def load_given(model: Any, tokenizer: Any, device: str | None) -> tuple[Any, Any, str]:
    """Model, tokenizer, and what the model is called."""
    if model is None or isinstance(model, str | os.PathLike):
        loaded, found = load_model(model, device)
        return loaded, tokenizer if tokenizer is not None else found, "bundled" if model is None else str(model)
    if device is not None:
        raise CompareError(f"device {device!r} is for a model given by its path; move a model of your own by model.to")
    if not hasattr(model, "config") or not callable(model):
        raise CompareError(
            f"model must be a causal language model of transformers or the path of one, found {type(model).__name__}"
        )
    if tokenizer is None:
        raise CompareError(
            "a model given as an object needs its tokenizer, found none; pass tokenizer=..., "
            "or the path of the model directory as model"
        )
    return model, tokenizer, str(getattr(model.config, "name_or_path", "") or type(model).__name__)


def about(model: Any, shown: str) -> dict[str, Any]:
    """A model and the versions of libraries, as results name them."""
    import torch
    import transformers

    return {
        "model": shown,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "versions": {
            "kvpolicy": version("kvpolicy"),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


@contextmanager
def _rows_file(directory: Path | None) -> Iterator[IO[str] | None]:
    if directory is None:
        yield None
        return
    with ExitStack() as stack:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            for name in RESULTS:
                (directory / name).unlink(missing_ok=True)
            file = stack.enter_context(open(directory / RESULTS[0], "w", encoding="utf-8"))
        except OSError as error:
            raise CompareError(f"{directory}: the results can't be written there: {error}") from error
        yield file


@contextmanager
def progress_bar(total: int, show: bool) -> Iterator[Any]:
    """A function of what is under way, and how many runs were finished."""
    if not show:
        yield lambda text, done: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.text import Text

    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=total)

        def advance(text: str, done: int) -> None:
            if text:
                bar.update(task, description=Text(text).markup)
            bar.advance(task, done)

        yield advance
