"""Attention straight from the stores: keys and values are read where they lie, packed codes plane by plane.

Softmax(QK^T)V does not depend on the order of the tokens, so nothing is sorted back. Scores of all stores stand side
by side as columns, in float32; each store then adds its share of the output. `key_scores` and `add_values` are the
two places where a fused kernel can take over.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvpolicy.errors import CacheError
from kvpolicy.packing import planes
from kvpolicy.stores import PackedStore, Store

if TYPE_CHECKING:
    from kvpolicy.layer import Tiers

__all__ = ["add_values", "attend", "key_scores"]

BLOCK = 1 << 14
"""Tokens of all heads and rows read at a time by each thread of a CPU: their codes as float32 stay in its cache."""
SCORES = 1 << 24
"""Scores computed at a time; more queries than fit take another turn over the stores."""
Columns = int | Tensor
"""Where the tokens of a store stand among the columns: from an offset on, or an index for each."""


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


def key_scores(store: Store, rows: Tensor, out: Tensor, columns: Columns) -> None:
    """Write the products of `rows` with the keys of a store into its columns of `out`.

    Args:
        store: keys of `[batch, kv_heads, tokens, head_dim]`.
        rows: float32 `[batch, kv_heads, rows, head_dim]`.
        out: float32 `[batch, kv_heads, rows, columns]`.
        columns: where its tokens stand in `out`.
    """
    if isinstance(store, PackedStore):
        for first, codes, scale, offset in store.affine_blocks(_block(rows)):
            product = _channel_product if codes.ndim == 5 else _token_product
            _put(out, product(store, rows, codes, scale, offset), columns, first)
    for first, x in _dense_blocks(store, rows):
        _put(out, rows @ x.transpose(2, 3), columns, first)


def add_values(store: Store, weights: Tensor, out: Tensor, columns: Columns) -> None:
    """Add the values of a store, weighted, to `out`.

    Args:
        store: values of `[batch, kv_heads, tokens, head_dim]`.
        weights: float32 `[batch, kv_heads, rows, columns]`.
        out: float32 `[batch, kv_heads, rows, head_dim]`.
        columns: where its tokens stand in `weights`.
    """
    if isinstance(store, PackedStore):
        for first, codes, scale, offset in store.affine_blocks(_block(weights)):
            tokens = codes.shape[2] * (codes.shape[3] if codes.ndim == 5 else 1)
            add = _add_by_channel if codes.ndim == 5 else _add_by_token
            add(store, _get(weights, columns, first, tokens), codes, scale, offset, out)
    for first, x in _dense_blocks(store, weights):
        out += _get(weights, columns, first, x.shape[2]) @ x


def _block(like: Tensor) -> int:
    if like.device.type != "cpu":
        return 1 << 40
    return max(64, BLOCK * torch.get_num_threads() // (like.shape[0] * like.shape[1]))


def _dense_blocks(store: Store, like: Tensor) -> Iterator[tuple[int, Tensor]]:
    """What a store holds in no codes, in float32, with the index of each block's first token."""
    if isinstance(store, PackedStore):
        blocks, before = store.parts["exact"].blocks(), store.parts["codes"].length
    else:
        blocks, before = store.decoded(_block(like), torch.float32), 0
    for first, x in blocks:
        yield before + first, x.float()


def _put(out: Tensor, scores: Tensor, columns: Columns, first: int) -> None:
    n = scores.shape[3]
    if isinstance(columns, int):
        out[..., columns + first : columns + first + n] = scores
    else:
        out.index_copy_(3, columns[first : first + n].to(out.device), scores)


def _get(weights: Tensor, columns: Columns, first: int, n: int) -> Tensor:
    if isinstance(columns, int):
        return weights[..., columns + first : columns + first + n]
    return weights.index_select(3, columns[first : first + n].to(weights.device))


def _pieces(first: int, last: int, size: int) -> Iterator[tuple[int, int, int]]:
    """Group, first and last + 1 channel of the parts of a plane that lie in one group of channels each."""
    for group in range(first // size, -(-last // size)):
        yield group, max(first, group * size), min(last, (group + 1) * size)


def _by_group(parameter: Tensor) -> Tensor:
    """A parameter per token and group as float32 `[groups, batch * kv_heads, tokens]`, its tokens neighbours."""
    return parameter.flatten(0, 1).permute(2, 0, 1).contiguous().float()


def _token_product(store: PackedStore, rows: Tensor, codes: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    count = scale.shape[3]
    size = store.head_dim // count
    scales, offsets = _by_group(scale), _by_group(offset)
    flat = rows.flatten(0, 1)
    sums: list[Tensor | None] = [None] * count
    for factor, first, last, plane in planes(codes.flatten(0, 1), store.quantizer.nbits, store.head_dim):
        x = plane.float().transpose(1, 2)
        for group, lo, hi in _pieces(first, last, size):
            part, y = flat[..., lo:hi], x[:, lo - first : hi - first]
            before = sums[group]
            sums[group] = torch.bmm(part, y).mul_(factor) if before is None else before.baddbmm_(part, y, alpha=factor)
    totals = flat.unflatten(2, (count, size)).sum(3)
    result: Tensor = torch.bmm(totals, offsets.transpose(0, 1))
    for summed, by in zip(sums, scales, strict=True):
        assert summed is not None
        result.addcmul_(summed, by.unsqueeze(1))
    return result.view(*rows.shape[:3], -1)


def _channel_product(store: PackedStore, rows: Tensor, codes: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    size = codes.shape[3]
    result = (rows @ offset[:, :, :, 0].float().transpose(2, 3)).repeat_interleave(size, dim=3)
    for factor, first, last, plane in planes(codes, store.quantizer.nbits, store.head_dim):
        x = plane.float().mul_(scale[..., first:last].float()).flatten(2, 3)
        product = rows[..., first:last] @ x.transpose(2, 3)
        result.add_(product, alpha=factor)
    return result


def _add_by_token(
    store: PackedStore, weights: Tensor, codes: Tensor, scale: Tensor, offset: Tensor, out: Tensor
) -> None:
    count = scale.shape[3]
    size = store.head_dim // count
    scales, offsets = _by_group(scale), _by_group(offset)
    flat, total = weights.flatten(0, 1), out.flatten(0, 1)
    scaled = [flat * by.unsqueeze(1) for by in scales]
    for factor, first, last, plane in planes(codes.flatten(0, 1), store.quantizer.nbits, store.head_dim):
        x = plane.float()
        for group, lo, hi in _pieces(first, last, size):
            total[..., lo:hi] += torch.bmm(scaled[group], x[..., lo - first : hi - first]).mul_(factor)
    shares = torch.bmm(flat, offsets.permute(1, 2, 0))
    total.unflatten(2, (count, size)).add_(shares.unsqueeze(3))


def _add_by_channel(
    store: PackedStore, weights: Tensor, codes: Tensor, scale: Tensor, offset: Tensor, out: Tensor
) -> None:
    groups, size = codes.shape[2:4]
    for factor, first, last, plane in planes(codes, store.quantizer.nbits, store.head_dim):
        x = plane.float().mul_(scale[..., first:last].float()).flatten(2, 3)
        out[..., first:last].add_(weights @ x, alpha=factor)
    out += weights.unflatten(3, (groups, size)).sum(4) @ offset[:, :, :, 0].float()
