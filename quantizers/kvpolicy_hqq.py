"""Quantizer `hqq`: codes and scales of HQQ."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import Field

from kvpolicy.errors import MissingDependencyError
from kvpolicy.hookspecs import hookimpl
from kvpolicy.interfaces.quantizer import Affine, AffineQuantizer, Quantizer, unit_factor

if TYPE_CHECKING:
    from torch import Tensor


def _library() -> Any:
    try:
        from hqq.core.quantize import Quantizer as Library
    except ImportError as error:
        raise MissingDependencyError(
            'quantizer "hqq" needs the library hqq, which can\'t be imported here '
            f"({error}); install it with: pip install hqq"
        ) from error
    return Library


class Hqq(AffineQuantizer):
    """Half-quadratic quantization, by the library hqq: the zero of each group is fitted to a sparse error.

    Source: Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models" (Mobius Labs, 2023),
    by `hqq.core.quantize.Quantizer`. Its optimiser stops for all groups at once, when their mean error no longer
    falls: with `optimize`, codes depend slightly on which tokens arrive together.
    Deviations: the zero, in code units there, becomes an offset in value units, in float32; groups with an inf or
    a nan are kept out of the optimiser and decode to nan; groups of a small range (below 0.016 with 8 bits, 0.001 with
    4), whose scales the library clamps, have their minimum subtracted and are multiplied by a power of two before it,
    which is undone afterwards.
    """

    kind: Literal["hqq"] = "hqq"
    requires: ClassVar[str | None] = "hqq"
    optimize: bool = Field(True, description="Fit the zeros by the library's optimiser, or round to nearest.")

    def check(self, head_dim: int) -> None:
        super().check(head_dim)
        _library()

    def calibrate(self, groups: Tensor) -> Affine:
        finite = groups.isfinite().all(dim=1, keepdim=True)
        x = torch.where(finite, groups, torch.zeros_like(groups)).float()
        low, high = torch.aminmax(x, dim=1, keepdim=True)
        spread = high - low
        small = (spread > 0) & (spread < self._smallest())
        factor = unit_factor(torch.where(small, spread, 1.0))
        codes, meta = _library().quantize(
            torch.where(small, (x - low) * factor, x),
            nbits=self.nbits,
            group_size=groups.shape[1],
            optimize=self.optimize,
            axis=1,
            bitpack=False,
            device=groups.device,
        )
        scale = meta["scale"].float()
        offset = -meta["zero"].float() * scale / factor + torch.where(small, low, 0.0)
        return Affine(codes.to(torch.uint8), scale / factor, torch.where(finite, offset, torch.nan))

    def _smallest(self) -> float:
        """The least range of a group whose scale the library doesn't clamp, and some more."""
        return 1.25 * max(1e-4, (2**self.nbits - 1) / 2e4)


@hookimpl
def kvpolicy_quantizers() -> list[type[Quantizer]]:
    return [Hqq]
