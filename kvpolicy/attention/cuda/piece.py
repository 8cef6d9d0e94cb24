"""Neighbouring tokens of one side, and pairs of them: keys, and where their values lie."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from kvpolicy.attention.cuda.formats import Format
from kvpolicy.interfaces.backend import SLOT_BITS, Part, Slots

__all__ = ["LAST", "Declined", "Piece", "indices_of", "paired", "some_of"]

LAST = 8
"""Bits of the number of a page, after which that of the last group of it stands."""


class Declined(Exception):
    """A part that the kernels can't serve; its text says why."""


class Piece(NamedTuple):
    """Neighbouring tokens of one side: where they stand among the columns, and where they lie."""

    at: int
    tokens: int
    form: Format
    space: int
    data: int
    """The page; likewise `params`, and the bytes from where it begins."""
    offset: int
    token: int
    """Bytes from token to token."""
    params: int = 0
    params_offset: int = 0
    group: int = 0
    """Per channel: tokens before them in the group that `params_offset` points to. Where tokens have the numbers of
    their groups, `params` are these, and this is the page of scales and offsets; from bit 8 on the last group."""
    first: int = 0
    """Then the bytes before these in their page."""
    by_slot: bool = False
    """Whether an index says which tokens of the page these are. Then `offset` is the bytes before theirs in the index,
    `params_offset` the slot of the first token in the page, and `group` the page of the index; from bit 8 on slots of
    this page, 0 where all lie in it."""


def some_of(piece: Piece, skip: int, tokens: int, at: int) -> Piece:
    """Some of a piece's tokens."""
    if tokens == piece.tokens and at == piece.at:
        return piece
    if piece.by_slot:
        return piece._replace(at=at, tokens=tokens, offset=piece.offset + 4 * skip)
    form, offset, group = piece.form, piece.params_offset, piece.group
    if form.by_channel and not form.numbered:
        group += skip
        offset += group // form.group * form.params
        group %= form.group
    elif form.bits < 16:
        offset += skip * form.params
    data = piece.offset + skip * piece.token
    return piece._replace(at=at, tokens=tokens, offset=data, params_offset=offset, group=group)


def indices_of(part: Part) -> list[Tensor]:
    """The index of each view of keys that says where their values lie, if there are any."""
    return [found.places for found in part.slots()] if part.slots is not None else []


def paired(
    keys: list[list[Piece]], values: list[list[Piece]], part: Part, first_page: int
) -> Iterator[tuple[Piece, Piece]]:
    """Keys, in columns store by store, and their values: neighbours, or those that an index says.

    Some keys stand in several pairs: each of their values lies in the page of one.

    Args:
        keys: of each view the pieces, in its order.
        values: likewise.
        part: the part, which has slots.
        first_page: the number of the page that is the index of the first view of keys; then come the others.
    """
    assert part.slots is not None
    before = 0
    for page, (slots, own) in enumerate(zip(part.slots(), keys, strict=True), first_page):
        for k in own:
            for number, pieces in zip(part.numbers, values, strict=True):
                for v in pieces:
                    for pair in _pairs(k, v, slots, (number << SLOT_BITS) + v.at, page, before):
                        if part.gaps and pair[1].by_slot and pair[1].params_offset < 0:
                            raise Declined("gaps, whose slot -1 would be one of a page whose first tokens have gone")
                        yield pair
        before += sum(k.tokens for k in own)


def _pairs(k: Piece, v: Piece, slots: Slots, slot: int, page: int, before: int) -> Iterator[tuple[Piece, Piece]]:
    """Those keys of a piece whose values lie in a piece, and these.

    Args:
        k: keys, counted in their store.
        v: values.
        slots: of the store of keys.
        slot: that of the first of the values.
        page: that of the index of the keys.
        before: the column of the first key of the store.
    """
    spans: list[tuple[int, int, bool]] = []
    at = 0
    for tokens, ranges, together in slots.segments:
        lo, hi = max(at, k.at), min(at + tokens, k.at + k.tokens)
        if lo < hi and together:
            shift = ranges[0][0] - slot - at
            lo, hi = max(lo, -shift), min(hi, v.tokens - shift)
            if lo < hi:
                yield (
                    some_of(k, lo - k.at, hi - lo, before + lo),
                    some_of(v, lo + shift, hi - lo, before + lo),
                )
        elif lo < hi and any(first < slot + v.tokens and slot < last for first, last in ranges):
            every = len(ranges) == 1 and slot <= ranges[0][0] and ranges[0][1] <= slot + v.tokens
            if spans and spans[-1][1:] == (lo, every):
                lo = spans.pop()[0]
            spans.append((lo, hi, every))
        at += tokens
    for lo, hi, every in spans:
        found = some_of(k, lo - k.at, hi - lo, before + lo)
        yield found, _by_slot(v, slot, page, every)._replace(at=found.at, tokens=hi - lo, offset=4 * lo)


def _by_slot(v: Piece, slot: int, page: int, every: bool) -> Piece:
    """Any of the values of a piece."""
    skipped = v.offset // v.token
    scales = 0 if v.form.bits == 16 else skipped * v.form.params
    if v.offset % v.token or v.params_offset != scales:
        raise Declined("scales that do not lie as their codes do")
    last = skipped + v.tokens  # of the page
    if page >= 1 << LAST or last >= 1 << (31 - LAST):
        raise Declined(f"slots of {last} tokens in page {page}")
    group = page | (0 if every else last << LAST)
    return v._replace(params_offset=slot - skipped, group=group, by_slot=True)
