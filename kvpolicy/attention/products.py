"""Products of queries with stored keys, and of weights with stored values, read where they lie.

Packed codes are read plane by plane, in blocks that stay in cache; nothing is decoded to a dense copy.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from kvpolicy.interfaces.checks import multiplied
from kvpolicy.storage.affine import AffineStore
from kvpolicy.storage.base import Store
from kvpolicy.storage.named import NamedStore
from kvpolicy.storage.packing import looked_up, plane_width, unpack

PIECES = {1: 8, 2: 4, 4: 2, 8: 1}
"""Planes of a byte, by the bits of a code."""
BLOCK = 1 << 20
"""Numbers of a plane, for all heads and rows, that a CPU reads at a time: more need memory, fewer make more calls."""
ELSEWHERE = 3 << 19
"""The same on other devices, where each call costs a launch."""
Product = Callable[[Tensor, Tensor, Tensor], None]
"""Takes codes and parameters of a block, and where the products go."""
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
    if isinstance(store, AffineStore) and store.direct and store.parts["codes"].length:
        mapped = _mapped(store, rows)
        product = (_channel_product if store.by_channel else _token_product)(store, mapped)
        for first, codes, params in store.affine_blocks(_block(store, rows)):
            n = codes.shape[2] * (codes.shape[3] if codes.ndim == 5 else 1)
            if isinstance(columns, int):
                scores = out[..., columns + first : columns + first + n]
            else:
                scores = out.new_empty((*out.shape[:3], n))
            product(codes, params, scores)
            if store.beside is not None:
                store.beside.add_scores(mapped, scores, first)
            if not isinstance(columns, int):
                _put(out, scores, columns, first)
    if isinstance(store, NamedStore) and store.direct:
        mapped = _mapped(store, rows)
        for first, last, tensors in store.blocks(_block(store, rows)):
            scores = multiplied(store.quantizer, "scores", mapped, tensors, last - first)
            if store.beside is not None:
                scores = scores.clone()
                store.beside.add_scores(mapped, scores, first)
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
    if isinstance(store, AffineStore) and store.direct and store.parts["codes"].length:
        result, room = out if store.chain is None else torch.zeros_like(out), _Room()
        add = _add_by_channel if store.by_channel else _add_by_token
        for first, codes, params in store.affine_blocks(_block(store, out)):
            tokens = codes.shape[2] * (codes.shape[3] if codes.ndim == 5 else 1)
            chosen = _get(weights, columns, first, tokens)
            add(store, chosen, codes, params, result, room)
            if store.beside is not None:
                store.beside.add_values(chosen, result, first)
        if store.chain is not None:
            out += store.chain.inverse(result, None)
    if isinstance(store, NamedStore) and store.direct:
        result = out if store.chain is None else torch.zeros_like(out)
        for first, last, tensors in store.blocks(_block(store, out)):
            chosen = _get(weights, columns, first, last - first)
            result += multiplied(store.quantizer, "combine", chosen, tensors, store.head_dim)
            if store.beside is not None:
                store.beside.add_values(chosen, result, first)
        if store.chain is not None:
            out += store.chain.inverse(result, None)
    for first, x in _dense_blocks(store, out):
        out += _get(weights, columns, first, x.shape[2]) @ x


def _mapped(store: AffineStore | NamedStore, rows: Tensor) -> Tensor:
    """Queries as they are to be multiplied with what is coded."""
    return rows if store.chain is None else store.chain.adjoint(rows)


def _block(store: Store, like: Tensor) -> int:
    """Tokens to read at a time; `like` has the batch, the heads and the channels of the store."""
    most = BLOCK if like.device.type == "cpu" else ELSEWHERE
    width = like.shape[3]
    if isinstance(store, AffineStore):
        groups = 1 if store.by_channel else store.numbers
        if not store.parts["codes"].length or _pieces(store, groups)[1] is not None:  # else all planes at once
            width = plane_width(store.head_dim, store.quantizer.bits)
        most //= 2 if store.by_channel else 1  # queries by group and their products take as much again
    return max(64, most // (width * like.shape[0] * like.shape[1]))


def _dense_blocks(store: Store, like: Tensor) -> Iterator[tuple[int, Tensor]]:
    """What a store holds in no codes, in float32, with the index of each block's first token."""
    if isinstance(store, NamedStore) and store.direct:
        return
    if isinstance(store, AffineStore) and store.direct:
        blocks, before = store.parts["exact"].blocks(), store.parts["codes"].length
    else:
        blocks, before = store.decoded(_block(store, like), torch.float32), 0
    for first, x in blocks:
        yield before + first, as_float(x)


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

    def masked(self, codes: Tensor, masks: Tensor) -> Tensor:
        """The bits of `codes` that are in `masks`."""
        out = self._get(codes.dtype, (len(masks), *codes.shape))
        return self._keep(torch.bitwise_and(codes, masks, out=out))

    def as_float(self, x: Tensor) -> Tensor:
        """Integers as float32."""
        out = self._get(torch.float32, tuple(x.shape))
        return self._keep(x.float()) if out is None else out.copy_(x)

    def _get(self, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor | None:
        size, held = math.prod(shape), self.held.get(dtype)
        if held is None or held.numel() < size:
            return None
        return held if held.shape == shape else held.view(-1)[:size].view(shape)

    def _keep(self, x: Tensor) -> Tensor:
        held = self.held.get(x.dtype)
        if held is None or held.numel() < x.numel():
            self.held[x.dtype] = x
        return x


def as_float(x: Tensor) -> Tensor:
    """`x` as float32: itself, without a call, where it is."""
    return x if x.dtype == torch.float32 else x.float()


def _pieces(store: AffineStore, count: int) -> tuple[int, Tensor | None]:
    """Into how many pieces of neighbouring channels codes are cut, and what each is to be multiplied with, if anything.

    A piece is a plane of the packed codes, left where it lies in its byte, where `count` groups of channels consist of
    whole planes. Else it is a group.

    Returns:
        Their number, and factors `[head_dim]`.
    """
    nbits = store.quantizer.bits
    if not isinstance(nbits, int):
        return count, None
    planes = PIECES.get(nbits, 0)
    if store.levels is None and planes and store.head_dim % planes == 0 and planes % count == 0:
        return planes, _factors(nbits, store.head_dim, store.parts["codes"].pages[0].device)
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
    bits, dim = store.quantizer.bits, store.head_dim
    levels = store.levels_on(codes.device)
    pieces, factors = _pieces(store, count)
    if factors is None:
        whole = unpack(codes, bits, dim) if bits != 8 else codes
        x = whole.unflatten(-1, (count, -1)).permute(-2, *range(whole.ndim - 1), -1)
        yield 0, count, room.as_float(x.contiguous()) if levels is None else looked_up(x, levels)
        return
    assert isinstance(bits, int)
    masks, words = _masks(bits, codes.ndim, codes.device)
    step = pieces if codes.numel() * pieces <= BLOCK else 1
    strides = (*codes.stride()[:-1], codes.storage_offset())
    if codes.shape[-1] % 8 == 0 and codes.stride(-1) == 1 and not any(n % 8 for n in strides):
        codes, masks = codes.view(torch.int64), words  # eight bytes at a time
    for first in range(0, pieces, step):
        plane = room.masked(codes, masks if step == pieces else masks[first : first + step])
        yield first, first + step, room.as_float(plane.view(torch.uint8))


@functools.cache
def _masks(nbits: int, ndim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Of each plane of a byte the bits, and the same for eight bytes, as tensors of `ndim` dimensions and one more."""
    masks = torch.tensor([((1 << nbits) - 1) << shift for shift in range(0, 8, nbits)], dtype=torch.uint8)
    words = masks.repeat_interleave(8).view(torch.int64)
    shape = (-1, *[1] * ndim)
    return masks.view(shape).to(device), words.view(shape).to(device)


@functools.cache
def _factors(nbits: int, head_dim: int, device: torch.device) -> Tensor:
    """What makes the masked bits of each channel a code."""
    factors = torch.tensor([2.0**-shift for shift in range(0, 8, nbits)])
    return factors.repeat_interleave(head_dim // len(factors)).to(device)


def _in_pieces(x: Tensor, pieces: int, factors: Tensor | None = None) -> Tensor:
    """`[..., head_dim]` as `[pieces, ..., channels of a piece]`, each channel multiplied with its factor."""
    if factors is not None:
        x = x * factors
    pieced: Tensor = x.unflatten(-1, (pieces, -1))
    return pieced.permute(-2, *range(x.ndim - 1), -1)


def _joined(x: Tensor, factors: Tensor | None) -> Tensor:
    """The inverse of `_in_pieces` for what was multiplied with the pieces: `[..., head_dim]`."""
    joined = x.permute(*range(1, x.ndim - 1), 0, -1).flatten(-2)
    return joined if factors is None else joined.mul_(factors)


def _multiplied(
    left: Tensor, parts: Iterator[tuple[int, int, Tensor]], pieces: int, across: bool, sums: int | None = None
) -> Tensor:
    """The matrix products of `left`, in as many parts as divide `pieces`, with each piece.

    Args:
        left: `[parts, ..., rows, n]`.
        parts: pieces, some at a time, as `_cut` yields them: `[some, ..., n, columns]`.
        pieces: their number.
        across: whether rows and columns of the pieces change places first.
        sums: into as many the products of neighbouring pieces are added up; by default they are not.

    Returns:
        `[sums or pieces, ..., rows, columns]`.
    """
    sums = sums or pieces
    each, share, found = pieces // len(left), pieces // sums, None
    for first, last, x in parts:
        right = x.transpose(-2, -1) if across else x
        if last - first == pieces:
            product = (left.repeat_interleave(each, 0) if each > 1 else left) @ right
            return product.unflatten(0, (sums, share)).sum(1) if share > 1 else product
        if found is None:
            found = left.new_empty((sums, *left.shape[1:-1], right.shape[-1]))
        own = left[first // each : (last - 1) // each + 1]
        if first % share:  # one at a time
            found[first // share].add_((own @ right)[0])
        else:
            torch.matmul(own, right, out=found[first // share : (last - 1) // share + 1])
    assert found is not None
    return found


def _token_product(store: AffineStore, rows: Tensor) -> Product:
    """Products of `rows` with codes that have scales per token."""
    count = store.numbers
    pieces, factors = _pieces(store, count)
    query, room = _in_pieces(rows, pieces, factors), _Room()
    totals = rows.unflatten(3, (count, -1)).sum(4, keepdim=True).permute(3, 0, 1, 2, 4)

    def product(codes: Tensor, params: Tensor, out: Tensor) -> None:
        found = _multiplied(query, _cut(store, codes, count, room), pieces, True, count)
        scale, offset = store.scales.by_group(params, count)
        found.mul_(scale)
        if offset is not None:
            found.addcmul_(totals, offset)
        torch.sum(found, 0, out=out)

    return product


def _channel_product(store: AffineStore, rows: Tensor) -> Product:
    """Products of `rows` with codes that have scales per channel, alike for a group of tokens."""
    pieces, factors = _pieces(store, 1)
    raised = rows.unsqueeze(2) if factors is None else (rows * factors).unsqueeze(2)
    across, room = rows.transpose(2, 3), _Room()

    def product(codes: Tensor, params: Tensor, out: Tensor) -> None:
        scale, offset = map(as_float, store.scales.split(params, store.head_dim))
        by_group = out.unflatten(3, codes.shape[2:4]).transpose(2, 3)
        if rows.shape[2] < codes.shape[3]:  # fewer rows than tokens of a group: they take its scales, each group apart
            query = _in_pieces(raised * scale, pieces)
            found = _multiplied(query, _cut(store, codes, 1, room), pieces, True, 1)
            by_group.copy_(found[0])
        else:
            scales, query = _in_pieces(scale, pieces), _in_pieces(rows, pieces, factors)
            out.zero_()
            for first, last, x in _cut(store, codes, 1, room):
                y = x.mul_(scales[first:last]).flatten(3, 4)
                out.add_((query[first:last] @ y.transpose(3, 4)).sum(0))
        by_group.add_((offset.squeeze(3) @ across).unsqueeze(4))

    return product


def _add_by_token(store: AffineStore, weights: Tensor, codes: Tensor, params: Tensor, out: Tensor, room: _Room) -> None:
    count = store.numbers
    pieces, factors = _pieces(store, count)
    scale, offset = store.scales.by_group(params, count)
    found = _multiplied(weights * scale, _cut(store, codes, count, room), pieces, False)
    out.add_(_joined(found, factors))
    if offset is not None:
        shares = weights @ offset.squeeze(3).permute(1, 2, 3, 0)
        out.unflatten(3, (count, -1)).add_(shares.unsqueeze(4))


def _add_by_channel(
    store: AffineStore, weights: Tensor, codes: Tensor, params: Tensor, out: Tensor, room: _Room
) -> None:
    pieces, factors = _pieces(store, 1)
    scale, offset = map(as_float, store.scales.split(params, store.head_dim))
    scales = _in_pieces(scale, pieces)
    parts = _cut(store, codes, 1, room)
    scaled = ((first, last, x.mul_(scales[first:last]).flatten(3, 4)) for first, last, x in parts)
    found = _multiplied(weights.unsqueeze(0), scaled, pieces, False)
    out.add_(_joined(found, factors))
    out += weights.unflatten(3, codes.shape[2:4]).sum(4) @ offset.squeeze(3)
