"""Attention straight from the stores: keys and values are read where they lie, packed codes plane by plane.

Softmax(QK^T)V does not depend on the order of the tokens, so nothing is sorted back. Scores of all stores stand side
by side as columns, in float32; each store then adds its share of the output.
"""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvpolicy.attention.mask import as_mask, mask_scores
from kvpolicy.attention.products import add_values, key_scores
from kvpolicy.placement.moves import ColumnMap

if TYPE_CHECKING:
    from kvpolicy.layer.layer import LayerCache
    from kvpolicy.placement.attention_scores import Observer

SCORES = 1 << 24
"""Scores computed at a time; more queries than fit take another turn over the stores."""
ALL = ColumnMap([], [], 0, False, lambda: torch.empty(0, dtype=torch.int64))
"""ColumnMap where all tokens are new ones, in order."""
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
    batch, heads, queries, dim = query.shape
    keys, values = new
    kv_heads = keys.shape[1]
    grouped = query.float().mul(dim**-0.5 if scaling is None else scaling).unflatten(1, (kv_heads, -1))
    groups = grouped.shape[2]
    columns = tiers.columns()
    held = columns.width
    width = held + keys.shape[2]
    mask = as_mask(mask, tiers.committed + keys.shape[2], kv_heads)
    out = query.new_empty((batch, queries, heads, values.shape[3]))
    step = max(1, SCORES // (batch * heads * width))
    for first in range(0, queries, step):
        last = min(first + step, queries)
        rows = grouped[:, :, :, first:last].flatten(2, 3)
        shape = (batch, kv_heads, rows.shape[2], width)
        scores = rows.new_zeros(shape) if columns.gaps else rows.new_empty(shape)
        for store, where in zip(tiers.stores["keys"], columns.keys, strict=True):
            if store is not None and store.length:
                key_scores(store, rows, scores, where)
        scores[..., held:] = rows @ keys.float().transpose(2, 3)
        shaped = scores.unflatten(2, (groups, last - first))
        if softcap is not None:
            scores.div_(softcap).tanh_().mul_(softcap)
        at = torch.arange(first, last)
        mask_scores(shaped, mask, at, columns, queries, keys.shape[2])
        visible = shaped > -torch.inf if observer is not None else None
        total = exponentials(shaped, sinks)
        result = scores[..., held:] @ values.float()
        for store, where in zip(tiers.stores["values"], columns.values, strict=True):
            if store is not None and store.length:
                add_values(store, scores, result, where)
        result = result.unflatten(2, (groups, last - first)).div_(total)
        out[:, first:last] = result.flatten(1, 2).transpose(1, 2)
        if observer is not None:
            observer.watch(at + keys.shape[2] - queries, shaped.div_(total), visible, slice(0, kv_heads), kv_heads)
    return out


def observe(
    query: Tensor,
    keys: Tensor,
    observer: Observer,
    mask: Tensor | None = None,
    scaling: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> None:
    """Tell an observer what the queries of a first update attend to, a few at a time: `attend` without values.

    Arguments as in `attend`; `keys` are all there are. Only queries that count for a policy are computed.
    """
    batch, heads, queries, dim = query.shape
    kv_heads, tokens = keys.shape[1:3]
    groups = heads // kv_heads
    scale = dim**-0.5 if scaling is None else scaling
    mask = as_mask(mask, tokens, kv_heads)
    most = OBSERVED if query.device.type == "cpu" else SCORES
    counted = torch.tensor(observer.queries, dtype=torch.int64).split(max(1, most // (batch * groups * tokens)))
    for head, at in product(range(kv_heads), counted if observer.queries else ()):
        stop = tokens if mask is not None else int(at[-1]) + 1 + tokens - queries
        rows = query[:, head * groups : (head + 1) * groups, at.to(query.device)].float().mul(scale).flatten(1, 2)
        scores = rows.new_empty((batch, 1, groups, len(at), stop))
        for first in range(0, stop, KEYS):
            part = keys[:, head, first : min(first + KEYS, stop)].float().transpose(1, 2)
            scores[..., first : first + KEYS] = (rows @ part).view(batch, 1, groups, len(at), -1)
        if softcap is not None:
            scores.div_(softcap).tanh_().mul_(softcap)
        own = slice(head, head + 1)
        shown = mask if mask is None or mask.shape[1] == 1 else mask[:, own]
        mask_scores(scores, shown, at, ALL, queries, stop)
        visible = scores > -torch.inf
        total = exponentials(scores, None if sinks is None else sinks[head * groups : (head + 1) * groups])
        observer.watch(at + tokens - queries, scores.div_(total), visible, own, kv_heads)


def exponentials(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """Replace scores by their exponentials; returns what divides them: `[batch, kv_heads, groups, queries, 1]`."""
    largest = scores.amax(-1, keepdim=True)
    if sinks is not None:
        sinks = sinks.float().view(1, *scores.shape[1:3], 1, 1)
        largest = torch.maximum(largest, sinks)
    largest.masked_fill_(largest == -torch.inf, 0.0)
    total = scores.sub_(largest).exp_().sum(-1, keepdim=True)
    if sinks is not None:
        total += (sinks - largest).exp_()
    return total.masked_fill_(total == 0, 1.0)
