"""Attention straight from the stores: keys and values are read where they lie."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvpolicy.attention.backend import asked, assigned, computed, merged, observed, others
from kvpolicy.attention.mask import Queries, as_mask
from kvpolicy.attention.reading import read
from kvpolicy.attention.reference import REFERENCE, SCORES, only_new, weights
from kvpolicy.attention.steady import asked_of, computed_first, known_of
from kvpolicy.interfaces.backend import AttentionOptions, Backend, Part, StoreView
from kvpolicy.layer.layer import LayerCache
from kvpolicy.placement.attention_scores import Observer

OBSERVED = 1 << 19
"""Scores of a prompt computed at a time on a CPU for policies that ask for them, ..."""
KEYS = 2048
"""... and keys of a head converted at a time."""


def attend(
    tiers: LayerCache,
    query: Tensor,
    new: tuple[Tensor, Tensor],
    mask: Tensor | None = None,
    scaling: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    observer: Observer | None = None,
) -> Tensor:
    """Attention of queries over what a layer holds and the tokens that are just coming in.

    Args:
        tiers: the layer, its pending tokens committed.
        query: `[batch, heads, queries, head_dim]`, the newest `queries` of the new tokens.
        new: keys and values `[batch, kv_heads, tokens, head_dim]` of the new tokens, not yet in the layer.
        mask: boolean (True attends) or additive, `[batch or 1, heads or 1, queries, tokens seen]`, or boolean
            `[batch, tokens seen]`, its columns being positions in the context. None: causal.
        scaling: factor of the products; by default 1 / sqrt(head_dim).
        softcap: scores become `softcap * tanh(scores / softcap)`.
        sinks: a score per head that takes part in the softmax and adds nothing: `[heads]`.
        observer: is told of the attention weights.

    Returns:
        `[batch, queries, heads, head_dim of values]` in the type of `query`. Rows that may attend nothing are zero.

    Raises:
        CacheError: the mask has another number of columns.
    """
    observer = observer if observer is not None and observer.queries else None  # some of these queries count
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    asked = out = None
    if mask is None:
        asked = asked_of(tiers, query, new, scale, softcap, sinks is None, observer and observer.room)
        out = _again(tiers, asked, query, new, sinks, observer)
    if out is not None:
        return out
    shown = as_mask(mask, tiers.committed + new[0].shape[2], new[0].shape[1])
    pages = read(tiers, query, shown, scale, softcap) if tiers.page_table is not None else None
    options = AttentionOptions(scale, softcap, sinks, observer, alone=pages is None)
    part = whole(tiers, new) if pages is None else above(tiers, new)
    pieces = assigned(query, part, shown, options, tiers.step.by_head)
    tiers.backends = tuple(dict.fromkeys(backend.kind for backend, _ in pieces))
    alone = len(pieces) == 1 and pages is None
    if alone and pieces[0][0] is REFERENCE:
        return _as_asked(REFERENCE.output(query, pieces[0][1], shown, options), query)
    out = computed_first(tiers, asked, *pieces[0], query, options) if alone and asked else None
    if out is not None:
        return out
    found = _computed(query, pieces, shown, options if alone else AttentionOptions(scale, softcap, sinks))
    return _as_asked(merged(found if pages is None else [pages, *found])[0], query)


def _again(
    tiers: LayerCache,
    asked: tuple[Any, ...],
    query: Tensor,
    new: tuple[Tensor, Tensor],
    sinks: Tensor | None,
    observer: Observer | None,
) -> Tensor | None:
    """What attention gives, if a layer before it stood alike and was asked the same."""
    known = known_of(tiers, asked)
    if known is None or tiers.stood is None:
        return None
    tiers.backends = known.backends
    out: Tensor | None = known.again(query, new, tiers.stood.addresses, tiers.stores, sinks, observer)
    return out


def _computed(
    query: Tensor, pieces: list[tuple[Backend, Part]], mask: Tensor | None, options: AttentionOptions
) -> list[tuple[Tensor, Tensor]]:
    """What backends give for their pieces, sinks being with the first."""
    asked = [options, *[replace(options, sinks=None)] * (len(pieces) - 1)]
    return [computed(backend, query, part, mask, own) for (backend, part), own in zip(pieces, asked, strict=True)]


def _as_asked(out: Tensor, query: Tensor) -> Tensor:
    out = out.transpose(1, 2)
    return out if out.dtype == query.dtype else out.to(query.dtype)


def whole(tiers: LayerCache, new: tuple[Tensor, Tensor]) -> Part:
    """All that a layer holds, and the tokens that are coming in."""
    columns = tiers.columns()
    sides, held = [], []
    for side, where in (("keys", columns.keys), ("values", columns.values)):
        known = columns.stretches.get(side) or [None] * len(where)
        stores = list(zip(tiers.stores[side], where, known, strict=True))
        held.append(tuple([i for i, (s, *_) in enumerate(stores) if s is not None and s.length]))
        sides.append(tuple([StoreView(*stores[i]) for i in held[-1]]))
    heads, dim = new[1].shape[1], new[1].shape[3]
    part = Part(sides[0], sides[1], columns.width, columns.gaps, columns.positions, heads, dim, new)
    slots = columns.slots
    if slots is None:
        return part
    return replace(part, slots=lambda: tuple([slots()[i] for i in held[0]]), numbers=held[1])


def above(tiers: LayerCache, new: tuple[Tensor, Tensor]) -> Part:
    """What a layer holds above its last tier, whose columns are the last, and the tokens that are coming in."""
    every = whole(tiers, new)
    last = tiers.stores["keys"][-1]
    width = every.width - (0 if last is None else last.length)
    keys, values = (tuple([v for v in side if v.columns != width]) for side in (every.keys, every.values))
    return replace(
        every, keys=keys, values=values, width=width, slots=None, positions=lambda: every.positions()[..., :width]
    )


def observe(
    query: Tensor,
    keys: Tensor,
    observer: Observer,
    mask: Tensor | None = None,
    scaling: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    lse: Tensor | None = None,
) -> None:
    """Tell an observer what the queries of a first update attend to, a few at a time: `attend` without values.

    Arguments as in `attend`; `keys` are all there are. Only queries that count for a policy are computed. `lse` is what
    `AttentionOptions` says.
    """
    batch, heads, queries, dim = query.shape
    kv_heads, tokens = keys.shape[1:3]
    groups = heads // kv_heads
    scale = dim**-0.5 if scaling is None else scaling
    shaped = as_mask(mask, tokens, kv_heads)
    options = AttentionOptions(scale, softcap, sinks, observer, lse=lse)
    if asked(query.device.type) and any(observed(backend, query, keys, mask, options) for backend in others()):
        return
    mask = shaped
    most = OBSERVED if query.device.type == "cpu" else SCORES
    offset = tokens - queries  # the observer counts tokens
    wanted = torch.tensor([token - offset for token in observer.queries if token >= offset], dtype=torch.int64)
    counted = wanted.split(max(1, most // (batch * groups * tokens)))
    for head, at in product(range(kv_heads), counted if len(wanted) else ()):
        stop = tokens if mask is not None else int(at[-1]) + 1 + offset
        own = slice(head * groups, (head + 1) * groups)
        rows = query[:, own, at.to(query.device, non_blocking=True)].float().mul(scale).flatten(1, 2)
        scores = rows.new_empty((batch, 1, rows.shape[1], stop))
        for first in range(0, stop, KEYS):
            part = keys[:, head, first : min(first + KEYS, stop)].float().transpose(1, 2)
            scores[:, 0, :, first : first + KEYS] = rows @ part
        shown = mask if mask is None or mask.shape[1] == 1 else mask[:, head : head + 1]
        told = _OfHead(observer, head, kv_heads)
        options = AttentionOptions(scale, softcap, None if sinks is None else sinks[own], told)
        new = keys[:, head : head + 1, :stop]
        weights(scores, only_new(new), shown, options, Queries(at, queries, offset))


class _OfHead(NamedTuple):
    """Tells an observer of one KV head's attention."""

    observer: Observer
    head: int
    kv_heads: int

    def watch(self, at: Tensor, weights: Tensor, visible: Tensor | None, heads: slice, of: int) -> None:
        self.observer.watch(at, weights, visible, slice(self.head, self.head + 1), self.kv_heads)
