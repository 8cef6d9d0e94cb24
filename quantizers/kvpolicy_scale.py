"""Transform `scale`: each channel divided by the root of its largest magnitude."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field

from kvpolicy.hookspecs import hookimpl
from kvpolicy.interfaces.site import Site
from kvpolicy.interfaces.transform import Transform

if TYPE_CHECKING:
    from torch import Tensor


class Scale(Transform):
    """Divides each channel by the root of its largest magnitude, so that large channels take no bits from others.

    The magnitudes are those of the first tokens that reach a store, or of a calibration. Of use where channels share a
    scale, that is with `per: token`.

    Source: ZipCache (arXiv 2405.14256, section 4.1, channel-separable quantization). Deviations: the divisors are found
    once, on the first tokens, not anew on all; small ones are raised to a quarter of their mean.
    """

    kind: Literal["scale"] = "scale"
    by: Literal["keys", "calibration"] = Field(
        "keys",
        description=(
            "keys: divide by the root of the largest magnitude in what is stored, keys or values; calibration: in what "
            "the recipe's calibration saw of these."
        ),
    )

    def check(self, site: Site) -> None:
        if self.by == "calibration":
            self._bounds(site)

    def _bounds(self, site: Site) -> Tensor:
        """Minima and maxima of a calibration: `[1, kv_heads, 2, head_dim]`."""
        shape = (site.kv_heads, site.head_dim)
        return torch.stack([site.calibrated("low", shape), site.calibrated("high", shape)], dim=1).unsqueeze(0)

    def fit(self, x: Tensor, queries: Tensor | None, site: Site) -> dict[str, Tensor]:
        magnitude = (self._bounds(site).to(x.device) if self.by == "calibration" else x).float().abs()
        # What is not finite says nothing of its channel, nor of the others by way of the mean.
        root = torch.where(magnitude.isfinite(), magnitude, 0.0).amax(2, keepdim=True).sqrt()
        # A channel that happens to be near zero in a few first tokens must not blow later ones up.
        root = root.clamp(min=0.25 * root.mean(3, keepdim=True))
        return {"divisors": torch.where(root > 0, root, 1.0).to(x.dtype)}

    def forward(self, x: Tensor, state: Mapping[str, Tensor], positions: Tensor | None) -> Tensor:
        return x / state["divisors"].to(x.dtype)

    def inverse(self, y: Tensor, state: Mapping[str, Tensor], positions: Tensor | None) -> Tensor:
        return y * state["divisors"].to(y.dtype)

    def adjoint(self, q: Tensor, state: Mapping[str, Tensor]) -> Tensor:
        return q * state["divisors"].to(q.dtype)


@hookimpl
def kvpolicy_transforms() -> list[type[Transform]]:
    return [Scale]
