"""The base classes of token-selection policies: by position, and by the attention that tokens receive."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from kvpolicy.errors import PluginError
from kvpolicy.interfaces.component import MOST, TRY, Component, call

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

    _role: ClassVar[str] = "policy"
    acts: ClassVar[Literal["arrival", "step"]] = "step"
    """`arrival` if tokens leave only at a step that brings new ones into the tier; `step` if also at others."""
    needs: ClassVar[frozenset[str]] = frozenset()
    """What `keep` and `departures` must be given besides, of `"prompt"`: then they are called with one argument more,
    the number of tokens of the prompt, or None while it goes on. The prompt ends when the first update of a single
    token comes, the very first update excepted; `keep` is asked at that moment too, with `seen == prompt`."""

    @abstractmethod
    def keep(self, positions: Ints, seen: int) -> NDArray[np.bool_]:
        """Which of the tier's tokens stay.

        Args:
            positions: positions in the context of all tokens that the tier holds, ascending: `[tokens]`. Not to be
                written to.
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
        something can change. Whether the prompt goes on is the same from `start` to `stop`.

        Args:
            positions: tokens held or arriving, ascending: `[tokens]`. Read-only, as are `arrivals`.
            arrivals: the number of tokens seen when each of them arrived in this tier; `start` or less for
                those that it held before: `[tokens]`.
            start: tokens seen before.
            stop: tokens seen after.

        Returns:
            For each token the number of tokens seen when it leaves, or `NEVER`: `[tokens]`.
        """
        return self._by_keep(positions, arrivals, start, stop, None)

    def _by_keep(self, positions: Ints, arrivals: Ints, start: int, stop: int, prompt: int | None) -> Ints:
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
            if not len(held) or len(held) <= self._room(seen):
                continue
            stays = self._kept(positions[held], seen, prompt)
            left[held[~stays]] = seen
            held = held[stays]
        return left

    @property
    def _prompted(self) -> bool:
        """Whether it must know where the prompt ends."""
        return "prompt" in self.needs

    def _kept(self, positions: Ints, seen: int, prompt: int | None) -> NDArray[np.bool_]:
        """`keep`, its answer checked."""
        told = (prompt,) if self._prompted else ()
        stays: NDArray[np.bool_] = call(self, "keep", positions, seen, *told)
        if not isinstance(stays, np.ndarray) or stays.dtype != np.bool_ or stays.shape != positions.shape:
            raise PluginError(
                f"policy {self.kind!r}: keep must return a NumPy array of bool {positions.shape}, found "
                f"{_described(stays)}. {TRY}"
            )
        return stays

    def _room(self, seen: int) -> int:
        """`capacity`, its answer checked."""
        return _count(self, "capacity", call(self, "capacity", seen))

    def _left(self, positions: Ints, arrivals: Ints, start: int, stop: int, prompt: int | None) -> Ints:
        """`departures`, its answer checked."""
        if self.acts not in ("arrival", "step"):
            raise PluginError(f"policy {self.kind!r}: acts must be arrival or step, found {self.acts!r}")
        shown = _read_only(positions), _read_only(arrivals)
        if self._prompted and type(self).departures is Policy.departures:
            left = self._by_keep(*shown, start, stop, prompt)
        else:
            left = call(self, "departures", *shown, start, stop, *((prompt,) if self._prompted else ()))
        whole = isinstance(left, np.ndarray) and np.issubdtype(left.dtype, np.signedinteger)
        if not whole or left.shape != positions.shape:
            raise PluginError(
                f"policy {self.kind!r}: departures must return a NumPy array of integers {positions.shape}, found "
                f"{_described(left)}. {TRY}"
            )
        events: Ints = left.astype(np.int64, copy=False)
        wrong = (events != NEVER) & ((events < np.maximum(arrivals, start + 1)) | (events > stop))
        if wrong.any():
            at = int(wrong.argmax())
            raise PluginError(
                f"policy {self.kind!r}: a token that arrives at {max(int(arrivals[at]), start)} must leave then or "
                f"later, after {start} and by {stop} or NEVER; departures gives {events[at]} for position "
                f"{positions[at]}. {TRY}"
            )
        return events


def _count(policy: Policy, method: str, found: Any) -> int:
    if not isinstance(found, int | np.integer) or isinstance(found, bool) or found < 0:
        raise PluginError(
            f"policy {policy.kind!r}: {method} must return an integer, 0 or more, found {found!r:.80}. {TRY}"
        )
    return min(int(found), MOST)


def _read_only(x: Ints) -> Ints:
    shown = x.view()
    shown.flags.writeable = False
    return shown


def _described(found: Any) -> str:
    """Type and shape of what a plugin returned."""
    shape = getattr(found, "shape", None)
    return f"{getattr(found, 'dtype', type(found).__name__)}{'' if shape is None else f' {tuple(shape)}'}"


Queries = Literal["all", "probe", "last", "last probe"]
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
    """Queries that count: `"all"`, probes (`"probe"`), or only the newest query (`"last"`) or the newest probe
    (`"last probe"`), which replaces what was there."""
    decode: Queries = "all"
    """The same for updates of a single token, with the same allowed values."""
    heads: Literal["mean", "sum", "max"] = "mean"
    """How the query heads of a KV head are put together, query by query: `"mean"`, `"sum"` or `"max"`."""
    newest: float = 0.05
    """Probes: this share of an update's queries, the newest ones (at least one), ... A number from 0 to 1."""
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
        for name in ("newest", "random"):
            value = getattr(self, name)
            if type(value) not in (int, float) or not 0 <= value <= 1:
                raise PluginError(f"Scores: {name} must be a number from 0 to 1, found {value!r:.80}")
        for name, least in (("period", 1), ("seed", 0)):
            value = getattr(self, name)
            if type(value) is not int or not least <= value <= MOST:
                raise PluginError(f"Scores: {name} must be an integer from {least} to {MOST}, found {value!r:.80}")


