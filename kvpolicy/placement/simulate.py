"""Placement of a list of tiers, with no cache and no model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from kvpolicy.placement.flows import NONE
from kvpolicy.placement.planner import Ints, Placement, State, TierLike


def simulate(tiers: Sequence[TierLike], tokens: int, prompt: int | None = None) -> list[Ints]:
    """The positions that each tier holds after `tokens` tokens; an evicting last tier holds none.

    Args:
        tiers: the tiers of a recipe.
        tokens: tokens seen.
        prompt: tokens of the prompt, which has ended; by default all of them. Of importance to policies alone that ask
            where it ends.
    """
    planner = Placement(tiers)
    first = tokens if prompt is None else min(prompt, tokens)
    state, _ = planner.advance(planner.start(), first)
    state = _ended(planner, state)
    state, _ = planner.advance(state, tokens - first, first)
    evicts = planner.specs["keys"][-1] == "evict"
    held = np.concatenate([NONE, *state.tiers])
    last = NONE if evicts else np.setdiff1d(np.arange(tokens, dtype=np.int64), held)
    return [*state.tiers, last]


def history(tiers: Sequence[TierLike], tokens: int, prompt: int = 1) -> NDArray[np.int16]:
    """Which tier holds each position after each step, fed one by one: `[tokens, tokens]`.

    Entry `[step, position]` is the index of the tier, -1 before the token was seen. Where the last tier evicts,
    its index stands for "dropped". The first `prompt` tokens are the prompt.
    """
    planner = Placement(tiers)
    state = planner.start()
    picture = np.full((tokens, tokens), -1, dtype=np.int16)
    for step in range(tokens):
        state, _ = planner.advance(state, 1, None if step < prompt else prompt)
        if step + 1 == prompt:
            state = _ended(planner, state)
        picture[step, : step + 1] = planner.tier_of(state, np.arange(step + 1, dtype=np.int64))
    return picture


def _ended(planner: Placement, state: State) -> State:
    return planner.end_prompt(state)[0] if planner.prompted else state
