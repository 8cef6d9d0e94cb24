"""Quantizer `int`: round-to-nearest integers."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import torch
from pydantic import BeforeValidator, Discriminator, Field, PrivateAttr, Tag, model_validator

from kvpolicy.errors import RecipeError
from kvpolicy.hookspecs import hookimpl
from kvpolicy.interfaces.quantizer import Affine, AffineQuantizer, Quantizer, Rounding, root_mean_square
from kvpolicy.interfaces.site import Site

if TYPE_CHECKING:
    from torch import Tensor


def _widths(given: Any) -> Any:
    """A list of bits as a tuple."""
    fits = 2 <= len(given) <= 64 and all(type(bits) is int and 0 <= bits <= 8 for bits in given)
    if not fits:
        raise ValueError(
            f"a list must hold the bits of 2 to 64 runs of channels, each from 0 to 8, found {given!r:.80}"
        )
    return tuple(given)


Widths = Annotated[tuple[int, ...], BeforeValidator(_widths)]
Nbits = Annotated[
    Annotated[Literal[1, 2, 3, 4, 8], Tag("one")] | Annotated[Widths, Tag("list")],
    Discriminator(lambda given: "list" if isinstance(given, list | tuple) else "one"),
]

STEPS = {1: 1.595769122, 2: 0.995686701, 3: 0.586019459, 4: 0.335200597, 8: 0.030762381}
"""By bits, the step of the evenly spaced levels that err least on a standard normal distribution, in squares."""


@lru_cache(maxsize=64)
def _highest(nbits: tuple[int, ...], head_dim: int, device: torch.device) -> Tensor:
    """The highest code of each channel, `[head_dim, 1]`."""
    with torch.inference_mode(False):
        codes = torch.tensor([2.0**bits - 1 for bits in nbits]).repeat_interleave(head_dim // len(nbits))
        return codes.unsqueeze(1).to(device, non_blocking=True)


class Int(AffineQuantizer):
    """Rounds to the nearest of `2**nbits` evenly spaced levels over the range of each group.

    Asymmetric, the levels run from the minimum of a group to its maximum; symmetric, from `-m` to `m` with `m` the
    largest magnitude. A group of equal numbers is kept exactly (scale 0). All in float32.

    With `range: rms` the step is a fixed multiple of a group's root mean square, and the levels lie symmetric to zero,
    none on it: a group has a scale and no offset. The multiple is the one that suits normal numbers best, which a
    rotation makes of keys and values.

    With a list of `nbits` equal runs of channels have codes of their own width, for channels that a transform put in
    order: of `[8, 4, 2, 0]` the first quarter has 8 bits, and of the last one is kept the mean of each group alone.

    Source: KIVI (arXiv 2402.02750, section 3, its round-to-nearest); `clip` as in QuaRot (arXiv 2404.00456) and SKVQ
    (arXiv 2405.06219); `range: percentiles` as KVQuant (arXiv 2401.18079) finds its ranges; the steps of `range: rms`
    are those of Max (1960). Deviations: `symmetric` places all `2**nbits` levels around zero, none on it, so that it
    also works with 1 bit.
    """

    kind: Literal["int"] = "int"
    independent: ClassVar[bool] = True
    mixed: ClassVar[bool] = True
    nbits: Nbits = Field(  # type: ignore[assignment]
        4,
        description=(
            "Bits per code; or, per channel and without range: rms, a list of the bits, 0 to 8, of equal runs of "
            "channels."
        ),
    )
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

    @model_validator(mode="after")
    def _check_widths(self) -> Int:
        if isinstance(self.nbits, tuple):
            if self.per != "channel" or self.range == "rms" or self.symmetric:
                raise ValueError(
                    f"a list of nbits goes with per: channel and levels from a least to a greatest number, found per: "
                    f"{self.per}, range: {self.range} and symmetric: {str(self.symmetric).lower()}; write one number"
                )
            if not any(self.nbits):
                raise ValueError(f"nbits must hold a number above 0, found {list(self.nbits)}")
        return self

    _head_dim: int = PrivateAttr(0)

    def check(self, head_dim: int) -> None:
        if isinstance(self.nbits, tuple) and head_dim % len(self.nbits):
            raise RecipeError(
                f"a list of nbits must have as many entries as divide head_dim, found {len(self.nbits)} and a head_dim "
                f"of {head_dim}"
            ).at("nbits")

    def at(self, site: Site) -> Int:
        if not isinstance(self.nbits, tuple):
            return self
        self.check(site.head_dim)
        placed = self.model_copy()
        placed._head_dim = site.head_dim
        return placed

    def highest(self, groups: Tensor) -> Tensor | int:
        if not isinstance(self.nbits, tuple):
            return 2**self.nbits - 1
        # Groups are those of whole tokens, channel after channel.
        of_channels = _highest(self.nbits, self._head_dim, groups.device)
        return of_channels.repeat(len(groups) // self._head_dim, 1)

    @property
    def offsets(self) -> bool:  # type: ignore[override]
        return self.range != "rms"

    def levels(self, site: Site) -> Tensor | None:
        if self.offsets or isinstance(self.nbits, tuple):
            return None
        return torch.arange(2**self.nbits) - (2**self.nbits - 1) / 2

    def rounding(self) -> Rounding | None:
        if self.range == "percentiles" or isinstance(self.nbits, tuple):
            return None
        return Rounding(self.range, self.symmetric, 0.0 if self.offsets else STEPS[self.nbits])

    def calibrate(self, groups: Tensor) -> Affine:
        x = groups.float()
        if self.range == "rms":
            return self._by_size(x)
        levels = self.highest(x)
        low, high = torch.aminmax(x, dim=1, keepdim=True) if self.range == "extremes" else self._percentiles(x)
        if isinstance(levels, torch.Tensor):  # of what has no codes at all the mean is kept
            low = torch.where(levels > 0, low, x.mean(dim=1, keepdim=True))
            high, levels = torch.where(levels > 0, high, low), levels.clamp(min=1)
        if self.symmetric:
            bound = torch.maximum(low.neg(), high)
            low, high = torch.where(low == high, low, -bound), torch.where(low == high, high, bound)
        scale = (high - low) / levels
        codes = (x - low).div_(torch.where(scale > 0, scale, 1.0)).round_().clamp_(min=0).clamp_(max=levels)
        return Affine(codes.nan_to_num_(0).to(torch.uint8), scale, low)

    def _by_size(self, x: Tensor) -> Affine:
        assert isinstance(self.nbits, int)
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
