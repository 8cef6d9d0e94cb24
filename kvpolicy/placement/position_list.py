"""Arrays of positions that grow by a token at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


class PositionList:
    """An immutable array of positions whose appended successor shares its buffer: O(1) per token."""

    def __init__(
        self, buffer: Any = None, length: int = 0, fill: list[int] | None = None, contiguous: bool | None = None
    ) -> None:
        self.buffer = np.empty(64, dtype=np.int32) if buffer is None else buffer
        self.length = length
        self.fill = [length] if fill is None else fill
        self.contiguous = _contiguous(self.array) if contiguous is None else contiguous
        """Whether each position is the one after the one before."""

    @property
    def array(self) -> NDArray[np.int32]:
        """The positions; not to be written to."""
        return self.buffer[: self.length]

    def append(self, items: Ints) -> PositionList:
        if not len(items):
            return self
        stop = self.length + len(items)
        if self.fill[0] != self.length or stop > len(self.buffer):
            buffer = np.empty(max(64, stop + stop // 8), dtype=np.int32)
            buffer[: self.length] = self.array
            grown = PositionList(buffer, self.length, None, self.contiguous)
        else:
            grown = self
        grown.buffer[self.length : stop] = items
        grown.fill[0] = stop
        follows = self.contiguous and (not self.length or int(items[0]) == int(self.buffer[self.length - 1]) + 1)
        return PositionList(grown.buffer, stop, grown.fill, follows and _contiguous(items))

    def places(self, items: Ints) -> Ints:
        """Where those of some positions that are here stand, ascending."""
        if len(items) != 1 or not self.contiguous or not self.length:
            return np.flatnonzero(np.isin(self.array, items))
        at = items - int(self.buffer[0])
        return at if 0 <= at[0] < self.length else at[:0]

    def without(self, places: Ints) -> PositionList:
        """All but those at some places, ascending."""
        n = len(places)
        if not n:
            return self
        if places[-1] == n - 1:  # the first ones
            kept = self.array[n:].copy()
            return PositionList(kept, len(kept), None, self.contiguous or None)
        mask = np.ones(self.length, dtype=np.bool_)
        mask[places] = False
        return self.keep(mask)

    def keep(self, mask: NDArray[np.bool_]) -> PositionList:
        """The positions where `mask` is True, in a buffer of their own."""
        kept = self.array[mask]
        return PositionList(kept, len(kept))


def _contiguous(positions: NDArray[Any]) -> bool:
    return len(positions) < 2 or bool((positions[1:] - positions[:-1] == 1).all())
