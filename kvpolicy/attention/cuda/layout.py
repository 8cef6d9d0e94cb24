"""Where the keys and values of a part lie: runs of neighbouring tokens, kept in one way on each side.

What is found depends on how many tokens lie in which pages, and on no address: it is the same for all layers of a step.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor

from kvpolicy.attention.cuda.formats import EXACT, Format, affine_form, kind_of, refuses_store
from kvpolicy.attention.cuda.kernel import large_tiles
from kvpolicy.attention.cuda.piece import LAST, Declined, Piece, indices_of, paired, some_of
from kvpolicy.interfaces.backend import Part, StoreView
from kvpolicy.storage.affine import AffineStore
from kvpolicy.storage.pages import Pages
from kvpolicy.storage.read import parts_read

__all__ = ["MAPS", "Declined", "Kind", "Laid", "Run", "lay_out", "pages_of", "scan", "width_of"]

MAPS = 4
"""Spaces of keys, and of values, at most: the model's own, and those of transforms."""
MANY, LONG = 400_000, 1024
"""Tokens of all rows and heads, and of one, from which on tiles are larger: each warp has some of them even so."""
PAGE, SIDES = struct.Struct("<2q"), struct.Struct("<12i")
Key = tuple[Any, ...]


class Kind(NamedTuple):
    """Runs that one piece of a kernel serves."""

    name: str
    query: int
    """Which queries it takes: 0 the model's, or those mapped by the transforms of a store."""
    space: int
    """Which output its values add to, likewise."""


class Run(NamedTuple):
    """Tokens of one kind, and their places in both sides."""

    at: int
    tokens: int
    kind: Kind
    tile: int
    """Tokens of a tile."""
    where: bytes
    """The sides, as the kernel reads them."""


class Laid(NamedTuple):
    """All runs of a part; those of its new tokens are the last."""

    runs: list[Run]
    pages: list[bytes]
    """Bytes from row to row and head to head of each page."""
    maps: tuple[list[int], list[int]]
    """The views of keys, and of values, whose transforms make a space, from number 1 on."""
    many: bool
    """Whether tiles may be larger."""


def pages_of(store: Any) -> tuple[Pages, ...]:
    """The parts of a store that kernels read, in the order in which their pages are counted.

    Raises:
        Declined: it is no store that they know.
    """
    found = parts_read(store)
    if found is not None:
        return found
    raise Declined(f"a store of {type(store).__name__}")


def scan(part: Part) -> tuple[Key, list[int]]:
    """What the layout of a part depends on, and where its pages lie."""
    key: list[Any] = []
    pointers: list[int] = []
    for side in (part.keys, part.values):
        for store, columns, stretches in side:
            if part.slots is None:
                key.append(columns if isinstance(columns, int) else stretches() if stretches else None)
            every = pages_of(store)
            if isinstance(store, AffineStore):
                key += store.format, store.quantizer.offsets, store.quantizer.scale_dtype, store.chain is None
                key.append(_coded(store))
            for pages in every:
                marks, addresses = pages.marks
                key.append(marks)
                pointers += addresses
            held = every[-1].pages
            if held:
                key += held[0].dtype, held[0].get_device()
        key.append(None)
    if part.slots is not None:
        key.append(part.numbers)
        for index, segments in part.slots():
            pointers.append(index.data_ptr())
            key += index.shape, index.stride(), segments
    for x in part.new or ():
        pointers.append(x.data_ptr())
        key += x.dtype, x.shape, x.stride()
    return tuple(key), pointers


def _coded(store: AffineStore) -> Key:
    """What of a store of codes decides how they are read."""
    coded = store.parts["codes"].length
    if not coded:
        return ()
    form = affine_form(store)
    whole = not form.by_channel or form.numbered or (store.grouped and coded == len(store.groups.sizes) * form.group)
    return form, whole, store.chain is None or store.chain.linear, store.parts["codes"].pages[0].get_device()


