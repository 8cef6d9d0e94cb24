"""Quantizers `mxfp4` and `nvfp4`: floating-point numbers of 4 bits in small blocks."""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from pydantic import Field

from kvpolicy.hookspecs import hookimpl
from kvpolicy.interfaces.quantizer import Affine, AffineQuantizer, GroupSize, Quantizer, rank_among
from kvpolicy.interfaces.site import Site

if TYPE_CHECKING:
    from torch import Tensor

ABOVE = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""The numbers of e2m1 that are not negative, in the order of their bits."""
LARGEST_SCALE = 448.0
"""The largest number of float8 e4m3."""
LEVELS = (*(-level for level in reversed(ABOVE[1:])), *ABOVE)


BETWEEN = tuple((low + high) / 2 for low, high in pairwise(LEVELS))


@lru_cache(maxsize=1)
def _bounds() -> tuple[float, ...]:
    """Half-way between levels. Every second lies just below, as a number there goes up to bits that end in 0."""
    middle = torch.tensor(BETWEEN)
    middle[::2] = middle[::2].nextafter(middle[::2] - 1)
    return tuple(middle.tolist())


class MxFp4(AffineQuantizer):
    """Numbers of 4 bits, e2m1, in blocks of 32 that share a power of two.

    The power is that of the largest magnitude, so that numbers beyond 6 times the scale become 6 times the scale. Ties
    are rounded to even.

    Source: OCP Microscaling Formats (MX) v1.0, section 6.3. Deviations: there is one zero; `group_size` may be another,
    for heads that 32 doesn't divide.
    """

    kind: Literal["mxfp4"] = "mxfp4"
    independent: ClassVar[bool] = True
    nbits: Literal[4] = Field(4, description="Bits per code.")
    group_size: GroupSize = Field(32, description="Numbers that share a scale, as of other quantizers.")
    scale_dtype: Literal["e8m0"] = Field("e8m0", description="Type in which the scale is kept: a power of two.")
    offsets: ClassVar[bool] = False

    def levels(self, site: Site) -> Tensor:
        return torch.tensor(LEVELS)

    def calibrate(self, groups: Tensor) -> Affine:
        x = groups.float()
        largest = x.abs().amax(dim=1, keepdim=True)
        exponent = (largest.view(torch.int32) >> 23) - 2
        scale = (exponent.clamp_(min=1) << 23).view(torch.float32)
        codes = rank_among(x / scale, _bounds())
        return Affine(codes, torch.where(largest > 0, scale, 0.0), torch.zeros_like(scale))


class NvFp4(AffineQuantizer):
    """Numbers of 4 bits, e2m1, in blocks of 16 with a scale in float8 e4m3.

    The scale is the largest magnitude through 6, rounded to the nearest. It can be at most 448, and below 0.016 it
    becomes coarse: `transforms: [{kind: unit}]` brings numbers of any size to where it is fine, which takes the place
    of the format's second scale. Ties are rounded to even.

    Source: NVIDIA, "Introducing NVFP4 for efficient and accurate low-precision inference" (2025), and torchao.
    Deviations: the second scale is found on the first tokens of each head, not on a tensor; there is one zero;
    `group_size` may be another, for heads that 16 doesn't divide.
    """

    kind: Literal["nvfp4"] = "nvfp4"
    independent: ClassVar[bool] = True
    nbits: Literal[4] = Field(4, description="Bits per code.")
    group_size: GroupSize = Field(16, description="Numbers that share a scale, as of other quantizers.")
    scale_dtype: Literal["float8_e4m3"] = Field("float8_e4m3", description="Type in which the scale is kept.")
    offsets: ClassVar[bool] = False

    def levels(self, site: Site) -> Tensor:
        return torch.tensor(LEVELS)

    def calibrate(self, groups: Tensor) -> Affine:
        x = groups.float()
        scale = x.abs().amax(dim=1, keepdim=True) / LEVELS[-1]
        scale = scale.clamp_(max=LARGEST_SCALE).to(torch.float8_e4m3fn).float()
        codes = rank_among(x / torch.where(scale > 0, scale, 1.0), _bounds())
        return Affine(codes, scale, torch.zeros_like(scale))


@hookimpl
def kvpolicy_quantizers() -> list[type[Quantizer]]:
    return [MxFp4, NvFp4]
