"""Attention over the pages that a reader chooses, gathered from their stores."""

from __future__ import annotations

import torch
from torch import Tensor

from kvpolicy.attention.products import as_float
from kvpolicy.attention.reference import exponentials
from kvpolicy.layer.layer import LayerCache


def read(
    tiers: LayerCache, query: Tensor, mask: Tensor | None, scaling: float, softcap: float | None
) -> tuple[Tensor, Tensor] | None:
    """Attention of a decode step over the last tier, as a backend gives it; None where all of it is to be read.

    Args:
        tiers: the layer, its pending tokens committed.
        query: `[batch, heads, 1, head_dim]`.
        mask: as backends get it.
        scaling: factor of the products.
        softcap: as of `attend`.
    """
    pages = tiers.pages()
    if pages is None or query.shape[2] != 1:
        return None
    keys, values = tiers.stores["keys"][-1], tiers.stores["values"][-1]
    if keys is None or values is None or not keys.length:
        return None
    batch, heads, _, dim = query.shape
    kv_heads = tiers.like["keys"].shape[1]
    rows = as_float(query).reshape(batch, kv_heads, -1, dim)
    places = pages.choose(rows, tiers.committed, tiers.site_of("keys"))
    if places is None:
        return None
    groups, own, tokens = rows.shape[2], *places.shape[2:]
    found = places.clamp(min=0).flatten(2)
    k, v = (as_float(s.gather(found, query.dtype)).unflatten(2, (own, tokens)) for s in (keys, values))
    scores = rows.mul(scaling).unflatten(2, (own, groups // own)) @ k.transpose(3, 4)
    scores = scores.flatten(2, 3)
    if softcap is not None:
        scores.div_(softcap).tanh_().mul_(softcap)
    places = places.expand(-1, -1, groups, -1)
    scores.masked_fill_(places < 0, -torch.inf)
    if mask is not None:
        _hide(scores, mask, tiers.by_head().slots_of_last(places))
    total, lse = exponentials(scores.unsqueeze(3), None)
    out = scores.unflatten(2, (own, groups // own)) @ v
    out = out.flatten(2, 3).div_(total.squeeze(3))
    return out.reshape(batch, heads, 1, -1), lse.reshape(batch, heads, 1)


def _hide(scores: Tensor, mask: Tensor, slots: Tensor) -> None:
    """Mask scores `[batch, kv_heads, groups, tokens]` in place, whose tokens stand in `slots` of the text."""
    wide = mask[..., 0, :].expand(*scores.shape[:3], -1)
    part = wide.gather(3, slots.clamp(min=0).long())
    if part.dtype == torch.bool:
        scores.masked_fill_(~part, -torch.inf)
        return
    scores.add_(part)
    scores.masked_fill_(part <= torch.finfo(part.dtype).min / 2, -torch.inf)
