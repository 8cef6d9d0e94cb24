"""Transform `range`: channels brought to [-1, 1] by the range that a calibration found of each."""

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


class Range(Transform):
    """Maps the range `low` to `high` of each channel, which a calibration holds, to -1 to 1.

    What is coded needs no scale of its own then: `nuq-static`. It is decoded block by block in attention.

    Source: KVQuant (arXiv 2401.18079, section 3.1, per-channel ranges that are found offline).
    """

    kind: Literal["range"] = "range"
    needs: ClassVar[frozenset[str]] = frozenset({"calibration"})
    unrotated: bool = Field(False, description="The range of keys before RoPE, for use behind the transform unrotate.")

    def check(self, site: Site) -> None:
        self._bounds(site)

    def _bounds(self, site: Site) -> tuple[Tensor, Tensor]:
        shape = (site.kv_heads, site.head_dim)
        return site.calibrated("low", shape, self.unrotated), site.calibrated("high", shape, self.unrotated)

    def fit(self, x: Tensor, queries: Tensor | None, site: Site) -> dict[str, Tensor]:
        low, high = (t.view(1, site.kv_heads, 1, -1).to(x.device) for t in self._bounds(site))
        half = (high - low) / 2
        return {"middle": (low + high) / 2, "half": torch.where(half > 0, half, 1.0)}

    def forward(self, x: Tensor, state: Mapping[str, Tensor], positions: Tensor | None) -> Tensor:
        return (x - state["middle"].to(x.dtype)) / state["half"].to(x.dtype)

    def inverse(self, y: Tensor, state: Mapping[str, Tensor], positions: Tensor | None) -> Tensor:
        return y * state["half"].to(y.dtype) + state["middle"].to(y.dtype)


@hookimpl
def kvpolicy_transforms() -> list[type[Transform]]:
    return [Range]
