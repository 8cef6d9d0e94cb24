"""Products of queries with stored keys, and of weights with stored values, read where they lie.

Packed codes are read plane by plane, in blocks that stay in cache; nothing is decoded to a dense copy. `key_scores` and
`add_values` are the two places where a fused kernel can take over.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from kvpolicy.storage.affine import AffineStore
from kvpolicy.storage.base import Store
from kvpolicy.storage.packing import looked_up, plane_width, unpack

PIECES = {1: 8, 2: 4, 4: 2, 8: 1}
"""Planes of a byte, by the bits of a code."""
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
        room = _Room()
        for first, codes, scale, offset in store.affine_blocks(_block(store, rows)):
            product = _channel_product if codes.ndim == 5 else _token_product
            n = codes.shape[2] * (codes.shape[3] if codes.ndim == 5 else 1)
            if isinstance(columns, int):
                scores = out[..., columns + first : columns + first + n]
            else:
                scores = out.new_empty((*out.shape[:3], n))
            product(store, mapped, codes, scale, offset, scores, room)
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
        result, room = out if store.chain is None else torch.zeros_like(out), _Room()
        for first, codes, scale, offset in store.affine_blocks(_block(store, out)):
            tokens = codes.shape[2] * (codes.shape[3] if codes.ndim == 5 else 1)
            add = _add_by_channel if codes.ndim == 5 else _add_by_token
            chosen = _get(weights, columns, first, tokens)
            add(store, chosen, codes, scale, offset, result, room)
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
        out.index_copy_(3, columns[first : first + n].to(out.device, non_blocking=True), scores)


def _get(weights: Tensor, columns: Columns, first: int, n: int) -> Tensor:
    if isinstance(columns, int):
        return weights[..., columns + first : columns + first + n]
    if columns.ndim == 3:
        return weights.gather(3, _lines(columns, first, n, weights))
    return weights.index_select(3, columns[first : first + n].to(weights.device, non_blocking=True))


def _lines(columns: Tensor, first: int, n: int, like: Tensor) -> Tensor:
    return columns[:, :, None, first : first + n].expand(*like.shape[:3], -1)


class _Room:
    """Memory that the blocks of a store use one after the other: what is allocated anew costs as much as it is used."""

    def __init__(self) -> None:
        self.held: dict[torch.dtype, Tensor] = {}

    def get(self, shape: tuple[int, ...], like: Tensor, dtype: torch.dtype) -> Tensor:
        size, held = math.prod(shape), self.held.get(dtype)
        if held is None or held.numel() < size:
            held = self.held[dtype] = torch.empty(size, dtype=dtype, device=like.device)
        return held[:size].view(shape)


def _pieces(store: AffineStore, count: int) -> tuple[int, Tensor | None]:
    """Into how many pieces of neighbouring channels codes are cut, and what each is to be multiplied with, if anything.

    A piece is a plane of the packed codes, left where it lies in its byte, where `count` groups of channels consist of
    whole planes. Else it is a group.
    """
    nbits = store.quantizer.nbits
    planes = PIECES.get(nbits, 0)
    if store.levels is None and planes and store.head_dim % planes == 0 and planes % count == 0:
        return planes, _masks(nbits, store.parts["codes"].pages[0].device)[2]
    return count, None


def _cut(store: AffineStore, codes: Tensor, count: int, room: _Room) -> Iterator[tuple[int, int, Tensor]]:
    """The codes of a block, or their levels, as float32: some pieces at a time, few where they are large.

    Args:
        store: where they are from.
        codes: packed, `[..., width]`.
        count: groups of channels with parameters of their own.
        room: memory for them.

    Yields:
        The first piece, the last + 1, and `[pieces, ..., channels of a piece]`.
    """
    nbits, dim = store.quantizer.nbits, store.head_dim
    levels = store.levels_on(codes.device)
    pieces, factors = _pieces(store, count)
    if factors is None:
        whole = unpack(codes, nbits, dim) if nbits < 8 else codes
        x = whole.unflatten(-1, (count, -1)).permute(-2, *range(whole.ndim - 1), -1)
        if levels is not None:
            yield 0, count, looked_up(x, levels)
        else:
            yield 0, count, room.get(tuple(x.shape), codes, torch.float32).copy_(x)
        return
    masks, words, _ = _masks(nbits, codes.device)
    step = pieces if codes.numel() * pieces <= BLOCK else 1
    strides = (*codes.stride()[:-1], codes.storage_offset())
    if codes.shape[-1] % 8 == 0 and codes.stride(-1) == 1 and not any(n % 8 for n in strides):
        codes, masks = codes.view(torch.int64), words  # eight bytes at a time
    masks = masks[(..., *[None] * codes.ndim)]
    for first in range(0, pieces, step):
        out = room.get((step, *codes.shape), codes, codes.dtype)
        plane = torch.bitwise_and(codes, masks[first : first + step], out=out).view(torch.uint8)
        yield first, first + step, room.get(tuple(plane.shape), codes, torch.float32).copy_(plane)


@functools.cache
def _masks(nbits: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Of each plane of a byte the bits, the same for eight bytes, and what makes them a code."""
    shifts = range(0, 8, nbits)
    masks = torch.tensor([((1 << nbits) - 1) << shift for shift in shifts], dtype=torch.uint8)
    factors = torch.tensor([2.0**-shift for shift in shifts])
    return (
        masks.to(device, non_blocking=True),
        masks.repeat_interleave(8).view(torch.int64).to(device),
        factors.to(device),
    )


