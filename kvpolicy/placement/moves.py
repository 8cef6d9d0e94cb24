"""What moves between the stores of a layer, and where attention finds what they hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvpolicy.interfaces.backend import Stretches

if TYPE_CHECKING:
    from torch import Tensor

    from kvpolicy.storage.pages import Leaving

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
    positions: Ints | Callable[[], Tensor] | None = None
    """Of each token among the real ones of its row, for stores that ask."""
    span: tuple[int, int] | None = None
    """The first index and the last + 1, if all between them come in order from one source."""
    run: int = 0
    """Arrivals of one run in sequence are one group where `group_size: arrival`."""
    full: bool = False
    """Whether the host knows that each row and head gets as many tokens as any other."""


class Flat(NamedTuple):
    """The tokens of a store that stay, where rows and heads have different numbers of them; see `Store.flatten`."""

    places: Tensor
    counts: Ints


class Moves(NamedTuple):
    """What one store does in an update: tokens arrive, then others leave."""

    arrivals: list[Arrival]
    leaving: Ints | Leaving | None
    """Indices of the tokens that it gives up, ascending, those that arrive included; `Leaving`: by row and head."""
    empty: tuple[Tensor | None, Tensor | None] = (None, None)
    """Places that hold no token, `[batch, kv_heads or 1, places]`, after the arrivals and before tokens leave."""
    flat: Flat | None = None
    """What stays in the end, if rows and heads are to take no more room than each needs."""


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
    stretches: Mapping[str, list[Callable[[], Stretches] | None]] = {}
    """For each store of keys, and of values, that has an index which is the same everywhere: `StoreView.stretches`."""


def stretches_of(columns: Ints) -> Stretches:
    """The stretches of neighbours in an index."""
    cuts = np.flatnonzero(np.diff(columns) != 1) + 1 if len(columns) else np.empty(0, dtype=np.int64)
    starts = [0, *cuts.tolist(), len(columns)]
    return tuple((a, int(columns[a]), b - a) for a, b in pairwise(starts) if b > a)
