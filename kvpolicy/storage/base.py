"""Where keys or values lie: what all stores have in common.

All stores keep tokens in order of arrival; shapes are `[batch, kv_heads, tokens, head_dim]`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvpolicy.errors import CacheError
from kvpolicy.storage.front import Front
from kvpolicy.storage.gather import on_device
from kvpolicy.storage.pages import Leaving, Pages

Ints = NDArray[np.int64]
LARGE = 1 << 40
"""More tokens than any store holds."""
BLOCK = 256
"""Tokens decoded at a time where they must be scattered: small enough to stay in cache."""


class Store(ABC):
    """Keys or values of the tiers that share a storage format, in order of arrival."""

    parts: dict[str, Pages]

    @property
    @abstractmethod
    def format(self) -> str:
        """What is kept, in words that backends of attention look at: `exact`, `affine`, `affine+levels` and so on.

        It ends in `+flat` where rows and heads lie one after the other.
        """

    @property
    def by_position(self) -> bool:
        """Whether `append` must be given positions."""
        return False

    @property
    def front(self) -> Front | None:
        """The tokens of rows and heads of different length, if they lie one row and head after the other."""
        return next((part.front for part in self.parts.values() if part.front is not None), None)

    @property
    def tokens(self) -> int:
        """Tokens held, by row and head; rounded up, the mean where each takes no more room than its own."""
        front = self.front
        return self.length if front is None else self.length - front.length + -(-len(front.flat) // front.counts.size)

    @property
    def waiting(self) -> int | None:
        """Tokens that wait for their group to be full; None where tokens are coded each for itself."""
        return None

    @property
    @abstractmethod
    def length(self) -> int:
        """Tokens held."""

    @abstractmethod
    def append(
        self, x: Tensor, empty: Tensor | None = None, positions: Tensor | None = None, full: bool = False
    ) -> None:
        """Encode and keep `x`; it is one arrival.

        Args:
            x: the tokens.
            empty: of a store per channel, which of the tokens that wait for their group, and then of `x`, are none:
                `[batch, kv_heads or 1, tokens]`.
            positions: the position of each token in its row's text, `[tokens]` or `[batch, kv_heads or 1, tokens]`; of
                use to stores that are `by_position`.
            full: whether it is known that every row and head has each of the tokens.
        """

    @abstractmethod
    def drop(self, index: Ints) -> None:
        """Remove the tokens at `index` (ascending)."""

    @abstractmethod
    def decoded(self, block: int, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
        """All tokens in order, decoded some `block` at a time, each with the index of its first token."""

    @abstractmethod
    def bytes(self) -> dict[str, int]:
        """Bytes used, by what they hold: codes, scales, zeros, exact, indices, state, extras."""

    def take(self, index: Ints, dtype: torch.dtype) -> Tensor:
        """The tokens at `index` (ascending), decoded."""
        parts = []
        for offset, x in self.decoded(LARGE, dtype):
            lo, hi = np.searchsorted(index, [offset, offset + x.shape[2]])
            if lo < hi:
                parts.append(x.index_select(2, on_device(index[lo:hi] - offset, x.device)))
        return torch.cat(parts, dim=2)

    def write(self, out: Tensor, start: int) -> None:
        """Decode all tokens into `out[:, :, start:start + length]`."""
        for offset, x in self.decoded(LARGE, out.dtype):
            out[:, :, start + offset : start + offset + x.shape[2]] = x

    def scatter(self, out: Tensor, index: Tensor) -> None:
        """Decode token i into `out[:, :, index[i]]`."""
        for offset, x in self.decoded(BLOCK, out.dtype):
            out.index_copy_(2, index[offset : offset + x.shape[2]], x.to(out.dtype))

    def scatter_by_head(self, out: Tensor, index: Tensor) -> None:
        """Decode token i of each row and head into `out[:, :, index[..., i]]`; one of a negative index nowhere.

        Args:
            out: `[batch, kv_heads, tokens, head_dim]`.
            index: `[batch, kv_heads or 1, tokens of the store]`.
        """
        if not out.shape[2]:
            return
        index = index.expand(*out.shape[:2], -1)
        for offset, x in self.decoded(LARGE, out.dtype):
            at = index[:, :, offset : offset + x.shape[2], None]
            # The last of `out` takes what belongs nowhere, and is put back.
            last = out[:, :, -1:].clone()
            here = torch.where(at < 0, out.shape[2] - 1, at).expand(-1, -1, -1, out.shape[3])
            out.scatter_(2, here, x.to(out.dtype))
            own = at == out.shape[2] - 1
            chosen = torch.where(own, x.to(out.dtype), 0).sum(2, keepdim=True)
            out[:, :, -1:] = torch.where(own.any(2, keepdim=True), chosen, last)

    def scatter_between(self, out: Tensor, index: Tensor) -> None:
        """Like `scatter`, but may write anything into the places of `out` that `index` leaves out."""
        self.scatter(out, index)

    def differ_by_head(self, row_heads: tuple[int, int]) -> None:
        """From now on tokens differ by row or head, and are taken and removed by `gather` and `remove`.

        Args:
            row_heads: rows and heads of what these are given, `[batch, kv_heads or 1, tokens]`.
        """
        for part in self.parts.values():
            part.join()

    @abstractmethod
    def gather(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        """The tokens at `index`, `[batch, kv_heads or 1, tokens]`, decoded."""

    def remove(self, leaving: Leaving | Tensor, empty: Tensor | None = None) -> None:
        """Remove tokens, or those at an index that ascends in each head; the last ones move into their places.

        `empty` as in `append`.
        """
        leaving = Leaving.of(leaving, self.length)
        for part in self.parts.values():
            part.remove(leaving)

    def flatten(self, places: Tensor, counts: Ints) -> None:
        """Keep the tokens at some places, each row and head as many as it has, and no room for more.

        Args:
            places: which are kept, in order, as many as the row and head that has most: `[batch, kv_heads or 1,
                tokens]`.
            counts: how many of these, `[batch or 1, kv_heads or 1]`.
        """
        for part in self.parts.values():
            part.flatten(places, counts)

    def select(self, rows: Tensor) -> None:
        for part in self.parts.values():
            part.select(rows)

    def to(self, device: torch.device) -> None:
        for part in self.parts.values():
            part.to(device)

    def reserved(self) -> int:
        return sum(part.reserved() for part in self.parts.values())

    def tensors(self) -> dict[str, Tensor]:
        """All that is held, by name, for saving."""
        return {name: p.slice(0, p.length).contiguous() for name, p in self.parts.items() if p.length}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of `tensors`, into an empty store."""
        for name, tensor in tensors.items():
            if name not in self.parts or tensor.ndim != 4:
                raise CacheError(f"a saved store must hold 4-D tensors named {list(self.parts)}, found {name}")
            self.parts[name].append(tensor)
