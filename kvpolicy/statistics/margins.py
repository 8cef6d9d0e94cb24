"""Differences that don't matter: by metric, and of a task its own."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from kvpolicy.errors import CompareError
from kvpolicy.statistics.pairs import BOUNDED, metrics_of, tasks_of
from kvpolicy.statistics.rows import Evidence
from kvpolicy.words import in_words, listed, quoted, suggest

__all__ = ["TASKS", "Given", "Margins", "margins_of", "merged", "span"]

Given = Mapping[str, Any] | float | None
"""What callers give: a number for all metrics; or numbers by metric, and those of tasks under `tasks`."""
TASKS = "tasks"
"""The key under which tasks have margins of their own."""
POINT = 0.01
"""The margin of metrics in [0, 1] if nobody declares one: a point of a hundred."""


@dataclass(frozen=True)
class Margins:
    """The margin of each metric, and those of tasks that have their own."""

    by_metric: Mapping[str, float]
    by_task: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def of(self, metric: str, task: str | None = None) -> float | None:
        """The margin of a metric on a task; None for the task: of the mean over tasks, which is the metric's own."""
        own = self.by_task.get(task, {}) if task is not None else {}
        return own.get(metric, self.by_metric.get(metric))


def margins_of(given: Given, evidence: Evidence, metrics: Iterable[str]) -> Margins:
    """The margins that verdicts are reached by.

    Args:
        given: by the caller; None: those of the evidence's settings.
        evidence: the rows, which say whether scores are of 1 or of 100.
        metrics: those that tasks are judged by.

    Raises:
        CompareError: a margin is no number above 0; or the caller's is of a task or a metric that no row has.
    """
    metrics = list(metrics)
    own = evidence.settings.get("margins") if given is None else given
    if own is not None and not isinstance(own, Mapping):
        own = dict.fromkeys(metrics, own)
    own = dict(own or {})
    tasks = own.pop(TASKS, None) or {}
    if not isinstance(tasks, Mapping) or not all(isinstance(inner, Mapping) for inner in tasks.values()):
        raise CompareError(f"margins of tasks must be numbers by metric, by task, found {in_words(tasks)}")
    if given is not None:
        _check_known(own, tasks, evidence)
    found = {
        name: POINT * scale for name in metrics if BOUNDED.match(name) and (scale := _scale(evidence, name)) is not None
    }
    return Margins(found | _numbers(own), {str(task): _numbers(inner, task) for task, inner in tasks.items()})


def _numbers(given: Mapping[Any, Any], task: Any = None) -> dict[str, float]:
    for name, value in given.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not (math.isfinite(value) and value > 0):
            where = quoted(str(name)) if task is None else f"{quoted(str(name))} of task {quoted(str(task))}"
            raise CompareError(f"a margin must be a number above 0, found {in_words(value)} for {where}")
    return {str(name): float(value) for name, value in given.items()}


def _check_known(own: Mapping[Any, Any], tasks: Mapping[Any, Any], evidence: Evidence) -> None:
    known = metrics_of(evidence.rows)
    for what, names, among in (
        ("a task", tasks, tasks_of(evidence)),
        ("a metric", dict.fromkeys([*own, *(name for inner in tasks.values() for name in inner)]), known),
    ):
        unknown = next((str(name) for name in names if name not in among), None)
        if among and unknown is not None:
            hint = suggest(unknown, among)
            raise CompareError(f"a margin must be of {what} among {listed(among)}, found {quoted(unknown)}{hint}")


def _scale(evidence: Evidence, metric: str) -> float | None:
    """The largest score: 1, or 100 where they are points of a hundred; None where neither can be."""
    known = [row.metrics[metric] for row in evidence.rows if metric in row.metrics]
    return span(min(known, default=0.0), max(known, default=0.0))


def span(least: float, most: float) -> float | None:
    """The largest value of a bounded metric of which these are the ends: 1, or points of a hundred; None: neither."""
    if not 0 <= least <= most <= 100:
        return None
    return 1.0 if most <= 1 else 100.0 if most > 2 else None


def merged(runs: Iterable[Evidence]) -> dict[str, Any]:
    """The margins of several runs: by metric those of the first that has any; each task keeps those it was run with."""
    found: dict[str, Any] = {}
    own: dict[str, dict[str, float]] = {}
    for run in runs:
        given = run.settings.get("margins")
        if not isinstance(given, Mapping) or not given:
            continue
        of_all = {name: value for name, value in given.items() if name != TASKS}
        found = found or of_all
        for task in tasks_of(run):
            mine = {**of_all, **(given.get(TASKS) or {}).get(task, {})}
            own.setdefault(task, {name: value for name, value in mine.items() if found.get(name) != value})
    own = {task: mine for task, mine in own.items() if mine}
    return {**found, TASKS: own} if own else found
