"""Transform `latent`: vectors by their principal directions, those first in which they differ most."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

import torch

from kvpolicy.hookspecs import hookimpl
from kvpolicy.interfaces.rotation import find_rotation
from kvpolicy.interfaces.site import Site
from kvpolicy.interfaces.transform import Transform

if TYPE_CHECKING:
    from torch import Tensor

PRIOR = 0.25
"""Tokens, in parts of head_dim, that the belief counts for that vectors differ alike in all directions."""
MOST = 127
"""The largest number of a direction as it is kept."""
STEPS = 5
"""Of an iteration that squares its error, which begins below a tenth."""
LEAST = 1e-3
"""The least weight of a channel, in parts of the mean."""


def _paired(power: Tensor, site: Site) -> Tensor:
    """The mean of both channels that are rotated together, where any are."""
    if site.side != "keys" or site.rotary is None:
        return power
    partners = find_rotation(site, power.device)["partners"].long().flatten()
    rotated, rest = power[..., : len(partners)], power[..., len(partners) :]
    return torch.cat([(rotated + rotated[..., partners]) / 2, rest], dim=-1)


class Latent(Transform):
    """Turns vectors into their principal directions about their mean: the first channel tells them apart most.

    Mean and directions are found of the first tokens that reach a store, for each head; with few of them directions are
    drawn towards equal ones. How many bits a channel deserves falls from the first to the last: write a list of
    `nbits`. Keys before RoPE (`unrotate` before it) lie in far fewer directions than keys after it.

    To find them the host waits for the device: once for a store, as its first group is full, which is in the prompt, or
    in a later step where the prompt is shorter. In a padded batch rows that bring no token to that are found later.

    Channels are weighted by the root of their mean square, that of both channels which RoPE rotates together: queries
    are large where keys are, and an error counts as much as the query that meets it.

    Source: SVDq (arXiv 2502.15304, section 3), which codes keys so, from the first direction in 8 bits to the last in
    none. Deviations: the mean is taken away, channels are weighted, directions are kept in 8 bits, and they are those
    of the tokens that are coded, not of the exact ones too.
    """

    kind: Literal["latent"] = "latent"

    def fit(self, x: Tensor, queries: Tensor | None, site: Site) -> dict[str, Tensor]:
        seen = torch.where(x.isfinite(), x, 0.0).double()
        n, channels = seen.shape[2], seen.shape[3]
        mean = seen.mean(2, keepdim=True).to(x.dtype)
        power = _paired(seen.square().mean(2, keepdim=True), site)
        whole = power.mean(3, keepdim=True)
        weights = torch.where(whole > 0, power / torch.where(whole > 0, whole, 1.0) + LEAST, 1.0).sqrt().to(x.dtype)
        y = (seen - mean.double()) * weights.double()
        moments = y.transpose(2, 3) @ y
        size = moments.diagonal(dim1=2, dim2=3).mean(2)[..., None, None] / n
        alike = torch.eye(channels, dtype=y.dtype, device=y.device) * torch.where(size > 0, size, 1.0)
        _, found = torch.linalg.eigh(moments + PRIOR * channels * alike)
        directions = (found / found.abs().amax(2, keepdim=True) * MOST).round().to(torch.int8)
        return {"mean": mean, "weights": weights, "directions": directions.flip(3)}

    def forward(self, x: Tensor, state: Mapping[str, Tensor], positions: Tensor | None) -> Tensor:
        # In float64, so that codes don't depend on how many tokens come together.
        mean, weights = state["mean"].double(), state["weights"].double()
        return (((x.double() - mean) * weights) @ _inverted(_directions(state, torch.float64)).mT).to(x.dtype)

    def inverse(self, y: Tensor, state: Mapping[str, Tensor], positions: Tensor | None) -> Tensor:
        mean, weights = state["mean"].to(y.dtype), state["weights"].to(y.dtype)
        return (y @ _directions(state, y.dtype).mT) / weights + mean


def _directions(state: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
    """The directions as columns of length 1: rounded to 8 bits they are not quite at right angles."""
    columns = state["directions"].to(dtype)
    return columns / columns.square().sum(2, keepdim=True).sqrt().clamp(min=1.0)


def _inverted(matrix: Tensor) -> Tensor:
    """The inverse of a matrix that is nearly orthonormal, by Newton's iteration: nothing waits for a device.

    It is not kept: in a type that is exact enough it would take several times what the directions do.
    """
    whole = matrix.flatten(0, -3)
    found = whole.mT
    for _ in range(STEPS):
        found = torch.baddbmm(found, found @ whole, found, beta=2, alpha=-1)
    return found.view_as(matrix)


@hookimpl
def kvpolicy_transforms() -> list[type[Transform]]:
    return [Latent]
