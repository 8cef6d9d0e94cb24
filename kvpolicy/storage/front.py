"""Tokens of rows and KV heads that hold different numbers of them, flat."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Ints = NDArray[np.int64]


class Front:
    """The first tokens of a tensor `[batch, kv_heads, tokens, width]`, one row and head after the other.

    Each has its own number of tokens. Shorter ones come first, so that a reader who takes as many of each as the
    longest has stays within the memory.
    """

    def __init__(self, flat: Tensor, counts: Ints, length: int) -> None:
        """Tokens `[total, width]` in the order of `order_of(counts)`, `[batch, kv_heads]` being their numbers."""
        self.flat, self.counts = flat, counts
        self.length = length
        """Places of each row and head: the tokens of the one that holds most, or held most before rows were chosen."""
        starts = np.empty(counts.size, dtype=np.int32)
        order = order_of(counts)
        starts[order] = np.cumsum(counts.flat[order]) - counts.flat[order]
        bounds = torch.from_numpy(np.stack([starts, counts.ravel().astype(np.int32)]))
        with torch.inference_mode(False):
            self.bounds = bounds.to(flat.device, non_blocking=True)
        """Where each row and head begins, and how many tokens it has: int32 `[2, batch x kv_heads]`."""

    @classmethod
    def of(cls, x: Tensor, places: Tensor, counts: Ints) -> Front:
        """The tokens of `x`, `[batch, kv_heads, tokens, width]`, at `places`.

        Args:
            x: the tokens.
            places: which are taken, in order, `[batch or 1, kv_heads or 1, tokens]`.
            counts: how many of these, `[batch or 1, kv_heads or 1]`.
        """
        counts = np.ascontiguousarray(np.broadcast_to(counts, x.shape[:2]))
        order = order_of(counts)
        many = counts.flat[order]
        line = np.repeat(order, many)
        rank = np.arange(len(line)) - np.repeat(np.cumsum(many) - many, many)
        own = torch.from_numpy(np.stack([line, rank])).to(x.device, non_blocking=True)
        places = places.expand(*x.shape[:2], -1).flatten(0, 1)
        index = own[0] * x.shape[2] + places[own[0], own[1]]
        with torch.inference_mode(False):
            # Outside inference mode, so that others may write to it.
            flat = widest_view(x.contiguous()).flatten(0, 2).index_select(0, index).view(x.dtype)
        return cls(flat, counts, places.shape[1])

    def __deepcopy__(self, memo: dict[int, Any]) -> Front:
        with torch.inference_mode(False):
            return Front(self.flat.clone(), self.counts, self.length)

    @property
    def block(self) -> int:
        """Tokens of each row and head that are laid side by side at a time."""
        most = AT_ONCE if self.flat.device.type == "cpu" else ELSEWHERE
        return max(64, most // self.counts.size)

    def slice(self, begin: int, end: int) -> Tensor:
        """The tokens from `begin` to `end`, `[batch, kv_heads, tokens, width]`, copied.

        A row and head that has fewer shows its last one in their places, zeros if it has none.
        """
        return self._gathered(torch.arange(begin, end, dtype=torch.int32, device=self.flat.device))

    def gather(self, index: Tensor) -> Tensor:
        """The tokens at `index`, `[batch, kv_heads, tokens]`."""
        return self._gathered(index.flatten(0, 1).int())

    def _gathered(self, places: Tensor) -> Tensor:
        if not len(self.flat):
            return self.flat.new_zeros((*self.counts.shape, places.shape[-1], self.flat.shape[1]))
        starts, counts = self.bounds.unsqueeze(2)
        index = torch.minimum(places, counts - 1).clamp_(min=0).add_(starts)
        words = widest_view(self.flat)
        found = words.index_select(0, index.flatten()).view(*self.counts.shape, index.shape[1], -1)
        if not self.counts.all():
            found.masked_fill_((counts == 0).view(*self.counts.shape, 1, 1), 0)
        return found.view(self.flat.dtype)

    def select(self, rows: Tensor) -> Front:
        """The batch rows `rows`, in that order, repeats included."""
        counts = self.counts[rows.cpu().numpy()]
        order = order_of(counts)
        many = counts.flat[order]
        rank = np.arange(many.sum()) - np.repeat(np.cumsum(many) - many, many)
        own = torch.from_numpy(np.stack([np.repeat(order, many), rank])).to(self.flat.device, non_blocking=True)
        starts = self.bounds[0].view(self.counts.shape).index_select(0, rows.to(self.flat.device, non_blocking=True))
        with torch.inference_mode(False):
            index = starts.flatten()[own[0]] + own[1]
            return Front(widest_view(self.flat).index_select(0, index).view(self.flat.dtype), counts, self.length)

    def to(self, device: torch.device) -> Front:
        return Front(self.flat.to(device, non_blocking=True), self.counts, self.length)


AT_ONCE = 1 << 14
"""Tokens of all rows and heads that a CPU lays side by side at a time."""
ELSEWHERE = 1 << 18


def order_of(counts: Ints) -> Ints:
    """The order in which rows and heads stand that hold so many tokens: shorter ones first."""
    return np.argsort(counts, axis=None, kind="stable")


def widest_view(x: Tensor) -> Tensor:
    """`x` as the widest integers that fit its last dimension: fewer elements to copy, and bytes whatever their type.

    Not all types (float8, for one) can be copied by index as what they are.
    """
    size, item = x.shape[-1] * x.element_size(), x.element_size()
    for dtype in (torch.int64, torch.int32, torch.int16, torch.uint8):
        if size and size % dtype.itemsize == 0 and min(item, 8) <= dtype.itemsize:
            return x.view(dtype)
    return x