def lay_out(part: Part, like: Tensor) -> Laid:
    """The runs of a part, and its pages in the order of `scan`.

    Args:
        part: what is to be attended.
        like: of the type that exact tokens must have, and on the device.

    Raises:
        Declined: some of its stores can't be read, or keys and values lie in orders that differ too much.
    """
    pages: list[bytes] = []
    maps: tuple[list[int], list[int]] = ([], [])
    sides: list[list[list[Piece]]] = []
    for name, views, own in zip(("keys", "values"), (part.keys, part.values), maps, strict=True):
        found: list[list[Piece]] = []
        for number, view in enumerate(views):
            reason = refuses_store(view.store, name)
            if reason is not None:
                raise Declined(f"{name}: {reason}")
            space = 0
            if isinstance(view.store, AffineStore) and view.store.chain is not None:
                own.append(number)
                space = len(own)
            found.append(list(_pieces(view.store, space, len(pages), like)))
            pages.extend(_strides(view.store, len(pages)))
        sides.append(found)
    if max(map(len, maps)) >= MAPS:
        raise Declined(f"more than {MAPS - 1} stores of a side with transforms")
    numbered = [piece.form for own in sides[0] for piece in own if piece.form.numbered]
    if len(set(numbered)) < len(numbered):
        raise Declined("several stores whose tokens have the numbers of their groups")
    width = width_of(part)
    many = width >= LONG and like.shape[0] * part.kv_heads * width >= MANY and large_tiles(like.get_device())
    runs = list(_runs(sides[0], sides[1], part, len(pages), many))
    pages.extend(PAGE.pack(*_apart(index)) for index in indices_of(part))
    if part.new is not None:
        new = [_new_piece(x, width, len(pages) + i) for i, x in enumerate(part.new)]
        runs += _join([new[0]], [new[1]], many)
        pages.extend(PAGE.pack(*(x.element_size() * n for n in x.stride()[:2])) for x in part.new)
    if not runs:
        raise Declined("no tokens")
    return Laid(runs, pages, maps, many)


def width_of(part: Part) -> int:
    """Columns of the tokens that are held, as runs count them: where there are slots, those of keys store by store."""
    return part.width if part.slots is None else sum(view.store.length for view in part.keys)


def _runs(keys: list[list[Piece]], values: list[list[Piece]], part: Part, first_page: int, many: bool) -> Iterator[Run]:
    """The runs of the tokens that are held, of which each view has some pieces; see `paired`."""
    if part.slots is not None:
        for k, v in paired(keys, values, part, first_page):
            yield from _join([k], [v], many)
        return
    sides = []
    for views, pieces in ((part.keys, keys), (part.values, values)):
        placed = (piece for view, own in zip(views, pieces, strict=True) for piece in _placed(own, view))
        sides.append(sorted(placed, key=lambda piece: piece.at))
    runs = list(_join(sides[0], sides[1], many))
    if sum(run.tokens for run in runs) < part.width:
        raise Declined("keys and values of other tokens")
    yield from runs


def _apart(index: Tensor) -> list[int]:
    """Bytes from row to row and head to head of an index."""
    steps = zip(index.stride()[:-1], index.shape[:-1], strict=True)
    return [index.element_size() * step if size > 1 else 0 for step, size in steps] or [0, 0]


def _strides(store: Any, first: int) -> Iterator[bytes]:
    """Bytes from row to row and head to head of each page; `first` is the number of the first."""
    for pages in pages_of(store):
        front = pages.front
        if front is not None:
            if front.length > front.counts.max():
                raise Declined("empty places of rows that were taken out")
            yield PAGE.pack(-(first + 1), front.flat.shape[1] * front.flat.element_size())
            yield PAGE.pack(0, 0)
        first += _count(pages)
        for page in pages.pages:
            _, own, size, width = page.shape
            head = size * width * page.element_size()
            yield PAGE.pack(own * head, head if own > 1 else 0)


def _new_piece(x: Tensor, at: int, page: int) -> Piece:
    return Piece(at, x.shape[2], EXACT, 0, page, 0, x.element_size() * x.stride(2))


def _count(pages: Pages) -> int:
    """How many pages kernels count: those of a `Front` are its tokens, and where each row and head begins."""
    return len(pages.pages) + (0 if pages.front is None else 2)


def _blocks(pages: Pages, first: int) -> Iterator[tuple[int, int, int, int]]:
    """Of each page with tokens: the index of its first, how many, the number of the page, the bytes before them."""
    at, start = 0, pages.start
    if pages.front is not None:
        yield 0, pages.front.length, first, 0
        at, first = pages.front.length, first + 2
    for number, page in enumerate(pages.pages, first):
        n = min(page.shape[2] - start, pages.length - at)
        if n > 0:
            yield at, n, number, start * page.shape[3] * page.element_size()
            at += n
        start = 0


