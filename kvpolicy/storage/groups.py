"""Which tokens of a store were coded together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from kvpolicy.errors import CacheError
from kvpolicy.storage.base import Ints
from kvpolicy.storage.clock import Clock
from kvpolicy.storage.pages import Leaving, Pages, planning

__all__ = ["Groups"]

GROUPS_AT_FIRST = 64
"""Groups held before a device is asked which of them are empty."""


class Groups:
    """The group of each token, which is kept as long as a token of it is.

    The tokens of a group stay neighbours, so that a count each tells them apart; where tokens differ by row or head
    they don't, and each has the number of its group.
    """

    def __init__(self) -> None:
        self.sizes: Ints = np.empty(0, dtype=np.int64)
        """Tokens of each group, where groups are neighbours."""
        self.numbers: Pages | None = None
        """The number of the group of each token, where they are not: int32 `[batch, kv_heads or 1, tokens, 1]`."""
        self.row_heads: tuple[int, int] | None = None
        """Rows and heads of the numbers."""
        self._most = GROUPS_AT_FIRST

    def add(self, sizes: Sequence[int], before: int, device: torch.device) -> None:
        """Tokens came in groups of so many each; there are `before` groups by number."""
        if self.numbers is None:
            self.sizes = np.concatenate([self.sizes, np.asarray(sizes, dtype=np.int64)])
        else:
            self._number(np.arange(before, before + len(sizes)), sizes, device)

    def _number(self, groups: Ints, sizes: Sequence[int] | Ints, device: torch.device) -> None:
        assert self.numbers is not None
        assert self.row_heads is not None
        if len(groups) == 1:
            like = torch.empty((*self.row_heads, 0, 1), dtype=torch.int32, device=device)
            for place in self.numbers.room(like, int(sizes[0])):
                place.fill_(int(groups[0]))
            return
        numbers = torch.from_numpy(np.repeat(groups.astype(np.int32), sizes)).to(device, non_blocking=True)
        if len(numbers):
            self.numbers.append(numbers.view(1, 1, -1, 1).expand(*self.row_heads, -1, -1))

    def of(self, index: Ints) -> Ints:
        """The groups of the tokens at `index`, where groups are neighbours."""
        return np.searchsorted(np.cumsum(self.sizes), index, side="right")

    def runs(self, first: int, last: int) -> Iterator[tuple[int, int, int]]:
        """The tokens from `first` to `last`, cut where groups of other lengths begin: the first, the last + 1, groups.

        A group that is cut by an end is one by itself. Of use where groups are neighbours.
        """
        if first == last:
            return
        lowest, highest = (int(self.of(np.asarray(at))) for at in (first, last - 1))
        ends = np.cumsum(self.sizes[: highest + 1])[lowest:]
        cuts = np.concatenate([[first], ends[:-1], [last]])
        lengths = np.diff(cuts)
        starts = np.flatnonzero(np.diff(lengths, prepend=-1))
        for start, end in zip(starts.tolist(), [*starts[1:].tolist(), len(lengths)], strict=True):
            yield int(cuts[start]), int(cuts[end]), end - start

    def drop(self, index: Ints) -> Ints:
        """Remove the tokens at `index`, ascending; returns the groups that are gone with them."""
        sizes = self.sizes - np.bincount(self.of(index), minlength=len(self.sizes))
        self.sizes = sizes[sizes > 0]
        return np.flatnonzero(sizes == 0)

    def remove(self, leaving: Leaving, kept: list[Pages]) -> None:
        """Remove tokens; the last ones move into their places.

        `kept` is what is kept of each group, and goes with groups that are gone.
        """
        assert self.numbers is not None
        self.numbers.remove(leaving)
        self.forget(kept)

    def forget(self, kept: list[Pages]) -> None:
        """Drop what is kept of groups that are gone, where it is time to look for them."""
        assert self.numbers is not None
        self._most = _forget_unused(self.numbers, kept, self._most)

    def slice(self, first: int, last: int) -> Tensor:
        """Of numbers those of the tokens from `first` to `last`: `[batch, kv_heads or 1, tokens]`."""
        assert self.numbers is not None
        return self.numbers.slice(first, last).squeeze(3)

    def gather(self, index: Tensor) -> Tensor:
        """Of numbers those of the tokens at `index`, of its shape."""
        assert self.numbers is not None
        return self.numbers.gather(index).squeeze(3)

    def differ_by_head(self, row_heads: tuple[int, int], device: torch.device | None) -> None:
        """From now on tokens differ by row or head. `device` is theirs, if there are any."""
        self.row_heads, self.numbers = row_heads, Pages(whole=True)
        if device is not None:
            self._number(np.arange(len(self.sizes)), self.sizes, device)
        self.sizes = np.empty(0, dtype=np.int64)

    def select(self, rows: Tensor) -> None:
        """Keep the batch rows `rows`."""
        if self.numbers is not None and self.row_heads is not None:
            self.numbers.select(rows)
            self.row_heads = (len(rows), self.row_heads[1])

    def to(self, device: torch.device) -> None:
        if self.numbers is not None:
            self.numbers.to(device)

    def used(self) -> int:
        """Bytes of what says which token is of which group."""
        return self.sizes.nbytes + (self.numbers.used() if self.numbers is not None else 0)

    def reserved(self) -> int:
        return self.numbers.reserved() if self.numbers is not None else 0

    def tensors(self, sizes: str, numbers: str) -> dict[str, Tensor]:
        """What is held, by these names."""
        if self.numbers is None:
            return {sizes: torch.from_numpy(self.sizes.copy())}
        return {numbers: self.numbers.all().contiguous()} if self.numbers.length else {}

    def restore(self, sizes: Tensor | None, numbers: Tensor | None, tokens: int, groups: int, most: int) -> None:
        """The inverse of `tensors`, into what is empty and knows whether rows or heads differ.

        Raises:
            CacheError: they are not those of so many tokens in so many groups, of `most` tokens each at most.
        """
        if self.numbers is None:
            found: Ints = np.empty(0, dtype=np.int64) if sizes is None else sizes.numpy().copy()
            inside = bool(((found >= 1) & (found <= most)).all())
            if numbers is not None or len(found) != groups or not inside or found.sum() != tokens:
                raise CacheError(
                    f"{tokens} tokens must be in {groups} groups of 1 to {most}, found {found[:8].tolist()}"
                )
            self.sizes = found
            return
        held = 0 if numbers is None else numbers.shape[2]
        inside = numbers is None or not held or 0 <= int(numbers.min()) <= int(numbers.max()) < groups
        if sizes is not None or held != tokens or not inside:
            raise CacheError(f"each of {tokens} tokens must belong to one of {groups} groups")
        if numbers is not None:
            self.numbers.append(numbers)


def _forget_unused(groups: Pages, kept: list[Pages], most: int) -> int:
    """Drop what is kept of groups that no token belongs to any more, and number the others anew.

    A CPU is asked each time which these are. Another device would have to be waited for, so it is asked once there are
    more than `most` groups.

    Args:
        groups: the number of the group of each token, `[batch, kv_heads or 1, tokens, 1]`.
        kept: what is kept of each group, in order.
        most: what the last call returned; `GROUPS_AT_FIRST` for the first.

    Returns:
        Twice as many groups as are left, or `GROUPS_AT_FIRST`.
    """
    count = kept[0].length
    if planning():
        return most
    if not count or (kept[0].pages[0].device.type != "cpu" and groups.length and count <= most):
        return most
    gone = np.arange(count)
    if groups.length:
        used = torch.zeros(count, dtype=torch.bool, device=kept[0].pages[0].device)
        used[groups.all().flatten().long()] = True
        groups.all().copy_((used.cumsum(0, dtype=torch.int32) - 1)[groups.all().long()])
        gone = (~used).nonzero()[:, 0].cpu().numpy()
    if len(gone):  # in another layer others may be empty
        Clock.tick()
    for part in kept:
        part.drop(gone)
    return max(2 * kept[0].length, GROUPS_AT_FIRST)
