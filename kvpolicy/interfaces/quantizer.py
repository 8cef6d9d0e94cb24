"""The base classes of quantizers."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple

from pydantic import Field, model_validator

from kvpolicy.errors import PluginError
from kvpolicy.interfaces.component import LIST, MOST, TRY, Component, call, list_of
from kvpolicy.interfaces.extra import Axis, Extra, Grouping
from kvpolicy.interfaces.site import Site
from kvpolicy.interfaces.transform import Transform

if TYPE_CHECKING:
    from torch import Tensor, device, dtype

__all__ = [
    "Affine",
    "AffineQuantizer",
    "Bits",
    "GroupSize",
    "Quantizer",
    "Rounding",
    "TensorQuantizer",
    "known_grouping",
    "precision_of",
    "rank_among",
    "root_mean_square",
    "unit_factor",
]

SCALES = ("model", "float32", "float8_e4m3", "e8m0")
AUTO_PER_CHANNEL = 32
"""Tokens that share a scale per channel with `group_size: auto`."""
MOST_BITS = 64
"""Bits of the longest number that is cached."""

GroupSize = Annotated[int, Field(ge=1, le=MOST)] | Literal["auto", "half", "head", "arrival"]
"""Numbers that share a scale, or a word for them."""
Bits = int | tuple[int, ...]
"""Bits of a code: of all channels, or of each of so many equal runs of channels."""


class Affine(NamedTuple):
    """Groups of numbers as `scale * levels[code] + offset`; without levels the code itself."""

    codes: Tensor
    """Integers in `[0, 2**nbits)`, uint8: `[groups, group_size]`."""
    scale: Tensor
    """float32: `[groups, 1]`."""
    offset: Tensor
    """float32, in the unit of the values (not of the codes): `[groups, 1]`."""


class Rounding(NamedTuple):
    """A way to round that backends know: what they compute is what `calibrate` gives.

    Numbers x of a group become `round((x - offset) / scale)` within the codes, of equal distances the even one, nan 0;
    a scale that is not above 0 divides as 1. All in float32.
    """

    by: Literal["extremes", "rms"]
    """extremes: the offset is the minimum, the scale `(maximum - minimum) / (2**nbits - 1)`. rms: there is no offset,
    the scale is `step` times `root_mean_square`, and codes are `round(x / scale + (2**nbits - 1) / 2)`."""
    symmetric: bool = False
    """With extremes: of a group whose numbers differ, minimum and maximum are minus and plus the largest magnitude."""
    step: float = 0.0


class Quantizer(Component):
    """Base of `AffineQuantizer` and `TensorQuantizer`; subclass one of these."""

    requires: ClassVar[str | None] = None
    """Name of an optional library that the quantizer imports when used (also the name of the extra), or None."""

    transforms: Annotated[tuple[Transform, ...], list_of(Transform), LIST[0], LIST[1]] = Field(
        (), description="Linear maps that keys or values go through before they are coded, from left to right."
    )
    extras: Annotated[tuple[Extra, ...], list_of(Extra), LIST[0], LIST[1]] = Field(
        (), description="What is kept beside the codes, such as outliers: each takes its own, from left to right."
    )

    _role: ClassVar[str] = "quantizer"

    def precision(self) -> float:
        """Nominal bits per value, by which the tiers of a recipe are ordered: above 0, and 64 at most."""
        return float(getattr(self, "nbits", 8))

    def check(self, head_dim: int) -> None:
        """Raise a `RecipeError` where the options don't fit keys or values of `head_dim` channels; returns nothing."""
        return

    def at(self, site: Site) -> Quantizer:
        """The quantizer for a place in a model: a copy that knows what a calibration says of it, or itself.

        Each store asks once. A copy must have the same options.

        Raises:
            RecipeError: the quantizer can't work there.
        """
        return self


def precision_of(quantizer: Quantizer) -> float:
    """Nominal bits per value.

    Raises:
        PluginError: the quantizer gives no number above 0 and up to 64.
    """
    bits = call(quantizer, "precision")
    if not isinstance(bits, int | float) or isinstance(bits, bool) or not 0 < bits <= MOST_BITS:
        raise PluginError(
            f"quantizer {quantizer.kind!r} must give its precision as a number of bits above 0 and up to {MOST_BITS}, "
            f"found {bits!r:.80}. {TRY}"
        )
    return float(bits)


def unit_factor(size: Tensor) -> Tensor:
    """The power of two that brings positive float32 numbers into [1, 2), or as near as a factor can; exact."""
    from torch import float32, int32

    exponent = (size.contiguous().view(int32) >> 23).clamp(max=253)
    return ((254 - exponent) << 23).view(float32)


