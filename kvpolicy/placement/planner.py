"""Which tier, and which store, holds each token: arithmetic on integers, shared by all layers.

Placement is defined as feeding tokens one by one. A chunk replays the same events, tier by tier: what a tier
lets go, and when, depends only on what arrived in it, and when.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from kvpolicy.interfaces.merger import Merger
from kvpolicy.interfaces.policy import Policy, RankPolicy
from kvpolicy.interfaces.prompt_scorer import PromptScorer
from kvpolicy.interfaces.reader import Reader
from kvpolicy.interfaces.scorer import Scorer
from kvpolicy.interfaces.scores import Scores
from kvpolicy.placement.arrivals import arrivals_of
from kvpolicy.placement.flows import NONE, Ahead, Flow, among, held_after, look_ahead
from kvpolicy.placement.moves import NOTHING, AllMoves, Moves
from kvpolicy.placement.position_list import PositionList

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Ints = NDArray[np.int64]


class TierLike(Protocol):
    """What a plan needs of a tier of a recipe."""

    @property
    def policy(self) -> Policy | None: ...
    @property
    def keys(self) -> Any: ...
    @property
    def values(self) -> Any: ...


class ScoreColumns:
    """What is stored beside each token for the policies that rank tokens: a number for each column."""

    def __init__(self, policies: Mapping[int, RankPolicy]) -> None:
        """Of policies, by the number of their tier."""
        asked = {tier: scores for tier, policy in policies.items() if (scores := policy._scores()) is not None}
        self.kinds: list[Scores] = list(dict.fromkeys(asked.values()))
        """The attention that the policies ask for. Two columns each: its sum, and the queries that saw the token."""
        self.prompt_only = all(policies[tier].when == "prompt" for tier in asked)
        """Whether no attention is asked for once the prompt has ended."""
        self.scorer = {tier: policy._scorer() for tier, policy in policies.items()}
        self.features: list[Scorer] = []
        """The scorers that score tokens as they arrive. A column each."""
        for scorer in self.scorer.values():
            if scorer is not None and scorer._on_arrival and scorer not in self.features:
                self.features.append(scorer)
        owners = {f: [t for t, s in self.scorer.items() if s == f] for f in self.features}
        self.once = [f for f, tiers in owners.items() if all(policies[tier].when == "prompt" for tier in tiers)]
        """Those that no policy asks for once the prompt has ended."""
        self.attention = {tier: 2 * self.kinds.index(scores) for tier, scores in asked.items()}
        """For the tier of each policy that asks for attention the column of its sum."""
        self.kind_of_feature = [
            next((self.attention.get(t) for t, s in self.scorer.items() if s == feature), None)
            for feature in self.features
        ]
        """The column of the attention that each of `features` asks for."""
        self.told = next((f for f in self.features if isinstance(f, PromptScorer)), None)
        """The scorer that must be told of the prompt's scores."""
        arrivals = any(policy.among == "arrival" for policy in policies.values())
        self.judged = 2 * len(self.kinds) + len(self.features) if arrivals else None
        """The column of the tier that a token competed in already, where policies ask for arrivals."""
        self.width = 2 * len(self.kinds) + len(self.features) + arrivals

    def reads_query(self, prompting: bool = True) -> bool:
        """Whether a scorer must see the queries of what comes, while the prompt goes on or later."""
        return any("query" in f.needs and (prompting or f not in self.once) for f in self.features)

    def feature(self, scorer: Scorer) -> int:
        """The column of one of `features`."""
        return 2 * len(self.kinds) + self.features.index(scorer)


@dataclass(frozen=True)
class State:
    """Where every committed token is.

    Attributes:
        seen: tokens committed, dropped ones included.
        tiers: positions that each tier but the last holds, ascending.
        stores: for each side and store the positions held, in the order of the store.
        ahead: what is known of the tokens to come.
    """

    seen: int
    tiers: tuple[Ints, ...]
    stores: dict[str, tuple[PositionList, ...]]
    ahead: Ahead | None = field(default=None, compare=False, repr=False)


