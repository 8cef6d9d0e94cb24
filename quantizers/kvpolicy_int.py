"""Quantizer `int`: round-to-nearest integers."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from pydantic import Field

from kvpolicy.hookspecs import hookimpl
from kvpolicy.interfaces.quantizer import Affine, AffineQuantizer, Quantizer

if TYPE_CHECKING:
    from torch import Tensor


class Int(AffineQuantizer):
    """Rounds to the nearest of `2**nbits` evenly spaced levels between the extremes of each group.

    Asymmetric, the levels run from the minimum of a group to its maximum; symmetric, from `-m` to `m` with `m` the
    largest magnitude. A group of equal numbers is kept exactly (scale 0). All in float32.

    Source: KIVI (arXiv 2402.02750, section 3, its round-to-nearest). Deviations: `symmetric` places all `2**nbits`
    levels around zero, none on it, so that it also works with 1 bit.
    """

    kind: Literal["int"] = "int"
    independent: ClassVar[bool] = True
    symmetric: bool = Field(False, description="Levels symmetric to zero, instead of between minimum and maximum.")

    def calibrate(self, groups: Tensor) -> Affine:
        x = groups.float()
        levels = 2**self.nbits - 1
        low, high = torch.aminmax(x, dim=1, keepdim=True)
        if self.symmetric:
            bound = torch.maximum(low.neg(), high)
            low, high = torch.where(low == high, low, -bound), torch.where(low == high, high, bound)
        scale = (high - low) / levels
        codes = (x - low).div_(torch.where(scale > 0, scale, 1.0)).round_().clamp_(0, levels)
        return Affine(codes.nan_to_num_(0).to(torch.uint8), scale, low)


@hookimpl
def kvpolicy_quantizers() -> list[type[Quantizer]]:
    return [Int]
