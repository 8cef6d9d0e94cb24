"""Where the keys and the values of a layer lie: runs of neighbouring tokens, kept in one way on each side."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from kvpolicy.growing import Growing
from kvpolicy.pages import Pages
from kvpolicy.packing import PARTS
from kvpolicy.quantizer import AffineQuantizer
from kvpolicy.store import ExactStore, Store
from kvpolicy.stores import PackedStore, group_size_of

if TYPE_CHECKING:
    from kvpolicy.layer import Tiers

__all__ = ["EXACT", "Format", "Piece", "Run", "format_of", "kind_of", "lay_out", "new_piece", "refuses_store"]

NUMBERS = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}
SLICES = 64
"""Stretches of positions that a store may have where its two sides differ."""


class Format(NamedTuple):
    """How numbers are kept: what of a kind of the kernel belongs to one side."""

    bits: int = 16
    group: int = 0
    by_channel: bool = False
    number: int = 0
    """The type of scale and offset: 0 float16, 1 bfloat16, 2 float32."""


EXACT = Format()


class Piece(NamedTuple):
    """Neighbouring tokens of one side: where they stand among all, and where they lie."""

    at: int
    tokens: int
    form: Format
    data: int
    params: int
    strides: tuple[int, int, int, int]
    """Bytes from row to row and from head to head: of the data, and of scales and offsets."""
    token: int
    """Bytes from token to token."""
    group: int = 0
    """Per channel: tokens before them in the group that `params` points to."""
    channels: tuple[int, int] = (0, 0)
    """Where it lies what each channel was divided by, or 0; and bytes from head to head of that."""


class Run(NamedTuple):
    """Tokens of one kind, and their places in both sides."""

    at: int
    tokens: int
    keys: Piece
    values: Piece


def refuses_store(spec: object, head_dim: int, side: str) -> str | None:
    """Why a store can't be read by the kernels, or None."""
    if isinstance(spec, str):
        return None
    if not isinstance(spec, AffineQuantizer):
        return f"quantizer {spec.kind!r} is not affine" if hasattr(spec, "kind") else "a store of its own"  # type: ignore[attr-defined]
    group = group_size_of(spec, head_dim)
    if spec.per == "channel":
        if side == "values":
            return "values per channel"
        if group == 0 or group % 16:
            return "keys per channel in groups that are no multiple of 16 tokens"
        return "odd widths of codes" if any(head_dim * bits // 8 % 4 for bits, _ in PARTS[spec.nbits]) else None
    for bits, _ in PARTS[spec.nbits]:
        width = head_dim * bits // 8
        for first in range(0, head_dim, width):
            for chunk in range(first, first + width, 16):
                if chunk // group != (min(chunk + 16, first + width) - 1) // group:
                    return f"groups of {group} channels in which 16 of {head_dim} don't fit"
    return None


def format_of(spec: object, head_dim: int, dtype: torch.dtype) -> Format:
    """The format of a store that is not refused."""
    if not isinstance(spec, AffineQuantizer):
        return EXACT
    number = NUMBERS[torch.float32 if spec.scale_dtype == "float32" else dtype]
    return Format(spec.nbits, group_size_of(spec, head_dim), spec.per == "channel", number)


def kind_of(keys: Format, values: Format) -> tuple[str, int]:
    """A kind as a type of `attend.cuh`, and the tokens of its tiles."""
    tile = 16 if 16 in (keys.bits, values.bits) or (keys.by_channel and keys.group % 32 and keys.group != 16) else 32
    names = []
    for form, side in ((keys, "Keys"), (values, "Values")):
        if form.bits == 16:
            names.append(f"Exact{side}<{tile}>")
        else:
            by = "Channel" if form.by_channel else "Token"
            names.append(f"{by}{side}<{form.bits}, {form.group}, {form.number}, {tile}>")
    return f"Pair<{names[0]}, {names[1]}, {tile}>", tile


def new_piece(x: Tensor, at: int) -> Piece:
    """Tokens of the model, `[batch, kv_heads, tokens, head_dim]`."""
    row, head, token = (2 * n for n in x.stride()[:3])
    return Piece(at, x.shape[2], EXACT, x.data_ptr(), 0, (row, head, 0, 0), token)


def _pages(part: Pages) -> Iterator[tuple[int, int, int, int, int, int]]:
    """Of each page with tokens: the index of its first, how many, where they lie, bytes per row, head and token."""
    first, start = 0, part.start
    for page in part.pages:
        _, heads, size, width = page.shape
        n = min(size - start, part.length - first)
        if n > 0:
            token = width * page.element_size()
            yield first, n, page.data_ptr() + start * token, heads * size * token, size * token, token
            first += n
        start = 0


def _exact(part: Pages, at: int) -> Iterator[Piece]:
    for first, n, data, row, head, token in _pages(part):
        yield Piece(at + first, n, EXACT, data, 0, (row, head, 0, 0), token)


def pieces(store: Store, form: Format) -> list[Piece] | None:
    """The tokens of a store, counted in its own order; None where groups of tokens are no neighbours."""
    if isinstance(store, ExactStore):
        return list(_exact(store.parts["exact"], 0))
    assert isinstance(store, PackedStore)
    codes, params = store.parts["codes"], store.parts["params"]
    if store.by_channel:
        if not store.grouped or not (store.sizes == form.group).all():
            return None
        found = list(_by_channel(codes, params, form))
    else:
        channels = store.channels
        divisor = (0, 0) if channels is None else (channels.data_ptr(), channels.stride(1) * channels.element_size())
        found = [
            Piece(first, n, form, data, scales, (row, head, row2, head2), token, 0, divisor)
            for (first, n, data, row, head, token), (_, _, scales, row2, head2, _) in zip(
                _pages(codes), _pages(params), strict=True
            )
        ]
    found.extend(_exact(store.parts["exact"], codes.length))
    return found


def _by_channel(codes: Pages, params: Pages, form: Format) -> Iterator[Piece]:
    size = form.group
    groups = list(_pages(params))
    for first, n, data, row, head, token in _pages(codes):
        for group, count, scales, row2, head2, width in groups:
            lo, hi = max(first, group * size), min(first + n, (group + count) * size)
            if lo < hi:
                where = scales + (lo // size - group) * width
                strides = (row, head, row2, head2)
                yield Piece(lo, hi - lo, form, data + (lo - first) * token, where, strides, token, lo % size)


_stretches: WeakKeyDictionary[Growing, list[tuple[int, int, int]]] = WeakKeyDictionary()


def _stretch(held: Growing) -> list[tuple[int, int, int]]:
    """The neighbouring positions in a store: index of the first, its position, how many."""
    found = _stretches.get(held)
    if found is None:
        array = held.array
        cuts = np.flatnonzero(np.diff(array) != 1) + 1 if len(array) else np.empty(0, dtype=np.int64)
        starts = [0, *cuts.tolist(), len(array)]
        found = [(a, int(array[a]), b - a) for a, b in zip(starts, starts[1:], strict=False) if b > a]
        _stretches[held] = found
    return found


def _part(piece: Piece, skip: int, tokens: int, at: int) -> Piece:
    """Some of a piece's tokens."""
    form, params, group = piece.form, piece.params, piece.group + skip
    if form.by_channel:
        number = 2 if form.number < 2 else 4
        head_dim = piece.token * 8 // form.bits
        params += group // form.group * 2 * head_dim * number
        group %= form.group
    elif form.bits < 16:
        params += skip * _width(piece)
        group = 0
    return piece._replace(
        at=at, tokens=tokens, data=piece.data + skip * piece.token, params=params, group=group if form.by_channel else 0
    )


def _width(piece: Piece) -> int:
    """Bytes of scale and offset of a token."""
    form = piece.form
    head_dim = piece.token * 8 // form.bits
    return head_dim // form.group * 2 * (2 if form.number < 2 else 4)


def _side(tiers: Tiers, side: str, forms: list[Format]) -> list[Piece] | None:
    """All pieces of a side in the order of both: by position, or, where sides are alike, by store."""
    found: list[Piece] = []
    alike = tiers.ragged is not None or tiers.placement.alike
    at = 0
    for s, store in enumerate(tiers.stores[side]):
        if store is None:
            continue
        own = pieces(store, forms[s])
        if own is None:
            return None
        if alike:
            found.extend(piece._replace(at=piece.at + at) for piece in own)
            at += store.length
            continue
        stretches = _stretch(tiers.state.stores[side][s])
        if len(stretches) > SLICES:
            return None
        for first, position, n in stretches:
            for piece in own:
                lo, hi = max(first, piece.at), min(first + n, piece.at + piece.tokens)
                if lo < hi:
                    found.append(_part(piece, lo - piece.at, hi - lo, position + lo - first))
    return found if alike else sorted(found, key=lambda piece: piece.at)


def lay_out(tiers: Tiers, forms: dict[str, list[Format]]) -> list[Run] | None:
    """The runs of all that a layer holds; None where keys and values lie in orders that differ too much."""
    if tiers.ragged is not None and not tiers.ragged.aligned:
        return None
    keys, values = _side(tiers, "keys", forms["keys"]), _side(tiers, "values", forms["values"])
    if keys is None or values is None:
        return None
    runs: list[Run] = []
    i = j = 0
    while i < len(keys) and j < len(values):
        k, v = keys[i], values[j]
        lo, hi = max(k.at, v.at), min(k.at + k.tokens, v.at + v.tokens)
        while lo < hi:
            n = hi - lo
            if k.form.by_channel:  # tiles lie in groups
                tile = kind_of(k.form, v.form)[1]
                ahead = (k.group + lo - k.at) % k.form.group % min(tile, k.form.group)
                n = min(n, min(tile, k.form.group) - ahead) if ahead else n
            runs.append(Run(lo, n, _part(k, lo - k.at, n, lo), _part(v, lo - v.at, n, lo)))
            lo += n
        i, j = i + (k.at + k.tokens <= hi), j + (v.at + v.tokens <= hi)
    return runs
