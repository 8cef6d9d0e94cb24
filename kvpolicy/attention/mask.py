"""Attention masks over the tokens seen, brought into the order in which scores stand."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from kvpolicy.errors import CacheError


class Columns(Protocol):
    """What is to be known of the columns of scores that stand for tokens held; then come those of new tokens."""

    @property
    def width(self) -> int: ...
    @property
    def gaps(self) -> bool: ...
    @property
    def positions(self) -> Callable[[], Tensor]: ...


def as_mask(mask: Tensor | None, seen: int, kv_heads: int) -> Tensor | None:
    """A mask as `[batch or 1, kv_heads or 1, groups or 1, queries or 1, tokens seen]`."""
    if mask is None:
        return None
    if mask.shape[-1] != seen:
        raise CacheError(
            f"the attention mask must have a column for each of the {seen} tokens seen, found {mask.shape[-1]}; "
            "give generate a mask of the whole text so far, or none"
        )
    if mask.ndim == 2:
        return mask[:, None, None, None].bool()
    return mask.unsqueeze(2) if mask.shape[1] == 1 else mask.unflatten(1, (kv_heads, -1))


def _gathered(mask: Tensor | None, columns: Columns, new: int) -> Tensor | None:
    """The mask's columns in the order of the scores'."""
    if not columns.width:
        return mask if mask is None else mask[..., mask.shape[-1] - new :]
    if mask is None and not columns.gaps:
        return None
    places = columns.positions()
    if mask is None:
        return (places >= 0)[:, :, None, None]
    seen = mask.shape[-1] - new
    places = places.to(mask.device, non_blocking=True)
    if places.ndim == 1:
        return torch.cat([mask.index_select(-1, places), mask[..., seen:]], dim=-1)
    batch, kv_heads = (max(a, b) for a, b in zip(mask.shape[:2], places.shape[:2], strict=True))
    wide = mask.expand(batch, kv_heads, *mask.shape[2:])
    index = places[:, :, None, None].long().expand(batch, kv_heads, *mask.shape[2:4], -1)
    absent = False if mask.dtype == torch.bool else -torch.inf
    held = wide.gather(4, index.clamp(min=0)).masked_fill(index < 0, absent)
    return torch.cat([held, wide[..., seen:]], dim=-1)


class Queries(NamedTuple):
    """Some of the queries of an update."""

    at: Tensor
    """Their numbers, ascending, on the CPU."""
    of: int
    """Queries of the update."""
    offset: int = 0
    """The number of the first query among the new tokens."""


def mask_scores(scores: Tensor, mask: Tensor | None, queries: Queries, columns: Columns, new: int) -> None:
    """Mask scores `[batch, kv_heads, groups, queries, columns]` in place; the last `new` columns are new tokens."""
    at, several = queries.at, queries.of > 1
    if several and new and (mask is None or mask.shape[3] != queries.of):
        query = at.to(scores.device, non_blocking=True)[:, None] + queries.offset
        later = torch.arange(new, device=scores.device) > query
        scores[..., -new:].masked_fill_(later, -torch.inf)
    if mask is not None and mask.shape[3] == queries.of and several:
        mask = mask.index_select(3, at.to(mask.device, non_blocking=True))
    part = _gathered(mask, columns, new)
    if part is None:
        return
    if part.shape[-1] < scores.shape[-1]:
        scores = scores[..., : part.shape[-1]]
    if part.dtype == torch.bool:
        scores.masked_fill_(~part, -torch.inf)
    else:
        scores.add_(part)
        # What models write for minus infinity would else count as seen.
        scores.masked_fill_(part <= torch.finfo(part.dtype).min / 2, -torch.inf)


def visible_columns(mask: Tensor | None, places: Tensor, new: int, heads: int) -> Tensor:
    """A mask for keys whose positions are `places`, `[batch, kv_heads or 1, columns]`, -1 where there is none.

    Args:
        mask: `[batch or 1, 1 or heads, queries, tokens seen]`.
        places: the positions.
        new: how many of the tokens are new.
        heads: query heads.
    """
    if places.shape[1] > 1:
        places = places.repeat_interleave(heads // places.shape[1], 1)
    empty = (places < 0).unsqueeze(2)
    if mask is None:
        later = torch.arange(new, device=places.device) > torch.arange(new, device=places.device)[:, None]
        shown = torch.nn.functional.pad(~later, (places.shape[2] - new, 0), value=True)
        return shown & ~empty
    wide = mask.expand(len(places), max(mask.shape[1], places.shape[1]), -1, -1)
    found = wide.gather(3, places.clamp(min=0).unsqueeze(2).expand(*wide.shape[:3], -1))
    return found.masked_fill(empty, False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min)
