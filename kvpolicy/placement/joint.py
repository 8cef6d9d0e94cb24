"""Layers that let tokens in together plan as one: a call of the device then serves all of them.

Their rows stand one layer's after another's. Between two updates each layer reads its own rows; whatever changes a
layer alone parts them.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from torch import Tensor

from kvpolicy.interfaces.policy import RankPolicy
from kvpolicy.placement.attention_scores import Observer
from kvpolicy.placement.contract import select
from kvpolicy.placement.held_per_head import Tables
from kvpolicy.placement.moves import AllMoves, Arrival, Moves
from kvpolicy.placement.padding import Padding
from kvpolicy.placement.per_head import PerHeadPlacement
from kvpolicy.placement.planner import Placement
from kvpolicy.placement.ranking import Turn
from kvpolicy.storage.pages import Leaving

AT_ONCE = 1 << 24
"""Tokens of all rows and heads that are planned as one, about: each takes ten to thirty bytes while it is."""
MORE = 2
"""As many times as many on other devices than a CPU, where each plan costs a launch of every kernel."""
PAIRS = 4
"""As so many of them a token counts that competes with its neighbour: pairs are made by sorting."""


@dataclass(eq=False)
class Joint:
    """Planners of layers that stand at the same step, and the one that plans for all of them."""

    members: list[PerHeadPlacement]
    planner: PerHeadPlacement
    _views: list[Tables] | None = None
    _where: Hashable = None

    def where(self) -> Hashable:
        """`_where` of its members, which stand alike."""
        if self._where is None:
            self._where = _where(self.members[0])
        return self._where

    def tables_of(self, member: Any) -> Tables:
        """The tables of one of them, to be read."""
        if self._views is None:
            rows = self.members[0].shape[0]
            self._views = [_rows(self.planner.own, i * rows, (i + 1) * rows) for i in range(len(self.members))]
        return self._views[next(i for i, own in enumerate(self.members) if own is member)]

    def part(self) -> None:
        """Each plans alone again."""
        for member in self.members:
            member.own = self.tables_of(member)
        for member in self.members:
            member.joint = None

    def moves(self, turn: Turn) -> list[AllMoves]:
        """What moves in each layer."""
        found = split(self.planner.moves(turn), len(self.members))
        self.moved()
        return found

    def moved(self) -> None:
        """Its planner has counted an update as done."""
        self._views = self._where = None
        step, counts, judged = self.planner.step, self.planner.counts, self.planner.judged
        for member in self.members:
            member.step, member.counts, member.judged = step, counts, judged


def key_of(planner: PerHeadPlacement, observer: Observer | None) -> Hashable | None:
    """Planners with the same key may plan as one; None: this one plans alone."""
    if not _joins(planner.placement):
        return None
    told = None if observer is None else observer.kind
    where = planner.joint.where() if isinstance(planner.joint, Joint) else _where(planner)
    return id(planner.placement), id(planner.step), where, told


def _where(planner: PerHeadPlacement) -> Hashable:
    """How many tokens are where."""
    lengths = tuple(planner.length(side, s) for side in ("keys", "values") for s in _stores(planner, side))
    counts = planner.counts.shape, planner.counts.tobytes(), planner.judged.shape, planner.judged.tobytes()
    return planner.shape, planner.device, lengths, counts


def _stores(planner: PerHeadPlacement, side: str) -> range:
    return range(len(planner.placement.first_tier[side]))


@cache
def _joins(placement: Placement) -> bool:
    """Whether what a layer selects needs no word of the host's, of other layers, or of where it stands."""
    ranks = [(tier, policy) for tier, policy in enumerate(placement.policies) if isinstance(policy, RankPolicy)]
    columns = placement.scores
    asked = [scorer for tier, _ in ranks if (scorer := columns.scorer[tier]) is not None]
    alone = any(policy._reads_counts or policy.share == "model" for _, policy in ranks)
    return (
        placement.merger is None
        and not alone
        and all(scorer in columns.features and not scorer._again for scorer in asked)
    )


