"""Transform `latent` and quantizer `by_width`: keys or values in their principal directions, the first in more bits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import groupby
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import BeforeValidator, Field, PrivateAttr, model_validator

from kvpolicy.errors import RecipeError
from kvpolicy.hookspecs import hookimpl
from kvpolicy.interfaces.quantizer import Quantizer, TensorQuantizer, root_mean_square
from kvpolicy.interfaces.site import Site
from kvpolicy.interfaces.transform import Transform
from kvpolicy.storage.packing import pack, unpack

if TYPE_CHECKING:
    from torch import Tensor, dtype

STEPS = {
    1: 1.595769122, 2: 0.995686701, 3: 0.586019459, 4: 0.335200597, 5: 0.188139169, 6: 0.104063007, 7: 0.056867422,
    8: 0.030762381,
}  # fmt: skip
"""By bits, the step between levels that errs least on a standard normal distribution, in squares (Max, 1960)."""
PRIOR = 0.25
"""How many tokens, in parts of head_dim, the belief that all directions are alike is worth."""


class Latent(Transform):
    """Turns vectors into their principal directions, each divided by its size there: the largest come first.

    The directions are the eigenvectors of the second moments of the first tokens that reach a store, of each head;
    their sizes the roots of the eigenvalues. What is coded is then alike in all channels, so that one step suits them;
    how many bits a channel deserves falls from the first to the last, which `by_width` follows. Keys before RoPE
    (`unrotate` before it) lie in far fewer directions than keys after it.

    Source: SVDq (arXiv 2502.15304, section 3). Deviations: with few tokens the moments are drawn towards those of equal
    directions, as if a quarter of `head_dim` more tokens had been seen that had these.
    """

    kind: Literal["latent"] = "latent"

    def fit(self, x: Tensor, queries: Tensor | None, site: Site) -> dict[str, Tensor]:
        seen = torch.where(x.isfinite(), x, 0.0).double()
        n, channels = seen.shape[2], seen.shape[3]
        moments = seen.transpose(2, 3) @ seen
        mean = moments.diagonal(dim1=2, dim2=3).mean(2)[..., None, None] / n
        alike = torch.eye(channels, dtype=moments.dtype, device=moments.device) * torch.where(mean > 0, mean, 1.0)
        prior = PRIOR * channels
        values, vectors = torch.linalg.eigh((moments + prior * alike) / (n + prior))
        sizes = values.flip(2).clamp(min=0).sqrt().unsqueeze(2)
        return {"directions": vectors.flip(3).to(x.dtype), "sizes": sizes.to(x.dtype)}

    def forward(self, x: Tensor, state: Mapping[str, Tensor], positions: Tensor | None) -> Tensor:
        return (x @ state["directions"].to(x.dtype)) / state["sizes"].to(x.dtype)

    def inverse(self, y: Tensor, state: Mapping[str, Tensor], positions: Tensor | None) -> Tensor:
        return (y * state["sizes"].to(y.dtype)) @ state["directions"].to(y.dtype).transpose(2, 3)

    def adjoint(self, q: Tensor, state: Mapping[str, Tensor]) -> Tensor:
        return (q @ state["directions"].to(q.dtype)) * state["sizes"].to(q.dtype)


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


class ByWidth(TensorQuantizer):
    """Codes whose bits differ from channel to channel, with evenly spaced levels around zero.

    The channels are cut into as many equal parts as `widths` has entries, each coded in so many bits: 0 keeps nothing.
    The step of each width is the best one for normal numbers of the size that a token has, or of size 1.

    Source: SVDq (arXiv 2502.15304, section 3.2), which cuts latent channels into eighths. Deviations: the range is that
    of a normal distribution, not the least and the greatest of a channel.
    """

    kind: Literal["by_width"] = "by_width"
    widths: Annotated[tuple[Annotated[int, Field(ge=0, le=8)], ...], BeforeValidator(_as_tuple)] = Field(
        (8, 4, 4, 2, 2, 1, 1, 0),
        min_length=1,
        max_length=64,
        description="Bits per code of equal parts of the channels, from the first to the last.",
    )
    scale: Literal["token", "none"] = Field(
        "token",
        description=(
            "token: steps are relative to the root mean square of each token, kept in the model's type; none: to 1."
        ),
    )

    @model_validator(mode="after")
    def _check_widths(self) -> ByWidth:
        if not any(self.widths):
            raise ValueError(f"widths must hold a number above 0, found {list(self.widths)}")
        return self

    def precision(self) -> float:
        return sum(self.widths) / len(self.widths)

    _head_dim: int = PrivateAttr(64)

    def check(self, head_dim: int) -> None:
        if head_dim % len(self.widths):
            raise RecipeError(
                f"widths must have a number of entries that divides head_dim, found {len(self.widths)} and {head_dim}"
            ).at("widths")

    def at(self, site: Site) -> ByWidth:
        placed = self.model_copy()
        placed._head_dim = site.head_dim
        return placed

    def _runs(self) -> Iterator[tuple[str, int, slice]]:
        """Of neighbouring channels with as many bits a name, the bits, and which they are."""
        each, first = self._head_dim // len(self.widths), 0
        for width, run in groupby(self.widths):
            last = first + each * len(list(run))
            yield f"codes{first}", width, slice(first, last)
            first = last

    def encode(self, x: Tensor) -> dict[str, Tensor]:
        y, found = x.float(), {}
        if self.scale == "token":
            size = root_mean_square(y.flatten(0, 2)).view(*y.shape[:3], 1).to(x.dtype)
            found["sizes"] = size
            y = y / torch.where(size > 0, size, 1.0).float()
        for name, width, run in self._runs():
            if width:
                codes = (y[..., run] / STEPS[width] + _middle(width)).round_().clamp_(0, 2 * _middle(width))
                found[name] = pack(codes.nan_to_num_(0).to(torch.uint8), width)
        return found

    def decode(self, encoded: dict[str, Tensor], dtype: dtype) -> Tensor:
        lead = next(t.shape[:3] for name, t in encoded.items() if name != "sizes")
        out = next(iter(encoded.values())).new_zeros((*lead, self._head_dim), dtype=torch.float32)
        for name, width, run in self._runs():
            if width:
                codes = unpack(encoded[name], width, run.stop - run.start).float()
                out[..., run] = (codes - _middle(width)) * STEPS[width]
        return (out * encoded["sizes"].float() if "sizes" in encoded else out).to(dtype)


def _middle(width: int) -> float:
    """Half the largest code."""
    return (2**width - 1) / 2


@hookimpl
def kvpolicy_transforms() -> list[type[Transform]]:
    return [Latent]


@hookimpl
def kvpolicy_quantizers() -> list[type[Quantizer]]:
    return [ByWidth]
