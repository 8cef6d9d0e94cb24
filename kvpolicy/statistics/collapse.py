"""Outputs that have collapsed: they repeat themselves, have another length, or part from the baseline's at once."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

from kvpolicy.statistics.pairs import Table, table, tasks_of
from kvpolicy.statistics.rows import Evidence

REPEATED = 0.5
"""Share of repeated 4-grams (seq-rep-4 of Welleck et al., 2019) from which an output repeats itself."""
LENGTHS = 3.0
"""An output this many times longer or shorter than the baseline's has another length."""
AT_ONCE = 8
"""Characters within which outputs part at once."""
SHARE = 0.2
"""Share of samples from which a sign is one of collapse."""
_GRAM = 4
_LONG = 64
_READ = 2_000


@dataclass(frozen=True)
class Collapse:
    """Signs of collapse of an arm on a task; each counts samples that the baseline does not show it on."""

    arm: str
    task: str
    n: int
    """Samples with outputs of both arms."""
    repeats: int
    """Outputs that repeat themselves, where the baseline's does not."""
    lengths: int
    """Outputs that are empty, or 3 times longer or shorter than the baseline's."""
    at_once: int
    """Outputs that part from the baseline's within 8 characters."""
    signs: tuple[str, ...]
    """Those that are shown on more samples than chance explains: `repetition`, `length`, `divergence at once`."""

    @property
    def collapsed(self) -> bool:
        """Whether outputs repeat themselves or have another length; to part at once alone is no collapse."""
        return "repetition" in self.signs or "length" in self.signs


def collapses(evidence: Evidence, baseline: str | None = None) -> tuple[Collapse, ...]:
    """Signs of collapse by arm and task, where outputs are known."""
    return tuple(_found(table(evidence), evidence, evidence.baseline if baseline is None else baseline))


def repetition(text: str) -> float:
    """Share of repeated 4-grams of words in the last 2,000 characters; of characters where they are not words."""
    text = text[-_READ:]  # loops begin late and end never
    words = re.findall(r"\w+|[^\w\s]", text)
    units = words if len(words) >= 2 * _GRAM else list(text) if len(text) >= _LONG else []
    grams = [tuple(units[i : i + _GRAM]) for i in range(len(units) - _GRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if len(grams) > _GRAM else 0.0


def parting(one: str, other: str) -> int | None:
    """The first character at which two texts differ; None if they are the same."""
    if one == other:
        return None
    # Halving compares slices, which is fast for long texts.
    same, end = 0, min(len(one), len(other))
    while same < end:
        middle = (same + end + 1) // 2
        same, end = (middle, end) if one[same:middle] == other[same:middle] else (same, middle - 1)
    return same


def _found(rows: Table, evidence: Evidence, baseline: str) -> Iterator[Collapse]:
    arms = dict.fromkeys([*evidence.arms, *(row.arm for row in evidence.rows)])
    for arm in arms:
        for task in tasks_of(evidence) if arm != baseline else ():
            ours, theirs = rows.get((arm, task), {}), rows.get((baseline, task), {})
            texts = [
                (ours[s].output or "", theirs[s].output or "")
                for s in theirs
                if s in ours and ours[s].output is not None and theirs[s].output is not None
            ]
            if texts:
                yield _count(arm, task, texts)


def _count(arm: str, task: str, texts: list[tuple[str, str]]) -> Collapse:
    shown = [(repetition(a) >= REPEATED, repetition(b) >= REPEATED) for a, b in texts]
    repeats, back = sum(a and not b for a, b in shown), sum(b and not a for a, b in shown)
    lengths = sum(_another_length(a, b) for a, b in texts)
    at_once = sum(a[:AT_ONCE] != b[:AT_ONCE] for a, b in texts)
    counted = {"repetition": (repeats, back), "length": (lengths, 0), "divergence at once": (at_once, 0)}
    signs = tuple(name for name, (shown, other) in counted.items() if _more(shown, other, len(texts)))
    return Collapse(arm, task, len(texts), repeats, lengths, at_once, signs)


def _another_length(ours: str, theirs: str) -> bool:
    a, b = len(ours.strip()), len(theirs.strip())
    if not a or not b:
        return bool(a or b)
    # A short answer is easily 3 times another one's length.
    return max(a, b) > _LONG / 2 and abs(math.log(a / b)) >= math.log(LENGTHS)


def _more(shown: int, other: int, n: int) -> bool:
    """Whether a sign is common, and by McNemar's exact test more common than in the baseline."""
    from statsmodels.stats.contingency_tables import mcnemar

    if shown < SHARE * n or shown <= other:
        return False
    return bool(mcnemar([[0, shown], [other, 0]], exact=True).pvalue < 0.05)
