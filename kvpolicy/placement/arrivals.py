"""From which stores tokens come that enter another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from kvpolicy.placement.moves import NEW, Arrival
from kvpolicy.placement.position_list import PositionList

__all__ = ["arrivals_of"]

Ints = NDArray[np.int64]


def arrivals_of(entering: Ints, runs: Ints | None, above: Sequence[PositionList], start: int) -> Iterator[Arrival]:
    """Split what enters a store, in order, where its source, or its entry of `runs` if there are such, changes."""
    if not len(entering):
        return
    alone = _neighbours(entering, runs, above, start)
    if alone is not None:
        yield alone
        return
    runs = np.zeros(len(entering), dtype=np.int64) if runs is None else runs
    source = np.full(len(entering), NEW, dtype=np.int64)
    index = entering - start
    old = entering < start
    if old.any():
        for s, store in enumerate(above):
            array = store.array
            order = np.argsort(array, kind="stable")
            at = np.minimum(np.searchsorted(array, entering, sorter=order), max(len(array) - 1, 0))
            if len(array):
                here = old & (array[order[at]] == entering)
                source[here], index[here] = s, order[at][here]
    cuts = np.flatnonzero((np.diff(source) != 0) | (np.diff(runs) != 0)) + 1
    for part, indices, run, positions in zip(
        *(np.split(x, cuts) for x in (source, index, runs, entering)), strict=True
    ):
        first, last = int(indices[0]), int(indices[-1]) + 1
        together = last - first == len(indices) and bool((np.diff(indices) == 1).all())
        span = (first, last) if together else None
        yield Arrival((int(part[0]),), indices, positions=positions, span=span, run=int(run[0]))


def _neighbours(entering: Ints, runs: Ints | None, above: Sequence[PositionList], start: int) -> Arrival | None:
    """What enters a store, if that is one stretch of the text that comes from one stretch of it, as in most steps."""
    n, first = len(entering), int(entering[0])
    if int(entering[-1]) - first != n - 1 or (n > 1 and (np.diff(entering) != 1).any()):
        return None
    run = 0 if runs is None else int(runs[0])
    if runs is not None and (runs != run).any():
        return None
    source, begin = NEW, start
    if first < start:
        holds = (
            (s, int(order.buffer[0]))
            for s, order in enumerate(above)
            if order.contiguous and order.length and 0 <= first - int(order.buffer[0]) <= order.length - n
        )
        source, begin = next(holds, (NEW, start))
        if source == NEW:
            return None
    at = first - begin
    return Arrival((source,), entering - begin, positions=entering, span=(at, at + n), run=run)
