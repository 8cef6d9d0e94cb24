"""The planner of a layer whose tokens are in the same places in all rows and heads."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvpolicy.placement.attention_scores import Observer
from kvpolicy.placement.contract import Planner
from kvpolicy.placement.moves import AllMoves, ColumnMap
from kvpolicy.placement.padding import Padding
from kvpolicy.placement.step import Step


class ByPosition(Planner[Step]):
    """Arithmetic on integers, which all layers with the same tiers share: a layer holds nothing of its own."""

    def __init__(self, step: Step) -> None:
        self.step = step

    def begin(self, new: Mapping[str, Tensor], padding: Padding | None, seen: Observer | None) -> Step:
        return self.step.advance(new["keys"].shape[2], padding)

    def end_prompt(self) -> Step:
        return self.step.end_prompt()

    def moves(self, turn: Step) -> AllMoves:
        self.step = turn
        assert turn.plan is not None
        return turn.plan

    def crop(self, length: int) -> AllMoves:
        return self.moves(self.step.crop(length))

    def select_rows(self, rows: Tensor) -> None:
        if self.step.padding is not None:
            self.step = self.step.select(rows.cpu().numpy())

    def length(self, side: str, store: int) -> int:
        return self.step.state.stores[side][store].length

    @property
    def width(self) -> int:
        return self.step.width

    def width_after(self, n: int, padding: Padding | None, ends: bool) -> int:
        step = self.step.advance(n, padding) if n else self.step
        step = step.end_prompt() if ends else step
        return step.width

    @property
    def plain(self) -> bool:
        return True

    def columns(self, device: torch.device) -> ColumnMap:
        return self.step.columns(device)

    def layout(self, side: str) -> list[int | Tensor]:
        return self.step.layout(side)[0]

    def _held(self) -> NDArray[np.int64]:
        return np.sort(np.concatenate([order.array for order in self.step.state.stores["keys"]])).astype(np.int64)

    def positions(self) -> Tensor:
        return torch.from_numpy(self._held())

    def tiers(self) -> Tensor:
        return torch.from_numpy(self.placement.tier_of(self.step.state, self._held()))

    def by_position(self, codes: list[int], absent: int) -> NDArray[np.int8]:
        tier = self.placement.tier_of(self.step.state, np.arange(self.step.seen, dtype=np.int64))
        return np.asarray(codes, dtype=np.int8)[tier][None, None]
