"""The base classes of token-selection policies: by position, and by the attention that tokens receive."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from kvpolicy.component import MOST, Component
from kvpolicy.errors import PluginError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["NEVER", "Policy", "RankPolicy", "Scores"]

NEVER = np.iinfo(np.int64).max
"""The event of a token that does not leave."""

Ints = NDArray[np.int64]


class Policy(Component):
    """Decides which tokens of a tier stay; the others descend to the next tier.

    A policy is a pure function of what it is shown. Tokens only ever descend: a token that it let go
    never comes back. Write `keep`; that is enough. `departures` is the same, said for many steps at once,
    and is overridden only for speed.

    Example:
        A policy that keeps every n-th token of the context::

            class Stride(Policy):
                kind: Literal["stride"] = "stride"
                n: int = Field(2, ge=1, description="Keep the positions divisible by n.")

                def keep(self, positions, seen):
                    return positions % self.n == 0
    """

    acts: ClassVar[Literal["arrival", "step"]] = "step"
    """`arrival` if tokens leave only at a step that brings new ones into the tier; `step` if also at others."""

    @abstractmethod
    def keep(self, positions: Ints, seen: int) -> NDArray[np.bool_]:
        """Which of the tier's tokens stay.

        Args:
            positions: positions in the context of all tokens that the tier holds, ascending: `[tokens]`.
            seen: number of tokens that the cache has seen, the newest included. The newest token has
                position `seen - 1`; the age of a token is `seen - 1 - position`.

        Returns:
            A boolean mask `[tokens]`, True where a token stays.
        """

    def capacity(self, seen: int) -> int:
        """As many tokens as surely all stay after `seen` tokens; `keep` is not asked while no more are held.

        0 (the default) means that `keep` is always asked. Declare it where it is true: it saves time only.
        """
        return 0

    def departures(self, positions: Ints, arrivals: Ints, start: int, stop: int) -> Ints:
        """When each token leaves while the cache grows from `start` to `stop` tokens.

        Equal to calling `keep` after each single token. The default does just that, at the steps where
        something can change.

        Args:
            positions: tokens held or arriving, ascending: `[tokens]`.
            arrivals: the number of tokens seen when each of them arrived in this tier; `start` or less for
                those that it held before: `[tokens]`.
            start: tokens seen before.
            stop: tokens seen after.

        Returns:
            For each token the number of tokens seen when it leaves, or `NEVER`: `[tokens]`.
        """
        left = np.full(len(positions), NEVER, dtype=np.int64)
        order = np.argsort(arrivals, kind="stable")
        arrived = arrivals[order]
        at = int(np.searchsorted(arrived, start, side="right"))
        held = np.sort(order[:at])
        events = np.arange(start + 1, stop + 1) if self.acts == "step" else np.unique(arrived[at:])
        for seen, end in zip(events.tolist(), np.searchsorted(arrived, events, side="right").tolist(), strict=True):
            if end > at:
                held = np.sort(np.concatenate([held, order[at:end]]))
                at = end
            if not len(held) or len(held) <= self.capacity(seen):
                continue
            stays = self._kept(positions[held], seen)
            left[held[~stays]] = seen
            held = held[stays]
        return left

    def _kept(self, positions: Ints, seen: int) -> NDArray[np.bool_]:
        stays = self.keep(positions, seen)
        if not isinstance(stays, np.ndarray) or stays.dtype != np.bool_ or stays.shape != positions.shape:
            found = getattr(stays, "dtype", type(stays).__name__), getattr(stays, "shape", None)
            raise PluginError(
                f"policy {self.kind!r}: keep must return a NumPy array of bool {positions.shape}, found {found[0]} "
                f"{found[1]}"
            )
        return stays


Queries = Literal["all", "probe", "last", "last probe"]


@dataclass(frozen=True)
class Scores:
    """Which attention the core sums up, per token, for a policy that ranks tokens by it.

    Policies that ask for the same share one tensor. It holds two numbers for each token and KV head: the attention
    that the token received, summed over the queries that are counted, and how many of these could see it.
    """

    queries: Queries = "all"
    """Queries that count: all, probes, or only the newest query or probe, which replaces what was there."""
    decode: Queries = "all"
    """The same for updates of a single token."""
    heads: Literal["mean", "sum", "max"] = "mean"
    """How the query heads of a KV head are put together, query by query."""
    newest: float = 0.05
    """Probes: this share of an update's queries, the newest ones (at least one), ..."""
    random: float = 0.05
    """... and this share, drawn at random from the others."""
    period: int = 100
    """Updates of fewer tokens, the first excepted, take their probes by position: the same shares of each such
    stretch of the text."""
    seed: int = 0
    """Seed of the random probes."""


class RankPolicy(Policy):
    """Keeps the tokens of a tier that rank highest by the attention they received, the same number in every row.

    It works on attached models only (`kvpolicy.attach`), where the core sees attention. Write `scores`, `budget` and,
    where the sum alone does not rank tokens, `rank`.

    Tokens are selected once per update, after its last token, not token by token; an update of more than 24 tokens
    settles as a whole at once.

    Example:
        A policy that keeps the n tokens with the most attention so far::

            class Heavy(RankPolicy):
                kind: Literal["heavy"] = "heavy"
                n: int = Field(64, ge=1, description="Tokens kept.")

                def scores(self):
                    return Scores(queries="all")

                def budget_tokens(self, seen, prompt):
                    return self.n
    """

    select: Literal["head", "layer", "shared"] = Field(
        "head",
        description=(
            "Each KV head selects its own tokens, all heads of a layer the same, or all heads of all layers with the "
            "same tiers."
        ),
    )
    every: int = Field(
        1,
        ge=1,
        le=MOST,
        description="Tokens are selected anew each time a multiple of this many has been seen; in between all stay.",
    )

    @abstractmethod
    def scores(self) -> Scores:
        """The attention to be summed up."""

    @abstractmethod
    def budget_tokens(self, seen: int, prompt: int) -> int:
        """How many tokens stay.

        Args:
            seen: tokens seen, padding not counted.
            prompt: tokens of the prompt: those seen before the first update of a single token.
        """

    def rank(self, attention: Tensor, queries: Tensor, ages: Tensor) -> Tensor:
        """What tokens are ranked by, the highest staying; by default their attention.

        Args:
            attention: attention received, summed over the queries that `scores` counts: `[batch, heads, tokens]`.
            queries: how many of those could see the token: `[batch, heads, tokens]`.
            ages: tokens seen from this one on, itself included, whether counted or not: `[batch, heads, tokens]`.

        Returns:
            A float tensor `[batch, heads, tokens]`.
        """
        return attention

    def keep(self, positions: Ints, seen: int) -> NDArray[np.bool_]:
        """A stand-in by position where there is no attention, as in pictures of a placement: the newest stay."""
        stays = np.ones(len(positions), dtype=np.bool_)
        if seen % self.every == 0:
            stays[: max(0, len(positions) - self.budget_tokens(seen, seen))] = False
        return stays
