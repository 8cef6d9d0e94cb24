"""Extra `sparse`: the largest magnitudes of each group, kept as they came."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import torch
from pydantic import Field, model_validator

from kvpolicy.errors import RecipeError
from kvpolicy.hookspecs import hookimpl
from kvpolicy.interfaces.component import MOST
from kvpolicy.interfaces.extra import Axis, Extra, Grouping
from kvpolicy.interfaces.site import Site

if TYPE_CHECKING:
    from torch import Tensor


class Sparse(Extra):
    """Keeps the numbers of largest magnitude of each group as they came, and codes the mean of the others there.

    So a few outliers cost the others of their group no levels. A number that is not finite is the first to be kept.
    Values are in the type of the model, their indices in the smallest integers that hold them.

    Source: GEAR (arXiv 2403.05527) and KVQuant (arXiv 2401.18079), the sparse part. GEAR's is `by: extremes` with
    `among: vector`. Deviations: vectors are those of one KV head; the mean of the others is coded in the place of what
    is kept, where GEAR's code has that of all; nothing is kept by a threshold.
    """

    kind: Literal["sparse"] = "sparse"
    axes: ClassVar[Mapping[str, Axis]] = {"slots": "arrival", "numbers": "arrival"}
    share: float | None = Field(
        None,
        gt=0,
        lt=1,
        description=(
            "Share of the numbers of a group that is kept, rounded down, one at least; by: extremes half of it on each "
            "side, rounded to the nearest, one at least."
        ),
    )
    count: int | None = Field(
        None, ge=1, le=2**15, description="Numbers of a group that are kept. Without both, 1; by: extremes 2."
    )
    by: Literal["magnitude", "extremes"] = Field(
        "magnitude", description="magnitude: the largest magnitudes are kept; extremes: as many largest as smallest."
    )
    among: Annotated[int, Field(ge=1, le=MOST)] | Literal["group", "vector"] = Field(
        "group",
        description=(
            "What a group is. group: the numbers that share a scale; vector: all channels of a token (per: token), all "
            "tokens of a channel that are coded together (per: channel); a number: so many neighbours of these."
        ),
    )

    @model_validator(mode="after")
    def _check_one(self) -> Sparse:
        if self.share is not None and self.count is not None:
            raise ValueError("sparse must have share or count, found both; remove one")
        if self.by == "extremes" and self.count is not None and self.count % 2:
            raise ValueError(
                f"sparse must have an even count by: extremes, found count: {self.count}; write {self.count + 1}"
            )
        return self

    def _most(self, size: int) -> int:
        """Numbers kept of a group of `size`."""
        if self.by == "extremes":
            return self.count or 2 * max(1, int((self.share or 0) * size / 2 + 0.5))
        if self.share is None:
            return self.count or 1
        return max(1, int(self.share * size))

    def _size(self, grouping: Grouping, head_dim: int) -> int:
        """Numbers of a group; 0: all that come."""
        if self.among == "group":
            return grouping.size
        if self.among == "vector":
            return head_dim if grouping.per == "token" else 0
        return self.among

    def arrival(self, grouping: Grouping) -> int:
        return self._size(grouping, 0) if grouping.per == "channel" else 0

    def check_grouping(self, grouping: Grouping) -> None:
        if self.share is not None and not self._size(grouping, 1):
            where = "group_size: arrival" if self.among == "group" else "per: channel and among: vector"
            raise RecipeError(
                f"sparse must have count with {where}, found share: {self.share}; write count: 2, or among: 64"
            )

    def take(self, x: Tensor, grouping: Grouping, site: Site) -> tuple[Tensor, dict[str, Tensor]]:
        size = self._size(grouping, x.shape[3])
        most, extremes = self._most(size), self.by == "extremes"
        if grouping.per == "token":
            if x.shape[3] % size:
                raise RecipeError(
                    f"among must divide head_dim with per: token, found among: {size} and head_dim {x.shape[3]}; use "
                    "group or vector"
                )
            groups = x.unflatten(3, (-1, size))
            rest, index, value = _without_largest(groups, most, extremes)
            first = torch.arange(0, x.shape[3], size, device=x.device).view(-1, 1)
            channel = (index + first).flatten(3).to(_integers(x.shape[3]))
            return rest.flatten(3), {"channel": channel, "value": value.flatten(3)}
        rest, index, value = _without_largest(x.transpose(2, 3), most, extremes)
        kind = _integers(size or 2**31)
        place = torch.arange(x.shape[2], device=x.device).to(kind).view(1, 1, -1, 1)
        parts = {"slots": index.to(kind).unsqueeze(2), "numbers": value.unsqueeze(2)}
        return rest.transpose(2, 3).contiguous(), {"place": place.expand(*x.shape[:2], -1, -1), **parts}

    def add(self, out: Tensor, parts: Mapping[str, Tensor]) -> None:
        if "channel" in parts:
            out.scatter_(3, parts["channel"].long(), parts["value"].to(out.dtype))
            return
        if parts["slots"].shape[2] == 1:
            _put(out, parts["place"], parts["slots"], parts["numbers"])
            return
        for i in range(parts["slots"].shape[4]):
            here = parts["slots"][..., i] == parts["place"]
            out.copy_(torch.where(here, parts["numbers"][..., i].to(out.dtype), out))


def _put(out: Tensor, place: Tensor, slots: Tensor, numbers: Tensor) -> None:
    """Write what is kept of an arrival to those of its tokens that are in `out`: `place` is that of each.

    Slots and numbers are `[batch, kv_heads, 1, head_dim, count]`.
    """
    tokens = out.shape[2]
    known, order = place.squeeze(3).int().contiguous().sort(dim=2)
    wanted = slots.squeeze(2).flatten(2).int().contiguous()
    at = torch.searchsorted(known, wanted).clamp_(max=tokens - 1)
    found = known.gather(2, at) == wanted
    token = torch.where(found, order.gather(2, at), tokens).unflatten(2, slots.shape[3:]).transpose(2, 3)
    more = torch.cat([out, out[:, :, :1]], dim=2)  # with a token that takes what belongs to none
    more.scatter_(2, token, numbers.squeeze(2).transpose(2, 3).to(out.dtype))
    out.copy_(more[:, :, :tokens])


def _integers(count: int) -> torch.dtype:
    """The smallest integers that count from 0 to `count - 1`."""
    return torch.uint8 if count <= 2**8 else torch.int16 if count <= 2**15 else torch.int32


def _without_largest(groups: Tensor, most: int, extremes: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Groups along the last dimension with the mean in place of the largest; where these were, and what they were.

    A group of fewer than `most` numbers is kept whole, its last number as often as needed.
    """
    size = groups.shape[-1]
    index = (_extremes if extremes else _largest)(groups.float(), min(most, size))
    taken = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, index, True)
    others = groups.float().masked_fill(taken, 0.0).sum(-1, keepdim=True) / max(size - most, 1)
    rest = torch.where(taken, others.to(groups.dtype), groups)
    if most > size:
        index = torch.cat([index, index[..., -1:].expand(*index.shape[:-1], most - size)], dim=-1)
    return rest, index, groups.gather(-1, index)


def _largest(groups: Tensor, most: int) -> Tensor:
    """Where the largest magnitudes are."""
    return groups.abs().topk(most, dim=-1).indices


def _extremes(groups: Tensor, most: int) -> Tensor:
    """Where the largest numbers are, and as many of the smallest, or one fewer; nan is one of the first."""
    order = groups.argsort(dim=-1, descending=True, stable=True)
    half = most // 2
    return torch.cat([order[..., : most - half], order[..., order.shape[-1] - half :]], dim=-1)


@hookimpl
def kvpolicy_extras() -> list[type[Extra]]:
    return [Sparse]
