"""Arrays of positions that grow by a token at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


class PositionList:
    """An immutable array of positions whose appended successor shares its buffer: O(1) per token."""

    def __init__(self, buffer: Any = None, length: int = 0, fill: list[int] | None = None) -> None:
        self.buffer = np.empty(64, dtype=np.int32) if buffer is None else buffer
        self.length = length
        self.fill = [length] if fill is None else fill

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
            grown = PositionList(buffer, self.length)
        else:
            grown = self
        grown.buffer[self.length : stop] = items
        grown.fill[0] = stop
        return PositionList(grown.buffer, stop, grown.fill)

    def keep(self, mask: NDArray[np.bool_]) -> PositionList:
        """The positions where `mask` is True, in a buffer of their own."""
        kept = self.array[mask]
        return PositionList(kept, len(kept))