class RankPolicy(Policy):
    """Keeps the tokens of a tier that rank highest by the attention they received, the same number in every row.

    It works on attached models only (`kvpolicy.attach`), where the core sees attention. Write `scores`, `budget` and,
    where the sum alone does not rank tokens, `rank`.

    Tokens are selected once per update, after its last token, not token by token; an update of more than 24 tokens
    commits as a whole at once.

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

    @model_validator(mode="after")
    def _check_selection(self) -> RankPolicy:
        """For classes that declare these options anew."""
        if self.select not in ("head", "layer", "shared") or type(self.every) is not int or self.every < 1:
            raise PluginError(
                f"policy {self.kind!r}: select must be head, layer or shared and every an integer, 1 or more, found "
                f"{self.select!r} and {self.every!r}"
            )
        return self

    @abstractmethod
    def scores(self) -> Scores:
        """The attention to be summed up; the same each time."""

    @abstractmethod
    def budget_tokens(self, seen: int, prompt: int) -> int:
        """How many tokens stay: an integer, 0 or more, that never falls as more tokens are seen.

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
            A float tensor `[batch, heads, tokens]`, on the device of `attention`. A nan ranks lowest. What it is
            given is not to be written to.
        """
        return attention

    def _budget(self, seen: int, prompt: int) -> int:
        """`budget_tokens`, its answer checked."""
        return _count(self, "budget_tokens", call(self, "budget_tokens", seen, prompt))

    def _scores(self) -> Scores:
        """`scores`, its answer checked."""
        try:
            found = call(self, "scores")
        except PluginError as error:
            if str(error).startswith("Scores: "):  # which doesn't know who asks
                raise PluginError(f"policy {self.kind!r}: {error}") from error
            raise
        if not isinstance(found, Scores):
            raise PluginError(
                f"policy {self.kind!r}: scores must return kvpolicy.Scores, found {type(found).__name__}. {TRY}"
            )
        return found

    def keep(self, positions: Ints, seen: int) -> NDArray[np.bool_]:
        """A stand-in by position where there is no attention, as in pictures of a placement: the newest stay."""
        stays = np.ones(len(positions), dtype=np.bool_)
        if seen % self.every == 0:
            stays[: max(0, len(positions) - self._budget(seen, seen))] = False
        return stays
