"""Scale and offset of groups in the type that a quantizer asks for, side by side in one tensor."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from kvpolicy.errors import PluginError
from kvpolicy.interfaces.component import TRY, call
from kvpolicy.interfaces.quantizer import Affine, AffineQuantizer, rank_among
from kvpolicy.interfaces.site import Site

__all__ = ["Scales", "levels_of"]

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0
"""The largest number of float8_e4m3."""


def levels_of(quantizer: AffineQuantizer, site: Site) -> Tensor | None:
    """What the codes of a quantizer stand for, or None: the codes themselves.

    Raises:
        PluginError: that is no ascending float32 tensor with as many entries as there are codes, or fewer.
    """
    found = call(quantizer, "levels", site)
    if found is None:
        return None
    count = 2 ** _most(quantizer)
    fits = isinstance(found, Tensor) and found.dtype == torch.float32 and found.ndim == 1 and 1 < len(found) <= count
    numbers = found.detach().cpu().numpy() if fits else np.empty(0)
    if not fits or not np.isfinite(numbers).all() or not (np.diff(numbers) > 0).all():
        shown = f"{tuple(found.shape)} in {found.dtype}" if isinstance(found, Tensor) else type(found).__name__
        raise PluginError(
            f"quantizer {quantizer.kind!r} must give 2 to {count} ascending numbers in float32 from levels, found "
            f"{shown}. {TRY}"
        )
    return torch.from_numpy(numbers.copy())


class Scales:
    """How scale and offset are kept: `[..., numbers]` of one float type, or as bytes for a type of 8 bits.

    The scales come first, then the offsets, if the quantizer has any.
    """

    def __init__(self, quantizer: AffineQuantizer, levels: Tensor | None) -> None:
        self.quantizer, self.levels = quantizer, levels
        known = None if levels is None else levels.numpy()
        even = known is not None and bool((np.diff(known) == 1).all())
        self.uneven = None if even or levels is None else _filled(levels, 2 ** _most(quantizer))
        """What each code stands for, if levels don't lie one apart: else they are codes, and an offset in scales."""
        self.origin = float(known[0]) if known is not None and even else 0.0
        """That offset."""
        self.codes = 2 ** _most(quantizer) if levels is None else len(levels)
        """How many there are."""
        self.small = quantizer.scale_dtype in ("float8_e4m3", "e8m0")
        """Whether scales have 8 bits."""
        self.bounds = () if known is None else tuple(((known[1:] + known[:-1]) / 2).tolist())
        """The middles between levels."""

    def dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Type of the tensor that is kept for numbers of type `dtype`.

        A scale is a small part of the numbers' range: that of numbers that float16 holds may be less than float16
        holds, and its error counts as often as the highest code says.
        """
        if self.small:
            return torch.uint8
        low = dtype == torch.float16 and _most(self.quantizer) > 2
        return torch.float32 if low or self.quantizer.scale_dtype == "float32" else dtype

    def rounded(self, affine: Affine, groups: Tensor) -> Affine:
        """With scales of 8 bits: what they and the offsets will be read as, and the nearest codes by that."""
        if not self.small:
            return affine
        scale, offset = affine.scale, affine.offset
        if self.quantizer.scale_dtype == "e8m0":
            scale = _power(_exponent(scale))
        elif not self.quantizer.offsets:
            scale = _e4m3(scale, up=True).float()
        else:
            offset = _e4m3(offset, up=False).float()
            top = self.quantizer.highest(groups) if self.levels is None else float(self.levels[-1])
            top = top.clamp(min=1) if isinstance(top, Tensor) else max(top, 1e-3)
            # Whatever the offset lost is to be within the levels still.
            scale = _e4m3(scale + (affine.offset - offset) / top, up=True).float()
        same = scale == affine.scale  # then the quantizer knows better where ties go
        x = groups.float()
        if self.quantizer.offsets:
            same, x = same & (offset == affine.offset), x - offset
        x = x / torch.where(scale > 0, scale, 1.0)
        if self.levels is None:
            codes = x.round_().clamp_(min=0).clamp_(max=self.quantizer.highest(groups)).nan_to_num_(0)
        else:
            codes = rank_among(x.nan_to_num_(0), self.bounds)
        return Affine(torch.where(same, affine.codes, codes.to(torch.uint8)), scale, offset)

    def join(self, scale: Tensor, offset: Tensor, dtype: torch.dtype) -> Tensor:
        """What is kept of scales and offsets `[..., numbers]`, as `rounded` gives them, of numbers of type `dtype`."""
        kept = self.dtype(dtype)
        if not self.small:
            both = torch.cat([scale, offset], dim=-1) if self.quantizer.offsets else scale
            return _within(both, kept).to(kept)
        if self.quantizer.scale_dtype == "e8m0":
            wide = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
            parts = [_exponent(scale), offset.to(wide).view(torch.uint8)]
        else:
            parts = [scale.to(E4M3).view(torch.uint8), offset.to(E4M3).view(torch.uint8)]
        return torch.cat(parts, dim=-1) if self.quantizer.offsets else parts[0]

    def split(self, params: Tensor, numbers: int) -> tuple[Tensor, Tensor]:
        """Scales and offsets `[..., numbers]` of what `join` gave, the offsets of codes; zeros where there are none."""
        scale, offset = self._kept(params, numbers)
        return scale, offset + scale.float() * self.origin if self.origin else offset

    def _kept(self, params: Tensor, numbers: int) -> tuple[Tensor, Tensor]:
        if not self.small and self.quantizer.offsets:
            scale, offset = params.chunk(2, dim=-1)
            return scale, offset
        scale, offset = params[..., :numbers], params[..., numbers:]
        e8m0 = self.quantizer.scale_dtype == "e8m0"
        if self.small:
            scale = _power(scale) if e8m0 else _read(scale, E4M3)
        if not self.quantizer.offsets:
            return scale, scale.new_zeros(()).expand(scale.shape)
        if self.small:
            wide = torch.bfloat16 if offset.shape[-1] == 2 * numbers else torch.float32
            offset = _read(offset, wide if e8m0 else E4M3)
        return scale, offset

    def by_group(self, params: Tensor, numbers: int) -> tuple[Tensor, Tensor | None]:
        """As `split` in float32, `[numbers, batch, kv_heads, 1, tokens]`, tokens neighbours; None for no offsets."""
        if self.small:
            found = self.split(params, numbers)
            scale, offset = (x.permute(3, 0, 1, 2).contiguous().unsqueeze(3) for x in found)
            return scale, offset if self.quantizer.offsets or self.origin else None
        both = params.permute(3, 0, 1, 2).contiguous().unsqueeze(3)
        both = both if both.dtype == torch.float32 else both.float()
        if not self.quantizer.offsets:
            return both, both * self.origin if self.origin else None
        scale, offset = both.chunk(2)
        return scale, offset + scale * self.origin if self.origin else offset

    def share(self, params: Tensor, numbers: int) -> Fraction:
        """The part of what is kept that scales are."""
        if not self.quantizer.offsets:
            return Fraction(1)
        return Fraction(numbers, params.shape[-1]) if self.small else Fraction(1, 2)


def _most(quantizer: AffineQuantizer) -> int:
    """Bits of the widest codes."""
    return quantizer.bits if isinstance(quantizer.bits, int) else max(quantizer.bits)


def _filled(levels: Tensor, count: int) -> Tensor:
    """Levels for so many codes; those that are not used, of which only a damaged file can have any, are the last."""
    return torch.cat([levels, levels[-1:].expand(count - len(levels))])


def _read(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Bytes as numbers of a type, in float32. Where they lie they may not be aligned."""
    return x.clone(memory_format=torch.contiguous_format).view(dtype).float()


