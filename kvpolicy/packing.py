"""Integer codes in bytes, plane by plane, and their decoding.

A code of `nbits` bits is cut into parts of 1, 2, 4 or 8 bits (3 bits: the lower two, then the upper one). Of a
part, byte j holds channels j, j + w, j + 2w, ... with `w` the number of bytes, the first in the lowest bits: with
2 bits and 128 channels byte j holds channels j, j + 32, j + 64, j + 96. So each plane `(bytes >> shift) & mask`
is a contiguous run of channels, and nothing is ever interleaved.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["dequantize", "pack", "packed_width", "unpack"]

PARTS = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 8: (8,)}
"""Bits of the parts of a code, lowest first."""

BLOCK_ELEMENTS = 1 << 17
"""Numbers decoded at a time: with their scratch they stay in a core's L2 cache."""


def _width(head_dim: int, bits: int) -> int:
    return -(-head_dim * bits // 8)


def packed_width(head_dim: int, nbits: int) -> int:
    """Bytes of the packed codes of `head_dim` channels."""
    return sum(_width(head_dim, bits) for bits in PARTS[nbits])


def _planes(head_dim: int, bits: int) -> Iterator[tuple[int, int, int]]:
    """Shift, first and last + 1 channel of each plane of a part."""
    width = _width(head_dim, bits)
    for plane, first in enumerate(range(0, head_dim, width)):
        yield plane * bits, first, min(first + width, head_dim)


def pack(codes: Tensor, nbits: int) -> Tensor:
    """Pack `codes`, uint8 in `[0, 2**nbits)`, along their last dimension."""
    head_dim, low, parts = codes.shape[-1], 0, []
    for bits in PARTS[nbits]:
        width = _width(head_dim, bits)
        part = codes.new_zeros((*codes.shape[:-1], width))
        for shift, first, last in _planes(head_dim, bits):
            plane = (codes[..., first:last] >> low) & ((1 << bits) - 1)
            part[..., : last - first] |= plane << shift
        parts.append(part)
        low += bits
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def unpack(packed: Tensor, nbits: int, head_dim: int) -> Tensor:
    """The inverse of `pack`: uint8 codes of `head_dim` channels."""
    codes = packed.new_zeros((*packed.shape[:-1], head_dim))
    low = start = 0
    for bits in PARTS[nbits]:
        part = packed[..., start : start + _width(head_dim, bits)]
        for shift, first, last in _planes(head_dim, bits):
            codes[..., first:last] |= ((part[..., : last - first] >> shift) & ((1 << bits) - 1)) << low
        start += part.shape[-1]
        low += bits
    return codes


def dequantize(packed: Tensor, nbits: int, head_dim: int, scale: Tensor, offset: Tensor, out: Tensor) -> None:
    """Write `scale * code + offset` into `out`.

    Args:
        packed: packed codes, uint8 `[..., packed_width(head_dim, nbits)]`.
        nbits: bits per code.
        head_dim: channels.
        scale: `[..., P]` where P divides `head_dim`: each covers `head_dim // P` consecutive channels. The
            leading dimensions broadcast against those of `packed`.
        offset: like `scale`.
        out: any float dtype, `[..., head_dim]` with the leading dimensions of `packed`; need not be contiguous.
    """
    codes = unpack(packed, nbits, head_dim)
    groups = scale.shape[-1]
    x = codes.unflatten(-1, (groups, -1)).float() * scale.float().unsqueeze(-1) + offset.float().unsqueeze(-1)
    out.copy_(x.flatten(-2))
