"""Products of queries with stored keys, and of weights with stored values, read where they lie.

Packed codes are read plane by plane, in blocks that stay in cache; nothing is decoded to a dense copy. `key_scores` and
`add_values` are the two places where a fused kernel can take over.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kvpolicy.packing import planes
from kvpolicy.stores import PackedStore, Store

__all__ = ["Columns", "add_values", "key_scores"]

BLOCK = 1 << 14
"""Tokens of all heads and rows read at a time by each thread of a CPU: their codes as float32 stay in its cache."""
Columns = int | Tensor
"""Where the tokens of a store stand among the columns: from an offset on, or an index for each, `[tokens]` or
`[batch, kv_heads or 1, tokens]`."""


def key_scores(store: Store, rows: Tensor, out: Tensor, columns: Columns) -> None:
    """Write the products of `rows` with the keys of a store into its columns of `out`.

    Args:
        store: keys of `[batch, kv_heads, tokens, head_dim]`.
        rows: float32 `[batch, kv_heads, rows, head_dim]`.
        out: float32 `[batch, kv_heads, rows, columns]`.
        columns: where its tokens stand in `out`.
    """
    if isinstance(store, PackedStore) and store.grouped:
        mapped = rows if store.channels is None else rows * store.channels.float()
        for first, codes, scale, offset in store.affine_blocks(_block(rows)):
            product = _channel_product if codes.ndim == 5 else _token_product
            _put(out, product(store, mapped, codes, scale, offset), columns, first)
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
    if isinstance(store, PackedStore) and store.grouped:
        result = out if store.channels is None else torch.zeros_like(out)
        for first, codes, scale, offset in store.affine_blocks(_block(weights)):
            tokens = codes.shape[2] * (codes.shape[3] if codes.ndim == 5 else 1)
            add = _add_by_channel if codes.ndim == 5 else _add_by_token
            add(store, _get(weights, columns, first, tokens), codes, scale, offset, result)
        if store.channels is not None:
            out.addcmul_(result, store.channels.float())
    for first, x in _dense_blocks(store, weights):
        out += _get(weights, columns, first, x.shape[2]) @ x


def _block(like: Tensor) -> int:
    if like.device.type != "cpu":
        return 1 << 40
    return max(64, BLOCK * torch.get_num_threads() // (like.shape[0] * like.shape[1]))


def _dense_blocks(store: Store, like: Tensor) -> Iterator[tuple[int, Tensor]]:
    """What a store holds in no codes, in float32, with the index of each block's first token."""
    if isinstance(store, PackedStore) and store.grouped:
        blocks, before = store.parts["exact"].blocks(), store.parts["codes"].length
    else:
        blocks, before = store.decoded(_block(like), torch.float32), 0
    for first, x in blocks:
        yield before + first, x.float()


def _put(out: Tensor, scores: Tensor, columns: Columns, first: int) -> None:
    n = scores.shape[3]
    if isinstance(columns, int):
        out[..., columns + first : columns + first + n] = scores
    elif columns.ndim == 3:
        out.scatter_(3, _lines(columns, first, n, out), scores)
    else:
        out.index_copy_(3, columns[first : first + n].to(out.device), scores)


def _get(weights: Tensor, columns: Columns, first: int, n: int) -> Tensor:
    if isinstance(columns, int):
        return weights[..., columns + first : columns + first + n]
    if columns.ndim == 3:
        return weights.gather(3, _lines(columns, first, n, weights))
    return weights.index_select(3, columns[first : first + n].to(weights.device))


def _lines(columns: Tensor, first: int, n: int, like: Tensor) -> Tensor:
    return columns[:, :, None, first : first + n].expand(*like.shape[:3], -1)


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
