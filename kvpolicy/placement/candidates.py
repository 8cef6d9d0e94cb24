"""The tokens that may move in an update, side by side: those of some stores, then the new ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvpolicy.placement.moves import EMPTY
from kvpolicy.storage.gather import gather_tokens

if TYPE_CHECKING:
    from kvpolicy.placement.step import Step


@dataclass(eq=False)
class Candidates:
    """Tokens of stores, and new ones. What is known of them stays where it lies until somebody asks for all of it."""

    live: list[int]
    """The stores among them."""
    bounds: list[int]
    """Where each store begins, where the new tokens begin, and the end."""
    places: list[Tensor]
    """The positions of each store's tokens, int32, and of the new ones, `[batch, kv_heads or 1, tokens]`."""
    target: Tensor
    """The tier that each is to be in."""
    noted: list[Tensor] | None = None
    """Their scores, like `places`; None where nothing is scored."""

    @property
    def positions(self) -> Tensor:
        """Of all, int64."""
        return _side_by_side(self.places).long()

    @cached_property
    def scores(self) -> Tensor | None:
        """Of all, `[batch, kv_heads or 1, tokens, width]`; may be written to."""
        if self.noted is None:
            return None
        found = _side_by_side(self.noted)
        self.noted = list(found.split([end - first for first, end in pairwise(self.bounds)], dim=2))
        return found

    def column(self, at: int, rows: slice = slice(None)) -> Tensor:
        """A column of the scores of some rows."""
        assert self.noted is not None
        return _side_by_side([x[rows, :, :, at] for x in self.noted])

    def positions_of(self, rows: slice) -> Tensor:
        """Of some rows, int64."""
        return _side_by_side([x[rows] for x in self.places]).long()

    def ages_of(self, rows: slice, step: Step) -> Tensor:
        """`step.ages` of some rows, int64; where rows are alike nothing but these is made."""
        some = [x[rows] for x in self.places if x.shape[2]]
        if step.by_row or not some:
            return step.ages(self.positions_of(rows))
        seen = torch.tensor(step.seen)
        found = some[0].new_empty((*some[0].shape[:2], sum([x.shape[2] for x in some])), dtype=torch.int64)
        for x, own in zip(some, found.split([x.shape[2] for x in some], dim=2), strict=True):
            torch.sub(seen, x, out=own)
        return found

    def taken(self, index: Tensor, sources: int, scored: bool) -> tuple[Tensor, Tensor | None]:
        """Positions and scores of tokens of the first stores or new ones; `EMPTY` and zeros where `index` is that.

        Args:
            index: `[batch, kv_heads or 1, tokens]`.
            sources: the number of these stores.
            scored: whether scores are asked for.
        """
        absent = index < 0
        parts = [*range(sources), len(self.places) - 1]
        positions = self._taken(self.places, index, parts).masked_fill_(absent, EMPTY)
        if not scored:
            return positions, None
        assert self.noted is not None
        return positions, self._taken(self.noted, index, parts).masked_fill_(absent.unsqueeze(3), 0.0)

    def _taken(self, every: list[Tensor], index: Tensor, parts: list[int]) -> Tensor:
        found: Tensor | None = None
        for part in parts:
            x, first = every[part], self.bounds[part]
            if not x.shape[2]:
                continue
            at = (index - first).clamp_(0, x.shape[2] - 1)
            own = x.gather(2, at) if x.dim() == 3 else gather_tokens(x, at)
            if found is None:
                found = own
            else:
                here = index >= first
                found = torch.where(here if x.dim() == 3 else here.unsqueeze(3), own, found)
        assert found is not None
        return found


def _side_by_side(parts: Sequence[Tensor]) -> Tensor:
    some = [x for x in parts if x.shape[2]]
    return some[0] if len(some) == 1 else torch.cat(some or list(parts), dim=2)