def _pieces(store: Any, space: int, first: int, like: Tensor) -> Iterator[Piece]:
    """The tokens of a store, counted in its own order; `first` is the number of its first page."""
    every = pages_of(store)
    for held in (page for pages in every for page in pages.pages):
        if held.device != like.device:
            raise Declined(f"tokens on {held.device}, queries on {like.device}")
    coded = 0
    if isinstance(store, AffineStore) and every[0].length:
        codes, params = every[:2]
        coded, form = codes.length, affine_form(store)
        if space and store.chain is not None and not store.chain.linear:
            raise Declined("transforms that queries can't go through")
        if form.numbered:
            yield _numbered(every, form, space, first)
        elif form.by_channel:
            if not store.grouped or coded != len(store.groups.sizes) * form.group:
                raise Declined("groups of tokens that are no neighbours, or not whole")
            yield from _by_channel(codes, params, form, space, first)
        else:
            scales = _blocks(params, first + _count(codes))
            for (at, n, page, offset), (_, same, own, own_offset) in zip(_blocks(codes, first), scales, strict=True):
                assert n == same
                yield Piece(at, n, form, space, page, offset, form.row, own, own_offset)
    exact = every[-1]
    if exact.pages and exact.pages[0].dtype != like.dtype:
        raise Declined(f"exact tokens in {exact.pages[0].dtype}, queries in {like.dtype}")
    for at, n, page, offset in _blocks(exact, first + sum(map(_count, every[:-1]))):
        width = exact.pages[0].shape[3] * exact.pages[0].element_size()
        yield Piece(coded + at, n, EXACT, 0, page, offset, width)


def _numbered(every: tuple[Pages, ...], form: Format, space: int, first: int) -> Piece:
    """The codes of a store whose tokens have the numbers of their groups."""
    codes, params, numbers = every[:3]
    if any(len(pages.pages) != 1 for pages in every[:3]) or codes.start or numbers.start:
        raise Declined("numbers of groups in several pages")
    page = params.pages[0]
    before = params.start * page.shape[3] * page.element_size()
    if first + 1 >= 1 << LAST:
        raise Declined(f"scales of groups in page {first + 1}")
    groups = first + 1 | params.length - 1 << LAST
    return Piece(0, codes.length, form, space, first, 0, form.row, first + 2, 0, groups, before)


def _by_channel(codes: Pages, params: Pages, form: Format, space: int, first: int) -> Iterator[Piece]:
    size = form.group
    groups = list(_blocks(params, first + len(codes.pages)))
    for at, n, page, offset in _blocks(codes, first):
        for group, count, own, own_offset in groups:
            lo, hi = max(at, group * size), min(at + n, (group + count) * size)
            if lo < hi:
                where = own_offset + (lo // size - group) * form.params
                data = offset + (lo - at) * form.row
                yield Piece(lo, hi - lo, form, space, page, data, form.row, own, where, lo % size)


def _placed(found: list[Piece], view: StoreView) -> Iterator[Piece]:
    """Pieces of a store where its tokens stand among the columns."""
    if isinstance(view.columns, int):
        yield from (piece._replace(at=piece.at + view.columns) for piece in found) if view.columns else found
        return
    stretches = view.stretches() if view.stretches else None
    if stretches is None:
        raise Declined("tokens that stand in columns that the host does not know")
    for first, column, n in stretches:
        for piece in found:
            lo, hi = max(first, piece.at), min(first + n, piece.at + piece.tokens)
            if lo < hi:
                yield some_of(piece, lo - piece.at, hi - lo, column + lo - first)


def _join(keys: list[Piece], values: list[Piece], many: bool) -> Iterator[Run]:
    i = j = 0
    while i < len(keys) and j < len(values):
        k, v = keys[i], values[j]
        lo, hi = max(k.at, v.at), min(k.at + k.tokens, v.at + v.tokens)
        while lo < hi:
            n = hi - lo
            if k.form.by_channel and not k.form.numbered:  # tiles lie in groups
                tile = min(kind_of(k.form, v.form)[1], k.form.group)
                ahead = (k.group + lo - k.at) % k.form.group % tile
                n = min(n, tile - ahead) if ahead else n
            yield _run(some_of(k, lo - k.at, n, lo), some_of(v, lo - v.at, n, lo), many)
            lo += n
        i, j = i + (k.at + k.tokens <= hi), j + (v.at + v.tokens <= hi)


def _run(k: Piece, v: Piece, many: bool) -> Run:
    name, tile = kind_of(k.form, v.form, v.by_slot, many)
    where = SIDES.pack(
        k.data, k.params, k.offset, k.params_offset, k.first if k.form.numbered else k.token, k.group,
        v.data, v.params, v.offset, v.params_offset, v.token, v.group,
    )  # fmt: skip
    return Run(k.at, k.tokens, Kind(name, k.space, v.space), tile, where)
