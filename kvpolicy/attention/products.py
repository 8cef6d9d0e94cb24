"""Products of queries with stored keys, and of weights with stored values, read where they lie.

Packed codes are read plane by plane, in blocks that stay in cache; nothing is decoded to a dense copy. `key_scores` and
`add_values` are the two places where a fused kernel can take over.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from kvpolicy.storage.affine import AffineStore
from kvpolicy.storage.base import Store
from kvpolicy.storage.packing import looked_up, unpack

PIECES = {1: 8, 2: 4, 4: 2, 8: 1}
"""Planes of a byte, by the bits of a code."""
BLOCK = 1 << 20
"""Numbers, for all heads and rows, that a CPU reads at a time: more need memory, fewer make more calls."""
ELSEWHERE = 3 << 21
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
    return max(64, most // like[:, :, 0].numel())


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


def _stacked(store: AffineStore, codes: Tensor, count: int) -> tuple[Tensor, Tensor | None]:
    """The codes, or their levels, as float32, cut into pieces of neighbouring channels that lie side by side.

    A piece is a plane of the packed codes, left where it lies in its byte, where groups of channels consist of whole
    planes. Else it is a group.

    Args:
        store: where they are from.
        codes: packed, `[..., width]`.
        count: groups of channels with parameters of their own.

    Returns:
        `[pieces, ..., channels of a piece]`, and what each piece is to be multiplied with, if anything.
    """
    nbits, dim, width = store.quantizer.nbits, store.head_dim, codes.shape[-1]
    levels = store.levels_on(codes.device)
    pieces = PIECES.get(nbits, 0)
    if levels is None and pieces and width * pieces == dim and pieces % count == 0:
        masks, factors = _masks(nbits, codes.device)
        return (codes & masks.view(-1, *[1] * codes.ndim)).float(), factors
    whole = unpack(codes, nbits, dim) if nbits < 8 else codes
    x = whole.unflatten(-1, (count, -1)).permute(-2, *range(whole.ndim - 1), -1)
    return (
        x.to(torch.float32, memory_format=torch.contiguous_format) if levels is None else looked_up(x, levels)
    ), None


@functools.cache
def _masks(nbits: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Of each plane of a byte the bits, and what makes them a code."""
    shifts = range(0, 8, nbits)
    masks = torch.tensor([((1 << nbits) - 1) << shift for shift in shifts], dtype=torch.uint8)
    factors = torch.tensor([2.0**-shift for shift in shifts])
    return masks.to(device), factors.to(device)


def _by_group(parameter: Tensor) -> Tensor:
    """A parameter per token and group as float32 `[groups, batch * kv_heads, tokens]`, its tokens neighbours."""
    return parameter.flatten(0, 1).permute(2, 0, 1).float().contiguous()


def _in_pieces(rows: Tensor, pieces: int, factors: Tensor | None) -> Tensor:
    """`[..., head_dim]` as `[pieces, ..., channels of a piece]`, multiplied with what belongs to each."""
    x = rows.unflatten(-1, (pieces, -1))
    if factors is not None:
        x = x * factors.unsqueeze(1)
    return x.permute(-2, *range(rows.ndim - 1), -1)


def _joined(x: Tensor, factors: Tensor | None) -> Tensor:
    """The inverse of `_in_pieces` for what was multiplied with the pieces: `[..., head_dim]`."""
    joined = x.permute(*range(1, x.ndim - 1), 0, -1)
    if factors is not None:
        joined = joined * factors.unsqueeze(1)
    return joined.flatten(-2)


def _token_product(store: AffineStore, rows: Tensor, codes: Tensor, scale: Tensor, offset: Tensor, out: Tensor) -> None:
    count = scale.shape[3]
    flat, result = rows.flatten(0, 1), out.flatten(0, 1)
    x, factors = _stacked(store, codes.flatten(0, 1), count)
    product = _in_pieces(flat, len(x), factors) @ x.transpose(2, 3)
    if count < len(x):
        product = product.unflatten(0, (count, -1)).sum(1)
    product.mul_(_by_group(scale).unsqueeze(2))
    totals = flat.unflatten(2, (count, -1)).sum(3)
    torch.bmm(totals, offset.flatten(0, 1).float().transpose(1, 2), out=result)
    for part in product:
        result.add_(part)


def _channel_product(
    store: AffineStore, rows: Tensor, codes: Tensor, scale: Tensor, offset: Tensor, out: Tensor
) -> None:
    groups, size = codes.shape[2:4]
    shifts = rows @ offset[:, :, :, 0].float().transpose(2, 3)
    x, factors = _stacked(store, codes.flatten(0, 2), 1)
    scale = scale[:, :, :, 0].float()
    if rows.shape[2] >= size:
        x.mul_(_in_pieces(scale.flatten(0, 2), len(x), factors).unsqueeze(2))
        y = x.view(len(x), *rows.shape[:2], groups * size, -1)
        out.copy_((_in_pieces(rows, len(x), None) @ y.transpose(3, 4)).sum(0))
        out.unflatten(3, (groups, size)).add_(shifts.unsqueeze(4))
        return
    # Fewer rows than tokens of a group: they take its scales, each group apart.
    scaled = (rows.unsqueeze(2) * scale.unsqueeze(3)).flatten(0, 2)
    product = _in_pieces(scaled, len(x), factors) @ x.transpose(2, 3)
    by_group = product.sum(0).view(*rows.shape[:2], groups, rows.shape[2], size).transpose(2, 3)
    torch.add(by_group, shifts.unsqueeze(4), out=out.unflatten(3, (groups, size)))


def _add_by_token(
    store: AffineStore, weights: Tensor, codes: Tensor, scale: Tensor, offset: Tensor, out: Tensor
) -> None:
    count = scale.shape[3]
    flat, total = weights.flatten(0, 1), out.flatten(0, 1)
    x, factors = _stacked(store, codes.flatten(0, 1), count)
    scaled = flat * _by_group(scale).unsqueeze(2)
    found = scaled.unsqueeze(1) @ x.unflatten(0, (count, -1)) if count < len(x) else scaled @ x
    total.add_(_joined(found.flatten(0, found.ndim - 4), factors))
    shares = torch.bmm(flat, offset.flatten(0, 1).float())
    total.unflatten(2, (count, -1)).add_(shares.unsqueeze(3))


def _add_by_channel(
    store: AffineStore, weights: Tensor, codes: Tensor, scale: Tensor, offset: Tensor, out: Tensor
) -> None:
    groups, size = codes.shape[2:4]
    x, factors = _stacked(store, codes, 1)
    x.mul_(_in_pieces(scale.float(), len(x), None))
    out.add_(_joined(weights @ x.flatten(3, 4), factors))
    out += weights.unflatten(3, (groups, size)).sum(4) @ offset[:, :, :, 0].float()
