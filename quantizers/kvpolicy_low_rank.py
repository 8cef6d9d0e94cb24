"""Extra `low_rank`: the error of coding as a product of two thin matrices."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from pydantic import Field

from kvpolicy.errors import RecipeError
from kvpolicy.hookspecs import hookimpl
from kvpolicy.interfaces.extra import Axis, Extra, Grouping
from kvpolicy.interfaces.site import Site

if TYPE_CHECKING:
    from torch import Tensor

MOST_RANK = 64


class LowRank(Extra):
    """Adds the error that coding made, as a matrix of low rank: for each head and for the tokens coded together.

    The error `[tokens, head_dim]` of an arrival is near `A @ B`, `A` of `[tokens, rank]` and `B` of `[rank, head_dim]`,
    by a few rounds of subspace iteration. `A` is kept in float16, `B` in bfloat16, which holds sizes that float16 does
    not. An arrival pays for `B` whatever its length: of use behind a tier whose tokens leave in blocks. What it finds
    depends on which tokens arrive together.

    Source: GEAR (arXiv 2403.05527, section 3). Deviations: the first `B` is the same for all heads and rows, from a
    seed; bases are made orthonormal in every round, which spans the same subspace and loses fewer digits.
    """

    kind: Literal["low_rank"] = "low_rank"
    axes: ClassVar[Mapping[str, Axis]] = {"across": "arrival"}
    additive: ClassVar[bool] = True
    rank: int = Field(2, ge=1, le=MOST_RANK, description="Rank of the matrix that is added, head_dim at most.")
    loops: int = Field(3, ge=1, le=64, description="Rounds of subspace iteration.")

    def check(self, site: Site) -> None:
        if self.rank > site.head_dim:
            raise RecipeError(f"rank must be up to head_dim, found rank: {self.rank} and head_dim {site.head_dim}").at(
                "rank"
            )

    def arrival(self, grouping: Grouping) -> int:
        return 0

    def fit(self, error: Tensor, grouping: Grouping, site: Site) -> dict[str, Tensor]:
        error = torch.where(error.isfinite(), error, 0.0)  # or one number would spoil all others
        size = error.abs().amax((2, 3), keepdim=True)
        error = error / torch.where(size > 0, size, 1.0)
        across = _start(error.shape[3], self.rank, error.device).to(error.dtype)
        for _ in range(self.loops):
            along = _orthonormal(error @ _orthonormal(across))
            across = error.transpose(2, 3) @ along
        return {"along": along.half(), "across": (across * size).transpose(2, 3).unsqueeze(2).bfloat16()}

    def add(self, out: Tensor, parts: Mapping[str, Tensor]) -> None:
        along, across = parts["along"].to(out.dtype), parts["across"]
        # Not as a product of matrices, whose digits depend on how many tokens there are.
        for i in range(self.rank):
            out.addcmul_(along[..., i : i + 1], across[..., i, :].to(out.dtype))

    def add_scores(self, rows: Tensor, out: Tensor, parts: Mapping[str, Tensor]) -> None:
        across = parts["across"].to(out.dtype)
        if across.shape[2] > 1:
            super().add_scores(rows, out, parts)
            return
        out += (rows @ across.squeeze(2).transpose(2, 3)) @ parts["along"].to(out.dtype).transpose(2, 3)

    def add_values(self, weights: Tensor, out: Tensor, parts: Mapping[str, Tensor]) -> None:
        across = parts["across"].to(out.dtype)
        if across.shape[2] > 1:
            super().add_values(weights, out, parts)
            return
        out += (weights @ parts["along"].to(out.dtype)) @ across.squeeze(2)


@cache
def _start(channels: int, rank: int, device: torch.device) -> Tensor:
    """Where the iteration begins: uniform numbers `[channels, rank]`, the same on every device."""
    generator = torch.Generator("cpu").manual_seed(0)
    with torch.inference_mode(False):
        start = torch.rand((channels, rank), generator=generator, device="cpu")
        if device.type == "cuda":  # from pinned memory, or a decode step would wait for the copy
            return start.pin_memory().to(device, non_blocking=True)
        return start.to(device)


def _orthonormal(x: Tensor) -> Tensor:
    """Orthonormal columns that span those of `x`, `[..., n, columns]`; zeros where there are fewer dimensions.

    By Gram and Schmidt, twice: it needs no library of linear algebra, which would make a GPU wait.
    """
    found: list[Tensor] = []
    for column in x.unbind(-1):
        before = column.norm(dim=-1, keepdim=True)
        for _ in range(2):
            for other in found:
                column = column - other * (other * column).sum(-1, keepdim=True)
        size = column.norm(dim=-1, keepdim=True)
        kept = size > 1e-5 * before  # what is left of a column that depends on the others is noise
        found.append(torch.where(kept, column / torch.where(kept, size, 1.0), 0.0))
    return torch.stack(found, dim=-1)


@hookimpl
def kvpolicy_extras() -> list[type[Extra]]:
    return [LowRank]
