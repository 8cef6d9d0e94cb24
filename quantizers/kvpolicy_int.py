"""Quantizer `int`: round-to-nearest integers."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from pydantic import Field, model_validator

from kvpolicy.hookspecs import hookimpl
from kvpolicy.interfaces.quantizer import Affine, AffineQuantizer, Quantizer, Rounding, root_mean_square
from kvpolicy.interfaces.site import Site

if TYPE_CHECKING:
    from torch import Tensor

STEPS = {1: 1.595769122, 2: 0.995686701, 3: 0.586019459, 4: 0.335200597, 8: 0.030762381}
"""By bits, the step of the evenly spaced levels that err least on a standard normal distribution, in squares."""


class Int(AffineQuantizer):
    """Rounds to the nearest of `2**nbits` evenly spaced levels over the range of each group.

    Asymmetric, the levels run from the minimum of a group to its maximum; symmetric, from `-m` to `m` with `m` the
    largest magnitude. A group of equal numbers is kept exactly (scale 0). All in float32.

    With `range: rms` the step is a fixed multiple of a group's root mean square, and the levels lie symmetric to zero,
    none on it: a group has a scale and no offset. The multiple is the one that suits normal numbers best, which a
    rotation makes of keys and values.

    Source: KIVI (arXiv 2402.02750, section 3, its round-to-nearest); `clip` as in QuaRot (arXiv 2404.00456) and SKVQ
    (arXiv 2405.06219); `range: percentiles` as KVQuant (arXiv 2401.18079) finds its ranges; the steps of `range: rms`
    are those of Max (1960). Deviations: `symmetric` places all `2**nbits` levels around zero, none on it, so that it
    also works with 1 bit.
    """

    kind: Literal["int"] = "int"
    independent: ClassVar[bool] = True
    symmetric: bool = Field(False, description="Levels symmetric to zero, instead of between minimum and maximum.")
    range: Literal["extremes", "percentiles", "rms"] = Field(
        "extremes",
        description=(
            "What levels run over. extremes: minimum to maximum of a group, times clip. percentiles: between two "
            "percentiles of a group. rms: a step that is a multiple of the root mean square, symmetric to zero, "
            "without an offset."
        ),
    )
    percentile: float | None = Field(
        None,
        gt=50,
        lt=100,
        description="With range: percentiles, the upper one; the lower is as far from the other end. Without, 99.5.",
    )

    @model_validator(mode="after")
    def _check_range(self) -> Int:
        for name, given, ranges in (
            ("percentile", self.percentile is not None, ("percentiles",)),
            ("clip", self.clip < 1, ("extremes",)),
            ("symmetric", self.symmetric, ("extremes", "percentiles")),
        ):
            if given and self.range not in ranges:
                raise ValueError(
                    f"{name} goes with range: {' or '.join(ranges)}, found it with range: {self.range}; remove it"
                )
        return self

    @property
    def offsets(self) -> bool:  # type: ignore[override]
        return self.range != "rms"

    def levels(self, site: Site) -> Tensor | None:
        return None if self.offsets else torch.arange(2**self.nbits) - (2**self.nbits - 1) / 2

    def rounding(self) -> Rounding | None:
        if self.range == "percentiles":
            return None
        return Rounding(self.range, self.symmetric, 0.0 if self.offsets else STEPS[self.nbits])

    def calibrate(self, groups: Tensor) -> Affine:
        x = groups.float()
        if self.range == "rms":
            return self._by_size(x)
        levels = 2**self.nbits - 1
        low, high = torch.aminmax(x, dim=1, keepdim=True) if self.range == "extremes" else self._percentiles(x)
        if self.symmetric:
            bound = torch.maximum(low.neg(), high)
            low, high = torch.where(low == high, low, -bound), torch.where(low == high, high, bound)
        scale = (high - low) / levels
        codes = (x - low).div_(torch.where(scale > 0, scale, 1.0)).round_().clamp_(0, levels)
        return Affine(codes.nan_to_num_(0).to(torch.uint8), scale, low)

    def _by_size(self, x: Tensor) -> Affine:
        levels = 2**self.nbits - 1
        scale = root_mean_square(x) * STEPS[self.nbits]
        codes = (x / torch.where(scale > 0, scale, 1.0)).add_(levels / 2).round_().clamp_(0, levels)
        return Affine(codes.nan_to_num_(0).to(torch.uint8), scale, torch.zeros_like(scale))

    def _percentiles(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Two percentiles of each group, between its numbers where they fall between them."""
        ordered = x.sort(dim=1).values
        last = x.shape[1] - 1
        place = (1 - (99.5 if self.percentile is None else self.percentile) / 100) * last
        at, share = int(place), place % 1
        beside = min(at + 1, last)
        low = torch.lerp(ordered[:, at], ordered[:, beside], share)
        high = torch.lerp(ordered[:, last - at], ordered[:, last - beside], share)
        return low.unsqueeze(1), high.unsqueeze(1)


@hookimpl
def kvpolicy_quantizers() -> list[type[Quantizer]]:
    return [Int]
