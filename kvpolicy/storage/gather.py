"""Tokens of tensors, taken and put by places that differ by row and head."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvpolicy.storage.front import widest_view

BY_ROWS = 1 << 10
"""Numbers that a CPU gathers one by one; it copies more as rows."""
_shared: ContextVar[dict[Any, Tensor] | None] = ContextVar("kvpolicy_shared_indices", default=None)


@contextmanager
def sharing_indices() -> Iterator[None]:
    """Meanwhile an index comes to a device once, for all layers that move by it."""
    before = _shared.set({})
    try:
        yield
    finally:
        _shared.reset(before)


def on_device(index: NDArray[np.int64], device: torch.device) -> Tensor:
    """An index on a device; to be read."""
    known = None if device.type == "cpu" else _shared.get()
    if known is None:
        return torch.from_numpy(index).to(device, non_blocking=True)
    key = index.tobytes(), device
    if key not in known:
        known[key] = torch.from_numpy(index).to(device, non_blocking=True)
    return known[key]


def gather_tokens(x: Tensor, index: Tensor) -> Tensor:
    """Of `x`, `[batch, kv_heads, tokens, width]`, the tokens at `index`, `[batch or 1, kv_heads or 1, tokens]`."""
    if not _one_by_one(x, index) or not _viewable(x):  # rows of a CPU are those of what lies in one piece
        x = x.contiguous()
    return gathered(widest_view(x), index).view(x.dtype)


def others(index: NDArray[np.int64], n: int) -> NDArray[np.int64]:
    """The numbers below `n` that are not in an index of such."""
    return np.flatnonzero(np.bincount(index, minlength=n) == 0)


def _viewable(x: Tensor) -> bool:
    """Whether tokens can be read as wider integers where they lie."""
    size = 8 // min(x.element_size(), 8)
    steps = (*x.stride()[:3], x.storage_offset(), x.shape[3])
    return x.stride(3) == 1 and not any(step % size for step in steps)


def gathered(x: Tensor, index: Tensor) -> Tensor:
    """The same of a tensor of any numbers, as it lies."""
    if x.shape[1] < index.shape[1]:  # kept once for all heads
        x = x.expand(-1, index.shape[1], -1, -1)
    if _one_by_one(x, index):
        return x.gather(2, index.long().unsqueeze(3).expand(*x.shape[:2], -1, x.shape[3]))
    return x.flatten(0, 2).index_select(0, _flat(index, x)).view(*x.shape[:2], -1, x.shape[3])


def put(x: Tensor, index: Tensor, tokens: Tensor) -> None:
    """Write tokens into the places at `index`."""
    if _one_by_one(x, index):
        x.scatter_(2, index.unsqueeze(3).expand_as(tokens), tokens)
    else:
        x.flatten(0, 2).index_copy_(0, _flat(index, x), tokens.flatten(0, 2))


def _one_by_one(x: Tensor, index: Tensor) -> bool:
    """Whether numbers are to be copied one by one, which takes fewer calls."""
    return x.device.type != "cpu" or x.shape[3] <= 2 or index.shape[2] * x.shape[3] <= BY_ROWS


def _flat(index: Tensor, like: Tensor) -> Tensor:
    """`index` among the tokens of all rows and heads."""
    batch, heads, tokens = like.shape[:3]
    first = torch.arange(batch * heads, device=index.device).view(batch, heads, 1) * tokens
    return (first + index).flatten()


def gather_all(tensors: Sequence[Tensor], index: Tensor) -> Tensor:
    """`gather_tokens` of several tensors that differ in tokens at most.

    Args:
        tensors: `[batch, kv_heads, tokens, width]` each.
        index: `[tensors, batch or 1, kv_heads or 1, tokens]`.

    Returns:
        `[tensors, batch, kv_heads, tokens, width]`.
    """
    x = tensors[0]
    if not _one_by_one(x, index[0]) or not all(map(_viewable, tensors)):
        return torch.stack([gather_tokens(x, own) for x, own in zip(tensors, index.unbind(0), strict=True)])
    words = [widest_view(x) for x in tensors]
    heads = max(x.shape[1], index.shape[2])
    places = index.long().unsqueeze(4).expand(-1, len(x), heads, -1, words[0].shape[3])
    out = words[0].new_empty(places.shape)
    for own, at, to in zip(words, places.unbind(0), out.unbind(0), strict=True):
        torch.gather(own if own.shape[1] == heads else own.expand(-1, heads, -1, -1), 2, at, out=to)
    return out.view(x.dtype)


def filled(x: Tensor, empty: Tensor) -> Tensor:
    """`x` with the nearest token before, or else after, in place of empty ones: these widen no group's range."""
    places = torch.arange(x.shape[2], device=x.device)
    before = torch.where(empty, -1, places).cummax(2).values
    after = torch.where(empty, x.shape[2], places).flip(2).cummin(2).values.flip(2)
    nearest = torch.where(before >= 0, before, after)
    return gather_tokens(x, nearest.clamp(max=x.shape[2] - 1))


def survivors(index: Tensor, kept: int) -> Tensor:
    """Which of the tokens from `kept` on are not in `index` and move to its first places; others fill up the rest."""
    n = index.shape[2]
    if n == 1:
        return torch.full_like(index, kept, dtype=torch.int64)
    leaves = torch.zeros((*index.shape[:2], n + 1), dtype=torch.int8, device=index.device)
    leaves.scatter_(2, torch.where(index >= kept, index - kept, n).long(), 1)
    return leaves[:, :, :n].argsort(dim=2, stable=True) + kept
