"""Tensors of rows and heads that hold different numbers of tokens, as files have them: without empty places."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvpolicy.layer.saving.file import Damaged

Ints = NDArray[np.int64]
FLAT = ".flat"
"""How the names of tensors end that hold the first tokens of all rows and heads, one row and head after the other."""
COUNTS = "flat"
"""Of a table: how many tokens each row and head has of these."""


def packed(tensors: Mapping[str, Tensor], counts: Ints) -> dict[str, Tensor]:
    """Tensors `[batch, kv_heads, tokens, ...]` with first tokens apart: `counts`, `[batch, kv_heads]`, of each."""
    found = {}
    for name, x in tensors.items():
        mask = _mask(counts, x)
        found[name] = x[:, :, mask.shape[2] :].contiguous()
        found[name + FLAT] = x[:, :, : mask.shape[2]][mask]
    return found


def unpacked(tensors: Mapping[str, Tensor], counts: Ints, absent: int = 0) -> dict[str, Tensor]:
    """The inverse of `packed`; `absent` in empty places. Tensors without first tokens apart are left as they are.

    Raises:
        Damaged: they have other numbers of tokens.
    """
    found = {name: x for name, x in tensors.items() if not name.endswith(FLAT)}
    for name, x in found.items():
        if name + FLAT not in tensors:
            continue
        flat = tensors[name + FLAT]
        fits = x.ndim > 2 and flat.ndim == x.ndim - 2 and flat.shape[1:] == x.shape[3:] and flat.dtype == x.dtype
        fits = fits and all(n in (1, m) for m, n in zip(x.shape[:2], counts.shape, strict=True))
        if not fits or len(flat) != np.broadcast_to(counts, x.shape[:2]).sum():
            raise Damaged(f"{name} must have {int(counts.sum())} first tokens, found {str(tuple(flat.shape))[:80]}")
        mask = _mask(counts, x)
        front = x.new_full((*mask.shape, *x.shape[3:]), absent)
        front[mask] = flat
        found[name] = torch.cat([front, x], dim=2)
    if len(tensors) - len(found) != sum(name + FLAT in tensors for name in found):
        raise Damaged("first tokens must belong to others")
    return found


def counts_in(tensors: dict[str, Tensor], shape: tuple[int, int]) -> Ints | None:
    """How many first tokens each row and head of a table has, taken out of what was saved of it; None: all alike.

    Raises:
        Damaged: they can't be counts.
    """
    found = tensors.pop(COUNTS, None)
    if found is None:
        return None
    if found.dtype != torch.int32 or tuple(found.shape) != shape or int(found.min()) < 0 or not int(found.max()):
        raise Damaged(f"a table must count the tokens of {shape} rows and heads, found {str(tuple(found.shape))[:80]}")
    counts = found.numpy().astype(np.int64)
    most = max((len(x) for name, x in tensors.items() if name.endswith(FLAT)), default=0)
    if counts.sum() != most:
        raise Damaged(f"the rows and heads of a table must have {most} first tokens, found {int(counts.sum())}")
    return counts


def _mask(counts: Ints, like: Tensor) -> Tensor:
    """Which of the first places hold a token, `[batch, kv_heads, tokens]`."""
    counts = np.broadcast_to(counts, like.shape[:2])
    return torch.from_numpy(np.arange(counts.max()) < counts[..., None]).to(like.device)
