"""Transform `unit`: a power of two for each head, after which numbers are about 1 in size."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

import torch

from kvpolicy.hookspecs import hookimpl
from kvpolicy.interfaces.site import Site
from kvpolicy.interfaces.transform import Transform

if TYPE_CHECKING:
    from torch import Tensor


class Unit(Transform):
    """Divides by a power of two, the same for all channels of a head, which loses nothing.

    It is the power nearest to the root mean square of the first tokens that reach a store. Of use before scales of 8
    bits, which hold neither very small nor very large numbers.

    Source: the second scale of NVFP4, as of torchao. Deviations: it is a power of two, one for each head, and found on
    the first tokens.
    """

    kind: Literal["unit"] = "unit"

    def fit(self, x: Tensor, queries: Tensor | None, site: Site) -> dict[str, Tensor]:
        numbers = torch.where(x.isfinite(), x, 0.0).double()
        tokens = (numbers != 0).any(3, keepdim=True)  # the others are places that a shorter row doesn't fill
        count = tokens.sum(2, keepdim=True).clamp(min=1) * x.shape[3]
        mean = numbers.square().sum((2, 3), keepdim=True) / count
        exponent = torch.where(mean > 0, mean.log2() / 2, 0.0).round().clamp(-100, 100)
        return {"size": torch.exp2(exponent).float()}

    def forward(self, x: Tensor, state: Mapping[str, Tensor], positions: Tensor | None) -> Tensor:
        return x / state["size"].to(x.dtype)

    def inverse(self, y: Tensor, state: Mapping[str, Tensor], positions: Tensor | None) -> Tensor:
        return y * state["size"].to(y.dtype)

    def adjoint(self, q: Tensor, state: Mapping[str, Tensor]) -> Tensor:
        return q * state["size"].to(q.dtype)


@hookimpl
def kvpolicy_transforms() -> list[type[Transform]]:
    return [Unit]
