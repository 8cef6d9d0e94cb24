"""Products of queries with stored keys, and of weights with stored values, read where they lie.

Packed codes are read plane by plane, in blocks that stay in cache; nothing is decoded to a dense copy. `key_scores` and
`add_values` are the two places where a fused kernel can take over.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kvpolicy.storage.affine import AffineStore
from kvpolicy.storage.base import Store
from kvpolicy.storage.packing import looked_up, plane_width, planes, unpack

BLOCK = 1 << 20
"""Numbers of a plane, for all heads and rows, that a CPU reads at a time: more need memory, fewer make more calls."""
ELSEWHERE = 3 << 19
"""The same on other devices, where each call costs a launch."""
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
    if isinstance(store, AffineStore) and store.direct:
        mapped = rows if store.chain is None else store.chain.adjoint(rows)
        assert mapped is not None
        for first, codes, scale, offset in store.affine_blocks(_block(store, rows)):
            product = _channel_product if codes.ndim == 5 else _token_product
            n = codes.shape[2] * (codes.shape[3] if codes.ndim == 5 else 1)
            if isinstance(columns, int):
                scores = out[..., columns + first : columns + first + n]
            else:
                scores = out.new_empty((*out.shape[:3], n))
            product(store, mapped, codes, scale, offset, scores)
            if store.beside is not None:
                store.beside.add_scores(mapped, scores, first)
            if not isinstance(columns, int):
                _put(out, scores, columns, first)
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
    if isinstance(store, AffineStore) and store.direct:
        result = out if store.chain is None else torch.zeros_like(out)
        for first, codes, scale, offset in store.affine_blocks(_block(store, out)):
            tokens = codes.shape[2] * (codes.shape[3] if codes.ndim == 5 else 1)
            add = _add_by_channel if codes.ndim == 5 else _add_by_token
            chosen = _get(weights, columns, first, tokens)
            add(store, chosen, codes, scale, offset, result)
            if store.beside is not None:
                store.beside.add_values(chosen, result, first)
        if store.chain is not None:
            out += store.chain.inverse(result, None)
    for first, x in _dense_blocks(store, out):
        out += _get(weights, columns, first, x.shape[2]) @ x


def _block(store: Store, like: Tensor) -> int:
    """Tokens to read at a time; `like` has the batch, the heads and the channels of the store."""
    most = BLOCK if like.device.type == "cpu" else ELSEWHERE
    width = plane_width(store.head_dim, store.quantizer.nbits) if isinstance(store, AffineStore) else like.shape[3]
    return max(64, most // (width * like.shape[0] * like.shape[1]))


def _dense_blocks(store: Store, like: Tensor) -> Iterator[tuple[int, Tensor]]:
    """What a store holds in no codes, in float32, with the index of each block's first token."""
    if isinstance(store, AffineStore) and store.direct:
        blocks, before = store.parts["exact"].blocks(), store.parts["codes"].length
    else:
        blocks, before = store.decoded(_block(store, like), torch.float32), 0
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


def _floats(store: AffineStore, codes: Tensor) -> Iterator[tuple[float, int, int, Tensor]]:
    """The planes of codes, or of their levels, as float32, each in the place of the one before."""
    nbits, levels = store.quantizer.nbits, store.levels_on(codes.device)
    if levels is not None:
        whole = [(1.0, 0, store.head_dim, unpack(codes, nbits, store.head_dim))] if nbits == 3 else None
        for factor, first, last, plane in whole or planes(codes, nbits, store.head_dim):
            yield factor, first, last, looked_up(plane, levels)
        return
    buffer = None
    for factor, first, last, plane in planes(codes, nbits, store.head_dim, shifted=False):
        if buffer is None or buffer.shape != plane.shape:
            buffer = torch.empty(plane.shape, dtype=torch.float32, device=plane.device)
        buffer.copy_(plane)
        del plane  # before the next one is made
        yield factor, first, last, buffer


def _token_product(store: AffineStore, rows: Tensor, codes: Tensor, scale: Tensor, offset: Tensor, out: Tensor) -> None:
    count = scale.shape[3]
    size = store.head_dim // count
    scales, offsets = _by_group(scale), _by_group(offset)
    flat = rows.flatten(0, 1)
    sums: list[Tensor | None] = [None] * count
    for factor, first, last, x in _floats(store, codes.flatten(0, 1)):
        part = flat[..., first:last] * factor
        for group, lo, hi in _pieces(first, last, size):
            q, y = part[..., lo - first : hi - first], x[..., lo - first : hi - first].transpose(1, 2)
            before = sums[group]
            sums[group] = torch.bmm(q, y) if before is None else before.baddbmm_(q, y)
    totals = flat.unflatten(2, (count, size)).sum(3)
    result = out.flatten(0, 1)
    torch.bmm(totals, offsets.transpose(0, 1), out=result)
    for summed, by in zip(sums, scales, strict=True):
        assert summed is not None
        result.addcmul_(summed, by.unsqueeze(1))


def _channel_product(
    store: AffineStore, rows: Tensor, codes: Tensor, scale: Tensor, offset: Tensor, out: Tensor
) -> None:
    groups, size = codes.shape[2:4]
    shifts = rows @ offset[:, :, :, 0].float().transpose(2, 3)
    if rows.shape[2] >= size:
        result = shifts.repeat_interleave(size, dim=3)
        for factor, first, last, x in _floats(store, codes):
            y = x.mul_(scale[..., first:last].float()).flatten(2, 3)
            result.add_(rows[..., first:last] @ y.transpose(2, 3), alpha=factor)
        out.copy_(result)
        return
    # Fewer rows than tokens of a group: they take its scales, each group apart.
    product = None
    for factor, first, last, x in _floats(store, codes.flatten(0, 2)):
        part = rows[..., first:last].unsqueeze(2) * factor
        scaled = (part * scale[..., first:last].float()).flatten(0, 2)
        y = x.transpose(1, 2)
        product = torch.bmm(scaled, y) if product is None else product.baddbmm_(scaled, y)
    assert product is not None
    by_group = product.view(*rows.shape[:2], groups, rows.shape[2], size).transpose(2, 3)
    torch.add(by_group, shifts.unsqueeze(4), out=out.unflatten(3, (groups, size)))


def _add_by_token(
    store: AffineStore, weights: Tensor, codes: Tensor, scale: Tensor, offset: Tensor, out: Tensor
) -> None:
    count = scale.shape[3]
    size = store.head_dim // count
    scales, offsets = _by_group(scale), _by_group(offset)
    flat, total = weights.flatten(0, 1), out.flatten(0, 1)
    scaled, of = flat, -1
    for factor, first, last, x in _floats(store, codes.flatten(0, 1)):
        for group, lo, hi in _pieces(first, last, size):
            if group != of:
                scaled, of = flat * scales[group].unsqueeze(1), group
            total[..., lo:hi].add_(torch.bmm(scaled, x[..., lo - first : hi - first]), alpha=factor)
    shares = torch.bmm(flat, offsets.permute(1, 2, 0))
    total.unflatten(2, (count, size)).add_(shares.unsqueeze(3))


def _add_by_channel(
    store: AffineStore, weights: Tensor, codes: Tensor, scale: Tensor, offset: Tensor, out: Tensor
) -> None:
    groups, size = codes.shape[2:4]
    for factor, first, last, x in _floats(store, codes):
        y = x.mul_(scale[..., first:last].float()).flatten(2, 3)
        out[..., first:last].add_(weights @ y, alpha=factor)
    out += weights.unflatten(3, (groups, size)).sum(4) @ offset[:, :, :, 0].float()
