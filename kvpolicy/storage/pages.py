"""Tensors that grow and shrink along the token axis without being copied."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvpolicy.storage.clock import Clock
from kvpolicy.storage.front import Front, widest_view
from kvpolicy.storage.gather import gather_tokens, gathered, on_device, others, put, survivors

Ints = NDArray[np.int64]

SMALLEST, LARGEST = 64, 1024
"""Tokens of a page with room for more."""
FULL = 4096
"""Tokens of a page that is filled at once."""
FEWER = 16
"""How many times as large both are on other devices than a CPU, where each page costs a launch of every kernel."""


_planned: ContextVar[str | None] = ContextVar("planned", default=None)
"""The type of the device for which a cache is planned that holds no numbers."""


@contextmanager
def planned_for(device: str) -> Iterator[None]:
    """Within it pages are as large as on a type of device (`cpu`, `cuda`), and no group is forgotten.

    For plans: which groups are empty is known to caches with numbers alone.
    """
    token = _planned.set(device)
    try:
        yield
    finally:
        _planned.reset(token)


class Leaving(NamedTuple):
    """Tokens that leave by row and head; the last ones move into their places."""

    places: Tensor
    """Which leave, `[batch or 1, kv_heads or 1, tokens]`, ascending in each head."""
    last: Tensor
    """Which move into these places, in order."""

    @classmethod
    def of(cls, index: Tensor | Leaving, length: int) -> Leaving:
        """The tokens at `index` leave what holds `length`."""
        return index if isinstance(index, Leaving) else cls(index, survivors(index, length - index.shape[2]))


class Pages:
    """A tensor `[batch, kv_heads, tokens, width]` in pages of 64 to 4,096 tokens (on a CPU).

    Growth allocates a page and copies nothing but a few tokens: up to 1,024 are kept in one page, which is copied as it
    grows. Tokens that leave from the front or the back free whole pages.
    With `whole` there is one page, copied as it grows, whose tokens may be taken and removed head by head. Rows and
    heads of different length may then have their first tokens in a `Front`; what comes after it stands in the page.
    """

    def __init__(self, whole: bool = False) -> None:
        self.whole = whole
        self.front: Front | None = None
        self.pages: list[Tensor] = []
        self.start = 0
        self.length = 0
        self._lies: tuple[tuple[int, ...], list[int]] | None = None
        """The tokens of each page, and addresses, until pages change."""
        Clock.tick()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_lies": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> Pages:
        copied = Pages(self.whole)
        # Outside inference mode, so that the copy can be continued anywhere.
        with torch.inference_mode(False):
            copied.pages, copied.front = [page.clone() for page in self.pages], copy.deepcopy(self.front)
        copied.start, copied.length = self.start, self.length
        return copied

    def _changed(self) -> None:
        self._lies = None
        Clock.tick()

    @property
    def capacity(self) -> int:
        return sum(page.shape[2] for page in self.pages)

    @property
    def _before(self) -> int:
        """Tokens before the first page."""
        return self.front.length if self.front is not None else 0

    @property
    def marks(self) -> tuple[tuple[int, ...], list[int]]:
        """Where its tokens lie, for what reads memory itself: start, length, the tokens of a `Front` and of each page;
        the addresses of a `Front` and its bounds, and of each page. Not to be written to."""
        if self._lies is None:
            front = [] if self.front is None else [self.front.flat, self.front.bounds]
            sizes = tuple([page.shape[2] for page in self.pages])
            self._lies = sizes, [x.data_ptr() for x in (*front, *self.pages)]
        sizes, addresses = self._lies
        before = 0 if self.front is None else self.front.length
        return (self.start, self.length, before, *sizes), addresses

    def append(self, x: Tensor) -> None:
        done = 0
        for place in self.room(x, x.shape[2]):
            n = place.shape[2]
            place.copy_(x if n == x.shape[2] else x[:, :, done : done + n])
            done += n

    def room(self, like: Tensor, tokens: int) -> list[Tensor]:
        """Let so many tokens like those of a tensor in; returns where they are to be written, in order."""
        Clock.note()
        found: list[Tensor] = []
        held, left = self.length - self._before, tokens
        sizes = [page.shape[2] for page in self.pages] if self._lies is None else self._lies[0]
        free = sum(sizes) - self.start - held
        if 0 < tokens <= free:
            self.length += tokens
            return [self.pages[-1].narrow(2, sizes[-1] - free, tokens)]
        if free < tokens and (self.whole or (held + tokens <= LARGEST and self.pages)):
            self._regrow(like, held + tokens)
            free = self.capacity - held
        while left:
            if free == 0:
                most = at_once(like)
                size = max(min(most * LARGEST // FULL, max(SMALLEST, self.length // 4)), min(most, left))
                # An inference tensor could not be written to once inference mode is left.
                self._changed()
                with torch.inference_mode(False):
                    shape = (*like.shape[:2], size, like.shape[3])
                    self.pages.append(torch.empty(shape, dtype=like.dtype, device=like.device))
                free = size
            n = min(free, left)
            page = self.pages[-1]
            at = page.shape[2] - free
            found.append(page.narrow(2, at, n))
            self.length += n
            left, free = left - n, free - n
        return found

    def _regrow(self, like: Tensor, tokens: int) -> None:
        self._changed()
        with torch.inference_mode(False):
            more = max(tokens // 8, 8) if self.whole else max(tokens // 4, SMALLEST)
            shape = (*like.shape[:2], tokens + more, like.shape[3])
            page = torch.empty(shape, dtype=like.dtype, device=like.device)
        for offset, block in self._in_pages():
            page[:, :, offset : offset + block.shape[2]] = block
        self.pages, self.start = [page], 0

    def join(self) -> None:
        """From now on one page."""
        self.whole = True
        if self.pages:
            self._regrow(self.pages[0], self.length - self._before)

    def flatten(self, places: Tensor, counts: Ints) -> None:
        """Of a `whole` tensor keep the tokens at `places`, each row and head as many as `counts` says: in a `Front`.

        Shapes as of `Front.of`. `places` has as many as the row and head that keeps most.
        """
        self._changed()
        if not places.shape[2]:
            self.lift()
            self._truncate(0)
        if not self.length:
            return
        like, x = self.pages[0], self.pages[0] if self.front is None else self.all()
        self.front, self.pages = Front.of(x, places, counts), []
        self.length = self.front.length
        self._regrow(like, 0)

    def lift(self) -> None:
        """Take tokens out of the `Front`: places that are empty are there again."""
        if self.front is not None:
            x = self.all()
            self._changed()
            self.front, self.pages, self.length = None, [], 0
            self.append(x)

    @classmethod
    def stacked(cls, parts: Sequence[Pages]) -> Pages:
        """The rows of several `whole` tensors of one length, one after the other, copied."""
        out = cls(whole=True)
        if parts[0].length:
            like = parts[0].all()
            with torch.inference_mode(False):
                rows = sum([part.all().shape[0] for part in parts])
                shape = rows, like.shape[1], like.shape[2] + max(like.shape[2] // 8, 8), like.shape[3]
                page = torch.empty(shape, dtype=like.dtype, device=like.device)
            torch.cat([part.all() for part in parts], out=page[:, :, : like.shape[2]])
            out.pages, out.length = [page], like.shape[2]
        return out

    def rows(self, first: int, last: int) -> Pages:
        """Some rows of a `whole` tensor, where they lie; to be read."""
        out = object.__new__(Pages)
        out.__dict__.update(self.__dict__)
        out.pages, out.front, out._lies = [page[first:last] for page in self.pages], None, None
        return out

    def all(self) -> Tensor:
        """A view of all tokens of a `whole` tensor that is not empty; a copy, where some are in a `Front`."""
        return self.pages[0][:, :, : self.length] if self.front is None else self.slice(0, self.length)

    def gather(self, index: Tensor) -> Tensor:
        """Of a `whole` tensor the tokens at `index`, `[batch or 1, kv_heads or 1, tokens]`, copied."""
        if self.front is None:
            return gather_tokens(self.pages[0], index)
        index = index.expand(*self.front.counts.shape, -1)
        found, before = self.front.gather(index), self.front.length
        if self.length > before:
            x = gather_tokens(self.pages[0], (index - before).clamp(0, self.length - before - 1))
            found = torch.where((index >= before).unsqueeze(3), widest_view(x), widest_view(found)).view(found.dtype)
        return found

    def remove(self, leaving: Leaving | Tensor) -> None:
        """Of a `whole` tensor remove tokens: those at an index `[batch or 1, kv_heads or 1, tokens]`, ascending.

        The last tokens move into the places that become free.
        """
        self.lift()
        leaving = Leaving.of(leaving, self.length)
        kept = self.length - leaving.places.shape[2]
        if kept:
            words = widest_view(self.pages[0])
            put(words, leaving.places, gathered(words, leaving.last))
        self.shorten(kept)

    def shorten(self, kept: int) -> None:
        """Of a `whole` tensor keep the first tokens."""
        self._truncate(kept)
        if self.pages and self.pages[0].shape[2] > 4 * max(kept, SMALLEST):
            self._regrow(self.pages[0], kept)

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        """Views of all tokens in order, with the index of the first of each. Those of a `Front` are copies."""
        before = self._before
        if self.front is not None:
            for first in range(0, before, self.front.block):
                yield first, self.front.slice(first, min(first + self.front.block, before))
        for offset, block in self._in_pages():
            yield before + offset, block

    def _in_pages(self) -> Iterator[tuple[int, Tensor]]:
        """Views of the tokens in pages."""
        offset, start, held = 0, self.start, self.length - self._before
        for page in self.pages:
            n = min(page.shape[2] - start, held - offset)
            if n > 0:
                yield offset, page if n == page.shape[2] else page[:, :, start : start + n]
                offset += n
            start = 0

    def slice(self, begin: int, end: int) -> Tensor:
        """Tokens `begin` to `end`: a view where they lie in one page."""
        if len(self.pages) == 1 and self.front is None and begin < end <= self.length:
            return self.pages[0].narrow(2, self.start + begin, end - begin)
        parts, before = [], self._before
        if self.front is not None and begin < before:
            parts.append(self.front.slice(begin, min(end, before)))
        for offset, block in self._in_pages():
            offset += before
            lo, hi = max(begin - offset, 0), min(end - offset, block.shape[2])
            if lo < hi:
                parts.append(block if hi - lo == block.shape[2] else block[:, :, lo:hi])
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)

    def take(self, index: Ints) -> Tensor:
        """The tokens at `index` (ascending, distinct), copied."""
        lowest, highest = int(index[0]), int(index[-1])
        window = self.slice(lowest, highest + 1)
        if highest - lowest + 1 == len(index):
            return window.clone()
        at = on_device(index - lowest, window.device)
        return widest_view(window).index_select(2, at).view(window.dtype)

    def scatter_between(self, index: Tensor, n: int) -> Tensor:
        """A tensor of `n` tokens whose token `index[i]` is token i of this; the others are undefined."""
        page = self.pages[0]
        out = page.new_empty((*page.shape[:2], n, page.shape[3]))
        words = widest_view(out)
        for offset, block in self.blocks():
            words.index_copy_(2, index[offset : offset + block.shape[2]], widest_view(block))
        return out

    def drop(self, index: Ints) -> None:
        """Remove the tokens at `index` (ascending, distinct)."""
        if not (n := len(index)):
            return
        self.lift()
        first, last = int(index[0]), int(index[-1])
        if first == self.length - n:
            self._truncate(first)
            return
        if last == n - 1 and not self.whole:
            self.start += n
            self._truncate(self.length - n)
            return
        if last + 1 - n <= self.length - 1 - last and not self.whole:  # which begins with its page
            self._close_from_front(index, last)
            return
        kept = self.take(first + others(index - first, self.length - first))
        self._truncate(first)
        self.append(kept)

    def _close_from_front(self, index: Ints, last: int) -> None:
        """Remove the tokens at `index` by moving those before the last of them back."""
        x = self.take(others(index, last + 1))
        self.start += len(index)
        self._truncate(self.length - len(index))
        for offset, block in self.blocks():
            n = min(block.shape[2], x.shape[2] - offset)
            if n <= 0:
                break
            block[:, :, :n] = x[:, :, offset : offset + n]

    def _truncate(self, length: int) -> None:
        self.length, before = length, len(self.pages)
        Clock.note()
        if not length:
            self.pages, self.start = [], 0
        elif before == 1 and self.start < self.pages[0].shape[2]:
            return
        while self.pages and self.start >= self.pages[0].shape[2]:
            self.start -= self.pages.pop(0).shape[2]
        while len(self.pages) > 1 and self.capacity - self.pages[-1].shape[2] >= self.start + length:
            self.pages.pop()
        if len(self.pages) < before:
            self._changed()

    def select(self, rows: Tensor) -> None:
        """Keep the batch rows `rows`, in that order, repeats included."""
        self._changed()
        self.front = self.front.select(rows) if self.front is not None else None
        with torch.inference_mode(False):
            self.pages = [
                widest_view(p).index_select(0, rows.to(p.device, non_blocking=True)).view(p.dtype) for p in self.pages
            ]

    def to(self, device: torch.device) -> None:
        self._changed()
        self.front = self.front.to(device) if self.front is not None else None
        self.pages = [page.to(device, non_blocking=True) for page in self.pages]

    def used(self) -> int:
        """Bytes of the tokens held."""
        return (0 if self.front is None else self.front.flat.nbytes) + sum(x.nbytes for _, x in self._in_pages())

    def bounds(self) -> int:
        """Bytes of what says where each row and head begins in a `Front`."""
        return self.front.bounds.nbytes if self.front is not None else 0

    def reserved(self) -> int:
        """Bytes of all pages, and of a `Front`."""
        own = self.front.flat.nbytes + self.bounds() if self.front is not None else 0
        return own + sum(page.nbytes for page in self.pages)


def planning() -> bool:
    """Whether a cache is planned that holds no numbers."""
    return _planned.get() is not None


def at_once(like: Tensor) -> int:
    """Tokens of the largest page on a device."""
    return FULL if (_planned.get() or like.device.type) == "cpu" else FULL * FEWER


def spots(pages: Sequence[Pages], n: int, width: int) -> tuple[int, list[int]]:
    """Let `n` tokens of so many bytes into each of the first pages where they fit into the last page as it is.

    Returns the tokens of such a page, the same in all, and in each that got its own the address of the first of them.
    """
    size, addresses = 0, []
    for own in pages:
        if own._lies is None or own.front is not None or not own.pages:
            break
        sizes, lie = own._lies
        last, at = sizes[-1], own.start + own.length - (sum(sizes[:-1]) if len(sizes) > 1 else 0)
        if at < 0 or at + n > last or last != (size or last):
            break
        size = last
        own.length += n
        addresses.append(lie[-1] + at * width)
    Clock.note()
    return size, addresses
