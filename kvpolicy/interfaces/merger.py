"""The base class of mergers: what becomes of the values of tokens that are dropped."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from kvpolicy.errors import PluginError
from kvpolicy.interfaces.checks import versions
from kvpolicy.interfaces.component import TRY, Component, call
from kvpolicy.interfaces.site import Site

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Merger", "Tokens", "shares_of"]


class Tokens(NamedTuple):
    """What a merger is told of some tokens. Not to be written to."""

    positions: Tensor
    """Place of each among the real ones of its row, -1 where no token is: `[batch, kv_heads, tokens]`, int64."""
    attention: Tensor
    """Attention that it received, as the policy above sums it up: `[batch, kv_heads, tokens]`, float32."""


class Merger(Component):
    """Adds the values of tokens that are being dropped to those of tokens that stay. Keys are left alone.

    `merge: {kind: ...}` is an option of the last tier, with `store: evict`. The tiers above are exact, and the last of
    them selects by attention, each head for itself. Values are merged once, as their token is dropped.

    Example:
        A dropped value is added to all values that stay, in equal parts::

            class Spread(Merger):
                kind: Literal["spread"] = "spread"

                def shares(self, gone, kept, site):
                    real = (kept.positions >= 0).float().unsqueeze(2)
                    return (real / real.sum(3, keepdim=True)).expand(-1, -1, gone.positions.shape[2], -1)
    """

    _role: ClassVar[str] = "merger"

    def check(self, site: Site) -> None:
        """Raise a `RecipeError` where the options don't fit a place in a model; returns nothing."""
        return

    @abstractmethod
    def shares(self, gone: Tokens, kept: Tokens, site: Site) -> Tensor:
        """What part of each dropped value is added to each value that stays.

        Args:
            gone: some of the tokens that are dropped now; they must not depend on each other.
            kept: the tokens that stay, in any order.
            site: where the layer stands in its model, on the side of the values.

        Returns:
            A float tensor `[batch, kv_heads, gone, kept]`: the same each time it is shown the same. Rows must not
            depend on each other. What it says of places without token is of no account.
        """


def shares_of(merger: Merger, gone: Tokens, kept: Tokens, site: Site) -> Tensor:
    """What a merger gives, checked; zero where no token is.

    Raises:
        PluginError: it raised, returned something else, or wrote to what it was given.
    """
    before = versions([*gone, *kept])
    found = call(merger, "shares", gone, kept, site)
    shape = (*gone.positions.shape, kept.positions.shape[2])
    kind, device = getattr(found, "dtype", None), getattr(found, "device", None)
    fits = tuple(getattr(found, "shape", ())) == shape and device == gone.positions.device
    if not fits or kind is None or not kind.is_floating_point:
        raise PluginError(
            f"merger {merger.kind!r}: shares must return a float tensor {shape} on {gone.positions.device}, found "
            f"{kind or type(found).__name__} {tuple(getattr(found, 'shape', ()))} on {device}. {TRY}"
        )
    if versions([*gone, *kept]) != before:
        raise PluginError(f"merger {merger.kind!r}: shares must leave its arguments as they are, found changes. {TRY}")
    absent = (gone.positions < 0).unsqueeze(3) | (kept.positions < 0).unsqueeze(2)
    masked: Tensor = found.float().masked_fill(absent, 0.0)
    return masked
