"""Pending tokens of several layers let into their tiers: layers that plan the same plan once, and move together."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor

from kvpolicy.layer.held import Held
from kvpolicy.layer.mover import move
from kvpolicy.layer.standing import Moving
from kvpolicy.placement import joint
from kvpolicy.placement.by_position import ByPosition
from kvpolicy.placement.contract import select
from kvpolicy.placement.entering import enter, enters
from kvpolicy.placement.moves import AllMoves
from kvpolicy.placement.per_head import PerHeadPlacement
from kvpolicy.storage.gather import sharing_indices
from kvpolicy.storage.later import Later


class Committing(Held):
    """A layer whose pending tokens can be let into its tiers."""

    @abstractmethod
    def hold(self) -> None:
        """Let the tokens that are staged in; they are pending then."""

    @abstractmethod
    def held_after_commit(self, coming: int = 0) -> int:
        """Tokens that the stores will hold once the pending ones are committed."""

    @abstractmethod
    def ends_prompt(self, coming: int = 1) -> bool:
        """Whether an update of so many tokens ends the prompt, and policies ask for that."""

    @abstractmethod
    def by_head(self) -> PerHeadPlacement:
        """From now on each row, and each head that policies look at, has places of its own."""

    @abstractmethod
    def begin(self, new: dict[str, Tensor]) -> Any:
        """Plan to let in new tokens."""

    @abstractmethod
    def moves(self, turn: Any, new: dict[str, Tensor]) -> AllMoves:
        """What moves as planned."""

    @abstractmethod
    def moved(self, moves: AllMoves) -> None:
        """Tokens have been let in, and moved."""


Group = Sequence[Committing]


def groups_of(layers: Iterable[Committing]) -> list[list[Committing]]:
    """Layers that select together, the others each for itself."""
    groups: dict[int, list[Committing]] = {}
    for number, tiers in enumerate(layers):
        placement = tiers.placement
        groups.setdefault(id(placement) if placement.shared else -1 - number, []).append(tiers)
    return list(groups.values())


def commit_all(groups: Iterable[Group], coming: int = 0) -> None:
    """Let the pending tokens of layers into their tiers.

    Args:
        groups: layers that select tokens together, or one alone.
        coming: tokens of the update before which this happens, if there is one. The first that brings a single token to
            a cache that holds some ends the prompt.
    """
    groups = list(groups)
    for group in groups:
        for layer in group:
            if layer.broken:
                layer.check_whole()
            if layer.staged or layer.decoded:
                layer.hold()
    waiting = _together([[layer for layer in group if layer.pending] for group in groups])
    for group in waiting:
        for layer in group if group[0].placement.shared else group[:1]:
            layer.held_after_commit(coming)  # arithmetic first, which steps keep: interrupted, it leaves layers whole
    _move(waiting)
    every = ([layer for layer in group if layer.asks_for_end and layer.ends_prompt(coming)] for group in groups)
    ending = [group for group in every if group]
    for layer in (layer for group in ending for layer in group):
        if not layer.placement.prompted:
            layer.planner.note_prompt()
    advance([[layer for layer in group if layer.placement.prompted] for group in ending], ends=True)


def advance(groups: Sequence[Group], ends: bool = False) -> None:
    """Let the pending tokens of layers in, or, as it `ends`, what the prompt's end asks for; see `commit_all`."""
    _move(_together(groups), ends)


def _together(groups: Sequence[Group]) -> list[Group]:
    """The same groups, those of one layer each that may plan as one put together."""
    found: dict[Any, list[Committing]] = {}
    for number, group in enumerate(groups):
        if group:
            key = _key(group[0]) if len(group) == 1 else None
            found.setdefault(number if key is None else key, []).extend(group)
    return [some for group in found.values() for some in _at_once(group)]


def _at_once(group: list[Committing]) -> Iterator[list[Committing]]:
    """The layers of a group, as many at a time as may plan as one; all of those that select together."""
    first = group[0]
    most = len(group)
    if most > 1 and first.tells_apart and not first.placement.shared:
        planner = first.by_head()
        if not enters(planner, first.waiting, first.padding, first.observer):  # which takes no memory
            most = joint.layers_at_once(planner, first.waiting, len(group))
    for i in range(0, len(group), most):
        yield group[i : i + most]


def _key(layer: Committing) -> Any:
    """Layers with one key may plan as one; None: this one plans alone."""
    if layer.tells_apart:
        key = joint.key_of(layer.by_head(), layer.observer)
        return None if key is None else (key, layer.waiting)
    alike = isinstance(layer.planner, ByPosition) and layer.placement.merger is None
    return (id(layer.planner.step), layer.waiting) if alike else None


def _move(groups: Sequence[Group], ends: bool = False) -> None:
    """What `advance` does for layers that are put together already; what is to be coded is coded in one go."""
    if not groups:
        return
    before = [(layer, layer.broken) for group in groups for layer in group]
    for layer, _ in before:
        layer.broken = True
    later, moving = Later(), Moving()
    with sharing_indices():
        for group in groups:
            moving.move([] if group[0].placement.shared else group)
            for layers, moves in _planned(group, ends):
                new = [layer.like if ends else layer.pending for layer in layers]
                move([layer.stores for layer in layers], new, moves, later)
                for layer, own in zip(layers, moves, strict=True):
                    layer.moved(own)
                    layer.pending = {}
        later.run()
    moving.end()
    for layer, broken in before:
        layer.broken = broken


def _planned(group: Group, ends: bool) -> Iterator[tuple[Group, list[AllMoves]]]:
    """Which of some layers move alike, and what moves in each."""
    first = group[0]
    if first.tells_apart and not first.placement.shared and not ends:
        moves = enter([layer.by_head() for layer in group], first.waiting, first.padding, first.observer)
        if moves is not None:
            yield group, moves
            return
    if len(group) > 1 and not first.placement.shared:
        if isinstance(first.planner, ByPosition):
            turn = first.planner.end_prompt() if ends else first.begin(first.pending)
            yield group, [layer.planner.moves(turn) for layer in group]
            return
        planners = [layer.by_head() for layer in group]
        new = [] if ends else [layer.pending for layer in group]
        yield group, joint.plan(joint.joined(planners), new, first.padding, [layer.observer for layer in group])
        return
    turns = [layer.planner.end_prompt() if ends else layer.begin(layer.pending) for layer in group]
    if first.placement.ranks:
        select([layer.planner for layer in group], turns)
    for layer, turn in zip(group, turns, strict=True):
        yield [layer], [layer.moves(turn, layer.like if ends else layer.pending)]
