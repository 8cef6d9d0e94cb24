"""Quantizer `quanto`: codes and scales of optimum-quanto."""

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
        import optimum.quanto
    except ImportError as error:
        raise MissingDependencyError(
            'quantizer "quanto" needs the library optimum-quanto, which can\'t be imported here '
            f"({error}); install it with: pip install optimum-quanto"
        ) from error
    return optimum.quanto


SMALL = 2.0**-4
"""Below this the scale of a group of float16 may be less than float16 holds well."""


class Quanto(AffineQuantizer):
    """The quantization that transformers' QuantizedCache does with optimum-quanto, by that library itself.

    Source: optimum-quanto, `MaxOptimizer` and `quantize_affine`, as LogQuant uses them (arXiv 2503.19950, section
    4). Computed in the model's dtype, as the library does. Deviations: a group whose scale is 0 has codes 0, where
    the library divides 0 by 0; a single group is a group, where the library takes each of its numbers for one; groups
    of small numbers in float16 are multiplied by a power of two before, which is undone afterwards.
    """

    kind: Literal["quanto"] = "quanto"
    requires: ClassVar[str | None] = "quanto"
    independent: ClassVar[bool] = True
    nbits: Literal[2, 4] = Field(4, description="Bits per code.")

    def check(self, head_dim: int) -> None:
        super().check(head_dim)
        _library()

    def calibrate(self, groups: Tensor) -> Affine:
        quanto = _library()
        qtype = quanto.qint2 if self.nbits == 2 else quanto.qint4
        factor = self._factor(groups)
        groups = groups * factor.to(groups.dtype)
        scale, shift = quanto.MaxOptimizer().optimize(groups, qtype, 0)
        divisor = torch.where(scale == 0, torch.ones_like(scale), scale)
        codes = torch.ops.quanto.quantize_affine(groups, self.nbits, 0, None, divisor, shift)
        # What a nan becomes as an integer depends on the machine.
        return Affine(codes.clamp_(max=2**self.nbits - 1), scale.float() / factor, -shift.float() / factor)

    def _factor(self, groups: Tensor) -> Tensor:
        largest = groups.float().abs().amax(dim=1, keepdim=True)
        small = (largest > 0) & (largest < SMALL) & (groups.dtype == torch.float16)
        return unit_factor(torch.where(small, largest, 1.0)).clamp(max=2.0**15)


@hookimpl
def kvpolicy_quantizers() -> list[type[Quantizer]]:
    return [Quanto]
