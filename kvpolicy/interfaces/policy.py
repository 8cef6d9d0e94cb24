"""The base classes of token-selection policies: by position, and by ranks."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from kvpolicy.errors import PluginError, RecipeError
from kvpolicy.interfaces.component import MOST, TRY, ByLayer, Component, Pyramid, call
from kvpolicy.interfaces.scorer import Scorer
from kvpolicy.interfaces.scores import Queries as Queries
from kvpolicy.interfaces.scores import Scores as Scores
from kvpolicy.interfaces.site import Site

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["NEVER", "Policy", "RankPolicy", "Scores"]

NEVER = np.iinfo(np.int64).max
"""The event of a token that does not leave."""

Ints = NDArray[np.int64]


class Policy(Component):
    """Decides which tokens of a tier stay; the others descend to the next tier.

    A policy is a pure function of what it is shown, also of tokens that are yet to come and perhaps never do.
    Tokens only ever descend: a token that it let go never comes back. Write `keep`; that is enough. `departures`
    is the same, said for many steps at once, and is overridden only for speed.

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

    def of_layer(self, layer: int, layers: int) -> Policy:
        """The policy of a layer of a model that has `layers` of them: of a `LayerBudget` the layer's own.

        Raises:
            RecipeError: there is none for it.
        """
        own = {}
        for name, option in self:
            if isinstance(option, ByLayer | Pyramid):
                try:
                    own[name] = option.of(layer, layers)
                except RecipeError as error:
                    raise error.at(name) from None
        return self.model_copy(update=own) if own else self

    def at(self, site: Site) -> Policy:
        """The policy for a place in a model: a copy that knows what a calibration says of it, or itself.

        Raises:
            RecipeError: the policy can't work there.
        """
        return self

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
        leaves = events != NEVER
        if not leaves.any():
            return events
        wrong = leaves & ((events < np.maximum(arrivals, start + 1)) | (events > stop))
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


