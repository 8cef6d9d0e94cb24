"""The same launch again, for the other layers of a step that stand alike: addresses are all that differs."""

from __future__ import annotations

import functools
import math
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kvpolicy.attention.cuda.heads import added
from kvpolicy.attention.cuda.kernel import Arguments, prepared
from kvpolicy.attention.cuda.layout import MAPS
from kvpolicy.attention.cuda.plan import POINTERS, Plan
from kvpolicy.attention.cuda.scratch import counters, partials
from kvpolicy.attention.cuda.spaces import joined, mapped
from kvpolicy.placement.attention_scores import Observer

__all__ = ["Again", "watch"]

QUERY, MAPPED, OUT, LSE, PARTIALS, SCORES, SUMS, SINKS, ZEROS = 0, 1, *range(MAPS + 2, POINTERS)
"""Which addresses of a launch are which; those of pages, indices and new tokens follow."""
AHEAD, LARGEST = 16, 1 << 20
"""Tensors that are made at a time at most, and their bytes."""


class Again:
    """Attention over parts like one that was planned, without a mask: see `Backend.again`.

    One thread uses it, in one step. Arguments are copied as they are launched, so that they have one place.
    """

    def __init__(self, plan: Plan, query: Tensor, slots: list[Tensor], columns: int) -> None:
        """`slots` are the indices of a part that has some, `columns` those of attention weights, 0 for none."""
        batch, heads, queries, _ = query.shape
        self.plan, self.slots, self.columns = plan, slots, columns
        self.indices = [index.data_ptr() for index in slots]
        self.lines = (batch, plan.lines // batch, heads * batch // plan.lines * queries)
        self.device = query.get_device()
        self.kept: list[Tensor] = [query.new_empty((batch, heads, queries), dtype=torch.float32)]
        """Sums that nobody asks for, and what blocks share."""
        self.arguments = Arguments(plan.numbers + bytes(plan.addresses.size) + plan.layout)
        first = len(plan.numbers)
        self.words = memoryview(self.arguments.buffer).cast("B")[first : first + plan.addresses.size].cast("Q")
        """The addresses among the arguments. Those that all layers share are written once."""
        self.words[LSE] = self.kept[0].data_ptr()
        self.behind: struct.Struct | None = None
        """The addresses of pages, indices and new tokens, once it is known how many there are."""
        self.begin = first + 8 * POINTERS
        self.dtype = plan.dtype if plan.spaces == (-1,) else query.dtype
        self.outs: list[Tensor] = []
        """Outputs that are still to be written, of layers to come; likewise scores, and sums."""
        self.found: list[Tensor] = []
        """What is found in each space of values, if there are several, and read before the next layer writes it."""
        self.maps: list[Tensor] = []
        """Likewise queries behind transforms."""
        self.scores: list[Tensor] = []
        self.sums: list[Tensor] = []
        self._share(torch._C._cuda_getCurrentRawStream(self.device), query)

    def __call__(
        self,
        query: Tensor,
        new: tuple[Tensor, Tensor],
        addresses: list[int],
        stores: Mapping[str, Sequence[Any]],
        sinks: Tensor | None,
        observer: Any,
    ) -> Tensor | None:
        keys, values, at = new[0].data_ptr(), new[1].data_ptr(), query.data_ptr()
        if (at | keys | values) % 16:
            return None
        plan, words = self.plan, self.words
        stream = torch._C._cuda_getCurrentRawStream(self.device)
        if stream != self.stream:
            self._share(stream, query)
        out = self.outs.pop() if self.outs else _one_of(self.outs, query, plan.out[-4:], self.dtype)
        words[QUERY] = at
        if self.maps:
            chains = _chains(stores["keys"], plan.maps)
            maps = [mapped(chain, query, self.lines[1], to) for chain, to in zip(chains, self.maps, strict=True)]
            for i, x in enumerate(maps):
                words[MAPPED + i] = x.data_ptr()
        if not self.found:
            words[OUT] = out.data_ptr()
        if sinks is not None:
            sinks = sinks.float().contiguous()
            words[SINKS] = sinks.data_ptr()
        if observer is not None:
            scores = _one_of(self.scores, query, (*self.lines, self.columns), torch.float32)
            sums = _one_of(self.sums, query, (*self.lines, 1), torch.float32)
            words[SCORES], words[SUMS] = scores.data_ptr(), sums.data_ptr()
        behind = self.behind
        if behind is None:
            behind = self.behind = struct.Struct(f"<{len(addresses) + len(self.indices) + 2}Q")
        behind.pack_into(self.arguments.buffer, self.begin, *addresses, *self.indices, keys, values)
        self.launch()
        if observer is not None and not observer.watch_later(scores, sums):
            watch(observer, scores, sums, query.shape[2], new[0].shape[2], query.shape[2] > 1)
        if self.found:
            out = joined(self.found[0], _chains(stores["values"], plan.spaces), self.lines[1], query.dtype, out)
        return out if out.dtype == query.dtype else out.to(query.dtype)

    def _share(self, stream: int, query: Tensor) -> None:
        """Take what the blocks of launches on a stream share."""
        plan, device = self.plan, self.device
        self.stream = stream
        grid = plan.parts, plan.lines, plan.turns
        self.launch = prepared(plan.kernel, self.arguments, grid, device, stream)
        self.outs, self.scores, self.sums = [], [], []  # memory that was made for a stream goes back to it
        self.found = [query.new_empty(plan.out, dtype=plan.dtype)] if plan.spaces != (-1,) else []
        self.maps = [query.new_empty(query.shape, dtype=torch.float16) for _ in plan.maps]
        if plan.partial:
            shared = partials(plan.partial, device), counters(plan.lines * plan.turns, device)
            self.kept[1:] = shared
            self.words[PARTIALS], self.words[ZEROS] = (x.data_ptr() for x in shared)
        if self.found:
            self.words[OUT] = self.found[0].data_ptr()


def _chains(stores: Sequence[Any], views: Sequence[int]) -> list[Any]:
    """The transforms of some of the stores that hold tokens, by their numbers among these; None for -1."""
    if not views or views == (-1,):
        return []
    held = [store for store in stores if store is not None and store.length]
    return [None if view < 0 else held[view].chain for view in views]


def _one_of(made: list[Tensor], like: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor to be written to; if none is left of those that were made, some are made for layers to come."""
    if not made:
        count = max(1, min(AHEAD, LARGEST // max(math.prod(shape) * dtype.itemsize, 1)))
        made += like.new_empty((count, *shape), dtype=dtype).unbind(0)
    return made.pop()


def watch(observer: Any, scores: Tensor, sums: Tensor, queries: int, new: int, hidden: bool) -> None:
    """Tell an observer of the attention weights of the newest of so many new tokens.

    `hidden` says whether some tokens may be hidden from a query.
    """
    kv_heads = scores.shape[1]
    if queries == 1 and not hidden and isinstance(observer, Observer):
        means = observer.by_heads(kv_heads)
        weights = None if means is None else added(scores, sums, means)
        if weights is not None:
            observer.watch_heads(weights)
            return
    shaped = scores.view(*scores.shape[:2], -1, queries, scores.shape[3])
    visible = shaped > -torch.inf if hidden else None
    scores.sub_(sums).exp2_()
    observer.watch(_newest(queries, new), shaped, visible, slice(0, kv_heads), kv_heads)


@functools.lru_cache(maxsize=256)
def _newest(queries: int, tokens: int) -> Tensor:
    """Which of the new tokens the queries are."""
    with torch.inference_mode(False):
        return torch.arange(tokens - queries, tokens)
