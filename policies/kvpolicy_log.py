"""Policy `log`: positions whose density falls with their distance."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BeforeValidator, Field

from kvpolicy.errors import RecipeError
from kvpolicy.hookspecs import hookimpl
from kvpolicy.interfaces.component import MOST, Budget, budget_tokens
from kvpolicy.interfaces.policy import Policy
from kvpolicy.interfaces.site import Site
from kvpolicy.words import in_words

Ints = NDArray[np.int64]
Words = NDArray[np.uint64]
CALIBRATED, MOST_EXPONENT = "calibrated", 8.0


def _exponent(given: Any) -> Any:
    """A number from 0 to 8, the word, or none."""
    number = isinstance(given, int | float) and not isinstance(given, bool) and 0 <= given <= MOST_EXPONENT
    if given is not None and given != CALIBRATED and not number:
        raise ValueError(f"must be a number from 0 to {MOST_EXPONENT:g}, or {CALIBRATED}, found {in_words(given)}")
    return float(given) if number else given


Exponent = Annotated[
    Annotated[float, Field(ge=0, le=MOST_EXPONENT)] | Literal["calibrated"] | None, BeforeValidator(_exponent)
]


class Log(Policy):
    """Keeps tokens at log-spaced distances: each time the budget is passed, every second token leaves.

    Source: LogQuant (arXiv 2503.19950, section 3, algorithm 1). Deviation: the official code thins its window
    and its log-spaced tokens together at a flush; here the same positions result from a `recent` tier with
    `flush` equal to the budget above this one. `jitter` and `exponent` are from no paper.
    """

    kind: Literal["log"] = "log"
    acts: ClassVar[Literal["arrival", "step"]] = "arrival"
    budget: Budget = Field(42, description="Tokens that stay at most: a number, or a fraction of the tokens seen.")
    jitter: int | None = Field(
        None,
        ge=0,
        le=MOST,
        description="Seed by which one of each two neighbours stays; by default the first does.",
    )
    exponent: Exponent = Field(
        None,
        description=(
            "Density falls with this power of the distance, from 0 to 8: 1 is log-spaced, 0 even. calibrated: each "
            "layer has that by which its attention falls, from a calibration by log. The budget is then used up. By "
            "default every second token leaves as often as the budget asks, which is log-spaced, too."
        ),
    )

    def at(self, site: Site) -> Log:
        if self.exponent != CALIBRATED:
            return self
        if "keys.attention" in site.fitted and "keys.exponent" not in site.fitted:
            raise RecipeError(
                "it takes a calibration that says how attention falls with distance, found one whose samples are too "
                "short for that; make it again with more of --tokens"
            ).at("exponent")
        try:
            found = round(float(site.calibrated("exponent", (1,))), 3)
        except RecipeError as error:
            raise error.at("exponent") from None
        return self.model_copy(update={"exponent": min(max(found, 0.0), MOST_EXPONENT)})

    def capacity(self, seen: int) -> int:
        return budget_tokens(self.budget, seen)

    def keep(self, positions: Ints, seen: int) -> NDArray[np.bool_]:
        budget = self.capacity(seen)
        keep = np.zeros(len(positions), dtype=np.bool_)
        keep[self._thinned(positions, budget) if self.exponent is None else self._dense(positions, seen, budget)] = True
        return keep

    def _thinned(self, positions: Ints, budget: int) -> Ints:
        """The places of those that stay where of each two neighbours one does."""
        places = np.arange(len(positions))
        while len(places) > budget and len(places) > 1:
            first, second = places[::2], places[1::2]
            if self.jitter is None:
                places = first
                continue
            odd = first[len(second) :]
            first = first[: len(second)]
            swap = _mixed(self.jitter, positions[first], positions[second]) & np.uint64(1) > 0
            places = np.concatenate([np.where(swap, second, first), odd])
        return places

    def _dense(self, positions: Ints, seen: int, budget: int) -> Ints:
        """The places of those that stay where the density is a power of the distance.

        Each position has a share from 0 to 1, evenly spread, and stays while that is small against the power of its
        distance. This power only falls and the budget fills up, so few of those that left are missed later.
        """
        # Without a calibration, for pictures, it is that which LogQuant assumes.
        exponent = 1.0 if self.exponent == CALIBRATED else float(self.exponent or 0)
        words = _reversed(positions.astype(np.uint64)) if self.jitter is None else _mixed(self.jitter, positions)
        shares = np.maximum(words.astype(np.float64), 0.5)
        ranks = -np.log(shares) - exponent * np.log(seen - positions)
        return np.argsort(-ranks, kind="stable")[:budget]


def _reversed(words: Words) -> Words:
    """The bits in reverse order: the van der Corput sequence, in which each stretch of positions is spread evenly."""
    for width, mask in (
        (1, 0x5555555555555555),
        (2, 0x3333333333333333),
        (4, 0x0F0F0F0F0F0F0F0F),
        (8, 0x00FF00FF00FF00FF),
        (16, 0x0000FFFF0000FFFF),
        (32, 0x00000000FFFFFFFF),
    ):
        by, kept = np.uint64(width), np.uint64(mask)
        words = ((words >> by) & kept) | ((words & kept) << by)
    return words


def _mixed(seed: int, *positions: Ints) -> Words:
    """Random bits that depend on a seed and on positions alone: the finalizer of splitmix64."""
    found = np.full(len(positions[0]), seed, dtype=np.uint64)
    for part in positions:
        found = (found ^ part.astype(np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
        found = (found ^ (found >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        found = (found ^ (found >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        found ^= found >> np.uint64(31)
    return found


@hookimpl
def kvpolicy_policies() -> list[type[Policy]]:
    return [Log]