def layers_at_once(planner: PerHeadPlacement, coming: int, layers: int) -> int:
    """How many of so many layers plan as one, like shares of them, so that this takes little memory."""
    rows, heads = planner.shape
    tokens = 1 << max(planner.width + coming - 1, 1).bit_length()  # it stays so for many steps
    pairs = any(isinstance(p, RankPolicy) and p.among == "pairs" for p in planner.placement.policies)
    most = AT_ONCE if planner.device.type == "cpu" else AT_ONCE * MORE
    parts = min(layers, -(-layers * rows * heads * tokens * (PAIRS if pairs else 1) // most))
    return -(-layers // max(parts, 1))


def joined(members: Sequence[PerHeadPlacement]) -> Joint:
    """Planners with one key as one."""
    known = members[0].joint
    if isinstance(known, Joint) and len(known.members) == len(members) and all(m.joint is known for m in members):
        known.planner.step = members[0].step  # which may have learnt where the prompt ends
        return known
    for member in members:
        member.part()
    joint = Joint(list(members), PerHeadPlacement.stacked(members))
    for member in members:
        member.joint, member.own = joint, {}
    return joint


def plan(
    joint: Joint, new: Sequence[Mapping[str, Tensor]], padding: Padding | None, seen: Sequence[Observer | None]
) -> list[AllMoves]:
    """What moves in each layer as new tokens come, or, where none do, as the prompt ends."""
    planner = joint.planner
    told = [observer for observer in seen if observer is not None]
    turn = planner.begin_all(new, padding, told) if new else planner.end_prompt()
    select([planner], [turn])
    return joint.moves(turn)


def _rows(tables: Tables, first: int, last: int) -> Tables:
    return {side: [t if t is None else t.rows(first, last) for t in own] for side, own in tables.items()}


def split(moves: AllMoves, layers: int) -> list[AllMoves]:
    """What moves in each of so many layers."""
    every = _Split(layers)
    found: dict[str, Any] = {}
    for side, planned in moves.items():
        same = next((other for other in found if moves[other] is planned), None)
        found[side] = found[same] if same else [list(own) for own in zip(*map(every.moves, planned), strict=True)]
    return [{side: own[i] for side, own in found.items()} for i in range(layers)]


class _Split:
    """Parts for each layer of what is known for the rows of all."""

    def __init__(self, layers: int) -> None:
        self.layers = layers
        self.known: dict[int, tuple[Tensor, Sequence[Any]]] = {}

    def rows(self, x: Any) -> Sequence[Any]:
        """Of a tensor the rows of each layer; what is none is the same for all."""
        if not isinstance(x, Tensor):
            return [x] * self.layers
        if id(x) not in self.known:
            self.known[id(x)] = x, x.view(self.layers, -1, *x.shape[1:]).unbind(0)
        return self.known[id(x)][1]

    def moves(self, x: Moves) -> list[Moves]:
        if not (x.arrivals or x.leaving is not None or x.empty != (None, None)):
            return [x] * self.layers
        arrivals = [list(own) for own in zip(*map(self.arrived, x.arrivals), strict=True)] or [
            [] for _ in range(self.layers)
        ]
        if isinstance(x.leaving, Leaving):
            leaving: Sequence[Any] = [*map(Leaving, *map(self.rows, x.leaving))]
        else:
            leaving = [x.leaving] * self.layers
        empty = zip(*map(self.rows, x.empty), strict=True)
        return [Moves(*own) for own in zip(arrivals, leaving, empty, strict=True)]

    def arrived(self, x: Arrival) -> list[Arrival]:
        places = zip(self.rows(x.indices), self.placed(x), strict=True)
        return [Arrival(x.sources, index, x.bounds, at, x.span, x.run, x.full) for index, at in places]

    def placed(self, x: Arrival) -> Sequence[Any]:
        """The positions of what arrives."""
        at, layers = x.positions, self.layers
        if at is None or isinstance(at, np.ndarray):
            return [at] * layers
        every = cache(lambda: at().unflatten(0, (layers, -1)).unbind(0))
        return [lambda i=i: every()[i] for i in range(layers)]
