"""Transform `scale`: each channel divided by a number of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from pydantic import Field

from kvpolicy.hookspecs import hookimpl
from kvpolicy.interfaces.site import Site
from kvpolicy.interfaces.transform import Transform

if TYPE_CHECKING:
    from torch import Tensor


class Scale(Transform):
    """Divides each channel by a number of its own, so that large channels take no bits from others.

    `by: keys`: the root of the channel's largest magnitude, among the first tokens that reach a store, of keys or
    values. `by: queries`: of keys, the root of that over the largest magnitude of the channel in queries. What is coded
    and the queries that meet it are then equally large in each channel. Only an attached model shows queries.
    `by: calibration`: as keys, the magnitudes being those that a calibration saw. Of use where channels share a scale,
    that is with `per: token`.

    Source: ZipCache (arXiv 2405.14256, section 4.1, channel-separable quantization); MiKV (arXiv 2402.18096, equations
    2 to 4, channel balancer), whose factor b is one over the divisor. Deviations: the divisors are found once, on the
    first tokens, not anew on all; roots of magnitudes are raised to a quarter of their mean where they are smaller.
    With grouped queries the magnitude is the largest of the group's heads.
    """

    kind: Literal["scale"] = "scale"
    needs: ClassVar[frozenset[str]] = frozenset({"queries", "calibration"})
    divides: ClassVar[str | None] = "divisors"
    by: Literal["keys", "queries", "calibration"] = Field(
        "keys",
        description=(
            "keys: divide by the root of the largest magnitude in what is stored, keys or values; queries: of keys, by "
            "the root of that over the largest magnitude in queries; calibration: by the root of the largest magnitude "
            "that the recipe's calibration saw."
        ),
    )

    def needed(self) -> frozenset[str]:
        return frozenset() if self.by == "keys" else frozenset({self.by})

    def check(self, site: Site) -> None:
        if self.by == "calibration":
            self._bounds(site)

    def _bounds(self, site: Site) -> Tensor:
        """Minima and maxima of a calibration: `[1, kv_heads, 2, head_dim]`."""
        shape = (site.kv_heads, site.head_dim)
        return torch.stack([site.calibrated("low", shape), site.calibrated("high", shape)], dim=1).unsqueeze(0)

    def fit(self, x: Tensor, queries: Tensor | None, site: Site) -> dict[str, Tensor]:
        root = _roots(self._bounds(site).to(x.device) if self.by == "calibration" else x)
        if queries is not None:
            root = root / _roots(queries)
        return {"divisors": root.to(x.dtype)}

    def forward(self, x: Tensor, state: Mapping[str, Tensor], positions: Tensor | None) -> Tensor:
        return x / state["divisors"].to(x.dtype)

    def inverse(self, y: Tensor, state: Mapping[str, Tensor], positions: Tensor | None) -> Tensor:
        return y * state["divisors"].to(y.dtype)

    def adjoint(self, q: Tensor, state: Mapping[str, Tensor]) -> Tensor:
        return q * state["divisors"].to(q.dtype)


def _roots(x: Tensor) -> Tensor:
    """The root of the largest magnitude of each channel, `[batch, kv_heads, 1, head_dim]`; 1 in a head of zeros."""
    # What is not finite says nothing of its channel, nor of the others by way of the mean.
    low, high = torch.aminmax(x.nan_to_num(0.0, 0.0, 0.0), dim=2, keepdim=True)
    root = torch.maximum(low.neg(), high).float().sqrt()
    # A channel that happens to be near zero in a few first tokens must not blow later ones up.
    root = root.clamp(min=0.25 * root.mean(3, keepdim=True))
    return torch.where(root > 0, root, 1.0)


@hookimpl
def kvpolicy_transforms() -> list[type[Transform]]:
    return [Scale]
