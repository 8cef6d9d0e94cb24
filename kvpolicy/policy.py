"""The base class of token-selection policies."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from kvpolicy.component import Component
from kvpolicy.errors import PluginError

__all__ = ["NEVER", "Policy"]

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
