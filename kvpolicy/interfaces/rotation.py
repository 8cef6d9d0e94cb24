"""Rotary position embedding of keys, undone and done again: a model's own, as numbers that outlive the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kvpolicy.errors import RecipeError
from kvpolicy.interfaces.site import Site

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["check_rotation", "find_rotation", "pairs", "rotate", "unrotate"]

DOUBLINGS = 20
"""Angles are read off at the positions 1, 2, 4, ... up to 2^20: each halves the error of a frequency."""


def check_rotation(site: Site) -> None:
    """Raise a `RecipeError` where keys can't be taken as they were before RoPE."""
    if site.side != "keys":
        raise RecipeError(
            "only keys are rotated by RoPE, found unrotate among the transforms of values; remove it there"
        )
    if site.rotary is None:
        raise RecipeError(
            "keys before RoPE take a model whose rotary embedding is a function of the position alone, found none in "
            "this layer; make the cache for the model, not for its config: make_cache(recipe, model), or use a recipe "
            "that codes keys after RoPE"
        )


def find_rotation(site: Site, device: Any = None) -> dict[str, Tensor]:
    """What `rotate` and `unrotate` need of a place in a model.

    Returns:
        `frequencies`: radians a position of each channel that is rotated, float32 `[1, 1, 1, rotated channels]`, below
        zero in the channels from which their partner is subtracted; `partners`: the channel that each is rotated with,
        int16; `factor`: the length that the embedding gives to what it rotates (YaRN's attention factor),
        `[1, 1, 1, 1]`.

    Raises:
        RecipeError: the model has no rotary embedding that rotates by frequencies.
    """
    import torch

    check_rotation(site)
    assert site.rotary is not None
    positions = torch.tensor([0, *(2**i for i in range(DOUBLINGS + 1)), 3, 1001], device=device)
    cos, sin = (x[0].double().cpu() for x in site.rotary(positions[None]))
    angles = torch.atan2(sin, cos)
    frequencies = angles[1]
    for i in range(1, DOUBLINGS + 1):
        turns = ((frequencies * 2**i - angles[i + 1]) / (2 * torch.pi)).round()
        frequencies = (angles[i + 1] + 2 * torch.pi * turns) / 2**i
    expected = torch.tensor([[3.0], [1001.0]], dtype=torch.float64) * frequencies
    factor = cos[:1, :1]
    again = torch.stack([expected.cos(), expected.sin()]) * factor
    if not (again - torch.stack([cos[-2:], sin[-2:]])).abs().max() < 1e-2 * factor.abs().max():
        raise RecipeError(
            "keys before RoPE take a rotary embedding that turns pairs of channels by a frequency times the position, "
            "found another in this model; use a recipe that codes keys after RoPE"
        )
    shape = (1, 1, 1, -1)
    partners, signs = pairs(cos.shape[1], site.interleaved)
    return {
        "frequencies": (frequencies * signs).view(shape).to(device, torch.float32),
        "partners": partners.view(shape).to(device, torch.int16),
        "factor": factor.view(shape).to(device, torch.float32),
    }


def pairs(channels: int, interleaved: bool) -> tuple[Tensor, Tensor]:
    """The channel with which each of some is rotated, and -1 where that is subtracted, else 1."""
    import torch

    index = torch.arange(channels)
    step = 1 if interleaved else channels // 2
    first = index // step % 2 == 0
    return torch.where(first, index + step, index - step), torch.where(first, -1, 1)


def unrotate(x: Tensor, found: Mapping[str, Tensor], positions: Tensor) -> Tensor:
    """Keys before the rotation that gave `x`, `[batch, kv_heads, tokens, head_dim]`, at `positions`.

    `positions` are `[batch, kv_heads or 1, tokens]`. The channels beyond the rotated ones stay as they are.
    """
    return _turned(x, found, positions, -1)


def rotate(x: Tensor, found: Mapping[str, Tensor], positions: Tensor) -> Tensor:
    """The inverse of `unrotate`: what the model makes of keys."""
    return _turned(x, found, positions, 1)


def _turned(x: Tensor, found: Mapping[str, Tensor], positions: Tensor, sign: int) -> Tensor:
    import torch

    frequencies, factor = found["frequencies"], found["factor"].to(x.dtype)
    # In float32, as models compute angles: the same positions then give the same cos and sin.
    angles = positions.unsqueeze(-1).float() * frequencies
    count = frequencies.shape[-1]
    some = x[..., :count]
    across = some.index_select(3, found["partners"].view(-1).long())
    turned = some * angles.cos().to(x.dtype) + across * (sign * angles.sin()).to(x.dtype)
    turned = turned * factor if sign > 0 else turned / factor
    return turned if count == x.shape[-1] else torch.cat([turned, x[..., count:]], dim=-1)