class Placement:
    """Plans updates for one list of tiers. It remembers nothing; what layers share of a step is a `Step`.

    Consecutive tiers with the same store on a side share one store on that side: a descent between them moves
    nothing, and a group that is being split needs no copy of its parameters.
    """

    def __init__(self, tiers: Sequence[TierLike]) -> None:
        self.policies = [tier.policy for tier in tiers]
        self.specs = {side: [getattr(tier, side) for tier in tiers] for side in ("keys", "values")}
        self.reader: Reader | None = getattr(tiers[-1], "read", None)
        """Who chooses what is read of the last tier, if not all is: then that has stores of its own."""
        apart = {0} if self.reader is None else {0, len(tiers) - 1}
        self.first_tier = {
            side: [i for i, spec in enumerate(specs) if i in apart or spec != specs[i - 1]]
            for side, specs in self.specs.items()
        }
        self.alike = self.specs["keys"] == self.specs["values"]
        self.aligned = self.first_tier["keys"] == self.first_tier["values"]
        """Whether stores of keys hold the tokens of stores of values, in the same order."""
        ranks = {i: p for i, p in enumerate(self.policies) if isinstance(p, RankPolicy)}
        self.ranked = min(ranks, default=len(self.policies) - 1)
        """The first tier that ranks its tokens; the tiers above it are placed by position alone."""
        self.ranks = bool(ranks)
        self.merger: Merger | None = getattr(tiers[-1], "merge", None)
        """Who adds the values of what is dropped to those that stay."""
        self.tabled = self.ranks or self.reader is not None
        """Whether each row has places of its own in any case."""
        self.by_head = any(policy.share == "head" for policy in ranks.values())
        self.shared = any(policy.share == "model" for policy in ranks.values())
        self.shares = len({policy.share for policy in ranks.values()})
        """How many kinds of sharing there are: if several, the places of tokens differ where selections agree."""
        self.prompted = any(policy is not None and policy._prompted for policy in self.policies)
        """Whether tokens may descend as the prompt ends."""
        self.reads_counts = [policy.kind for policy in ranks.values() if policy._reads_counts]
        """The policies of which the device alone knows how many tokens stay."""
        self.scores = ScoreColumns(ranks)
        self._start = self._empty()

    @property
    def kinds(self) -> list[Scores]:
        """The attention that policies ask for."""
        return self.scores.kinds

    @property
    def attends(self) -> bool:
        """Whether policies ask for what only an attached model shows."""
        return bool(self.kinds) or self.scores.reads_query()

    @property
    def tier_dtype(self) -> torch.dtype:
        """Integers that hold a tier, or `nowhere`."""
        import torch

        return torch.int8 if self.nowhere <= torch.iinfo(torch.int8).max else torch.int16

    @property
    def nowhere(self) -> int:
        """The tier of a place that holds no token."""
        return len(self.policies)

    def start(self) -> State:
        """The state of an empty cache."""
        return self._start

    def _empty(self) -> State:
        stores = {side: tuple(PositionList() for _ in first) for side, first in self.first_tier.items()}
        if self.alike:
            stores["values"] = stores["keys"]
        return State(0, tuple(NONE for _ in self.policies[:-1]), stores)

    def store_spec(self, side: str, store: int) -> Any:
        return self.specs[side][self.first_tier[side][store]]

    def tiers_of_store(self, side: str, store: int) -> range:
        first = [*self.first_tier[side], len(self.policies)]
        return range(first[store], first[store + 1])

    def advance(self, state: State, n: int, prompt: int | None = None) -> tuple[State, AllMoves]:
        """Commit `n` more tokens; `prompt` is the number of tokens of the prompt, None while it goes on."""
        tiers, flows, ahead = self._flows(state, n, prompt)
        return self._planned(state, state.seen + n, tiers, flows, ahead)

    def end_prompt(self, state: State) -> tuple[State, AllMoves]:
        """No token comes, but the prompt ends with those that were seen."""
        return self._planned(state, state.seen, *self._ended(state))

    def _planned(
        self, state: State, stop: int, tiers: tuple[Ints, ...], flows: list[Flow], ahead: Ahead | None = None
    ) -> tuple[State, AllMoves]:
        start = state.seen
        stores: dict[str, tuple[PositionList, ...]] = {}
        plan: AllMoves = {}
        for side, first in self.first_tier.items():
            if side == "values" and self.alike:
                stores[side], plan[side] = stores["keys"], plan["keys"]
                break
            stores[side], plan[side] = self._plan_side(side, [flows[i] for i in first], state, start)
        return State(stop, tiers, stores, ahead), plan

    def advance_row(self, state: State, n: int, prompt: int | None) -> State:
        """The tiers that are placed by position, one row of a batch alone after `n` more tokens; without stores."""
        tiers, _, ahead = self._flows(state, n, prompt, self.ranked)
        return State(state.seen + n, tiers, {}, ahead)

    def end_prompt_row(self, state: State) -> State:
        """`end_prompt`, of such tiers."""
        tiers, _ = self._ended(state, self.ranked)
        return State(state.seen, tiers, {})

    def crop_row(self, state: State, length: int) -> State:
        """The tiers that are placed by position, cut to positions below `length`."""
        tiers = tuple(tier[tier < length] for tier in state.tiers)
        return State(min(state.seen, length), tiers, {})

    def _flows(
        self, state: State, n: int, prompt: int | None, count: int | None = None
    ) -> tuple[tuple[Ints, ...], list[Flow], Ahead | None]:
        """What each tier holds after `n` more tokens, what enters each with them, and what is known of more to come."""
        start, stop, ahead = state.seen, state.seen + n, state.ahead
        if ahead is None or stop > ahead.stop or prompt != ahead.prompt:
            ahead = look_ahead(self.policies[:count], state.tiers, start, n, prompt)
        flows = ahead.between(start, stop)
        return held_after(state.tiers[:count], flows), flows, ahead if stop < ahead.stop else None

    def _ended(self, state: State, count: int | None = None) -> tuple[tuple[Ints, ...], list[Flow]]:
        """What descends as the prompt ends: a tier is asked if it must know, or if tokens come from above."""
        seen, moving = state.seen, NONE
        tiers: list[Ints] = []
        flows = [Flow(NONE, NONE)]
        for policy, own in zip(self.policies[:count], state.tiers, strict=False):
            assert policy is not None
            held = np.sort(np.concatenate([own, moving]))
            if len(held) and (policy._prompted or len(moving)):
                stays = policy._kept(held, seen, seen)
                held, moving = held[stays], held[~stays]
            tiers.append(held)
            flows.append(Flow(moving, np.full(len(moving), seen, dtype=np.int64)))
        return tuple(tiers), flows

    def _plan_side(
        self, side: str, flows: list[Flow], state: State, start: int
    ) -> tuple[tuple[PositionList, ...], list[Moves]]:
        held = state.stores[side]
        stores: list[PositionList] = []
        plans: list[Moves] = []
        for s, (positions, flow) in enumerate(zip(held, flows, strict=True)):
            below = flows[s + 1].positions if s + 1 < len(flows) else NONE
            spec = self.store_spec(side, s)
            entering = flow.positions
            if spec == "evict" or not (len(entering) or len(below)):
                stores.append(positions)
                plans.append(NOTHING)
                continue
            old = below[below < start] if len(below) else NONE
            leaving = positions.places(old) if len(old) else NONE
            kept = positions.without(leaving)
            passing = NONE
            if len(below) and len(entering):
                passes = among(entering, below)
                grouped = getattr(spec, "per", "token") == "channel"
                if passes.any() and grouped and self.store_spec(side, s + 1) == "evict":
                    passing = np.flatnonzero(passes)
                    kept = kept.append(entering[~passes])
                else:
                    entering = entering[~passes]
                    kept = kept.append(entering)
            else:
                kept = kept.append(entering)
            stores.append(kept)
            runs = None
            if getattr(spec, "group_size", None) == "arrival":
                runs = flow.events[among(flow.positions, entering)]
            if len(passing):
                leaving = np.concatenate([leaving, positions.length + passing])
            arrivals = list(arrivals_of(entering, runs, held[:s], start))
            plans.append(Moves(arrivals, leaving if len(leaving) else None))
        return tuple(stores), plans

    def crop(self, state: State, length: int) -> tuple[State, AllMoves]:
        """Forget the positions from `length` on; returns the state and what each store drops."""
        plan: AllMoves = {}
        stores: dict[str, tuple[PositionList, ...]] = {}
        for side, held in state.stores.items():
            drops = [np.flatnonzero(s.array >= length) for s in held]
            plan[side] = [Moves([], index if len(index) else None) for index in drops]
            stores[side] = tuple(s.keep(s.array < length) if len(d) else s for s, d in zip(held, drops, strict=True))
        if self.alike:
            stores["values"] = stores["keys"]
        tiers = tuple(t[t < length] for t in state.tiers)
        return State(min(state.seen, length), tiers, stores), plan

    def layout(self, state: State, side: str) -> tuple[list[int | Tensor], int]:
        """Where in token order each store's tokens go: an offset where they stay neighbours, else an index each.

        Returns:
            That for every store, and the number of tokens held.
        """
        import torch

        orders = state.stores[side]
        total = sum(order.length for order in orders)
        ordered = np.sort(np.concatenate([order.array for order in orders])) if total != state.seen else None
        where: list[int | Tensor] = []
        for order in orders:
            array: NDArray[Any] = order.array if ordered is None else np.searchsorted(ordered, order.array)
            if order.contiguous and (not order.length or array[-1] - array[0] == order.length - 1):
                where.append(int(array[0]) if order.length else 0)
            else:
                where.append(torch.from_numpy(array.astype(np.int64)))
        return where, total

    def columns(
        self, state: State, layout: Callable[[str], list[int | Tensor]]
    ) -> tuple[list[int | Tensor], list[int | Tensor]]:
        """An order of all tokens held in which each store's tokens stand together as far as possible.

        Args:
            state: where they are.
            layout: gives the layout of a side of that state.

        Returns:
            For every store of keys, then of values, where its tokens stand in that order: an offset, or an index each.
        """
        if not self.aligned:
            return layout("keys"), layout("values")
        offsets: list[int | Tensor] = [*accumulate([order.length for order in state.stores["keys"][:-1]], initial=0)]
        return offsets, offsets

    def in_columns(self, state: State) -> Tensor:
        """The position of each token in the order of `columns`."""
        import torch

        positions = np.concatenate([order.array for order in state.stores["keys"]]).astype(np.int64)
        return torch.from_numpy(positions if self.aligned else np.sort(positions))

    def tier_of(self, state: State, positions: Ints) -> NDArray[np.int16]:
        """The tier that holds each of `positions`; those that no tier but the last holds are in the last."""
        tier = np.full(len(positions), len(self.policies) - 1, dtype=np.int16)
        for i, held in enumerate(state.tiers):
            tier[np.isin(positions, held)] = i
        return tier
