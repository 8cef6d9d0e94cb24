"""Which tokens of a batch are padding."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


class Padding:
    """For each row of a batch, which of the tokens seen are real. Immutable; what is appended shares its buffer.

    A *slot* is a place in the padded text, a *position* counts the real tokens of a row alone.
    """

    def __init__(self, buffer: Bools, length: int, first: int, fill: list[int]) -> None:
        self._buffer, self.length, self.first = buffer, length, first
        self._fill = fill
        """How much of the buffer is taken: only the newest value that shares it may write on."""
        self._end: int | None = None
        self._later: tuple[int, Ints] | None = None

    @classmethod
    def none(cls, batch: int, seen: int) -> Padding:
        """`seen` slots without padding."""
        return cls(np.ones((batch, max(64, seen)), dtype=np.bool_), seen, seen, [seen])

    @property
    def real(self) -> Bools:
        """True where a token is real: `[batch, slots]`. Not to be written to."""
        return self._buffer[:, : self.length]

    @property
    def batch(self) -> int:
        return len(self._buffer)

    def append(self, real: Bools) -> Padding:
        """With the tokens of one more update, `[batch, tokens]`."""
        stop, buffer, fill = self.length + real.shape[1], self._buffer, self._fill
        if fill[0] != self.length or stop > buffer.shape[1]:
            buffer, fill = np.ones((self.batch, stop + stop // 8), dtype=np.bool_), [0]
            buffer[:, : self.length] = self.real
        buffer[:, self.length : stop] = real
        fill[0] = stop
        first = self.first
        if first == self.length:
            padded = np.flatnonzero(~real.all(0))
            first = self.length + int(padded[0]) if len(padded) else stop
        found = Padding(buffer, stop, first, fill)
        if self._end is not None and real.all():
            found._end, found._later = self._end, self._later
        return found

    def before(self, stop: int) -> bool:
        """Whether any slot below `stop` is padding."""
        return self.first < min(stop, self.length)

    def alike(self, other: Padding | None, stop: int) -> bool:
        """Whether the slots below `stop` are the same ones as another's."""
        if other is self:
            return True
        if other is None:
            return not self.before(stop)
        return np.array_equal(self.real[:, :stop], other.real[:, :stop])

    def count(self, start: int, stop: int) -> list[int]:
        """Real tokens of each row in the slots from `start` to `stop`."""
        return [int(n) for n in self.real[:, start:stop].sum(1)]

    def slots(self, row: int, stop: int) -> Ints:
        """The slot of each position of a row, below `stop`."""
        return np.flatnonzero(self.real[row, :stop])

    def slots_of(self, row: int, positions: Ints, stop: int) -> Ints:
        """The slots of some positions of a row, below `stop`; where it is long, only its padded part is looked at."""
        end = min(self._padded_end(), stop)
        before = int(self.real[row, :end].sum())
        if not len(positions) or positions.min() >= before:
            return positions + (end - before)
        padded = self.slots(row, end)
        return np.where(positions < before, padded[np.minimum(positions, before - 1)], positions + (end - before))

    def from_each(self, stop: int) -> Ints:
        """How many slots are padding from each on, below `stop`: `[batch, slots]`, those after the last padding one."""
        end = min(self._padded_end(), stop)
        if self._later is None or self._later[0] != end:
            absent = ~self.real[:, :end]
            counts: Ints = np.zeros((self.batch, end + 1), dtype=np.int64)
            counts[:, :end] = np.cumsum(absent[:, ::-1], axis=1)[:, ::-1]
            self._later = end, counts
        return self._later[1]

    def _padded_end(self) -> int:
        """The first slot after the last one that is padding in some row."""
        if self._end is None:
            padded = np.flatnonzero(~self.real[:, self.first :].all(0))
            self._end = self.first + int(padded[-1]) + 1 if len(padded) else 0
        return self._end

    def crop(self, length: int) -> Padding:
        """Without the slots from `length` on."""
        length = min(self.length, length)
        return Padding(self._buffer, length, min(self.first, length), self._fill)

    def select(self, rows: Ints) -> Padding:
        """The batch rows `rows`, in that order, repeats included."""
        buffer = self.real[rows]
        padded = np.flatnonzero(~buffer.all(0))
        return Padding(buffer, self.length, int(padded[0]) if len(padded) else self.length, [self.length])
