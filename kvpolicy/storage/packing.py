"""Integer codes in bytes, plane by plane, and their decoding.

A code of `nbits` bits is cut into parts of 1, 2, 4 or 8 bits (3 bits: the lower two, then the upper one; 7: four, two,
one). Of a part, byte j holds channels j, j + w, j + 2w, ... with `w` the number of bytes, the first in the lowest bits:
with 2 bits and 128 channels byte j holds channels j, j + 32, j + 64, j + 96. So each plane `(bytes >> shift) & mask` is
a contiguous run of channels, and nothing is ever interleaved.

Bits may differ: a tuple has those of equal runs of channels, which lie one after the other as if each were a token of
its own. With 0 bits all codes are 0 and need no room.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from itertools import groupby
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from kvpolicy.interfaces.quantizer import Bits

PARTS: dict[int, tuple[tuple[int, int], ...]] = {
    0: (),
    1: ((1, 0),),
    2: ((2, 0),),
    3: ((2, 0), (1, 2)),
    4: ((4, 0),),
    5: ((4, 0), (1, 4)),
    6: ((4, 0), (2, 4)),
    7: ((4, 0), (2, 4), (1, 6)),
    8: ((8, 0),),
}
"""Of each part of a code: its bits, and the bits of the code below it."""

BLOCK_BYTES = 1 << 21
"""Decoded numbers of a block, for each thread: few enough to stay in its L2 cache."""


def _width(head_dim: int, bits: int) -> int:
    return -(-head_dim * bits // 8)


@functools.cache
def _runs(head_dim: int, nbits: Bits) -> tuple[tuple[int, int, int], ...]:
    """Bits, first and last + 1 channel of neighbouring channels with as many bits."""
    if isinstance(nbits, int):
        return ((nbits, 0, head_dim),)
    each, first, runs = head_dim // len(nbits), 0, []
    for bits, same in groupby(nbits):
        last = first + each * len(list(same))
        runs.append((bits, first, last))
        first = last
    return tuple(runs)


def _widths(head_dim: int, nbits: Bits) -> list[int]:
    """Bytes of each part of each run of channels."""
    runs = _runs(head_dim, nbits)
    return [_width(last - first, bits) for width, first, last in runs for bits, _ in PARTS[width]]


@functools.cache
def packed_width(head_dim: int, nbits: Bits) -> int:
    """Bytes of the packed codes of `head_dim` channels."""
    return sum(_widths(head_dim, nbits))


def plane_width(head_dim: int, nbits: Bits) -> int:
    """Channels of the widest plane."""
    return max(_widths(head_dim, nbits))


def _planes(head_dim: int, bits: int) -> Iterator[tuple[int, int, int]]:
    """Shift, first and last + 1 channel of each plane of a part."""
    width = _width(head_dim, bits)
    for plane, first in enumerate(range(0, head_dim, width)):
        yield plane * bits, first, min(first + width, head_dim)


def _plane(part: Tensor, shift: int, bits: int, shifted: bool = True) -> Tensor:
    if bits == 8:
        return part
    wide = (
        part.numel() and part.shape[-1] % 8 == 0 and part.stride(-1) == 1 and not any(n % 8 for n in part.stride()[:-1])
    )
    if wide and part.storage_offset() % 8 == 0:  # eight bytes at a time: what crosses a byte is masked away
        words = part.view(torch.int64)
        if not shifted:
            return (words & _signed(((1 << bits) - 1 << shift) * 0x0101010101010101)).view(torch.uint8)
        mask = ((1 << bits) - 1) * 0x0101010101010101
        return ((words >> shift if shift else words) & mask).view(torch.uint8)
    if not shifted:
        return part & ((1 << bits) - 1 << shift)
    if shift + bits == 8:
        return part >> shift
    return (part >> shift if shift else part) & ((1 << bits) - 1)


def _signed(word: int) -> int:
    """The int64 with the bits of an unsigned one."""
    return word - (1 << 64) if word >> 63 else word


@functools.cache
def _shifts(nbits: int, device: torch.device) -> Tensor:
    """Where in a byte each plane begins: `[planes, 1]`."""
    return torch.arange(0, 8, nbits, dtype=torch.uint8, device=device).unsqueeze(1)  # made there: nothing waits


def _packed_part(codes: Tensor, bits: int) -> Tensor:
    """The lower bits of codes, packed, where all planes are as wide."""
    planes_of = codes.unflatten(-1, (8 // bits, -1)) & ((1 << bits) - 1)
    packed: Tensor = (planes_of << _shifts(bits, codes.device)).sum(-2, dtype=torch.uint8)
    return packed


def pack(codes: Tensor, nbits: Bits) -> Tensor:
    """Pack `codes`, uint8 in `[0, 2**nbits)`, along their last dimension."""
    head_dim, parts = codes.shape[-1], []
    if nbits == 8:
        return codes
    even = isinstance(nbits, int) and all(head_dim * bits % 8 == 0 for bits, _ in PARTS[nbits])
    # On a CPU planes are put in place one by one; elsewhere what counts is the number of calls.
    if isinstance(nbits, int) and even and (len(PARTS[nbits]) == 1 or codes.device.type != "cpu"):
        whole = [_packed_part(codes >> low if low else codes, bits) for bits, low in PARTS[nbits]]
        return whole[0] if len(whole) == 1 else torch.cat(whole, dim=-1)
    for run, start, end in _runs(head_dim, nbits):
        for bits, low in PARTS[run]:
            part = codes.new_zeros((*codes.shape[:-1], _width(end - start, bits)))
            for shift, first, last in _planes(end - start, bits):
                plane = (codes[..., start + first : start + last] >> low) & ((1 << bits) - 1)
                part[..., : last - first] |= plane << shift
            parts.append(part)
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def unpack(packed: Tensor, nbits: Bits, head_dim: int) -> Tensor:
    """The inverse of `pack`: uint8 codes of `head_dim` channels."""
    shape = (*packed.shape[:-1], head_dim)
    codes = packed.new_empty(shape) if isinstance(nbits, int) else packed.new_zeros(shape)
    for factor, first, last, plane in planes(packed, nbits, head_dim):
        if factor > 1:
            codes[..., first:last] += plane * int(factor)
        else:
            codes[..., first:last] = plane
    return codes


def planes(
    packed: Tensor, nbits: Bits, head_dim: int, shifted: bool = True
) -> Iterator[tuple[float, int, int, Tensor]]:
    """The contiguous runs of channels in packed codes: a code is the sum of its planes, each times its factor.

    Args:
        packed: packed codes, uint8 `[..., packed_width(head_dim, nbits)]`.
        nbits: bits per code, or those of equal runs of channels.
        head_dim: channels.
        shifted: whether the bits of a plane are moved to the lowest. Left where they are they cost a pass less, and
            factors may be fractions: powers of two all the same.

    Yields:
        Factor, first and last + 1 channel, and the plane: uint8 `[..., last - first]`.
    """
    start = 0
    for run, begin, end in _runs(head_dim, nbits):
        for bits, low in PARTS[run]:
            part = packed[..., start : start + _width(end - begin, bits)]
            for shift, first, last in _planes(end - begin, bits):
                factor = 2.0 ** (low if shifted else low - shift)
                yield factor, begin + first, begin + last, _plane(part[..., : last - first], shift, bits, shifted)
            start += part.shape[-1]


def dequantize(
    packed: Tensor,
    nbits: Bits,
    head_dim: int,
    scale: Tensor,
    offset: Tensor,
    out: Tensor,
    levels: Tensor | None = None,
) -> None:
    """Write `scale * code + offset` into `out`, computed in float32 and rounded once.

    Args:
        packed: packed codes, uint8 `[..., packed_width(head_dim, nbits)]`.
        nbits: bits per code, or those of equal runs of channels.
        head_dim: channels.
        scale: `[..., P]` where P divides `head_dim`: each covers `head_dim // P` consecutive channels. The
            leading dimensions broadcast against those of `packed`.
        offset: like `scale`.
        out: any float dtype, `[..., head_dim]` with the leading dimensions of `packed`; need not be contiguous.
        levels: what stands in place of each code, float32 `[2**nbits]`; with the same bits in all channels.
    """
    block_elements = BLOCK_BYTES // out.element_size() * torch.get_num_threads()
    if out.numel() <= block_elements or out.ndim == 1:
        _dequantize_block(packed, nbits, head_dim, scale, offset, out, levels)
        return
    axis = max(range(out.ndim - 1), key=lambda dim: out.shape[dim])
    length = out.shape[axis]
    step = max(1, block_elements * length // out.numel())
    for start in range(0, length, step):
        n = min(step, length - start)
        block, s, o, x = (_narrow(t, axis - out.ndim, start, n) for t in (packed, scale, offset, out))
        _dequantize_block(block, nbits, head_dim, s, o, x, levels)


def _narrow(x: Tensor, axis: int, start: int, n: int) -> Tensor:
    broadcast = x.ndim < -axis or x.shape[axis] == 1
    return x if broadcast else x.narrow(axis, start, n)


def looked_up(codes: Tensor, levels: Tensor) -> Tensor:
    """The level of each code, float32."""
    return levels.index_select(0, codes.flatten().int()).view(codes.shape)


def _dequantize_block(
    packed: Tensor, nbits: Bits, head_dim: int, scale: Tensor, offset: Tensor, out: Tensor, levels: Tensor | None
) -> None:
    # On a CPU addcmul of 16-bit numbers computes in float32 and rounds once.
    fused = levels is None and scale.dtype == out.dtype and out.dtype != torch.float32 and out.device.type == "cpu"
    dtype = out.dtype if fused else torch.float32
    x = out if out.dtype == torch.float32 else torch.empty(out.shape, dtype=dtype, device=out.device)
    if levels is not None:
        x.copy_(looked_up(unpack(packed, nbits, head_dim), levels))
    elif isinstance(nbits, tuple) or len(PARTS[nbits]) > 1:
        x.copy_(unpack(packed, nbits, head_dim))
    else:
        for _, first, last, plane in planes(packed, nbits, head_dim):
            x[..., first:last] = plane
    groups = scale.shape[-1]
    y, result = x, out
    if groups < head_dim:
        y, result = x.unflatten(-1, (groups, -1)), out.unflatten(-1, (groups, -1))
        scale, offset = scale.unsqueeze(-1), offset.unsqueeze(-1)
        if fused:  # its loop is vectorised only where no operand is one number along a row
            scale, offset = scale.expand_as(y).contiguous(), offset.expand_as(y).contiguous()
    if fused:
        torch.addcmul(offset, scale, y, out=result)
        return
    y.mul_(scale.float()).add_(offset.float())
    if x is not out:
        out.copy_(x)
