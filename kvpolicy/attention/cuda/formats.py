"""How the numbers of a store are kept, in the words of the kernels."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch

from kvpolicy.storage.affine import AffineStore
from kvpolicy.storage.packing import PARTS

__all__ = ["EXACT", "Format", "affine_form", "is_large", "kind_of", "kinds_of", "refuses_store", "weight_of"]

NUMBERS = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}
SMALL = {"float8_e4m3": 3}
"""Of scales that are kept as bytes."""
SIZES = (2, 2, 4, 1)
LARGE = 48
"""Bytes of a token's codes and scales, on one side, of which shared memory holds larger tiles in three stages."""


class Format(NamedTuple):
    """How numbers are kept: what of a kind of the kernel belongs to one side."""

    bits: int = 16
    group: int = 0
    by_channel: bool = False
    number: int = 0
    """The type of scale and offset: 0 float16, 1 bfloat16, 2 float32, 3 float8_e4m3, -1 one that kernels can't read; 4
    more without offsets, where levels are symmetric to zero."""
    dim: int = 0
    """Channels of a token; 0 where they are exact."""
    numbered: bool = False
    """Per channel: whether tokens have the numbers of their groups, which lie anyhow."""

    @property
    def row(self) -> int:
        """Bytes of a token's codes."""
        return sum(self.dim * bits // 8 for bits, _ in PARTS[self.bits])

    @property
    def params(self) -> int:
        """Bytes of the scales and offsets of a token, or of a group of tokens, or of the number of a token's group."""
        if self.numbered:
            return 4
        own = (self.dim if self.by_channel else self.dim // self.group) * SIZES[self.number % 4]
        return own if self.number >= 4 else 2 * own


EXACT = Format()
_forms: WeakKeyDictionary[AffineStore, Format] = WeakKeyDictionary()


def affine_form(store: AffineStore) -> Format:
    """The format of what a store has coded; it must hold some."""
    found, numbered = _forms.get(store), store.by_channel and store.groups.numbers is not None
    if found is None or found.numbered != numbered:
        small = SMALL.get(store.quantizer.scale_dtype)
        number = NUMBERS.get(store.parts["params"].pages[0].dtype, -1) if small is None else small
        number += 0 if store.quantizer.offsets or number < 0 else 4
        group = 0 if numbered else store.group_size
        found = Format(store.quantizer.nbits, group, store.by_channel, number, store.head_dim, numbered)
        _forms[store] = found
    return found


def refuses_store(store: Any, side: str) -> str | None:
    """Why a store of packed codes can't be read by the kernels, or None."""
    if not isinstance(store, AffineStore):
        return None
    quantizer, dim, group = store.quantizer, store.head_dim, store.group_size
    if quantizer.scale_dtype not in ("model", "float32", *SMALL):
        return f"scales in {quantizer.scale_dtype}"
    if not isinstance(quantizer.bits, int):
        return "codes of several widths"
    middle = (2**quantizer.nbits - 1) / 2
    if store.scales.origin != (0.0 if quantizer.offsets else -middle) or (store.by_channel and not quantizer.offsets):
        return "scales without offsets, or levels"
    if not store.by_channel:
        return _misfit(quantizer.nbits, group, dim)
    if side == "values":
        return "values per channel"
    if store.groups.numbers is None and (group == 0 or group % 16):
        return "keys per channel in groups that are no multiple of 16 tokens"
    if any(dim * bits // 8 % 4 for bits, _ in PARTS[quantizer.nbits]):
        return "codes of a plane that fill no words"
    return None


@functools.lru_cache(maxsize=256)
def _misfit(nbits: int, group: int, dim: int) -> str | None:
    for bits, _ in PARTS[nbits]:
        width = dim * bits // 8
        if dim * bits % 8:
            return f"{dim} channels that fill no bytes"
        for first in range(0, dim, width):
            for chunk in range(first, first + width, 16):
                if chunk // group != (min(chunk + 16, first + width) - 1) // group:
                    return f"groups of {group} channels in which 16 of {dim} don't fit"
    return None


@functools.lru_cache(maxsize=256)
def kind_of(keys: Format, values: Format, by_slot: bool = False, many: bool = False) -> tuple[str, int]:
    """A kind as a type of the headers, and the tokens of its tiles; values may lie where an index says.

    Of `many` tokens per token tiles are larger where registers allow it, and shared memory several of them: what a tile
    costs besides is paid for more tokens.
    """
    halves = keys.by_channel and not keys.numbered and keys.group % 32 and keys.group != 16
    # more numbers than registers
    large = any(form.bits == 3 and form.dim > 128 for form in (keys, values))
    large = large or (keys.by_channel and keys.dim > 128 and (by_slot or keys.numbered))
    large = large or (keys.numbered and keys.bits == 3 and keys.dim % 128 > 0)
    tile = 16 if 16 in (keys.bits, values.bits) or halves or large else 32
    if many and tile == 32 and not keys.by_channel and not by_slot and _small(keys) and _small(values):
        tile = 64
    names = []
    for form, side in ((keys, "Keys"), (values, "Values")):
        if form.bits == 16:
            names.append(f"Exact{side}<{tile}>")
        elif form.numbered:
            names.append(f"GroupKeys<{form.bits}, {form.number}, {tile}>")
        else:
            by = "Channel" if form.by_channel else "Token"
            names.append(f"{by}{side}<{form.bits}, {form.group}, {form.number}, {tile}>")
    if by_slot:
        names[1] = f"Slots<{names[1]}>"
    return f"Pair<{names[0]}, {names[1]}, {tile}>", tile


def _small(form: Format) -> bool:
    """Whether larger tiles of a side find room."""
    return form.bits <= 2 and form.dim <= 128 and form.row + form.params <= LARGE


def kinds_of(pairs: Any) -> tuple[str, ...]:
    """The kinds that a kernel is compiled for that serves these pairs of formats, and new tokens."""
    return tuple(sorted({kind_of(keys, values)[0] for keys, values in [(EXACT, EXACT), *pairs]}))


def is_large(kind: str) -> bool:
    """Whether its tiles have twice as many tokens as others."""
    return kind.endswith(", 64>")


@functools.lru_cache(maxsize=256)
def weight_of(kind: str) -> int:
    """What a tile costs, about: with exact tokens there are more bytes, and fewer tiles on their way."""
    return 8 if kind.count("Exact") == 2 or is_large(kind) else 6 if "Exact" in kind else 4
