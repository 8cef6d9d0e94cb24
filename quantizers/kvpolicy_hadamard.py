"""Transform `hadamard`: a rotation that spreads large channels over all."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from pydantic import Field

from kvpolicy.errors import RecipeError
from kvpolicy.hookspecs import hookimpl
from kvpolicy.interfaces.site import Site
from kvpolicy.interfaces.transform import Transform

if TYPE_CHECKING:
    from torch import Tensor


def _block(channels: int) -> int:
    """The largest power of two that divides a number of channels."""
    return channels & -channels


def _rotated(x: Tensor) -> Tensor:
    """`x` times the matrix, by sums and differences alone: a token's numbers don't depend on how many come with it."""
    channels, width = x.shape[-1], 1
    if x.requires_grad and torch.is_grad_enabled():  # what is written in place has no gradient
        while width < _block(channels):
            a, b = x.unflatten(-1, (-1, 2, width)).unbind(-2)
            x = torch.stack([a + b, a - b], dim=-2).flatten(-3)
            width *= 2
        return x.mul(width**-0.5)
    spare = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    other = torch.empty_like(spare)
    while width < _block(channels):
        a, b = x.unflatten(-1, (-1, 2, width)).unbind(-2)
        total, difference = spare.unflatten(-1, (-1, 2, width)).unbind(-2)
        torch.add(a, b, out=total)
        torch.sub(a, b, out=difference)
        x, spare, other = spare, other, spare
        width *= 2
    return x * width**-0.5 if width == 1 else x.mul_(width**-0.5)


@lru_cache(maxsize=32)
def _matrix(channels: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The matrix of one block, for queries and sums of values: one product costs less than many sums."""
    with torch.inference_mode(False):
        size = _block(channels)
        matrix: Tensor = _rotated(torch.eye(size, dtype=torch.float64)).to(device, dtype)
        return matrix


def _multiplied(x: Tensor) -> Tensor:
    """`x` times the matrix by one product; rounding may depend on how many tokens come together."""
    matrix = _matrix(x.shape[-1], x.dtype, x.device)
    found: Tensor = (x.unflatten(-1, (-1, len(matrix))) @ matrix).flatten(-2)
    return found


class Hadamard(Transform):
    """Multiplies the channels of a head by an orthonormal Hadamard matrix.

    A large channel is spread over the others, which lets numbers of one scale tell all of them apart. Where head_dim is
    no power of two the matrix is block-diagonal, its blocks the largest power of two that divides head_dim.

    Source: QuaRot (arXiv 2404.00456), which rotates keys and values so; random signs as in QuIP# (arXiv 2402.04396).
    Deviations: values are rotated back by what reads the cache, not by weights that were changed before; without `seed`
    there are no signs.
    """

    kind: Literal["hadamard"] = "hadamard"
    butterflies: ClassVar[bool] = True
    seed: int | None = Field(
        None,
        ge=0,
        le=2**31 - 1,
        description="Channels change sign before, at random with this seed. Without it none does.",
    )

    def check(self, site: Site) -> None:
        if site.head_dim % 2:
            raise RecipeError(
                f"hadamard needs an even head_dim, found {site.head_dim}, of which it would change nothing; remove it"
            )

    def fit(self, x: Tensor, queries: Tensor | None, site: Site) -> dict[str, Tensor]:
        if self.seed is None:
            return {}
        drawn = torch.randint(2, (1, 1, 1, x.shape[3]), generator=torch.Generator().manual_seed(self.seed))
        return {"signs": (2 * drawn - 1).to(x.device, torch.int8)}

    def forward(self, x: Tensor, state: Mapping[str, Tensor], positions: Tensor | None) -> Tensor:
        return _rotated(x * state["signs"] if state else x)

    def inverse(self, y: Tensor, state: Mapping[str, Tensor], positions: Tensor | None) -> Tensor:
        # A call of a device costs more than the arithmetic of a decode step, and the matrix is its own inverse.
        x = _rotated(y) if y.device.type == "cpu" else _multiplied(y)
        return x * state["signs"] if state else x

    def adjoint(self, q: Tensor, state: Mapping[str, Tensor]) -> Tensor:
        q = q * state["signs"] if state else q
        return _multiplied(q)


@hookimpl
def kvpolicy_transforms() -> list[type[Transform]]:
    return [Hadamard]