class RankPolicy(Policy):
    """Keeps the tokens of a tier that rank highest, the same number in every row.

    They are ranked by a scorer (`ranked_by`), or by the attention they received: then write `scores` and, where the sum
    alone does not rank tokens, `rank`. Attention is seen on attached models only (`kvpolicy.attach`).

    Tokens are selected once per update, after its last token, not token by token; an update of more than 24 tokens (64
    where no attention is asked for) commits as a whole at once.

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

    share: Literal["head", "layer", "model"] = Field(
        "head",
        description=(
            "Who selects the same tokens: each KV head for itself, all heads of a layer, or all heads of all layers "
            "with the same tiers."
        ),
    )
    when: Literal["every", "prompt"] = Field(
        "every",
        description=(
            "When tokens are selected: each time a multiple of `every` has been seen, or once, at the prompt's end, "
            "after which all that come stay."
        ),
    )
    every: int = Field(
        1,
        ge=1,
        le=MOST,
        description="Tokens are selected anew each time a multiple of this many has been seen; in between all stay.",
    )
    among: Literal["tier", "arrival", "pairs"] = Field(
        "tier",
        description=(
            "Which tokens compete: all of the tier; those alone that arrived since it last selected, for a budget of "
            "their own; or each two neighbours by position, as often as the budget asks."
        ),
    )

    @model_validator(mode="before")
    @classmethod
    def _check_names(cls, options: Any) -> Any:
        if isinstance(options, dict) and "select" in options and "select" not in cls.model_fields:
            now = {"shared": "model"}.get(options["select"], options["select"])
            raise ValueError(
                f"option 'select' must be given as share, which is head, layer or model (select: shared of old), found "
                f"select: {options['select']!r:.40}; write share: {now!s:.40}"
            )
        return options

    @model_validator(mode="after")
    def _check_selection(self) -> RankPolicy:
        """Also for classes that declare these options anew."""
        allowed = {
            "share": ("head", "layer", "model"),
            "when": ("every", "prompt"),
            "among": ("tier", "arrival", "pairs"),
        }
        for name, words in allowed.items():
            if (found := getattr(self, name)) not in words:
                raise PluginError(f"policy {self.kind!r}: {name} must be one of {', '.join(words)}, found {found!r}")
        if type(self.every) is not int or self.every < 1:
            raise PluginError(f"policy {self.kind!r}: every must be an integer, 1 or more, found {self.every!r}")
        if self.when == "prompt" and self.every != 1:
            raise ValueError(f"option 'every' must go with when: every, found every: {self.every} with when: prompt")
        if self.when == "prompt" and self.among == "arrival":
            raise ValueError("option 'among: arrival' must go with when: every, found when: prompt, which selects once")
        if self.among == "pairs" and self._reads_counts:
            raise ValueError(
                "option 'among: pairs' must go with a budget that is the same in all heads, found a threshold, or "
                "budgets by head"
            )
        return self

    def ranked_by(self) -> Scorer | None:
        """The scorer that ranks tokens in place of `rank`, if there is one; the same each time."""
        return None

    def scores(self) -> Scores | None:
        """The attention to be summed up; the same each time. Of no account where a scorer ranks."""
        return None

    @abstractmethod
    def budget_tokens(self, seen: int, prompt: int) -> int:
        """How many tokens stay: an integer, 0 or more, that never falls as more tokens are seen.

        Args:
            seen: tokens seen, padding not counted; with `among: arrival` the tokens that compete.
            prompt: tokens of the prompt: those seen before the first update of a single token.
        """

    def head_budgets(self, rank: Tensor, budgets: Tensor) -> Tensor | None:
        """How many tokens stay in each KV head, where that depends on their ranks; None: `budgets` in all.

        The counts are then read back from the device each time the policy acts, and attention must be that of an
        attached model, as heads hold different numbers of tokens.

        Args:
            rank: what the tokens are ranked by, minus infinity where a token does not compete: `[batch, kv_heads or 1,
                tokens]`.
            budgets: what `budget_tokens` gives, integers `[batch, kv_heads or 1]`.

        Returns:
            Integers `[batch, kv_heads or 1]`.
        """
        return None

    def stay(self, rank: Tensor) -> Tensor | None:
        """Which tokens stay, where a threshold says it; None: the budget does. Counts are read as of `head_budgets`.

        Args:
            rank: as `head_budgets` is given it.

        Returns:
            A mask of its shape.
        """
        return None

    @property
    def _reads_counts(self) -> bool:
        """Whether how many tokens stay is known to the device alone."""
        own = type(self)
        return own.stay is not RankPolicy.stay or own.head_budgets is not RankPolicy.head_budgets

    @property
    def _prompted(self) -> bool:
        return self.when == "prompt"

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

    def _scorer(self) -> Scorer | None:
        """`ranked_by`, its answer checked."""
        found = call(self, "ranked_by")
        if found is not None and not isinstance(found, Scorer):
            raise PluginError(
                f"policy {self.kind!r}: ranked_by must return a kvpolicy.Scorer or None, found {type(found).__name__}. "
                f"{TRY}"
            )
        return found

    def _scores(self) -> Scores | None:
        """The attention that is to be summed up, if any is, checked."""
        scorer = self._scorer()
        if scorer is not None and not scorer._sums:
            return None
        asked: Component = self if scorer is None else scorer
        try:
            found = call(asked, "scores")
        except PluginError as error:
            if str(error).startswith("Scores: "):  # which doesn't know who asks
                raise PluginError(f"{asked._role} {asked.kind!r}: {error}") from error
            raise
        if not isinstance(found, Scores):
            besides = ", or ranked_by a scorer" if scorer is None else ""
            raise PluginError(
                f"{asked._role} {asked.kind!r}: scores must return kvpolicy.Scores{besides}, found "
                f"{type(found).__name__}. {TRY}"
            )
        return found

    def keep(self, positions: Ints, seen: int, prompt: int | None = None) -> NDArray[np.bool_]:
        """A stand-in by position where there are no ranks, as in pictures of a placement: the newest stay."""
        stays = np.ones(len(positions), dtype=np.bool_)
        acts = seen == prompt if self.when == "prompt" else seen % self.every == 0
        if acts:
            stays[: max(0, len(positions) - self._budget(seen, seen))] = False
        return stays
