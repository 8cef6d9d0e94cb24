"""Which attention is summed up for policies and scorers that rank tokens by it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from kvpolicy.errors import PluginError
from kvpolicy.interfaces.budget import MOST

__all__ = ["Queries", "Scores"]

Queries = Literal["all", "probe", "newest", "last", "last probe"]
HEADS = ("mean", "sum", "max")


@dataclass(frozen=True)
class Scores:
    """Which attention the core sums up, per token, for a policy that ranks tokens by it.

    Policies that ask for the same share one tensor. It holds two numbers for each token and KV head: the attention
    that the token received, summed over the queries that are counted, and how many of these could see it.

    Raises:
        PluginError: a field has a value that is not allowed; the error lists those that are.
    """

    queries: Queries = "all"
    """Queries that count: `"all"`, probes (`"probe"`), the newest ones (`"newest"`), or only the newest query
    (`"last"`) or the newest probe (`"last probe"`), which replaces what was there. The newest ones are as many as
    `newest` says, then an integer: an update of as many replaces what was there; where it brings fewer, what was there
    counts less by as much."""
    decode: Queries = "all"
    """The same for updates of a single token, with the same allowed values."""
    heads: Literal["mean", "sum", "max"] = "mean"
    """How the query heads of a KV head are put together, query by query: `"mean"`, `"sum"` or `"max"`."""
    newest: int | float = 0.05
    """Probes: this share of an update's queries, the newest ones (at least one), or as many as an integer says, ... A
    float from 0 to 1, or an integer from 1 to 2,147,483,647."""
    random: float = 0.05
    """... and this share, drawn at random from the others. A number from 0 to 1."""
    period: int = 100
    """Updates of fewer tokens, the first excepted, take their probes by position: the same shares of each such
    stretch of the text. An integer from 1 to 2,147,483,647."""
    seed: int = 0
    """Seed of the random probes: an integer from 0 to 2,147,483,647."""

    def __post_init__(self) -> None:
        for name, allowed in (("queries", get_args(Queries)), ("decode", get_args(Queries)), ("heads", HEADS)):
            if not isinstance(value := getattr(self, name), str) or value not in allowed:
                raise PluginError(f"Scores: {name} must be one of {', '.join(map(repr, allowed))}, found {value!r:.80}")
        whole, asked = type(self.newest) is int, "newest" in (self.queries, self.decode)
        for name, most in (("newest", MOST if whole else 1), ("random", 1)):
            value = getattr(self, name)
            if type(value) not in (int, float) or not 0 <= value <= most:
                also = f", or an integer to {MOST}" if name == "newest" else ""
                raise PluginError(f"Scores: {name} must be a number from 0 to 1{also}, found {value!r:.80}")
            if name == "newest" and asked and not (whole and value):
                asks = "with queries or decode 'newest'"
                raise PluginError(f"Scores: newest must be an integer, 1 or more, {asks}, found {value!r:.80}")
        for name, least in (("period", 1), ("seed", 0)):
            value = getattr(self, name)
            if type(value) is not int or not least <= value <= MOST:
                raise PluginError(f"Scores: {name} must be an integer from {least} to {MOST}, found {value!r:.80}")

    def newest_of(self, n: int) -> int:
        """How many of `n` queries are the newest ones: at least one."""
        return min(n, max(1, self.newest if isinstance(self.newest, int) else int(self.newest * n)))
