"""Where the keys and the values of a layer lie: runs of neighbouring tokens, kept in one way on each side."""

from __future__ import annotations

import functools
import operator
import struct
from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from kvpolicy.growing import Growing
from kvpolicy.packing import PARTS
from kvpolicy.pages import Pages
from kvpolicy.quantizer import AffineQuantizer
from kvpolicy.store import ExactStore, Store
from kvpolicy.stores import PackedStore, group_size_of

if TYPE_CHECKING:
    from kvpolicy.layer import Tiers

__all__ = ["EXACT", "Format", "Piece", "Run", "format_of", "kind_of", "lay_out", "new_piece", "refuses_store", "run_of"]

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
    kind: str
    tile: int
    """Tokens of a tile."""
    where: bytes
    """The sides, as the kernel reads them."""
    channels: tuple[int, int, int, int]


SIDES = struct.Struct("<6q2i6q2i")


def run_of(at: int, tokens: int, k: Piece, v: Piece) -> Run:
    """A run of two pieces of as many tokens."""
    kind, tile = kind_of(k.form, v.form)
    where = SIDES.pack(
        k.data, k.params, *k.strides, k.token, k.group, v.data, v.params, *v.strides, v.token, v.group
    )  # fmt: skip
    return Run(at, tokens, kind, tile, where, (k.channels[0], v.channels[0], k.channels[1], v.channels[1]))


def refuses_store(spec: object, head_dim: int, side: str) -> str | None:
    """Why a store can't be read by the kernels, or None."""
    if isinstance(spec, str):
        return None
    if not isinstance(spec, AffineQuantizer):
        return f"quantizer {spec.kind!r} is not affine" if hasattr(spec, "kind") else "a store of its own"
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


@functools.lru_cache(maxsize=256)
def kind_of(keys: Format, values: Format) -> tuple[str, int]:
    """A kind as a type of `the headers`, and the tokens of its tiles."""
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


def _pages(part: Pages) -> list[tuple[int, int, int, int, int, int]]:
    """Of each page with tokens: the index of its first, how many, where they lie, bytes per row, head and token."""
    if part.places is None:
        part.places = []
        first, start = 0, part.start
        for page in part.pages:
            _, heads, size, width = page.shape
            n = min(size - start, part.length - first)
            if n > 0:
                token = width * page.element_size()
                part.places.append(
                    (first, n, page.data_ptr() + start * token, heads * size * token, size * token, token)
                )
                first += n
            start = 0
    found: list[tuple[int, int, int, int, int, int]] = part.places
    return found


def _exact(part: Pages, at: int) -> Iterator[Piece]:
    for first, n, data, row, head, token in _pages(part):
        yield Piece(at + first, n, EXACT, data, 0, (row, head, 0, 0), token)


_known: WeakKeyDictionary[Store, tuple[list[Any], list[Piece] | None]] = WeakKeyDictionary()


def pieces(store: Store, form: Format) -> list[Piece] | None:
    """The tokens of a store, counted in its own order; None where groups of tokens are no neighbours.

    The same list as before where nothing has moved.
    """
    places = [_pages(part) for part in store.parts.values()]
    known = _known.get(store)
    if known is not None and len(places) == len(known[0]) and all(map(operator.is_, places, known[0])):
        return known[1]
    found = _pieces(store, form)
    _known[store] = places, found
    return found


def _pieces(store: Store, form: Format) -> list[Piece] | None:
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
        found = [(a, int(array[a]), b - a) for a, b in pairwise(starts) if b > a]
        _stretches[held] = found
    return found


def _part(piece: Piece, skip: int, tokens: int, at: int) -> Piece:
    """Some of a piece's tokens."""
    if not skip and tokens == piece.tokens and at == piece.at:
        return piece
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


_joined: WeakKeyDictionary[Store, tuple[list[Piece], list[Piece], list[Run]]] = WeakKeyDictionary()


def _alike(tiers: Tiers, forms: dict[str, list[Format]]) -> list[Run] | None:
    """The runs of a layer whose stores of keys and values hold the same tokens in the same order."""
    found: list[Run] = []
    at = 0
    for s, (keys, values) in enumerate(zip(tiers.stores["keys"], tiers.stores["values"], strict=True)):
        if keys is None or values is None or not keys.length:
            continue
        k, v = pieces(keys, forms["keys"][s]), pieces(values, forms["values"][s])
        if k is None or v is None:
            return None
        known = _joined.get(keys)
        if known is None or known[0] is not k or known[1] is not v:
            known = _joined[keys] = (k, v, _join(k, v))
        found.extend(run._replace(at=run.at + at) for run in known[2]) if at else found.extend(known[2])
        at += keys.length
    return found


def _by_position(tiers: Tiers, side: str, forms: list[Format]) -> list[Piece] | None:
    """All pieces of a side in order of position."""
    found: list[Piece] = []
    for s, store in enumerate(tiers.stores[side]):
        if store is None:
            continue
        own = pieces(store, forms[s])
        stretches = _stretch(tiers.state.stores[side][s])
        if own is None or len(stretches) > SLICES:
            return None
        for first, position, n in stretches:
            for piece in own:
                lo, hi = max(first, piece.at), min(first + n, piece.at + piece.tokens)
                if lo < hi:
                    found.append(_part(piece, lo - piece.at, hi - lo, position + lo - first))
    return sorted(found, key=lambda piece: piece.at)


def lay_out(tiers: Tiers, forms: dict[str, list[Format]]) -> list[Run] | None:
    """The runs of all that a layer holds; None where keys and values lie in orders that differ too much."""
    if tiers.ragged is not None and not tiers.ragged.aligned:
        return None
    if tiers.ragged is not None or tiers.placement.alike:
        return _alike(tiers, forms)
    keys, values = (_by_position(tiers, side, forms[side]) for side in ("keys", "values"))
    return None if keys is None or values is None else _join(keys, values)


def _join(keys: list[Piece], values: list[Piece]) -> list[Run]:
    runs: list[Run] = []
    i = j = 0
    while i < len(keys) and j < len(values):
        k, v = keys[i], values[j]
        lo, hi = max(k.at, v.at), min(k.at + k.tokens, v.at + v.tokens)
        while lo < hi:
            n = hi - lo
            if k.form.by_channel:  # tiles lie in groups
                tile = min(kind_of(k.form, v.form)[1], k.form.group)
                ahead = (k.group + lo - k.at) % k.form.group % tile
                n = min(n, tile - ahead) if ahead else n
            runs.append(run_of(lo, n, _part(k, lo - k.at, n, lo), _part(v, lo - v.at, n, lo)))
            lo += n
        i, j = i + (k.at + k.tokens <= hi), j + (v.at + v.tokens <= hi)
    return runs
