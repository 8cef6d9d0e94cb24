"""Merger `cam`: a dropped value is added to those that follow, by chance."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from kvpolicy.hookspecs import hookimpl
from kvpolicy.interfaces.component import MOST
from kvpolicy.interfaces.merger import Merger, Tokens
from kvpolicy.interfaces.site import Site

STEP, FIRST, SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
"""Constants of splitmix64."""


class Cam(Merger):
    """Adds a dropped value, in equal parts, to the values of the next tokens that stay, or not at all.

    It is added with probability min(1, A / B): A is the attention that the token received, B that of the tokens with
    which it is compared. The draw depends on seed, layer, head and position alone.

    Source: CaM (Cache Merging, ICML 2024), as kvpress (`to: mean`) and KVCache-Factory (`to: max`) have it.
    """

    kind: Literal["cam"] = "cam"
    tokens: int = Field(32, ge=1, le=MOST, description="Tokens to whose values a dropped one is added, 1/tokens each.")
    to: Literal["mean", "max"] = Field(
        "mean",
        description="What attention is compared with: the mean of the tokens that it is added to, or the largest of "
        "all that stay.",
    )
    seed: int = Field(0, ge=0, le=MOST, description="Seed of the draws.")

    def shares(self, gone: Tokens, kept: Tokens, site: Site) -> Tensor:
        real = kept.positions >= 0
        last = torch.iinfo(torch.int64).max
        places = kept.positions.masked_fill(~real, last)
        ordered, order = places.sort(dim=2)
        rank = torch.empty_like(order).scatter_(
            2, order, torch.arange(order.shape[2], device=order.device).expand_as(order)
        )
        before = torch.searchsorted(ordered, gone.positions.contiguous())
        ahead = rank.unsqueeze(2) - before.unsqueeze(3)
        near = (ahead >= 0) & (ahead < self.tokens) & real.unsqueeze(2)
        seen = kept.attention.masked_fill(~real, 0.0).unsqueeze(2)
        other = seen.amax(3) if self.to == "max" else (seen * near).sum(3) / near.sum(3).clamp(min=1)
        chosen = _uniform(self.seed, site.layer, gone.positions) * other < gone.attention
        return (near & chosen.unsqueeze(3)).float() / self.tokens


def _uniform(seed: int, layer: int, positions: Tensor) -> Tensor:
    """Numbers from 0 to 1, by seed, layer, head and position: the finalizer of splitmix64 over one after the other."""
    heads = torch.arange(positions.shape[1], device=positions.device).view(1, -1, 1)
    found = torch.full_like(positions, seed)
    for part in (layer, heads, positions):
        found = (found ^ part) + _signed(STEP)
        found = (found ^ _shifted(found, 30)) * _signed(FIRST)
        found = (found ^ _shifted(found, 27)) * _signed(SECOND)
        found = found ^ _shifted(found, 31)
    return _shifted(found, 40).float() / (1 << 24)


def _signed(x: int) -> int:
    return x - (1 << 64)


def _shifted(x: Tensor, by: int) -> Tensor:
    """To the right, zeros coming in."""
    return (x >> by) & ((1 << (64 - by)) - 1)


@hookimpl
def kvpolicy_mergers() -> list[type[Merger]]:
    """The merger of this file."""
    return [Cam]
