"""Transform `reorder`: channels with like ranges side by side, so that they share a scale."""

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


def _order(low: Tensor, high: Tensor) -> Tensor:
    """Channels by their place on the line along which their points (low, high) are spread most."""
    a, b = (x - x.mean(-1, keepdim=True) for x in (low.double(), high.double()))
    angle = torch.atan2(2 * (a * b).mean(-1), (a * a).mean(-1) - (b * b).mean(-1)) / 2
    along = a * angle.cos().unsqueeze(-1) + b * angle.sin().unsqueeze(-1)
    return along.argsort(dim=-1, stable=True)


class Reorder(Transform):
    """Puts the channels of each head in an order in which neighbours have like minima and maxima.

    With `per: token` and groups smaller than a head, channels with large numbers then share their scales with each
    other alone. Attention folds the order into the query and into the output.

    Source: SKVQ (arXiv 2405.06219, section 3.2, channel reorder). Deviations: channels stay within their head, and
    groups are of equal size, so that channels are sorted where SKVQ clusters those of all heads by k-means; with groups
    as large as a head nothing changes.
    """

    kind: Literal["reorder"] = "reorder"
    by: Literal["keys", "calibration"] = Field(
        "keys",
        description=(
            "keys: minima and maxima are those of the first tokens that are stored, keys or values; calibration: those "
            "of the recipe's calibration."
        ),
    )
    unrotated: bool = Field(
        False, description="With by: calibration, those of keys before RoPE, for use behind the transform unrotate."
    )

    def check(self, site: Site) -> None:
        if self.by == "calibration":
            self._bounds(site)

    def _bounds(self, site: Site) -> tuple[Tensor, Tensor]:
        shape = (site.kv_heads, site.head_dim)
        return site.calibrated("low", shape, self.unrotated), site.calibrated("high", shape, self.unrotated)

    def fit(self, x: Tensor, queries: Tensor | None, site: Site) -> dict[str, Tensor]:
        if self.by == "calibration":
            low, high = self._bounds(site)
            return {"order": _order(low, high).unsqueeze(0).to(x.device, torch.int16)}
        numbers = torch.where(x.isfinite(), x, 0.0).float()
        low, high = torch.aminmax(numbers, dim=2)
        return {"order": _order(low, high).to(torch.int16)}

    def forward(self, x: Tensor, state: Mapping[str, Tensor], positions: Tensor | None) -> Tensor:
        return x.gather(3, _like(state["order"], x))

    def inverse(self, y: Tensor, state: Mapping[str, Tensor], positions: Tensor | None) -> Tensor:
        return torch.empty_like(y).scatter_(3, _like(state["order"], y), y)

    def adjoint(self, q: Tensor, state: Mapping[str, Tensor]) -> Tensor:
        return self.forward(q, state, None)


def _like(order: Tensor, x: Tensor) -> Tensor:
    """The order of channels for each token of `x`."""
    return order.long().unsqueeze(2).expand(x.shape)


@hookimpl
def kvpolicy_transforms() -> list[type[Transform]]:
    return [Reorder]
