"""Placement of a list of tiers, with no cache and no model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from kvpolicy.placement.planner import NONE, Ints, Placement, TierLike


def simulate(tiers: Sequence[TierLike], tokens: int, placement: str = "token") -> list[Ints]:
    """The positions that each tier holds after `tokens` tokens; an evicting last tier holds none."""
    planner = Placement(tiers, placement)
    state, _ = planner.advance(planner.start(), tokens)
    evicts = planner.specs["keys"][-1] == "evict"
    held = np.concatenate([NONE, *state.tiers])
    last = NONE if evicts else np.setdiff1d(np.arange(tokens, dtype=np.int64), held)
    return [*state.tiers, last]


def history(tiers: Sequence[TierLike], tokens: int, placement: str = "token") -> NDArray[np.int16]:
    """Which tier holds each position after each step, fed one by one: `[tokens, tokens]`.

    Entry `[step, position]` is the index of the tier, -1 before the token was seen. Where the last tier evicts,
    its index stands for "dropped".
    """
    planner = Placement(tiers, placement)
    state = planner.start()
    picture = np.full((tokens, tokens), -1, dtype=np.int16)
    for step in range(tokens):
        state, _ = planner.advance(state, 1)
        picture[step, : step + 1] = planner.tier_of(state, np.arange(step + 1, dtype=np.int64))
    return picture
