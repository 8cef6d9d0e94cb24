"""What an experiment would run, how long that would take, and what so many samples can show."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from kvpolicy.errors import CompareError
from kvpolicy.experiment.bench import fitting_cache
from kvpolicy.experiment.comparison import declare
from kvpolicy.experiment.names import AGAIN, ATTENTION, EXACT
from kvpolicy.experiment.prepared import Prepared, prepare
from kvpolicy.experiment.printed import Printed
from kvpolicy.experiment.run import Runner
from kvpolicy.experiment.work import cause_of
from kvpolicy.hf.models import attached, one_thread
from kvpolicy.statistics.power import minimum_effect


@dataclass(frozen=True)
class DryRun(Printed):
    """What `compare --dry-run` prints."""

    arms: tuple[str, ...]
    """The exact cache first."""
    tasks: Mapping[str, tuple[int, float]]
    """Of each task the samples, and the mean of their tokens."""
    seconds: float | None
    """What all of it takes, estimated from one sample; None where that could not be run."""
    cause: str = ""
    """Why not."""
    shared: bool = False
    """Whether an engine's workers would share the work."""

    @property
    def comparisons(self) -> int:
        """Arms times tasks that are judged against the exact cache."""
        return max(sum(arm != EXACT for arm in self.arms) * len(self.tasks), 1)

    @property
    def rows(self) -> int:
        """Rows that would be made."""
        return len(self.arms) * sum(n for n, _ in self.tasks.values())

    def tables(self) -> list[Any]:
        """A rich table: each task with its samples, and the smallest difference that they can show."""
        table = Table(title="would run", title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
        table.add_column("task", overflow="fold")
        columns = ("samples", "tokens\neach", "rows", "smallest\ndifference", "right or\nwrong")
        for column in columns:
            table.add_column(column, justify="right", no_wrap=True)
        for task, (n, tokens) in self.tasks.items():
            effect, flips = (minimum_effect(n, deviation=x, comparisons=self.comparisons) for x in (1.0, None))
            table.add_row(
                task,
                str(n),
                f"{tokens:,.0f}",
                str(n * len(self.arms)),
                "-" if effect is None else f"{effect:.2f} sd",
                "-" if flips is None else f"{100 * flips:.0f} points",
            )
        return [table]

    def notes(self) -> str:
        """How long it takes, and how the table is to be read."""
        time_ = f"unknown: {self.cause}" if self.seconds is None else f"about {_duration(self.seconds)}"
        time_ += " of one worker, which those of the engine share" if self.shared and self.seconds is not None else ""
        return (
            f"arms: {', '.join(self.arms)}\nrows: {self.rows}; time: {time_}\n"
            "Smallest difference: what a paired comparison finds with a probability of 80% where "
            f"{self.comparisons} are judged together, in standard deviations (sd) of the differences between an arm "
            "and the exact cache. Right or wrong: the same of samples that are right or wrong, in the best case that "
            "all that differ differ one way."
        )


def dry_run(arms: Any, **given: Any) -> DryRun:
    """What `compare` would do with these arguments. The model is loaded, and one sample runs with two arms.

    Raises:
        CompareError: an argument is not valid.
        RecipeError: a recipe is not valid, or does not fit the model.
        TaskError: a task is unknown, or its file is not valid.
    """
    experiment, recipes, loaded = declare(arms, **given)
    ready = prepare(experiment, recipes, loaded)
    tasks: dict[str, tuple[int, float]] = {}
    for task in dict.fromkeys(item.planned.task for item in ready.items):
        sizes = [_size(item.encoded) for item in ready.items if item.planned.task == task]
        tasks[task] = len(sizes), sum(sizes) / len(sizes)
    try:
        seconds, cause = _estimate(ready), ""
    except CompareError:
        raise
    except Exception as error:
        seconds, cause = None, cause_of(error)
    return DryRun(tuple(ready.all_arms()), tasks, seconds, cause, experiment.engine is not None)


def _size(encoded: Any) -> int:
    return len(encoded.prompt) + len(encoded.answer)


def _estimate(ready: Prepared) -> float:
    """Seconds of all rows: those of the first sample with the exact cache and one arm, scaled by tokens."""
    arms = ready.all_arms()
    with ExitStack() as stack:
        reads = stack.enter_context(attached(ready.model, ready.experiment.attach))
        caches = {name: fitting_cache(recipe, ready.model, reads) for name, recipe in arms.items()}
        stack.enter_context(one_thread(ready.bundled))
        measures = set(ready.experiment.measures)
        runner = Runner(ready.model, ready.tokenizer, bool(measures & set(ATTENTION)) and reads, "score" in measures)
        stack.enter_context(runner.ready())
        runner.warm_up(copy.deepcopy(caches[EXACT]))
        others = [name for name in arms if name not in (EXACT, AGAIN)]
        first, spent = ready.items[0].encoded, []
        for name in (EXACT, others[-1]):
            start = time.perf_counter()
            runner.run(copy.deepcopy(caches[name]), first)
            spent.append(time.perf_counter() - start)
    scale = sum(_size(item.encoded) for item in ready.items) / _size(first)
    return (spent[0] + spent[1] * (len(arms) - 1)) * scale / ready.experiment.batch


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
