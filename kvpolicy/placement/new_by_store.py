"""New tokens put in order by store, where the host knows how many each gets: a few calls serve all stores."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kvpolicy.placement.candidates import Candidates
from kvpolicy.placement.moves import NEW, Arrival
from kvpolicy.placement.step import Step
from kvpolicy.placement.token_table import TokenTable, indices_of
from kvpolicy.storage.gather import gather_tokens

__all__ = ["NewByStore"]


class NewByStore(NamedTuple):
    """The tokens of an update that moves no others; as many go to a store in all rows and heads."""

    order: Tensor
    """Their numbers by store, ascending within one: `[batch, kv_heads or 1, tokens]`."""
    ends: list[int]
    """Where each store begins, and the end."""
    positions: Tensor
    tiers: Tensor

    @classmethod
    def of(cls, work: Candidates, covers: Sequence[range], counts: Sequence[int]) -> NewByStore:
        """Those of an update.

        Args:
            work: the tokens, and the tier of each.
            covers: the tiers of each store, in order.
            counts: how many tokens each store gets.
        """
        n, target = sum(counts), work.target
        first, stop = _bounds(tuple((own.start, own.stop) for own in covers), target.dtype, target.device)
        here = (target.unsqueeze(2) >= first) & (target.unsqueeze(2) < stop)
        order = indices_of(here.flatten(2), n).remainder_(n)
        positions = work.places[-1].gather(2, order).to(torch.int32)
        return cls(order, np.cumsum([0, *counts]).tolist(), positions, target.gather(2, order))

    def enter(self, s: int, table: TokenTable, work: Candidates, step: Step) -> list[Arrival]:
        """Let the tokens of a store into its table; returns their arrival, if there are any."""
        first, last = self.ends[s], self.ends[s + 1]
        if first == last:
            return []
        order, positions = self.order[..., first:last], self.positions[..., first:last]
        scores = None
        if "scores" in table.parts:
            assert work.noted is not None
            scores = gather_tokens(work.noted[-1], order)
        table.append(positions, self.tiers[..., first:last], scores)
        n = self.ends[-1]
        whole = last - first == n  # in order, then
        index, span = (np.arange(n, dtype=np.int64), (0, n)) if whole else (order, None)
        return [Arrival((NEW,), index, ((0, n),), lambda: step.in_text(positions), span, full=True)]


@lru_cache(maxsize=64)
def _bounds(covers: tuple[tuple[int, int], ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The first tier of each store, and the one after its last: `[2, stores, 1]`."""
    with torch.inference_mode(False):
        bounds: Tensor = torch.tensor(covers, dtype=dtype).T.unsqueeze(2).to(device, non_blocking=True)
        return bounds