def root_mean_square(groups: Tensor) -> Tensor:
    """Of float32 numbers `[groups, group_size]`, as `[groups, 1]`; their squares neither overflow nor vanish."""
    from torch import where

    largest = groups.abs().amax(dim=1, keepdim=True)
    squares: Tensor = (groups / where(largest > 0, largest, 1.0)).square_()
    count = squares.shape[1]
    if squares.device.type == "cpu" or count & (count - 1):
        return squares.mean(dim=1, keepdim=True).sqrt_().mul_(largest)
    # By pairs of neighbours: the order of a GPU's own sums goes by its libraries, and by how many groups there are.
    while squares.shape[1] > 1:
        squares = squares[:, ::2] + squares[:, 1::2]
    return squares.mul_(1 / count).sqrt_().mul_(largest)


@lru_cache(maxsize=64)
def _held(numbers: tuple[float, ...], device: device) -> Tensor:
    """Numbers on a device, in float32."""
    from torch import float32, inference_mode, tensor

    with inference_mode(False):
        return tensor(numbers, dtype=float32).to(device)


def rank_among(x: Tensor, bounds: tuple[float, ...]) -> Tensor:
    """How many of some ascending float32 numbers each float32 number exceeds, as uint8; nan exceeds none."""
    from torch import bucketize, isnan, uint8, zeros_like

    if x.device.type == "cpu" and len(bounds) < 32:  # for few, a search costs many times as much
        found = zeros_like(x, dtype=uint8)
        for bound in bounds:
            found.add_((x > bound).view(uint8))
        return found
    ranks: Tensor = bucketize(x, _held(bounds, x.device)).to(uint8)
    return ranks.masked_fill_(isnan(x), 0)


