"""Which tokens of a batch are padding."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["Padding"]

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


class Padding:
    """For each row of a batch, which of the tokens seen are real; one object for all layers of a cache.

    A *slot* is a place in the padded text, a *position* counts the real tokens of a row alone.
    """

    def __init__(self, batch: int, seen: int) -> None:
        self._buffer = np.ones((batch, max(64, seen)), dtype=np.bool_)
        self.length = seen
        self._ages: Ints | None = None
        self.first = seen
        """The first slot that is padding in some row, or `length`."""

    @property
    def real(self) -> Bools:
        """True where a token is real: `[batch, slots]`."""
        return self._buffer[:, : self.length]

    @property
    def batch(self) -> int:
        return len(self._buffer)

    def append(self, real: Bools) -> None:
        """Add the tokens of an update, `[batch, tokens]`."""
        stop = self.length + real.shape[1]
        if stop > self._buffer.shape[1]:
            grown = np.ones((self.batch, stop + stop // 8), dtype=np.bool_)
            grown[:, : self.length] = self.real
            self._buffer = grown
        self._buffer[:, self.length : stop] = real
        if self.first == self.length:
            padded = np.flatnonzero(~real.all(0))
            self.first = self.length + int(padded[0]) if len(padded) else stop
        self.length, self._ages = stop, None

    def before(self, stop: int) -> bool:
        """Whether any slot below `stop` is padding."""
        return self.first < min(stop, self.length)

    def count(self, start: int, stop: int) -> list[int]:
        """Real tokens of each row in the slots from `start` to `stop`."""
        return [int(n) for n in self.real[:, start:stop].sum(1)]

    def slots(self, row: int, stop: int) -> Ints:
        """The slot of each position of a row, below `stop`."""
        return np.flatnonzero(self.real[row, :stop])

    def ages(self, stop: int) -> Ints:
        """How many real tokens of a row stand in each slot and after it, below `stop`: `[batch, slots]`."""
        if self._ages is None or self._ages.shape[1] != stop:  # all layers ask for the same
            from_end: Ints = np.cumsum(self.real[:, :stop][:, ::-1], axis=1, dtype=np.int64)
            self._ages = np.ascontiguousarray(from_end[:, ::-1])
        return self._ages

    def crop(self, length: int) -> None:
        self.length, self._ages = min(self.length, length), None
        self.first = min(self.first, self.length)

    def select(self, rows: Ints) -> None:
        """Keep the batch rows `rows`, in that order, repeats included."""
        self._buffer, self._ages = self._buffer[rows], None
        padded = np.flatnonzero(~self.real.all(0))
        self.first = int(padded[0]) if len(padded) else self.length
