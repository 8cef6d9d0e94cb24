"""Steps in which new tokens come to the first tier and nothing else happens: most steps of many recipes.

What planners of all layers do then is arithmetic on the host. No device is asked for anything, and what is kept of the
tokens is written when somebody asks for it, for many steps at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from kvpolicy.placement.attention_scores import Observer
from kvpolicy.placement.counts import Counts
from kvpolicy.placement.joint import Joint, joined, layers_at_once
from kvpolicy.placement.moves import NEW, NOTHING, AllMoves, Arrival, Moves
from kvpolicy.placement.padding import Padding
from kvpolicy.placement.per_head import PerHeadPlacement
from kvpolicy.placement.ranking import NOWHERE
from kvpolicy.placement.step import Step
from kvpolicy.placement.token_table import Run

__all__ = ["enter", "enters"]


def enters(planner: PerHeadPlacement, n: int, padding: Padding | None, observer: Observer | None) -> bool:
    """Whether `n` new tokens do no more than come; it is so for all planners with one key, see `joint.key_of`."""
    placement, before = planner.placement, planner.step
    if not n or placement.scores.features or placement.merger is not None:
        return False
    step = before.advance(n, padding)
    if not step.quiet:
        return False
    if placement.kinds:
        counted = before.counted(n, padding, 0) if observer is None else observer.counted
        if counted.queries:
            return False
    counts = step.counts(planner.counts, planner.judged)
    return (
        not counts.selections
        and bool((counts.new == n).all())
        and all(_takes(planner, side, counts, n) for side in planner._alike.own)
    )


def _takes(planner: PerHeadPlacement, side: str, counts: Counts, n: int) -> bool:
    """Whether the first store of a side takes tokens in as they come, as many in all rows and heads."""
    table = planner._alike.own[side][0]
    if table is None or table.gaps or table.flat is not None or planner._grouped(side, 0):
        return False
    covers = planner.placement.tiers_of_store(side, 0)
    held = counts.after[covers.start : covers.stop].sum(0)
    return bool((held == table.length + n).all())


def enter(
    planners: Sequence[PerHeadPlacement], n: int, padding: Padding | None, observer: Observer | None
) -> list[AllMoves] | None:
    """What moves in each layer as `n` new tokens come, if that is all that happens; the planners count it as done.

    Planners have one key.
    """
    first = planners[0]
    if not enters(first, n, padding, observer):
        return None
    step = first.step.advance(n, padding)
    counts = step.counts(first.counts, first.judged)
    scores, moves = first.placement.scores, _moves(first, step, n)
    run = Run(first.step.seen, n, tuple([float(NOWHERE if at == scores.judged else 0) for at in range(scores.width)]))
    for planner in _apart(planners, n):
        for own in planner.own.values():
            if own[0] is not None:
                own[0].append_run(run)
        planner.step, planner.counts, planner.judged = step, counts.after, counts.judged
    for joint in {id(planner.joint): planner.joint for planner in planners}.values():
        if isinstance(joint, Joint):
            joint.moved()
    return [moves] * len(planners)


def _apart(planners: Sequence[PerHeadPlacement], n: int) -> list[PerHeadPlacement]:
    """Who plans for the planners: those who did already; else one for some layers at a time, for memory."""
    if len(planners) == 1:
        planners[0].part()
        return list(planners)
    known = {id(planner.joint): planner.joint for planner in planners if isinstance(planner.joint, Joint)}
    if {id(member) for joint in known.values() for member in joint.members} == {id(planner) for planner in planners}:
        return [joint.planner for joint in known.values()]
    most = layers_at_once(planners[0], n, len(planners))
    if most == 1:
        for planner in planners:
            planner.part()
        return list(planners)
    return [joined(planners[i : i + most]).planner for i in range(0, len(planners), most)]


def _moves(planner: PerHeadPlacement, step: Step, n: int) -> AllMoves:
    shape, device = planner.shape, planner.device
    places = np.arange(n, dtype=np.int64)

    def positions() -> Tensor:
        return step.in_text(step.new_slots(n, device).expand(*shape, -1))

    came = Moves([Arrival((NEW,), places, (), positions, (0, n), full=True)], None)
    found = {side: [came, *[NOTHING] * (len(own) - 1)] for side, own in planner._alike.own.items()}
    if planner.aligned:
        found["values"] = found["keys"]
    return found
