"""Searches a space of recipes: KL from the exact cache against effective bits, reported on texts held out."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from kvpolicy.arguments import check_directory, check_optuna, check_room, check_search
from kvpolicy.errors import CompareError
from kvpolicy.experiment.bench import fitting_cache
from kvpolicy.experiment.comparison import limit_of, progress_bar
from kvpolicy.experiment.prepared import about, load_given
from kvpolicy.experiment.result import estimate
from kvpolicy.experiment.run import Runner
from kvpolicy.experiment.search import Search, Trial
from kvpolicy.experiment.study import open_study
from kvpolicy.experiment.tuning import Found, Tuning
from kvpolicy.experiment.work import cause_of
from kvpolicy.hf.cache import make_cache
from kvpolicy.hf.fingerprint import fingerprint_of
from kvpolicy.hf.models import attached, one_thread, positions_of
from kvpolicy.hf.predictions import divergence
from kvpolicy.hf.source import is_bundled
from kvpolicy.recipe.load import Recipe
from kvpolicy.recipe.space import Space, load_space
from kvpolicy.tasks.texts import ANSWER, Span, Split, cut, text_files


def tune(
    space: str | os.PathLike[str] | Mapping[str, Any] | Space,
    *,
    text: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    model: Any = None,
    tokenizer: Any = None,
    bits: float | None = None,
    trials: int = 100,
    samples: int = 16,
    tokens: int = 1024,
    held_out: float = 0.5,
    seed: int = 0,
    out: str | os.PathLike[str] | None = None,
    device: str | None = None,
    progress: bool = True,
    attach: bool = True,
) -> Tuning:
    """Search a space of recipes for little KL from the exact cache at few effective bits.

    Each trial draws a recipe. It reads prompts cut from `text` and then the 64 tokens that follow, token by token
    through its cache; KL is that of the exact cache's predictions from its own, in nats per token, over the tokens
    after the first, and bits are those of `memory()` in the end. A trial that does badly on the first texts is given
    up. What is found is run again on the samples held out, which no trial has seen: these numbers are reported.

    Needs Optuna: `pip install 'kvpolicy[tune]'`.

    Args:
        space: the path of a YAML file, a mapping like it, or a `Space`.
        text: one or several files in UTF-8 that samples are cut from.
        model: as `compare` takes it.
        tokenizer: the tokenizer of a model given as an object.
        bits: the most effective bits per value, a mean over samples; the recipe of least KL within them is searched
            (TPE). Without it the Pareto front of KL and bits (NSGA-II).
        trials: combinations that are tried, those of an earlier run included.
        samples: samples cut from the texts, at least 2.
        tokens: tokens of a prompt.
        held_out: the share of samples held out, between 0 and 1.
        seed: seed of the search.
        out: directory for the study, from which the same search goes on, and the results: recipes (best.yaml, or
            front-1.yaml and so on), result.json, and front.png. Without it nothing is written.
        device: where a model given by its name is loaded, such as `cpu`; by default CUDA where there is one.
        progress: show progress bars on stderr.
        attach: let the model read the compressed stores directly, as `kvpolicy.attach` does, and detach it in the end.

    Returns:
        The recipes found, with means and confidence intervals over the samples held out; printable.

    Raises:
        MissingDependencyError: Optuna is not installed.
        RecipeError: the space is not valid.
        TaskError: a text can't be read, or all are shorter than asked.
        CompareError: an argument is not valid, `out` holds another search, or no recipe was found within `bits`.
    """
    given = {"trials": trials, "samples": samples, "tokens": tokens, "seed": seed}
    check_search({**given, "held_out": held_out, "bits": bits, "out": out})
    check_optuna()
    directory = None if out is None else Path(out)
    if directory is not None:
        check_directory(directory)
    files = text_files(text)
    check_room(tokens, limit_of(model))
    space = load_space(space)
    bundled = is_bundled(model)
    model, tokenizer, shown = load_given(model, tokenizer, device)
    _check_length(tokens, positions_of(model))
    split = cut(files, tokenizer, tokens, samples, held_out)
    with ExitStack() as stack:
        reads = stack.enter_context(attached(model, attach))
        settings = {"bits": bits, "tokens": tokens, "samples": samples, "held_out": held_out, "attached": reads}
        facts = about(model, shown)
        settings["dtype"] = facts["dtype"]
        study = stack.enter_context(open_study(directory, _about(space, model, split, settings, facts), bits, seed))
        stack.enter_context(one_thread(bundled))
        runner = Runner(model, tokenizer)
        stack.enter_context(runner.ready())
        texts = Texts(runner, space, split, reads)
        search = _searched(Search(study, space, bits, texts.tuned, len(split.tuned)), texts, trials, progress)
        found = _report(study, search, texts, progress)
    described = {**facts, **settings, "space": space.name, "texts": [str(file) for file in files], "seed": seed}
    result = Tuning(found, list(search.trials.values()), described)
    if directory is not None:
        result.write(directory)
    return result


class Score(NamedTuple):
    """A recipe on one sample."""

    kl: float
    bits: float
    top1: float


class Texts:
    """The samples of a search, and what the exact cache predicts on each, computed once."""

    def __init__(self, runner: Runner, space: Space, split: Split, reads: bool) -> None:
        self.runner, self.space, self.split, self.reads = runner, space, split, reads
        self._exact: dict[int, Tensor] = {}

    def exact(self, span: Span) -> Tensor:
        """Log-probabilities `[answer tokens, vocabulary]` of the exact cache."""
        if id(span) not in self._exact:
            cache = make_cache("full", self.runner.model)
            try:
                found = self.runner.predictions(cache, span.prompt, span.answer)
            except Exception as error:
                raise CompareError(f"the exact cache: the model can't be run: {cause_of(error)}") from error
            self._exact[id(span)] = found.cpu()
        return self._exact[id(span)]

    def tuned(self, drawn: dict[str, int | float]) -> Iterator[tuple[float, float]]:
        """KL and bits of a combination, text by text, on those that the search may see."""
        for score in self.scores(self.space.recipe(drawn), self.split.tuned):
            yield score.kl, score.bits

    def scores(self, recipe: Recipe, spans: list[Span]) -> Iterator[Score]:
        """A recipe on some samples."""
        empty = fitting_cache(recipe, self.runner.model, self.reads)
        for span in spans:
            exact, cache = self.exact(span), copy.deepcopy(empty)
            log_probs = self.runner.predictions(cache, span.prompt, span.answer).cpu()
            # The first token is predicted by the prefill, which reads no stored token.
            kl = divergence(exact[1:], log_probs[1:])
            if not all(x < float("inf") for x in kl):
                raise CompareError("the predictions must be finite, found a token with probability 0")
            top1 = (exact[1:].argmax(-1) == log_probs[1:].argmax(-1)).float().mean()
            yield Score(sum(kl) / len(kl), cache.memory().bits_per_value, float(top1))


def _check_length(tokens: int, limit: int | None) -> None:
    if limit is not None and tokens + ANSWER > limit:
        raise CompareError(
            f"tokens of a prompt and {ANSWER} more must fit the model's max_position_embeddings, {limit}, found "
            f"{tokens} + {ANSWER}; ask for shorter samples (--tokens)"
        )


def _about(space: Space, model: Any, split: Split, settings: dict[str, Any], facts: dict[str, Any]) -> dict[str, Any]:
    """What a study is of: whatever numbers of its trials depend on."""
    found = fingerprint_of(model)
    release = facts["versions"]["transformers"]
    known = {"config": found.config, "weights": found.weights, "transformers": release}
    return {"space": space.plain(), "model": known, "texts": split.digest(), "settings": settings}


def _searched(search: Search, texts: Texts, trials: int, show: bool) -> Search:
    """The search with all its trials."""
    spans = texts.split.tuned
    if len(search.trials) < trials:
        with progress_bar(len(spans), show) as advance:
            for number, span in enumerate(spans):
                advance(f"exact cache, sample {number + 1} of {len(spans)}", 0)
                texts.exact(span)
                advance("", 1)
        with progress_bar(trials, show) as advance:
            advance("", len(search.trials))
            search.run(trials, advance)
    return search


def _report(study: Any, search: Search, texts: Texts, show: bool) -> list[Found]:
    """What was found, run on the samples held out. A run that is interrupted keeps what is done."""
    trials, spans = search.found(), texts.split.held_out
    if not trials:
        least = min((trial.mean_bits for trial in search.trials.values() if trial.bits), default=None)
        if search.budget is None or least is None:
            raise CompareError(f"no combination could be run: {search.causes()[0]}; mend the space")
        raise CompareError(
            f"no recipe of the space was found within {search.budget:g} bits per value, the least has {least:.2f}; "
            "ask for more bits (--bits) or longer samples (--tokens), or widen the space"
        )
    by_bits = sorted(trials, key=lambda trial: trial.mean_bits)
    with progress_bar(len(trials) * len(spans), show) as advance:
        return [_found(study, search, texts, trial, place + 1, advance) for place, trial in enumerate(by_bits)]


def _found(study: Any, search: Search, texts: Texts, trial: Trial, place: int, advance: Any) -> Found:
    space, spans, key = texts.space, texts.split.held_out, f"held out {trial.number}"
    label = "best" if search.budget is not None else f"front-{place}"
    recipe = space.recipe(trial.drawn, name=f"{space.document.data['name']}-{label}")
    rows = study.user_attrs.get(key)
    if rows is None:
        rows = []
        for number, score in enumerate(texts.scores(recipe, spans)):
            rows.append(list(score))
            advance(f"{label}: held-out sample {number + 1} of {len(spans)}", 1)
        study.set_user_attr(key, rows)
    columns = [estimate(list(column)) for column in zip(*rows, strict=True)]
    kl, bits, top1 = columns
    assert kl is not None
    assert bits is not None
    assert top1 is not None
    return Found(label, trial, recipe, space.values(trial.drawn), bits, kl, top1)
