"""The contract of the two planners: by position, and by row and head."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvpolicy.placement.attention_scores import Observer
from kvpolicy.placement.moves import AllMoves, ColumnMap
from kvpolicy.placement.padding import Padding
from kvpolicy.placement.planner import Placement
from kvpolicy.placement.step import Step

T = TypeVar("T")
"""What a planner knows of an update that is being planned."""


class Planner(ABC, Generic[T]):
    """Says where the tokens of a layer are, and what moves. `layer/mover.py` moves them.

    There are two: by position, where all rows and heads hold the same tokens, and by row and head. An update is
    planned in three steps: `begin`, then `rank` and `select` for each tier that ranks its tokens, then `moves`.
    """

    step: Step
    """Where the tokens are, as far as position decides: the same value in all layers with the same tiers."""

    @property
    def placement(self) -> Placement:
        return self.step.placement

    @abstractmethod
    def begin(self, new: Mapping[str, Tensor], padding: Padding | None, seen: Observer | None) -> T:
        """Begin to let in more tokens; returns what the other methods take.

        Args:
            new: their keys and values, `[batch, kv_heads, tokens, head_dim]`.
            padding: which slots are padding, up to these tokens.
            seen: what the update's queries attended to, if policies ask for it.
        """

    @abstractmethod
    def end_prompt(self) -> T:
        """As `begin`, where no token comes but the prompt ends with those that were let in."""

    def note_prompt(self) -> None:
        """The prompt ends with the tokens that were let in, and no policy is to select because of that."""
        self.step = self.step.end_prompt()

    def rank(self, turn: T, tier: int) -> Tensor | None:
        """What a tier's policy ranks its tokens by now, `[batch, kv_heads or 1, tokens]`, if it selects any."""
        return None

    def select(self, turn: T, tier: int, rank: Tensor) -> None:
        """Let the tokens of a tier that rank lowest descend."""
        raise AssertionError("nothing was ranked")

    @abstractmethod
    def moves(self, turn: T) -> AllMoves:
        """What every store does; the planner counts it as done."""

    @abstractmethod
    def crop(self, length: int) -> AllMoves:
        """Forget the slots from `length` on; the planner counts it as done."""

    @abstractmethod
    def select_rows(self, rows: Tensor) -> None:
        """Keep the batch rows `rows`, in that order, repeats included."""

    @abstractmethod
    def length(self, side: str, store: int) -> int:
        """Places of a store: the tokens of the row and head that holds most."""

    @property
    @abstractmethod
    def width(self) -> int:
        """Tokens held by the row and head that holds most."""

    @abstractmethod
    def width_after(self, n: int, padding: Padding | None, ends: bool) -> int:
        """`width` once `n` more tokens are let in, and the prompt `ends` with them; at most, where ranks decide it."""

    @property
    def uneven(self) -> bool:
        """Whether rows or heads hold different numbers of tokens."""
        return False

    @property
    def plain(self) -> bool:
        """Whether the step and the tokens of each store say where attention finds them, in all layers alike."""
        return False

    @abstractmethod
    def columns(self, device: torch.device) -> ColumnMap:
        """Where attention finds the tokens of each store, on the device of the layer."""

    @abstractmethod
    def layout(self, side: str) -> list[int | Tensor]:
        """Where each store's tokens go in token order: an offset, or an index each, `EMPTY` for no token."""

    @abstractmethod
    def positions(self) -> Tensor:
        """Positions of all tokens held, ascending, `[tokens]`; by row and head `EMPTY` ones come first."""

    @abstractmethod
    def tiers(self) -> Tensor:
        """The tier of each of `positions`."""

    @abstractmethod
    def by_position(self, codes: list[int], absent: int) -> NDArray[np.int8]:
        """The code of the tier of each position seen, `[batch or 1, kv_heads or 1, seen]`."""

    def bytes(self, side: str, store: int) -> dict[str, int]:
        """Bytes of what is kept beside the tokens of a store, by what they hold, and those reserved."""
        return {}

    def to(self, device: torch.device) -> None:
        """Move what is kept on a device, if anything is."""


def select(planners: Sequence[Planner[Any]], turns: Sequence[Any]) -> None:
    """Let each tier that ranks its tokens select among them, after the tier above it.

    Args:
        planners: of one layer, or of all that select the same tokens, which go by the mean of their ranks.
        turns: what each planner's `begin` gave.
    """
    for tier in range(len(planners[0].placement.policies)):
        ranks = [planner.rank(turn, tier) for planner, turn in zip(planners, turns, strict=True)]
        found = [rank for rank in ranks if rank is not None]
        if not found:
            continue
        mean = torch.stack([rank.to(found[0].device) for rank in found]).mean(0) if len(found) > 1 else found[0]
        for planner, turn, rank in zip(planners, turns, ranks, strict=True):
            if rank is not None:
                planner.select(turn, tier, mean.to(rank.device))