def _within(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A range that float16 holds may have a scale that it doesn't."""
    if dtype != torch.float16:
        return x
    limit = torch.finfo(dtype).max
    return torch.where(x.isfinite(), x.clamp(-limit, limit), x)


def _exponent(x: Tensor) -> Tensor:
    """The exponent of the least power of two that is no smaller, as e8m0 has it; 0 for 0."""
    bits = x.contiguous().view(torch.int32)
    exponent = (bits >> 23) + ((bits & 0x7FFFFF) > 0)
    return torch.where(x > 0, exponent.clamp(max=254), 0).to(torch.uint8)


def _power(exponent: Tensor) -> Tensor:
    return (exponent.int() << 23).view(torch.float32)


def _e4m3(x: Tensor, up: bool) -> Tensor:
    """`x` rounded up, or down, to float8_e4m3; what is beyond its range is brought within."""
    size = x.abs().clamp_(max=LARGEST)
    near = size.to(E4M3)
    kept, bits, negative = near.float(), near.view(torch.uint8), x < 0
    # A byte more or less is the next number away from zero, or towards it; 255 is less.
    away, back = (kept < size).view(torch.uint8), (kept > size).view(torch.uint8).mul_(255)
    bits = bits + (torch.where(negative, back, away) if up else torch.where(negative, away, back))
    return bits.bitwise_or_(negative.view(torch.uint8) << 7).view(E4M3)
