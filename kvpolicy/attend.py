"""Attention straight from the stores: keys and values are read where they lie, packed codes plane by plane.

Softmax(QK^T)V does not depend on the order of the tokens, so nothing is sorted back. Scores of all stores stand side
by side as columns, in float32; each store then adds its share of the output.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvpolicy.errors import CacheError
from kvpolicy.products import add_values, key_scores

if TYPE_CHECKING:
    from kvpolicy.layer import Tiers

__all__ = ["attend"]

SCORES = 1 << 24
"""Scores computed at a time; more queries than fit take another turn over the stores."""


def attend(
    tiers: Tiers,
    query: Tensor,
    new: tuple[Tensor, Tensor],
    mask: Tensor | None = None,
    scaling: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention of queries over what a layer holds and the tokens that are just coming in.

    Args:
        tiers: the layer, its pending tokens settled.
        query: `[batch, heads, queries, head_dim]`, the newest `queries` of the new tokens.
        new: keys and values `[batch, kv_heads, tokens, head_dim]` of the new tokens, not yet in the layer.
        mask: boolean (True attends) or additive, `[batch or 1, heads or 1, queries, tokens seen]`, or boolean
            `[batch, tokens seen]`, its columns being positions in the context. None: causal.
        scaling: factor of the products; by default 1 / sqrt(head_dim).
        softcap: scores become `softcap * tanh(scores / softcap)`.
        sinks: a score per head that takes part in the softmax and adds nothing: `[heads]`.

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
    key_columns, value_columns, positions = tiers.placement.columns(tiers.state)
    held, seen = len(positions), tiers.state.seen
    width = held + keys.shape[2]
    mask = _gathered(mask, positions, seen, keys.shape[2], query.device)
    out = query.new_empty((batch, queries, heads, values.shape[3]))
    step = max(1, SCORES // (batch * heads * width))
    for first in range(0, queries, step):
        last = min(first + step, queries)
        rows = grouped[:, :, :, first:last].flatten(2, 3)
        scores = rows.new_empty((batch, kv_heads, rows.shape[2], width))
        for store, columns in zip(tiers.stores["keys"], key_columns, strict=True):
            if store is not None and store.length:
                key_scores(store, rows, scores, columns)
        scores[..., held:] = rows @ keys.float().transpose(2, 3)
        shaped = scores.unflatten(2, (groups, last - first))
        if softcap is not None:
            scores.div_(softcap).tanh_().mul_(softcap)
        _mask(shaped, mask, first, last, queries, keys.shape[2])
        total = _exponentials(shaped, sinks)
        result = scores[..., held:] @ values.float()
        for store, columns in zip(tiers.stores["values"], value_columns, strict=True):
            if store is not None and store.length:
                add_values(store, scores, result, columns)
        result = result.unflatten(2, (groups, last - first)).div_(total)
        out[:, first:last] = result.flatten(1, 2).transpose(1, 2)
    return out


def _gathered(mask: Tensor | None, positions: Tensor, seen: int, new: int, device: torch.device) -> Tensor | None:
    """The mask's columns in the order of the scores'."""
    if mask is None:
        return None
    if mask.shape[-1] != seen + new:
        raise CacheError(
            f"the attention mask must have a column for each of the {seen + new} tokens seen, found {mask.shape[-1]}; "
            "give generate a mask of the whole text so far, or none"
        )
    columns = torch.cat([positions, torch.arange(seen, seen + new)]).to(device)
    return mask.index_select(-1, columns)


def _mask(scores: Tensor, mask: Tensor | None, first: int, last: int, queries: int, new: int) -> None:
    """Mask scores `[batch, kv_heads, groups, queries, columns]` of the queries `first` to `last`, in place."""
    if mask is None or mask.ndim == 2:
        if queries > 1:
            query = torch.arange(first, last, device=scores.device)[:, None] + (new - queries)
            later = torch.arange(new, device=scores.device) > query
            scores[..., -new:].masked_fill_(later, -torch.inf)
        if mask is None:
            return
        part = mask[:, None, None, None].bool()
    else:
        part = mask[:, :, first:last]
        part = part.unsqueeze(2) if part.shape[1] == 1 else part.unflatten(1, scores.shape[1:3])
    if part.dtype == torch.bool:
        scores.masked_fill_(~part, -torch.inf)
    else:
        scores.add_(part)


def _exponentials(scores: Tensor, sinks: Tensor | None) -> Tensor:
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
