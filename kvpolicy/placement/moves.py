"""What the stores of a layer do in an update."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
NEW = -1
"""The source of a token that comes from the pending ones."""


class Arrival(NamedTuple):
    """Tokens that enter a store in one run from one source."""

    source: int
    """A store of the same side, or `NEW`."""
    indices: Ints
    """Their indices in the source, as it was before the update."""
    run: int = 0
    """Arrivals of one run in sequence are one group where `group_size: arrival`."""


class Moves(NamedTuple):
    """What one store does in an update."""

    leaving: Ints
    """Indices of the tokens that it gives up, ascending."""
    arrivals: list[Arrival]
    passing: Ints
    """Of the tokens that arrive, counted in order, those that leave for eviction in the same update."""


@dataclass
class Plan:
    """What every store of both sides does in an update. Empty lists: nothing moves."""

    sides: dict[str, list[Moves]] = field(default_factory=dict)
