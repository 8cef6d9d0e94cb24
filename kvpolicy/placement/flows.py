"""What descends from tier to tier, and when: worked out for several tokens to come at once."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvpolicy.errors import KvpolicyError
from kvpolicy.interfaces.policy import NEVER, Policy

__all__ = ["NONE", "Ahead", "Flow", "among", "held_after", "look_ahead"]

Ints = NDArray[np.int64]
NONE: Ints = np.empty(0, dtype=np.int64)
AHEAD = 32
"""Tokens to come for which it is worked out at once: a step of decoding has one."""


class Flow(NamedTuple):
    """Tokens that enter a tier, as they come: the number of tokens seen then tells when."""

    positions: Ints
    events: Ints


NOTHING = Flow(NONE, NONE)


class Ahead(NamedTuple):
    """What enters each tier, the last included, with the tokens to come, until `stop` have."""

    stop: int
    prompt: int | None
    """What policies were told of the prompt."""
    flows: tuple[Flow, ...]
    when: tuple[list[int], ...]
    """The events of each flow."""

    def between(self, start: int, stop: int) -> list[Flow]:
        """What enters each tier with some of these tokens."""
        found: list[Flow] = []
        for flow, events in zip(self.flows, self.when, strict=True):
            first, last = bisect_right(events, start), bisect_right(events, stop)
            some = slice(first, last)
            found.append(Flow(flow.positions[some], flow.events[some]) if first < last else NOTHING)
        return found


def look_ahead(
    policies: Sequence[Policy | None], tiers: Sequence[Ints], start: int, n: int, prompt: int | None
) -> Ahead:
    """What descends with the next `n` tokens, and with those after them, if `n` are few.

    Args:
        policies: of the tiers that are placed by position.
        tiers: the positions that each of these holds after `start` tokens.
        start: tokens seen before.
        n: tokens that come.
        prompt: tokens of the prompt, None while it goes on.
    """
    if n < AHEAD:
        try:
            return _flows(policies, tiers, start, start + AHEAD, prompt)
        except KvpolicyError:
            pass  # it is said once the token comes with which a policy fails
    return _flows(policies, tiers, start, start + n, prompt)


def _flows(
    policies: Sequence[Policy | None], tiers: Sequence[Ints], start: int, stop: int, prompt: int | None
) -> Ahead:
    new = np.arange(start, stop, dtype=np.int64)
    flows = [Flow(new, new + 1)]
    for policy, held in zip(policies, tiers, strict=False):
        assert policy is not None
        flows.append(_leaving(policy, held, flows[-1], start, stop, prompt))
    return Ahead(stop, prompt, tuple(flows), tuple([flow.events.tolist() for flow in flows]))


def _leaving(policy: Policy, held: Ints, flow: Flow, start: int, stop: int, prompt: int | None) -> Flow:
    """What leaves a tier into which tokens flow."""
    if not len(flow.positions) and (not len(held) or policy.acts == "arrival"):
        return NOTHING
    positions = np.concatenate([held, flow.positions])
    arrivals = np.concatenate([np.full(len(held), start, dtype=np.int64), flow.events])
    if len(positions) > 1 and (positions[1:] < positions[:-1]).any():
        order = np.argsort(positions, kind="stable")
        positions, arrivals = positions[order], arrivals[order]
    left = policy._left(positions, arrivals, start, stop, prompt)
    leaves = left != NEVER
    if not leaves.any():
        return NOTHING
    gone, events = positions[leaves], left[leaves]
    order = np.lexsort((gone, events))
    return Flow(gone[order], events[order])


def held_after(tiers: Sequence[Ints], flows: Sequence[Flow]) -> tuple[Ints, ...]:
    """The positions that each tier holds once tokens have flowed, ascending."""
    found: list[Ints] = []
    for tier, (held, own, below) in enumerate(zip(tiers, flows, flows[1:], strict=False)):
        if len(own.positions):
            held = np.concatenate([held, own.positions])
            if tier:  # to the first those come that are new
                held.sort()
        found.append(held[~among(held, below.positions)] if len(below.positions) else held)
    return tuple(found)


def among(positions: Ints, others: Ints) -> NDArray[np.bool_]:
    """Which positions are among others."""
    found: NDArray[np.bool_] = positions == others[0] if len(others) == 1 else np.isin(positions, others)
    return found
