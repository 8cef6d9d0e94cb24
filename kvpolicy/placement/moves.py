"""What moves between the stores of a layer, and the contract of who plans it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from kvpolicy.placement.attention_scores import Observer
    from kvpolicy.placement.padding import Padding
    from kvpolicy.placement.planner import Placement
    from kvpolicy.placement.step import Step

Ints = NDArray[np.int64]
EMPTY = -1
"""The position of a place that holds no token: rows shorter than others have such."""
NEW = -1
"""The source of a token that comes from the pending ones."""


class Arrival(NamedTuple):
    """Tokens that enter a store together."""

    sources: tuple[int, ...]
    """Stores of the same side, or `NEW`."""
    indices: Ints | Tensor
    """Which tokens of the sources, side by side as they were before: the same in all rows and heads, `[tokens]`, or
    `[batch, kv_heads or 1, tokens]` with `EMPTY` where a row or head gets fewer than others."""
    bounds: tuple[tuple[int, int], ...] = ()
    """Of a tensor the numbers that stand for each source, from the first to the last + 1."""
    run: int = 0
    """Arrivals of one run in sequence are one group where `group_size: arrival`."""


class Moves(NamedTuple):
    """What one store does in an update: tokens arrive, then others leave."""

    arrivals: list[Arrival]
    leaving: Ints | Tensor | None
    """Indices of the tokens that it gives up, ascending, those that arrive included. A tensor: by row and head."""
    empty: tuple[Tensor | None, Tensor | None] = (None, None)
    """Places that hold no token, `[batch, kv_heads or 1, places]`, after the arrivals and before tokens leave."""


NOTHING = Moves([], None)
AllMoves = dict[str, list[Moves]]
"""For each side, of each of its stores."""


class ColumnMap(NamedTuple):
    """The order in which attention has the tokens of a layer side by side."""

    keys: list[int | Tensor]
    """For each store of keys where its tokens stand: an offset, or an index for each."""
    values: list[int | Tensor]
    width: int
    gaps: bool
    """Whether some columns hold no token."""
    positions: Callable[[], Tensor]
    """The position of each column, `EMPTY` where no token is: `[columns]` or `[batch, kv_heads or 1, columns]`."""


class Planner(ABC):
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
    def begin(self, n: int, of: int, padding: Padding | None, seen: Observer | None) -> Any:
        """Begin to let in `n` more tokens, the first of an update of `of`; returns what the other methods take.

        Args:
            n: how many.
            of: tokens of the update that brings them.
            padding: which slots are padding, up to these tokens.
            seen: what the update's queries attended to, if policies ask for it.
        """

    def rank(self, turn: Any, tier: int) -> Tensor | None:
        """What a tier's policy ranks its tokens by now, `[batch, kv_heads or 1, tokens]`, if it selects any."""
        return None

    def select(self, turn: Any, tier: int, rank: Tensor) -> None:
        """Let the tokens of a tier that rank lowest descend."""
        raise AssertionError("nothing was ranked")

    @abstractmethod
    def moves(self, turn: Any) -> AllMoves:
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

    def to(self, device: torch.device) -> None:  # noqa: B027
        """Move what is kept on a device, if anything is."""
