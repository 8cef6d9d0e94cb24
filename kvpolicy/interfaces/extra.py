"""The base class of extras: what is kept beside the codes."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple

from kvpolicy.interfaces.component import Component
from kvpolicy.interfaces.site import Site

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["AXES", "Axis", "Extra", "Grouping"]

Axis = Literal["token", "arrival", "store"]
"""What a tensor has an entry for: each token, each arrival of tokens that were coded together, or the store."""
AXES = ("token", "arrival", "store")


class Grouping(NamedTuple):
    """Which numbers share a scale."""

    per: Literal["token", "channel"]
    """token: `size` neighbouring channels of a token; channel: `size` tokens of a channel, which are an arrival."""
    size: int
    """Numbers of a group; 0 with `group_size: arrival`, where a group is as long as what arrives."""


class Extra(Component):
    """Something kept beside the codes that brings what is decoded nearer: outliers, a low rank, a sketch.

    `extras: [...]` is an option of every quantizer. Each takes from `x` what it wants to keep itself, left to right;
    what remains is coded; then each may fit what it keeps to the error. Decoding adds from right to left. All this is
    in the space of the transforms, if there are any.

    What it keeps are named tensors on one of three axes. The store moves, saves, crops and counts them.

    Example:
        The mean error of each token::

            class MeanError(Extra):
                kind: Literal["mean-error"] = "mean-error"
                additive: ClassVar[bool] = True

                def fit(self, error, grouping, site):
                    return {"mean": error.mean(3, keepdim=True).half()}

                def add(self, out, parts):
                    out += parts["mean"]
    """

    axes: ClassVar[Mapping[str, Axis]] = {}
    """The axis of each tensor that it keeps; `"token"` for those that are not named."""
    additive: ClassVar[bool] = False
    """Whether `add` adds the same whatever stands in `out`. Then attention reads the codes as they lie, and
    `add_scores` and `add_values` add to that; otherwise keys and values are decoded block by block."""

    unbiased: ClassVar[bool] = False
    """Whether it makes products right on average, which it may pay for: with up to twice the squared error."""

    _role: ClassVar[str] = "extra"

    def check(self, site: Site) -> None:
        """Raise a `RecipeError` where the options don't fit a place in a model; returns nothing."""
        return

    def check_grouping(self, grouping: Grouping) -> None:
        """Raise a `RecipeError` where they don't fit what shares a scale; returns nothing.

        A recipe asks when it is built, if its groups don't depend on head_dim, and each store when it is made.
        """
        return

    def arrival(self, grouping: Grouping) -> int:
        """Tokens of an arrival, of those that are coded together; the last may have fewer. 0: all of them.

        By default those that share scales where `grouping.per` is `"channel"`, else all.
        """
        return grouping.size if grouping.per == "channel" else 0

    def take(self, x: Tensor, grouping: Grouping, site: Site) -> tuple[Tensor, dict[str, Tensor]]:
        """What is to be coded in place of `x`, in its shape and type, and what is kept of it.

        Args:
            x: the tokens of an arrival: `[batch, kv_heads, tokens, head_dim]` in the type of the model. Several
                arrivals of as many tokens may come as rows of a batch. Not to be written to.
            grouping: which numbers of it will share a scale.
            site: where the store stands.

        Returns:
            That, and named tensors: per token `[batch, kv_heads, tokens, ...]`, per arrival `[batch, kv_heads, 1,
            ...]`, per store `[1, kv_heads or 1, ...]`, which must be the same each time. Types and further shapes are
            the same each time.
        """
        return x, {}

    def fit(self, error: Tensor, grouping: Grouping, site: Site) -> dict[str, Tensor]:
        """What is kept of the error that coding made: `error` is what was coded less what it decodes to, float32."""
        return {}

    @abstractmethod
    def add(self, out: Tensor, parts: Mapping[str, Tensor]) -> None:
        """Bring decoded tokens `[batch, kv_heads, tokens, head_dim]`, float32, nearer, in place.

        Args:
            out: any tokens of the store.
            parts: what is kept of these tokens: per token `[batch, kv_heads, tokens, ...]`; per arrival the entry of
                each token, or one for all of them, `[batch, kv_heads, tokens or 1, ...]`; per store as it is kept.
        """

    def add_scores(self, rows: Tensor, out: Tensor, parts: Mapping[str, Tensor]) -> None:
        """Add the products of `rows`, `[batch, kv_heads, rows, head_dim]`, with what `add` adds to keys.

        `out` is `[batch, kv_heads, rows, tokens]`, float32. Of use where `additive`.
        """
        block = rows.new_zeros((*out.shape[:2], out.shape[3], rows.shape[3]))
        self.add(block, parts)
        out += rows @ block.transpose(2, 3)

    def add_values(self, weights: Tensor, out: Tensor, parts: Mapping[str, Tensor]) -> None:
        """Add what `add` adds to values, weighted: `weights` are `[batch, kv_heads, rows, tokens]`.

        `out` is `[batch, kv_heads, rows, head_dim]`, float32. Of use where `additive`.
        """
        block = out.new_zeros((*out.shape[:2], weights.shape[3], out.shape[3]))
        self.add(block, parts)
        out += weights @ block
