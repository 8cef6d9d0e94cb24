"""Quantizers `lloyd_max` and `split_lloyd_max`: the levels that suit normal numbers best."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field, model_validator

from kvpolicy.errors import RecipeError
from kvpolicy.hookspecs import hookimpl
from kvpolicy.interfaces.extra import Axis
from kvpolicy.interfaces.quantizer import (
    Affine,
    AffineQuantizer,
    Quantizer,
    TensorQuantizer,
    rank_among,
    root_mean_square,
)
from kvpolicy.interfaces.site import Site
from kvpolicy.storage.packing import looked_up, pack, unpack

if TYPE_CHECKING:
    from torch import Tensor, dtype

ABOVE = {
    1: (0.79788456,),
    2: (0.45278003, 1.51041761),
    3: (0.24509418, 0.75600528, 1.34390928, 2.15194570),
    4: (0.12839503, 0.38804830, 0.65675912, 0.94234046, 1.25623120, 1.61804639, 2.06901723, 2.73258957),
}
"""By bits, the levels above zero that err least on a standard normal distribution, in squares."""


def _levels(nbits: int) -> tuple[float, ...]:
    return (*(-level for level in reversed(ABOVE[nbits])), *ABOVE[nbits])


def _codes(groups: Tensor, nbits: int) -> tuple[Tensor, Tensor]:
    """The nearest levels of `[groups, numbers]`, and the root mean squares."""
    size = root_mean_square(groups)
    levels = _levels(nbits)
    bounds = tuple((low + high) / 2 for low, high in pairwise(levels))
    return rank_among(groups / torch.where(size > 0, size, 1.0), bounds), size


class LloydMax(AffineQuantizer):
    """The nearest of the levels that are best for normal numbers, times the root mean square of a group.

    Rotated keys and values are nearly normal: write `transforms: [{kind: hadamard, seed: 0}]` with it. There is no
    offset.

    Source: TurboQuant (arXiv 2504.19874, algorithm 1), whose norm of a vector is the root mean square here; Lloyd
    (1982) and Max (1960). Deviations: the levels are those of the normal distribution, which the density of the
    paper's rotated vectors comes near; with 64 channels these err by 1% less.
    """

    kind: Literal["lloyd_max"] = "lloyd_max"
    independent: ClassVar[bool] = True
    nbits: Literal[1, 2, 3, 4] = Field(4, description="Bits per code.")
    offsets: ClassVar[bool] = False

    def levels(self, site: Site) -> Tensor:
        return torch.tensor(_levels(self.nbits))

    def calibrate(self, groups: Tensor) -> Affine:
        codes, scale = _codes(groups.float(), self.nbits)
        return Affine(codes, scale, torch.zeros_like(scale))


@lru_cache(maxsize=64)
def _rotation(seed: int, channels: int, device: torch.device) -> Tensor:
    """A random orthonormal matrix, in float64: the same for a seed wherever it is drawn."""
    drawn = np.random.RandomState(seed).standard_normal((channels, channels))
    q, r = np.linalg.qr(drawn)
    with torch.inference_mode(False):
        return torch.from_numpy(q * np.sign(np.diag(r))).to(device)


@lru_cache(maxsize=16)
def _table(nbits: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(_levels(nbits)).to(device)


class SplitLloydMax(TensorQuantizer):
    """Lloyd-Max levels, with more bits for the channels that are largest in the first tokens of each head.

    These channels and the others are two vectors: each is rotated, and coded with a norm of its own. Attention rotates
    queries and sums in place of what is stored.

    Source: TurboQuant (arXiv 2504.19874, section 4.3). Deviations: the paper does not say how it finds these channels;
    the levels are those of the normal distribution.
    """

    kind: Literal["split_lloyd_max"] = "split_lloyd_max"
    axes: ClassVar[Mapping[str, Axis]] = {"channels": "store"}
    nbits: Literal[1, 2, 3] = Field(2, description="Bits per code of most channels.")
    wide_bits: Literal[2, 3, 4] = Field(3, description="Bits per code of the largest channels: more than nbits.")
    share: float = Field(0.25, gt=0, lt=1, description="Share of the channels of a head that have wide_bits.")
    seed: int = Field(0, ge=0, le=2**31 - 1, description="Which rotations are drawn.")

    @model_validator(mode="after")
    def _check_bits(self) -> SplitLloydMax:
        if self.wide_bits <= self.nbits:
            raise ValueError(f"wide_bits must be more than nbits, found {self.wide_bits} and {self.nbits}")
        return self

    def precision(self) -> float:
        return self.share * self.wide_bits + (1 - self.share) * self.nbits

    def check(self, head_dim: int) -> None:
        if not 0 < self._wide(head_dim) < head_dim:
            raise RecipeError(
                f"share must leave channels on both sides, found {self.share} of {head_dim} channels; write 0.5"
            )

    def _wide(self, head_dim: int) -> int:
        """How many channels have more bits."""
        return round(self.share * head_dim)

    def _parts(self, head_dim: int) -> Iterator[tuple[str, int, slice]]:
        """Of both vectors the name, the bits, and which channels they are once these are in order."""
        wide = self._wide(head_dim)
        yield "wide", self.wide_bits, slice(0, wide)
        yield "narrow", self.nbits, slice(wide, head_dim)

    def encode(self, x: Tensor) -> dict[str, Tensor]:
        return self.encode_with(x, {})

    def encode_with(self, x: Tensor, kept: Mapping[str, Tensor]) -> dict[str, Tensor]:
        channels = kept["channels"] if kept else self._ordered(x)
        ordered = x.float().gather(3, _along(channels, x))
        found, sizes = {"channels": channels}, []
        for name, nbits, part in self._parts(x.shape[3]):
            y = ordered[..., part]
            # In float64, so that codes don't depend on how many tokens come together.
            y = (y.double() @ _rotation(self.seed, y.shape[3], x.device).T).float()
            codes, size = _codes(y.flatten(0, 2), nbits)
            found[name] = pack(codes.view(y.shape), nbits)
            sizes.append(size.view(*y.shape[:3], 1))
        return {**found, "norms": torch.cat(sizes, dim=3).to(x.dtype)}

    def _ordered(self, x: Tensor) -> Tensor:
        """The channels of each head, those first that are large: `[batch, kv_heads, head_dim]`."""
        power = torch.where(x.isfinite(), x, 0.0).float().square().mean(2)
        order = power.argsort(dim=2, descending=True, stable=True)
        parts = [order[..., part].sort(dim=2).values for _, _, part in self._parts(x.shape[3])]
        return torch.cat(parts, dim=2).to(torch.uint8 if x.shape[3] <= 256 else torch.int16)

    def _read(self, encoded: Mapping[str, Tensor]) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
        """Of both vectors the channels, levels `[batch, kv_heads, tokens, channels]`, sizes, and the rotation."""
        head_dim = encoded["channels"].shape[2]
        for i, (name, nbits, part) in enumerate(self._parts(head_dim)):
            device, count = encoded[name].device, part.stop - part.start
            levels = looked_up(unpack(encoded[name], nbits, count), _table(nbits, device))
            rotation = _rotation(self.seed, count, device).float()
            yield part, levels, encoded["norms"][..., i : i + 1].float(), rotation

    def decode(self, encoded: dict[str, Tensor], dtype: dtype) -> Tensor:
        parts = [(levels * size) @ rotation for _, levels, size, rotation in self._read(encoded)]
        return _put_back(torch.cat(parts, dim=3), encoded["channels"]).to(dtype)

    def scores(self, rows: Tensor, encoded: dict[str, Tensor]) -> Tensor:
        ordered, found = rows.gather(3, _along(encoded["channels"], rows)), None
        for part, levels, size, rotation in self._read(encoded):
            product = (ordered[..., part] @ rotation.T) @ levels.transpose(2, 3) * size.transpose(2, 3)
            found = product if found is None else found.add_(product)
        assert found is not None
        return found

    def combine(self, weights: Tensor, encoded: dict[str, Tensor]) -> Tensor:
        parts = [
            (weights * size.transpose(2, 3)) @ levels @ rotation for _, levels, size, rotation in self._read(encoded)
        ]
        return _put_back(torch.cat(parts, dim=3), encoded["channels"])


def _along(channels: Tensor, x: Tensor) -> Tensor:
    """Channels of each head as an index into `x`, `[batch, kv_heads, n, head_dim]`."""
    return channels.long().unsqueeze(2).expand(x.shape)


def _put_back(ordered: Tensor, channels: Tensor) -> Tensor:
    """Channels in order as they were."""
    return torch.empty_like(ordered).scatter_(3, _along(channels, ordered), ordered)


@hookimpl
def kvpolicy_quantizers() -> list[type[Quantizer]]:
    return [LloydMax, SplitLloydMax]
