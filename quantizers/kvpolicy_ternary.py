"""Quantizer `ternary`: three levels, five numbers in a byte."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field

from kvpolicy.errors import RecipeError
from kvpolicy.hookspecs import hookimpl
from kvpolicy.interfaces.quantizer import Quantizer, TensorQuantizer

if TYPE_CHECKING:
    from torch import Tensor, dtype

FIVE = (1, 3, 9, 27, 81)
LARGEST = 448.0
"""The largest number of float8_e4m3."""


@lru_cache(maxsize=8)
def _digits(device: torch.device) -> Tensor:
    """The five codes of each byte, the first the lowest: `[256, 5]`."""
    with torch.inference_mode(False):
        powers = torch.tensor(FIVE)
        return (torch.arange(256).unsqueeze(1) // powers % 3).float().to(device)


class Ternary(TensorQuantizer):
    """Rounds to the minimum, the middle or the maximum of a group of channels. A byte holds five codes, 1.6 bits each.

    A group has a scale and an offset.

    Source: SKVQ (arXiv 2405.06219), its values in 1.5 bits. Deviations: five codes are a byte, where the official code
    takes two bits for each; with scales of 8 bits, codes are the nearest of the levels that these give.
    """

    kind: Literal["ternary"] = "ternary"
    group_size: int = Field(
        64, ge=1, le=2**16, description="Channels of a token that share a scale and an offset; they divide head_dim."
    )
    clip: float = Field(1.0, gt=0, le=1, description="The minimum and the maximum are multiplied with this. 1: none.")

    scale_dtype: Literal["model", "float8_e4m3"] = Field(
        "model",
        description="Type in which scale and offset are kept: the model's, or 8 bits, for numbers from 0.01 to 448.",
    )

    def precision(self) -> float:
        return 8 / len(FIVE)

    def check(self, head_dim: int) -> None:
        if head_dim % self.group_size:
            fits = [n for n in range(1, head_dim + 1) if head_dim % n == 0]
            raise RecipeError(
                f"group_size must divide head_dim, found group_size {self.group_size} and head_dim {head_dim}; use one "
                f"of {fits}"
            )

    def encode(self, x: Tensor) -> dict[str, Tensor]:
        groups = x.float().unflatten(3, (-1, self.group_size))
        low, high = (bound * self.clip for bound in torch.aminmax(groups, dim=4, keepdim=True))
        if self.scale_dtype != "model":
            low = self._kept(low, x.dtype).float()
        scale = (high - low).clamp_(min=0) / 2
        if self.scale_dtype != "model":
            scale = self._kept(scale, x.dtype).float()
        codes = ((groups - low) / torch.where(scale > 0, scale, 1.0)).round_().clamp_(0, 2).nan_to_num_(0)
        fives = torch.nn.functional.pad(codes.flatten(3).to(torch.uint8), (0, -x.shape[3] % 5)).unflatten(3, (-1, 5))
        packed = (fives * torch.tensor(FIVE, dtype=torch.uint8, device=x.device)).sum(4, dtype=torch.uint8)
        scales, offsets = (self._kept(part.squeeze(4), x.dtype) for part in (scale, low))
        return {"codes": packed, "scales": scales, "offsets": offsets}

    def _kept(self, x: Tensor, dtype: dtype) -> Tensor:
        """Scales or offsets in the type in which they are kept, brought within its range if it has 8 bits."""
        if self.scale_dtype == "model":
            return x.to(dtype)
        return x.clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)

    def _groups(self, encoded: Mapping[str, Tensor]) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
        """Of each group its channels, codes `[batch, kv_heads, tokens, channels]`, scales and offsets, in float32."""
        packed, size = encoded["codes"], self.group_size
        codes = _digits(packed.device).index_select(0, packed.flatten().int()).view(*packed.shape[:3], -1)
        scales, offsets = encoded["scales"].float(), encoded["offsets"].float()
        for i in range(scales.shape[3]):
            part = slice(i * size, (i + 1) * size)
            yield part, codes[..., part], scales[..., i : i + 1], offsets[..., i : i + 1]

    def decode(self, encoded: dict[str, Tensor], dtype: dtype) -> Tensor:
        found = [codes * scale + offset for _, codes, scale, offset in self._groups(encoded)]
        return torch.cat(found, dim=3).to(dtype)

    def scores(self, rows: Tensor, encoded: dict[str, Tensor]) -> Tensor:
        found = None
        for part, codes, scale, offset in self._groups(encoded):
            mine = rows[..., part]
            product = (mine @ codes.transpose(2, 3)).mul_(scale.transpose(2, 3))
            product.addcmul_(mine.sum(3, keepdim=True), offset.transpose(2, 3))
            found = product if found is None else found.add_(product)
        assert found is not None
        return found

    def combine(self, weights: Tensor, encoded: dict[str, Tensor]) -> Tensor:
        found = [
            (weights * scale.transpose(2, 3)) @ codes + weights @ offset
            for _, codes, scale, offset in self._groups(encoded)
        ]
        return torch.cat(found, dim=3)


@hookimpl
def kvpolicy_quantizers() -> list[type[Quantizer]]:
    return [Ternary]
