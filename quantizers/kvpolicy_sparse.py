"""Extra `sparse`: the largest magnitudes of each group, kept as they came."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from pydantic import Field, model_validator

from kvpolicy.errors import RecipeError
from kvpolicy.hookspecs import hookimpl
from kvpolicy.interfaces.extra import Axis, Extra, Grouping
from kvpolicy.interfaces.site import Site

if TYPE_CHECKING:
    from torch import Tensor


class Sparse(Extra):
    """Keeps the numbers of largest magnitude of each group as they came, and codes the mean of the others there.

    So a few outliers cost the others of their group no levels. A number that is not finite is the first to be kept.
    Values are in the type of the model, their indices in the smallest integers that hold them.

    Source: GEAR (arXiv 2403.05527) and KVQuant (arXiv 2401.18079), the sparse part. Deviations: outliers are chosen in
    each group that shares a scale, by magnitude, not by threshold; the mean of the others is coded in their place.
    """

    kind: Literal["sparse"] = "sparse"
    axes: ClassVar[Mapping[str, Axis]] = {"slots": "arrival", "numbers": "arrival"}
    share: float | None = Field(
        None, gt=0, lt=1, description="Share of the numbers of a group that is kept, rounded down, one at least."
    )
    count: int | None = Field(None, ge=1, le=2**15, description="Numbers of a group that are kept. Without both, 1.")

    @model_validator(mode="after")
    def _check_one(self) -> Sparse:
        if self.share is not None and self.count is not None:
            raise ValueError("sparse must have share or count, found both; remove one")
        return self

    def _most(self, size: int) -> int:
        """Numbers kept of a group of `size`."""
        if self.share is None:
            return self.count or 1
        return max(1, int(self.share * size))

    def check_grouping(self, grouping: Grouping) -> None:
        if self.share is not None and not grouping.size:
            raise RecipeError(
                f"sparse must have count with group_size: arrival, found share: {self.share}; write count: 1, or "
                "another group_size"
            )

    def take(self, x: Tensor, grouping: Grouping, site: Site) -> tuple[Tensor, dict[str, Tensor]]:
        most = self._most(grouping.size)
        if grouping.per == "token":
            groups = x.unflatten(3, (-1, grouping.size))
            rest, index, value = _without_largest(groups, most)
            first = torch.arange(0, x.shape[3], grouping.size, device=x.device).view(-1, 1)
            channel = (index + first).flatten(3).to(_integers(x.shape[3]))
            return rest.flatten(3), {"channel": channel, "value": value.flatten(3)}
        rest, index, value = _without_largest(x.transpose(2, 3), most)
        kind = _integers(grouping.size or 2**31)
        place = torch.arange(x.shape[2], device=x.device).to(kind).view(1, 1, -1, 1)
        parts = {"slots": index.to(kind).unsqueeze(2), "numbers": value.unsqueeze(2)}
        return rest.transpose(2, 3).contiguous(), {"place": place.expand(*x.shape[:2], -1, -1), **parts}

    def add(self, out: Tensor, parts: Mapping[str, Tensor]) -> None:
        if "channel" in parts:
            out.scatter_(3, parts["channel"].long(), parts["value"].to(out.dtype))
            return
        for i in range(parts["slots"].shape[4]):
            here = parts["slots"][..., i] == parts["place"]
            out.copy_(torch.where(here, parts["numbers"][..., i].to(out.dtype), out))


def _integers(count: int) -> torch.dtype:
    """The smallest integers that count from 0 to `count - 1`."""
    return torch.uint8 if count <= 2**8 else torch.int16 if count <= 2**15 else torch.int32


def _without_largest(groups: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """Groups along the last dimension with the mean in place of the largest; where these were, and what they were.

    A group of fewer than `most` numbers is kept whole, its last number as often as needed.
    """
    size = groups.shape[-1]
    index = groups.float().abs().topk(min(most, size), dim=-1).indices
    taken = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, index, True)
    others = groups.float().masked_fill(taken, 0.0).sum(-1, keepdim=True) / max(size - most, 1)
    rest = torch.where(taken, others.to(groups.dtype), groups)
    if most > size:
        index = torch.cat([index, index[..., -1:].expand(*index.shape[:-1], most - size)], dim=-1)
    return rest, index, groups.gather(-1, index)


@hookimpl
def kvpolicy_extras() -> list[type[Extra]]:
    return [Sparse]
