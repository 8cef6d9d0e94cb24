"""Quantizer `nf4`: 4-bit NormalFloat."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from pydantic import Field

from kvpolicy.hookspecs import hookimpl
from kvpolicy.interfaces.quantizer import Affine, AffineQuantizer, Quantizer, rank_among
from kvpolicy.interfaces.site import Site

if TYPE_CHECKING:
    from torch import Tensor

LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


BOUNDS = tuple((low + high) / 2 for low, high in pairwise(LEVELS))


class Nf4(AffineQuantizer):
    """The nearest of 16 levels that lie as the quantiles of a normal distribution do, times the largest magnitude.

    Zero is a level. There is no offset, so that a group takes half the bytes of scales.

    Source: QLoRA (arXiv 2305.14314, section 3, 4-bit NormalFloat); the levels are those of bitsandbytes.
    Deviations: scales are not quantized again, unless `scale_dtype` says so.
    """

    kind: Literal["nf4"] = "nf4"
    independent: ClassVar[bool] = True
    nbits: Literal[4] = Field(4, description="Bits per code.")
    offsets: ClassVar[bool] = False

    def levels(self, site: Site) -> Tensor:
        return torch.tensor(LEVELS)

    def calibrate(self, groups: Tensor) -> Affine:
        x = groups.float()
        scale = x.abs().amax(dim=1, keepdim=True)
        codes = rank_among(x / torch.where(scale > 0, scale, 1.0), BOUNDS)
        return Affine(codes, scale, torch.zeros_like(scale))


@hookimpl
def kvpolicy_quantizers() -> list[type[Quantizer]]:
    return [Nf4]
