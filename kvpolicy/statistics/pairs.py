"""Rows of an arm beside the baseline's, sample by sample."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvpolicy.errors import CompareError
from kvpolicy.statistics.rows import Evidence, Row
from kvpolicy.words import listed, quoted

Floats = NDArray[np.float64]
Table = Mapping[tuple[str, str], Mapping[str, Row]]
"""Rows by arm and task, then by sample."""

FIRST_CHOICES = ("score", "nll", "kl")
"""What a task is judged by if nobody says: the first of these that it has, else its first metric."""
BOUNDED = re.compile(r"(score|acc|acc_norm|exact_match|f1|top1|em|rouge\w*|pass@\d+|contains)(,.*)?$")
"""Metrics in [0, 1]."""
_LOWER = re.compile(
    r"(^|_)(nll|kl|l1|l2|bits|bytes|seconds|perplexity|ppl|brier|error|errors|loss|wer|ter|mse|mae|latency)(_|,|$)"
    r"|^dropped_mass$"
)


def lower_is_better(metric: str) -> bool:
    """Whether less of a metric is better: divergence, losses, bits, bytes and seconds; all others rise."""
    return bool(_LOWER.search(metric.lower()))


@dataclass(frozen=True)
class Pairs:
    """A metric of an arm and of the baseline on the samples that have both."""

    arm: str
    task: str
    metric: str
    samples: tuple[str, ...]
    ours: Floats
    """Of the arm."""
    theirs: Floats
    """Of the baseline, in the same order."""
    documents: tuple[str, ...]
    """The document of each sample; one of its own for a sample that stands for itself."""
    unpaired: int
    """Samples that only one of the two has."""
    errors: int
    """Samples on which the arm failed."""

    @property
    def differences(self) -> Floats:
        """Arm minus baseline; what only the last digits of a number tell apart is the same."""
        same = np.isclose(self.ours, self.theirs, rtol=1e-9, atol=1e-15)
        return np.where(same, 0.0, self.ours - self.theirs)


def table(evidence: Evidence) -> Table:
    """The rows of an evidence by arm and task, then by sample.

    Raises:
        CompareError: an arm has two rows of one sample, so that nothing says which of them is its pair.
    """
    found: dict[tuple[str, str], dict[str, Row]] = {}
    for row in evidence.rows:
        rows = found.setdefault((row.arm, row.task), {})
        if row.sample in rows:
            raise CompareError(
                f"an arm must have one row for each sample, found two of arm {quoted(row.arm)}, task "
                f"{quoted(row.task)}, sample {quoted(row.sample)}; name the arms apart, or leave one run out"
            )
        rows[row.sample] = row
    return found


def tasks_of(evidence: Evidence) -> tuple[str, ...]:
    """Tasks, planned ones first, in the order in which they appear."""
    return tuple(dict.fromkeys([*evidence.planned, *(row.task for row in evidence.rows)]))


def metrics_of(rows: Iterable[Row]) -> tuple[str, ...]:
    """Names of the metrics that some row has, in the order in which they appear."""
    return tuple(dict.fromkeys(name for row in rows for name in row.metrics))


def judged_by(evidence: Evidence, metric: str | None = None) -> dict[str, str]:
    """The metric that each task is judged by.

    Args:
        evidence: the rows.
        metric: of all tasks; by default `score`, or `nll`, or `kl`, or the first that the task has.

    Returns:
        A metric for each task that has any.

    Raises:
        CompareError: no row has the metric.
    """
    by_task: dict[str, dict[str, None]] = {}
    for row in evidence.rows:
        by_task.setdefault(row.task, {}).update(dict.fromkeys(row.metrics))
    if metric is not None:
        known = metrics_of(evidence.rows)
        if metric not in known:
            raise CompareError(f"metric must be one of {listed(known) or '(there are none)'}, found {quoted(metric)}")
        return {task: metric for task, names in by_task.items() if metric in names}
    return {
        task: next((name for name in FIRST_CHOICES if name in names), next(iter(names)))
        for task, names in by_task.items()
        if names
    }


def pair(rows: Table, arm: str, baseline: str, task: str, metric: str) -> Pairs:
    """A metric of two arms on the samples that both have, in the order of the baseline's."""
    ours, theirs = rows.get((arm, task), {}), rows.get((baseline, task), {})
    both = [s for s in theirs if s in ours and _has(ours[s], metric) and _has(theirs[s], metric)]
    known = {s for s in [*ours, *theirs] if _has(ours.get(s), metric) or _has(theirs.get(s), metric)}
    documents = []
    for number, sample in enumerate(both):
        document = theirs[sample].document or ours[sample].document
        documents.append(f"={document}" if document is not None else f"#{number}")
    return Pairs(
        arm,
        task,
        metric,
        tuple(both),
        np.array([ours[s].metrics[metric] for s in both], dtype=np.float64),
        np.array([theirs[s].metrics[metric] for s in both], dtype=np.float64),
        tuple(documents),
        len(known) - len(both),
        sum(row.error is not None for row in ours.values()),
    )


def values(rows: Table, arm: str, task: str, metric: str) -> Floats:
    """A metric of an arm on all its samples that have it."""
    found = rows.get((arm, task), {}).values()
    return np.array([row.metrics[metric] for row in found if _has(row, metric)], dtype=np.float64)


def _has(row: Row | None, metric: str) -> bool:
    return row is not None and row.error is None and math.isfinite(row.metrics.get(metric, math.nan))
