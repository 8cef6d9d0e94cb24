"""Stores behind transforms: queries go through them to the keys, and weighted sums of values back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["joined", "mapped"]


def mapped(chain: Any, query: Tensor, kv_heads: int) -> Tensor:
    """Queries for keys behind transforms, in float16: `[batch, heads, queries, head_dim]`."""
    rows = query.float().unflatten(1, (kv_heads, -1)).flatten(2, 3)
    found: Tensor = chain.adjoint(rows).to(torch.float16).contiguous()
    return found.view(query.shape)


def joined(out: Tensor, chains: Sequence[Any], kv_heads: int) -> Tensor:
    """Outputs of all spaces of values as one, `[batch, queries, heads, head_dim]`, in float32.

    Args:
        out: of one space that, of several `[spaces, batch, queries, heads, head_dim]`.
        chains: of each the transforms; None for the model's own.
    """
    queries, total = out.shape[-3], None
    for x, chain in zip(out if len(chains) > 1 else out.unsqueeze(0), chains, strict=True):
        if chain is not None:
            rows = x.transpose(1, 2).unflatten(1, (kv_heads, -1)).flatten(2, 3)
            x = chain.inverse(rows, None).unflatten(2, (-1, queries)).flatten(1, 2).transpose(1, 2)
        total = x if total is None else total + x
    assert isinstance(total, Tensor)
    return total
