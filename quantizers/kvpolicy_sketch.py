"""Extra `sketch`: signs of random projections of the error, which make products with queries unbiased."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field

from kvpolicy.hookspecs import hookimpl
from kvpolicy.interfaces.extra import Extra, Grouping
from kvpolicy.interfaces.site import Site

if TYPE_CHECKING:
    from torch import Tensor


@lru_cache(maxsize=32)
def _projections(seed: int, count: int, channels: int, device: torch.device) -> Tensor:
    """Normal numbers, `[count, channels]`: the same for a seed wherever they are drawn."""
    drawn = np.random.RandomState(seed).standard_normal((count, channels)).astype(np.float32)
    with torch.inference_mode(False):
        return torch.from_numpy(drawn).to(device)


@lru_cache(maxsize=8)
def _signs(device: torch.device) -> Tensor:
    """What each byte stands for: 1 and -1, the lowest bit first, `[256, 8]`."""
    with torch.inference_mode(False):
        bits = torch.arange(256).unsqueeze(1) >> torch.arange(8) & 1
        return (2.0 * bits - 1).to(device)


class Sketch(Extra):
    """Keeps of each token's error its norm, and of random projections of it the signs, a bit each.

    What attention computes of a query and such a key is right on average over the projections, where codes alone
    shrink it: the best codes of one bit by a third. The price is variance: squared errors grow by half, so this is for
    keys of few bits whose products must not be biased.

    Source: QJL (arXiv 2406.03482, definition 3.1), as the second stage of TurboQuant (arXiv 2504.19874, algorithm 2).
    Deviations: the projections are not made orthogonal, as QJL's code does; the norm is kept in bfloat16.
    """

    kind: Literal["sketch"] = "sketch"
    additive: ClassVar[bool] = True
    unbiased: ClassVar[bool] = True
    bits: int = Field(1, ge=1, le=8, description="Projections for each channel of a head, of which each is a bit.")
    seed: int = Field(0, ge=0, le=2**31 - 1, description="Which projections are drawn.")

    def fit(self, error: Tensor, grouping: Grouping, site: Site) -> dict[str, Tensor]:
        drawn = self._drawn(error)
        # In float64, so that signs don't depend on how many tokens come together.
        bits = (error.double() @ drawn.double().T >= 0).to(torch.uint8)
        whole = torch.nn.functional.pad(bits, (0, -len(drawn) % 8)).unflatten(3, (-1, 8))
        signs = (whole << torch.arange(8, dtype=torch.uint8, device=error.device)).sum(4, dtype=torch.uint8)
        return {"signs": signs, "norm": error.norm(dim=3, keepdim=True).to(torch.bfloat16)}

    def _drawn(self, like: Tensor) -> Tensor:
        """The projections of tokens like some."""
        return _projections(self.seed, self.bits * like.shape[3], like.shape[3], like.device)

    def _read(self, parts: Mapping[str, Tensor], drawn: Tensor) -> tuple[Tensor, Tensor]:
        """Signs as 1 and -1, `[batch, kv_heads, tokens, projections]`, and what they are to be multiplied with."""
        kept = parts["signs"]
        signs = _signs(kept.device).index_select(0, kept.flatten().int()).view(*kept.shape[:3], -1)[..., : len(drawn)]
        return signs, parts["norm"].float() * (math.sqrt(math.pi / 2) / len(drawn))

    def add(self, out: Tensor, parts: Mapping[str, Tensor]) -> None:
        drawn = self._drawn(out)
        signs, size = self._read(parts, drawn)
        out += (signs @ drawn) * size

    def add_scores(self, rows: Tensor, out: Tensor, parts: Mapping[str, Tensor]) -> None:
        drawn = self._drawn(rows)
        signs, size = self._read(parts, drawn)
        out += ((rows @ drawn.T) @ signs.transpose(2, 3)) * size.transpose(2, 3)

    def add_values(self, weights: Tensor, out: Tensor, parts: Mapping[str, Tensor]) -> None:
        drawn = self._drawn(out)
        signs, size = self._read(parts, drawn)
        out += ((weights * size.transpose(2, 3)) @ signs) @ drawn


@hookimpl
def kvpolicy_extras() -> list[type[Extra]]:
    return [Sketch]