class TensorQuantizer(Quantizer):
    """A quantizer that keeps whatever tensors it likes: per token, per arrival or per store.

    The core appends, gathers, crops, saves and counts them, as bytes: they may be of any type, float8 included. A
    token's tensors must be decodable without its neighbours'. A quantizer with integer codes, a scale and an
    offset is an `AffineQuantizer` instead, and shares the packed stores and everything built on them.
    """

    axes: ClassVar[Mapping[str, Axis]] = {}
    """The axis of each tensor that it keeps; `"token"` for those that are not named. One at least is per token."""

    @abstractmethod
    def encode(self, x: Tensor) -> dict[str, Tensor]:
        """Encode tokens that arrive together, `x` of `[batch, kv_heads, tokens, head_dim]`.

        Returns:
            Named tensors: per token `[batch, kv_heads, tokens, ...]`, per arrival `[batch, kv_heads, 1, ...]`, per
            store `[batch or 1, kv_heads or 1, ...]`. Names, types and trailing shapes are the same each time, the
            device is that of `x`, and `x` is not written to. Of tensors per store the first are kept, and need not be
            given again: a quantizer with such is asked by `encode_with`.
        """

    def encode_with(self, x: Tensor, kept: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`encode`, with the tensors per store that are kept so far: none the first time."""
        return self.encode(x)

    @abstractmethod
    def decode(self, encoded: dict[str, Tensor], dtype: dtype) -> Tensor:
        """The inverse of `encode`, as `dtype`: `[batch, kv_heads, tokens, head_dim]`.

        It is given the tensors of any tokens that were encoded, in any order, and must not write to them: per arrival
        the entry of each token, or one for all of them, `[batch, kv_heads, tokens or 1, ...]`.
        """

    def scores(self, rows: Tensor, encoded: dict[str, Tensor]) -> Tensor:
        """The products of `rows` with keys, which need not be decoded for it: `[batch, kv_heads, rows, tokens]`.

        `rows` is `[batch, kv_heads, rows, head_dim]`, float32 as the answer; `encoded` is as for `decode`. A class that
        has this and `combine` is asked for them by attention in place of `decode`.
        """
        return rows @ self.decode(encoded, rows.dtype).transpose(2, 3)

    def combine(self, weights: Tensor, encoded: dict[str, Tensor]) -> Tensor:
        """The sums of values, weighted by `weights` of `[batch, kv_heads, rows, tokens]`, float32 as the answer.

        That is `[batch, kv_heads, rows, head_dim]`.
        """
        return weights @ self.decode(encoded, weights.dtype)

    @classmethod
    def multiplies(cls) -> bool:
        """Whether the class has `scores` and `combine`."""
        return cls.scores is not TensorQuantizer.scores and cls.combine is not TensorQuantizer.combine


class AffineQuantizer(Quantizer):
    """A quantizer by integer codes with a scale and an offset per group.

    A subclass writes `calibrate`. The core lays the groups out, packs the codes and keeps the parameters.
    """

    nbits: Literal[1, 2, 3, 4, 8] = Field(4, description="Bits per code.")
    group_size: GroupSize = Field(
        "auto",
        description=(
            "Numbers that share a scale and an offset: channels of a token (per: token) or tokens of a channel "
            "(per: channel). auto: per channel, 32; per token, the largest divisor of head_dim not above 64, or the "
            "next one above where scales and offsets would need more room than codes. head: as many as head_dim; half: "
            "half as many. arrival (per: channel only): the tokens that arrive together."
        ),
    )
    per: Literal["token", "channel"] = Field(
        "token", description="token: groups of channels within a token; channel: groups of tokens within a channel."
    )
    scale_dtype: Literal["model", "float32", "float8_e4m3", "e8m0"] = Field(
        "model",
        description=(
            "Type in which scale and offset are kept. model: the model's, but float32 where it computes in float16 and "
            "codes have more than 2 bits, whose scales float16 can't hold for small numbers. float32: always that. "
            "float8_e4m3: both in 8 bits, for numbers from 0.01 to 448. e8m0: the scale as a power of two in 8 bits, "
            "the offset as with model. In 8 bits a scale is rounded up, and codes are the nearest levels then."
        ),
    )
    clip: float = Field(
        1.0,
        gt=0,
        le=1,
        description=(
            "Numbers beyond this share of the minimum and maximum of their group become these, so that the others have "
            "finer levels. 1: none."
        ),
    )

    offsets: ClassVar[bool] = True
    """Whether groups have an offset. Without, `calibrate` gives zeros and none is kept. A property, where it depends on
    options."""
    mixed: ClassVar[bool] = False
    """Whether `nbits` may also be a list, the bits of equal runs of channels. `highest` then tells groups apart."""
    independent: ClassVar[bool] = False
    """Whether `calibrate` gives each group the same whatever it is given besides. Tokens of several layers are then
    coded in one call, and long prompts in several."""

    @model_validator(mode="before")
    @classmethod
    def _say_what_replaced_it(cls, data: Any) -> Any:
        if isinstance(data, dict) and "channel_separable" in data and "channel_separable" not in cls.model_fields:
            raise ValueError(
                "channel_separable is no option any more, found it; write transforms: [{kind: scale}] in place of "
                "channel_separable: true"
            )
        return data

    @model_validator(mode="after")
    def _check_options(self) -> AffineQuantizer:
        """For classes that declare these options anew."""
        size = self.group_size
        fits = size in ("auto", "half", "head", "arrival") if isinstance(size, str) else type(size) is int and size >= 1
        fits = fits and (self.nbits in (1, 2, 3, 4, 8) if type(self.nbits) is int else self.mixed)
        fits = fits and type(self.clip) in (int, float) and 0 < self.clip <= 1
        if not fits or self.per not in ("token", "channel") or self.scale_dtype not in SCALES:
            raise PluginError(
                f"quantizer {self.kind!r} must have nbits 1, 2, 3, 4 or 8, a group_size that is a number, auto, half, "
                f"head or arrival, per token or channel, scale_dtype {', '.join(SCALES)}, and clip above 0 and up to "
                f"1, found {self.nbits!r}, {size!r}, {self.per!r}, {self.scale_dtype!r} and {self.clip!r}"
            )
        return self

    @property
    def bits(self) -> Bits:
        """Bits per code, as the core packs them."""
        return self.nbits

    def highest(self, groups: Tensor) -> Tensor | int:
        """The highest code of `groups`, `[groups, group_size]`: of all, or float32 `[groups, 1]`."""
        return 2**self.nbits - 1

    def precision(self) -> float:
        bits = self.bits
        return float(bits) if isinstance(bits, int) else sum(bits) / len(bits)

    def levels(self, site: Site) -> Tensor | None:
        """What codes stand for before scale and offset: float32, ascending. None: 0, 1, 2, ...

        There are `2**nbits` or fewer, the same each time for a place in a model; codes beyond them are not used. Levels
        that lie one apart cost attention no more than None does.
        """
        return None

    def rounding(self) -> Rounding | None:
        """The way in which `calibrate` rounds, if backends may do it in its place; `clip` comes before. None: call it.

        A subclass that overrides anything, a helper of `calibrate` included, is taken to have none, unless it overrides
        this too.
        """
        return None

    @abstractmethod
    def calibrate(self, groups: Tensor) -> Affine:
        """Codes, scale and offset of `groups`, a float tensor `[groups, group_size]` in the model's dtype.

        Returns:
            `Affine`: unpacked codes, and scale and offset in float32, before any cast to `scale_dtype`.
        """


def known_grouping(quantizer: AffineQuantizer) -> Grouping | None:
    """Which numbers share a scale, where that does not depend on head_dim."""
    size = quantizer.group_size
    if quantizer.per == "channel":
        size = {"auto": AUTO_PER_CHANNEL, "arrival": 0}.get(size, size) if isinstance(size, str) else size
    return None if isinstance(size, str) else Grouping(quantizer.per, size)
