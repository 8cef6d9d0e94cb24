"""The base classes of quantizers."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, NamedTuple

from pydantic import Field, model_validator

from kvpolicy.component import MOST, Component

if TYPE_CHECKING:
    from torch import Tensor, dtype

__all__ = ["Affine", "AffineQuantizer", "Quantizer", "TensorQuantizer"]


class Affine(NamedTuple):
    """Groups of numbers as `scale * code + offset`."""

    codes: Tensor
    """Integers in `[0, 2**nbits)`, uint8: `[groups, group_size]`."""
    scale: Tensor
    """float32: `[groups, 1]`."""
    offset: Tensor
    """float32, in the unit of the values (not of the codes): `[groups, 1]`."""


class Quantizer(Component):
    """Base of `AffineQuantizer` and `TensorQuantizer`; subclass one of these."""

    requires: ClassVar[str | None] = None
    """Name of an optional library that the quantizer imports when used (also the name of the extra), or None."""

    def precision(self) -> float:
        """Nominal bits per value, by which the tiers of a recipe are ordered."""
        return float(getattr(self, "nbits", 8))

    def check(self, head_dim: int) -> None:
        """Raise a `RecipeError` where the options don't fit keys or values of `head_dim` channels."""
        return


class TensorQuantizer(Quantizer):
    """A quantizer that keeps whatever tensors it likes, one entry per token.

    The core appends, gathers, crops, saves and counts them. A quantizer with integer codes, a scale and an
    offset is an `AffineQuantizer` instead, and shares the packed stores and everything built on them.
    """

    @abstractmethod
    def encode(self, x: Tensor) -> dict[str, Tensor]:
        """Encode `x` of `[batch, kv_heads, tokens, head_dim]`: tensors of `[batch, kv_heads, tokens, ...]`."""

    @abstractmethod
    def decode(self, encoded: dict[str, Tensor], dtype: dtype) -> Tensor:
        """The inverse of `encode`, as `dtype`: `[batch, kv_heads, tokens, head_dim]`."""


class AffineQuantizer(Quantizer):
    """A quantizer by integer codes with a scale and an offset per group.

    A subclass writes `calibrate`. The core lays the groups out, packs the codes and keeps the parameters.
    """

    nbits: Literal[1, 2, 3, 4, 8] = Field(4, description="Bits per code.")
    group_size: Annotated[int, Field(ge=1, le=MOST)] | Literal["auto", "head", "arrival"] = Field(
        "auto",
        description=(
            "Numbers that share a scale and an offset: channels of a token (per: token) or tokens of a channel "
            "(per: channel). auto: per token, the largest divisor of head_dim not above 64; per channel, 32. "
            "head: as many as head_dim. arrival (per: channel only): the tokens that arrive together."
        ),
    )
    per: Literal["token", "channel"] = Field(
        "token", description="token: groups of channels within a token; channel: groups of tokens within a channel."
    )
    scale_dtype: Literal["model", "float32"] = Field(
        "model", description="Type in which scale and offset are kept: the model's, or float32."
    )
    channel_separable: bool = Field(
        False,
        description=(
            "With per: token, divide each channel by the square root of its largest magnitude before encoding "
            "(ZipCache, arXiv 2405.14256, section 4.1), found on the first tokens that reach a store; small channels "
            "by a quarter of the mean."
        ),
    )

    @model_validator(mode="after")
    def _check_channels(self) -> AffineQuantizer:
        if self.channel_separable and self.per == "channel":
            raise ValueError(
                "channel_separable must go with per: token, found per: channel, where channels are apart anyway; "
                "remove it"
            )
        return self

    @abstractmethod
    def calibrate(self, groups: Tensor) -> Affine:
        """Codes, scale and offset of `groups`, a float tensor `[groups, group_size]` in the model's dtype.

        Returns:
            `Affine`: unpacked codes, and scale and offset in float32, before any cast to `scale_dtype`.
        """
