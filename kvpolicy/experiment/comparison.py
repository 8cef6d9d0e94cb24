"""Compares recipes on the same samples, each against the exact cache."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from kvpolicy.arguments import check_comparison, check_directory, check_room
from kvpolicy.errors import CompareError
from kvpolicy.experiment.bench import Terms, bench
from kvpolicy.experiment.elsewhere import check_workers, elsewhere
from kvpolicy.experiment.experiment import Experiment, load_experiment
from kvpolicy.experiment.lock import locked
from kvpolicy.experiment.names import ATTENTION, EXACT, METRICS
from kvpolicy.experiment.outputs import write_results
from kvpolicy.experiment.prepared import Prepared, early_identity, match_arms, prepare
from kvpolicy.experiment.result import Comparison
from kvpolicy.experiment.store import Store, check_same, open_store
from kvpolicy.experiment.work import NO_EXACT, Finished, Labour, Pending, Said, missing, named, units
from kvpolicy.hf.models import one_thread, positions_of
from kvpolicy.hf.source import ModelSource, check_model, source_of
from kvpolicy.recipe.load import Recipe
from kvpolicy.statistics.rows import Row
from kvpolicy.tasks.files import FromFile
from kvpolicy.tasks.load import check_task
from kvpolicy.words import clip, quoted


def compare(
    arms: Any,
    *,
    model: Any = None,
    tokenizer: Any = None,
    task: Any = None,
    tasks: Iterable[Any] | None = None,
    n: int | None = None,
    seed: int | None = None,
    tokens: int | None = None,
    metrics: Iterable[str] | None = None,
    margins: Mapping[str, float] | None = None,
    match: str | Mapping[str, float | None] | None = None,
    baseline: str | None = None,
    aa: bool | None = None,
    batch: int | None = None,
    out: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    retry: bool = False,
    device: str | None = None,
    progress: bool = True,
    attach: bool | None = None,
    errors: bool = True,
    engine: Any = None,
    command: str | None = None,
) -> Comparison:
    """Run recipes on the same samples in the same order, each against the exact cache.

    Each arm reads the prompt at once and then the answer token by token through its cache; from there come the
    negative log-likelihood of the answer (`nll`), the Kullback-Leibler divergence of the exact cache's prediction
    from the arm's (`kl`, in nats) and how often their most likely tokens agree (`top1`), over the answer's tokens
    after the first: the first is predicted by the prefill, which reads no stored token (`nll_first`). `score` rates
    greedy decoding. The exact cache runs once per sample, whether or not it is an arm, and the prompt is computed once
    for all arms for which this can't change a number.

    Of an attached model also the attention over the same tokens: relative errors of its outputs (`l1`, `l2`) against
    exact attention of the same queries over all keys and values that the layer was given in this run, and the shares
    of exact attention on tokens that the arm keeps exactly, quantized, or dropped (`exact_mass`, `quantized_mass`,
    `dropped_mass`), as means over the compressed layers; absent where a model computes on keys and values itself.

    With `out` every row is in a file as soon as it is finished. A run that was interrupted, however, goes on when it is
    started again.

    Args:
        arms: recipes, each as `load_recipe` takes it; a mapping gives them names of its own. Or an experiment: the path
            of its YAML file, a mapping like it, or an `Experiment`; arguments below then count before what it says.
        model: a causal language model of transformers, whose training mode is restored; or a directory, an id of the
            Hugging Face hub, a GGUF file, or a `ModelSource`, which also says dtype and devices; by default the
            bundled model.
        tokenizer: the tokenizer of a model given as an object.
        task: the name of a task, maybe with options (`"needle:depth=0.5"`), the path of a JSON Lines file, or a `Task`.
            By default `lines`.
        tasks: several of these, each a name or a mapping with `task`, `n`, `tokens`, `seeds`, `name` and `margins`.
        n: samples of each task, by default 16; fewer if a file has fewer rows.
        seed: seed of the samples, by default 0.
        tokens: approximate length of a generated sample, by default the task's own.
        metrics: what is measured, by default all. Without `score` nothing is generated; without those of attention
            none is watched.
        margins: by metric, a difference from the baseline that counts as none; a task's own count before these.
        match: `"bits"`: choose the parameter that each arm leaves open (`"logquant:window=?"`,
            `"kivi:residual=32..256"`) so that effective bits agree within 2%; `"bits=3.0"` or `{"bits": 3.0}`: so that
            they come to that.
        baseline: the arm that others are compared with, by default `exact`.
        aa: run the exact cache again, in another batch, as the arm `exact again`: the noise floor.
        batch: samples that run together, by default 1. In batches attention is not watched.
        out: directory for run.sqlite (a row for each arm and sample, committed when it is finished), a report and
            pictures.
        overwrite: replace what `out` holds, once the new run has its first row.
        retry: run samples again that failed in an earlier run.
        device: where a model given by its name is loaded, such as `cpu`; by default CUDA where there is one.
        progress: show a progress bar on stderr.
        attach: let the model read the compressed stores directly, as `kvpolicy.attach` does, and detach it in the end;
            by default yes. A model that can't be attached runs unattached, with a warning; one that is attached
            already stays so.
        errors: False leaves out the metrics of attention. Watching keeps an exact copy of keys and values beside the
            cache of the arm that runs, which is not counted in its bytes, nor is the work in its times.
        engine: what runs the samples: by default this process; `"local"`, worker processes of this machine, one for
            each device; `"ray"`, actors of a Ray cluster (the extra `ray`); or a mapping with `name`, `workers`,
            `cpus`, `gpus` and `address`, as in the file of an experiment. The model must be given by its name. Rows
            are the same, and a run may go on with another engine. Programs that call this need the guard
            `if __name__ == "__main__"`, because local workers import them.
        command: what was run, for the record.

    Returns:
        The rows, means with confidence intervals, paired differences; printable.

    Raises:
        CompareError: an argument is not valid, `out` is in use or holds another experiment, a row can't be written,
            workers can't be started, or every sample failed. A sample that fails is a row with its error, and the run
            goes on.
        RecipeError: a recipe is not valid, or does not fit the model.
        TaskError: a task is unknown, or its file is not valid.
        MissingDependencyError: an engine, or a model, needs a package that is not installed.
    """
    given = {
        "model": model, "task": task, "tasks": tasks, "n": n, "seed": seed, "tokens": tokens, "metrics": metrics,
        "margins": margins, "match": match, "baseline": baseline, "aa": aa, "batch": batch, "device": device,
        "attach": attach, "errors": errors, "engine": engine,
    }  # fmt: skip
    check_comparison(16 if n is None else n, 0 if seed is None else seed, tokens, "lines", out)
    experiment, recipes, loaded = declare(arms, tokenizer=tokenizer, **given)
    if progress and experiment.matching is not None:
        print(experiment.matching, file=sys.stderr)
    return run_experiment(
        experiment, recipes, model=loaded, tokenizer=tokenizer, out=None if out is None else Path(out),
        overwrite=overwrite, retry=retry, progress=progress, command=command,
    )  # fmt: skip


def declare(
    arms: Any,
    *,
    model: Any = None,
    tokenizer: Any = None,
    seed: int | None = None,
    task: Any = None,
    errors: bool = True,
    **given: Any,
) -> tuple[Experiment, dict[str, Recipe], Any]:
    """The experiment that arguments of `compare` declare, its recipes, and the model if that is an object."""
    if task is not None and given.get("tasks") is not None:
        raise CompareError("task and tasks say the same, found both; give one of them")
    if task is not None:
        given["tasks"] = [os.fspath(task) if isinstance(task, os.PathLike) else task]
    if not errors and given.get("metrics") is None:
        given["metrics"] = [name for name in METRICS if name not in ATTENTION]
    source = source_of(model, given.get("device"))
    given |= {} if source is None else _words_of(source)
    given["seeds"] = None if seed is None else [seed]
    for name, kind in (("metrics", list), ("tasks", list), ("margins", dict)):
        given[name] = None if given.get(name) is None else kind(given[name])
    loaded = model if source is None else None
    experiment, recipes = load_experiment(
        arms,
        lambda e, opened, beside: match_arms(e, opened, beside, loaded, tokenizer),
        **{key: value for key, value in given.items() if value is not None},
    )
    check_experiment(experiment, loaded)
    return experiment, recipes, loaded


def _words_of(source: ModelSource) -> dict[str, Any]:
    """What a source says, as keys of an experiment."""
    said = {**vars(source), "model": source.name}
    del said["name"]
    return {
        key: os.fspath(value) if isinstance(value, os.PathLike) else value
        for key, value in said.items()
        if value not in (None, False)
    }


def check_experiment(experiment: Experiment, model: Any = None) -> None:
    """Refuse tasks and lengths that can't be right, before anything is made.

    Raises:
        CompareError: a length does not fit the model.
        TaskError: a task is unknown, or too large.
    """
    limit = limit_of(experiment.source if model is None else model)
    for task in experiment.tasks:
        n, tokens = experiment.size(task)
        found = check_task(task.task, n, tokens)
        if isinstance(found, FromFile):
            found.samples(n, (task.seeds or experiment.seeds)[0])  # says that the file has fewer rows
        check_room(tokens, limit)


def run_experiment(
    experiment: Experiment,
    recipes: dict[str, Recipe],
    *,
    model: Any = None,
    tokenizer: Any = None,
    out: Path | None = None,
    overwrite: bool = False,
    retry: bool = False,
    progress: bool = True,
    command: str | None = None,
) -> Comparison:
    """Run what is not yet in `out`. See `compare`.

    What ends it early, Ctrl-C or a full disk, is raised with the rows that are finished as its attribute `partial`.
    """
    if experiment.engine is not None:
        check_workers(experiment, model, tokenizer)
    with ExitStack() as stack:
        if out is not None:
            check_directory(out)
            stack.enter_context(locked(out, "a comparison"))
        if out is not None and not overwrite:
            check_same(out, early_identity(experiment, recipes))
        if experiment.engine is not None:
            ready, reads, labour = stack.enter_context(elsewhere(experiment, recipes, command))
        else:
            ready = prepare(experiment, recipes, model, tokenizer, command)
            reads, labour = stack.enter_context(_here(ready))
            stack.enter_context(one_thread(ready.bundled))
        store = stack.enter_context(open_store(out, ready.contents(reads), overwrite))
        try:
            _run(ready, labour, store, retry, progress)
        except BaseException as error:
            error.partial = Comparison.of(store, recipes)  # type: ignore[attr-defined]
            raise
        result = Comparison.of(store, recipes)
    _refuse_failure(result)
    if out is not None:
        write_results(result, out)
    return result


def _refuse_failure(result: Comparison) -> None:
    """Raise if there is no row to be compared."""
    if any(row.error is None for row in result.evidence.rows if row.arm != EXACT):
        return
    causes = {row.arm: f"sample {row.sample}: {row.error}" for row in reversed(result.evidence.rows) if row.error}
    if EXACT in causes:
        raise CompareError(f"the exact cache, {causes[EXACT]}")
    raise CompareError(
        f"every arm failed: {'; '.join(f'{arm}, {causes[arm]}' for arm in result.arms if arm in causes)}"
    )


def _run(ready: Prepared, labour: Labour, store: Store, retry: bool, show: bool) -> None:
    done, arms, failing = store.finished(failed=not retry), list(ready.all_arms()), set[str]()
    pending = [(unit, missing(unit, arms, done)) for unit in units(ready.items, ready.experiment.batch)]
    pending = [(unit, wanted) for unit, wanted in pending if wanted]
    if not pending:
        return
    total = sum(len(wanted) for _, wanted in pending)
    with progress_bar(total, show) as advance, labour(pending, advance) as rows:
        for finished in rows:
            store.add(finished.row, finished.attention)
            _warn_of(finished.row, failing)


@contextmanager
def _here(ready: Prepared) -> Iterator[tuple[bool, Labour]]:
    """This process runs every unit, one after another."""

    def warn(text: str) -> None:
        warnings.warn(text, stacklevel=8)

    with bench(ready.model, ready.tokenizer, ready.all_arms(), Terms.of(ready.experiment), warn) as found:

        def rows(pending: Pending, said: Said) -> Iterator[Finished]:
            for number, (unit, wanted) in enumerate(pending):
                where = f"{named(unit)}, {number + 1} of {len(pending)}"

                def told(arm: str, n: int, at: str = where) -> None:
                    said(f"{at}: {arm}" if arm else "", n)

                yield from found.run(unit, wanted, told)

        @contextmanager
        def labour(pending: Pending, said: Said) -> Iterator[Iterator[Finished]]:
            with found.ready():
                yield rows(pending, said)

        yield found.reads, labour


def _warn_of(row: Row, failing: set[str]) -> None:
    """Say, once for each arm, that it failed on a sample."""
    if row.error is None or row.arm in failing or row.error.startswith(NO_EXACT):
        return
    failing.add(row.arm)
    warnings.warn(
        f"arm {quoted(row.arm)} failed, and goes on with its next sample: sample {row.sample}: "
        f"{clip(row.error, 300)}. Said once",
        stacklevel=6,
    )


def limit_of(model: Any) -> int | None:
    """The positions of a model that is given as `compare` takes it, where its config says how many."""
    if (source := source_of(model)) is not None:
        return check_model(source)
    return positions_of(model) if hasattr(getattr(model, "config", None), "get_text_config") else None


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
