"""Quantizer `fp8`: floating-point numbers of 8 bits."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from pydantic import Field

from kvpolicy.hookspecs import hookimpl
from kvpolicy.interfaces.quantizer import Affine, AffineQuantizer, GroupSize, Quantizer
from kvpolicy.interfaces.site import Site

if TYPE_CHECKING:
    from torch import Tensor

TYPES = {"e4m3": (torch.float8_e4m3fn, 126), "e5m2": (torch.float8_e5m2, 123)}
"""Of each format the type, and the bits of its largest number, which count the numbers between it and zero."""


class Fp8(AffineQuantizer):
    """Numbers of 8 bits with an exponent each, times a scale by which the largest of a group becomes the largest.

    They are rounded to the nearest, ties to even. A code is the rank of a number among those of the format.

    Source: Micikevicius et al., "FP8 Formats for Deep Learning" (arXiv 2209.05433), and vLLM's `kv_cache_dtype`.
    Deviations: each group has a scale of its own, by default a token of a head; vLLM has one for all, 1 unless
    calibrated. There is one zero.
    """

    kind: Literal["fp8"] = "fp8"
    independent: ClassVar[bool] = True
    format: Literal["e4m3", "e5m2"] = Field(
        "e4m3", description="Bits of exponent and mantissa. e4m3 errs by half as much; e5m2 reaches nearer to zero."
    )
    nbits: Literal[8] = Field(8, description="Bits per code.")
    group_size: GroupSize = Field("head", description="Numbers that share a scale, as of other quantizers.")
    offsets: ClassVar[bool] = False

    def levels(self, site: Site) -> Tensor:
        dtype, top = TYPES[self.format]
        above = torch.arange(top + 1, dtype=torch.uint8).view(dtype).float()
        return torch.cat([-above[1:].flip(0), above])

    def calibrate(self, groups: Tensor) -> Affine:
        dtype, top = TYPES[self.format]
        x, largest = groups.float(), torch.finfo(dtype).max
        scale = x.abs().amax(dim=1, keepdim=True) / largest
        y = (x / torch.where(scale > 0, scale, 1.0)).nan_to_num_(0).clamp_(-largest, largest)
        bits = y.to(dtype).view(torch.uint8)
        codes = torch.where(bits < 128, bits + top, top - (bits & 127))
        return Affine(codes, scale, torch.zeros_like(scale))


@hookimpl
def kvpolicy_quantizers() -> list[type[Quantizer]]:
    return [Fp8]