def _by_group(parameter: Tensor) -> Tensor:
    """A parameter per token and group as float32 `[groups, batch * kv_heads, tokens]`, its tokens neighbours."""
    return parameter.flatten(0, 1).permute(2, 0, 1).contiguous().float()


def _in_pieces(rows: Tensor, pieces: int, factors: Tensor | None) -> Tensor:
    """`[..., head_dim]` as `[pieces, ..., channels of a piece]`, multiplied with what belongs to each."""
    x: Tensor = rows.unflatten(-1, (pieces, -1))
    if factors is not None:
        x = x * factors.unsqueeze(1)
    return x.permute(-2, *range(rows.ndim - 1), -1)


def _joined(x: Tensor, factors: Tensor | None) -> Tensor:
    """The inverse of `_in_pieces` for what was multiplied with the pieces: `[..., head_dim]`."""
    joined = x.permute(*range(1, x.ndim - 1), 0, -1)
    if factors is not None:
        joined = joined * factors.unsqueeze(1)
    return joined.flatten(-2)


def _token_product(
    store: AffineStore, rows: Tensor, codes: Tensor, scale: Tensor, offset: Tensor, out: Tensor, room: _Room
) -> None:
    count = scale.shape[3]
    flat, result = rows.flatten(0, 1), out.flatten(0, 1)
    pieces, factors = _pieces(store, count)
    query = _in_pieces(flat, pieces, factors)
    product = flat.new_empty((pieces, *result.shape))
    for first, last, x in _cut(store, codes.flatten(0, 1), count, room):
        torch.matmul(query[first:last], x.transpose(2, 3), out=product[first:last])
    if count < pieces:
        product = product.unflatten(0, (count, -1)).sum(1)
    product.mul_(_by_group(scale).unsqueeze(2))
    totals = flat.unflatten(2, (count, -1)).sum(3)
    shifts = torch.bmm(totals, _by_group(offset).transpose(0, 1))
    if count == 1:
        torch.add(product[0], shifts, out=result)
    else:
        torch.sum(product, 0, out=result).add_(shifts)


def _channel_product(
    store: AffineStore, rows: Tensor, codes: Tensor, scale: Tensor, offset: Tensor, out: Tensor, room: _Room
) -> None:
    groups, size = codes.shape[2:4]
    shifts = rows @ offset[:, :, :, 0].float().transpose(2, 3)
    scale, by_group = scale[:, :, :, 0].float(), out.unflatten(3, (groups, size))
    pieces, factors = _pieces(store, 1)
    if rows.shape[2] >= size:
        scales, query = _in_pieces(scale.flatten(0, 2), pieces, factors), _in_pieces(rows, pieces, None)
        out.zero_()
        for first, last, x in _cut(store, codes.flatten(0, 2), 1, room):
            y = x.mul_(scales[first:last].unsqueeze(2)).view(last - first, *rows.shape[:2], groups * size, -1)
            out.add_((query[first:last] @ y.transpose(3, 4)).sum(0))
        by_group.add_(shifts.unsqueeze(4))
        return
    # Fewer rows than tokens of a group: they take its scales, each group apart.
    query = _in_pieces((rows.unsqueeze(2) * scale.unsqueeze(3)).flatten(0, 2), pieces, factors)
    product = rows.new_empty((pieces, *query.shape[1:3], size))
    for first, last, x in _cut(store, codes.flatten(0, 2), 1, room):
        torch.matmul(query[first:last], x.transpose(2, 3), out=product[first:last])
    found = product.sum(0).view(*rows.shape[:2], groups, rows.shape[2], size).transpose(2, 3)
    torch.add(found, shifts.unsqueeze(4), out=by_group)


def _add_by_token(
    store: AffineStore, weights: Tensor, codes: Tensor, scale: Tensor, offset: Tensor, out: Tensor, room: _Room
) -> None:
    count = scale.shape[3]
    flat, total = weights.flatten(0, 1), out.flatten(0, 1)
    pieces, factors = _pieces(store, count)
    scaled = flat * _by_group(scale).unsqueeze(2)
    each = pieces // count
    found = flat.new_empty((pieces, *flat.shape[:2], store.head_dim // pieces))
    for first, last, x in _cut(store, codes.flatten(0, 1), count, room):
        if last - first > 1 and each > 1:
            torch.matmul(scaled.repeat_interleave(each, 0), x, out=found)
        else:
            torch.matmul(scaled[first // each : (last - 1) // each + 1], x, out=found[first:last])
    total.add_(_joined(found, factors))
    shares = torch.bmm(flat, _by_group(offset).permute(1, 2, 0))
    total.unflatten(2, (count, -1)).add_(shares.unsqueeze(3))


def _add_by_channel(
    store: AffineStore, weights: Tensor, codes: Tensor, scale: Tensor, offset: Tensor, out: Tensor, room: _Room
) -> None:
    groups, size = codes.shape[2:4]
    pieces, factors = _pieces(store, 1)
    scales = _in_pieces(scale.float(), pieces, None)
    found = out.new_empty((pieces, *out.shape[:3], store.head_dim // pieces))
    for first, last, x in _cut(store, codes, 1, room):
        torch.matmul(weights, x.mul_(scales[first:last]).flatten(3, 4), out=found[first:last])
    out.add_(_joined(found, factors))
    out += weights.unflatten(3, (groups, size)).sum(4) @ offset[:, :, :, 0].float()
