"""What comes to another tier by position in a step, row by row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvpolicy.placement.padding import Padding
from kvpolicy.placement.planner import State

Ints = NDArray[np.int64]


class Moved(NamedTuple):
    """The tokens of a row that come to another tier, ascending: those held before, then the new ones."""

    slots: Ints
    into: Ints
    """The tier of each, `ranked` where position says no more."""
    old: int
    """How many were held before."""

    @classmethod
    def of(cls, ranked: int, before: State, after: State) -> Moved:
        """As two placements by position of a row say that follow each other; slots are positions."""
        gone = [_gone(a, b) for a, b in zip(before.tiers[:ranked], after.tiers, strict=False)]
        old = gone[0] if len(gone) == 1 else np.sort(np.concatenate(gone)) if gone else np.empty(0, dtype=np.int64)
        positions = np.concatenate([old, np.arange(before.seen, after.seen, dtype=np.int64)])
        into = np.full(len(positions), ranked, dtype=np.int64)
        for tier, held in enumerate(after.tiers[:ranked]):
            if len(held):
                at = np.minimum(held.searchsorted(positions), len(held) - 1)
                into[held[at] == positions] = tier
        return cls(positions, into, len(old))


def _gone(before: Ints, after: Ints) -> Ints:
    """The positions of a tier that it no longer holds; both ascend."""
    first = int(before.searchsorted(after[0])) if len(after) else len(before)
    left = before[first:]
    if len(left) <= len(after) and np.array_equal(left, after[: len(left)]):  # the oldest went
        return before[:first]
    return np.setdiff1d(before, after, assume_unique=True)


def moved_by_row(
    ranked: int, before: Sequence[State], after: Sequence[State], padding: Padding | None, seen: int
) -> list[Moved]:
    """Of each row; `padding` where slots are not positions, `seen` slots in all."""
    made: dict[tuple[int, int], Moved] = {}
    pairs = [*zip(before, after, strict=True)]
    for pair in pairs:
        key = id(pair[0]), id(pair[1])
        if key not in made:
            made[key] = Moved.of(ranked, *pair)
    found = [made[id(a), id(b)] for a, b in pairs]
    if padding is None:
        return found
    return [own._replace(slots=padding.slots_of(row, own.slots, seen)) for row, own in enumerate(found)]


def old_moves(rows: Sequence[Moved]) -> tuple[Ints, Ints]:
    """Slots held before, and their tiers: `[rows, 1, moved]`; where fewer moved, slots that there are none of."""
    most = max(own.old for own in rows)
    slots = np.full((len(rows), 1, most), np.iinfo(np.int32).max, dtype=np.int64)
    tiers = np.zeros_like(slots)
    for r, own in enumerate(rows):
        slots[r, 0, : own.old], tiers[r, 0, : own.old] = own.slots[: own.old], own.into[: own.old]
    return slots, tiers


def tiers_of_slots(rows: Sequence[Moved], n: int, seen: int) -> Ints:
    """The tier of each of the `n` newest of `seen` slots, 0 of padding: `[rows, 1, n]`."""
    tiers = np.zeros((len(rows), 1, n), dtype=np.int64)
    for r, own in enumerate(rows):
        tiers[r, 0, own.slots[own.old :] - (seen - n)] = own.into[own.old :]
    return tiers


def each_of(make: Callable[..., State], rows: Sequence[State], *more: Sequence[Any]) -> tuple[State, ...]:
    """A state for each of `rows`; rows that were one value, and are told the same, stay one."""
    made: dict[tuple[Any, ...], State] = {}
    keys = [(id(row), *told) for row, *told in zip(rows, *more, strict=True)]
    for row, key in zip(rows, keys, strict=True):
        if key not in made:
            made[key] = make(row, *key[1:])
    return tuple(made[key] for key in keys)
