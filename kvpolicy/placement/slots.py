"""Where the value of each key lies, where keys and values stand in stores that differ."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from kvpolicy.interfaces.backend import SLOT_BITS, Ranges, Segment, Slots
from kvpolicy.placement.position_list import PositionList

if TYPE_CHECKING:
    import torch
    from torch import Tensor

STORES = 1 << 31 - SLOT_BITS
"""Stores of values that slots can name."""
FEW = 16
"""Stretches of neighbours of a store up to which it is read stretch by stretch."""
BLOCK = 1024
"""Keys of which the host knows together where their values lie."""


class _Known(NamedTuple):
    values: tuple[PositionList, ...]
    device: torch.device
    slots: Slots


_known: WeakKeyDictionary[PositionList, _Known] = WeakKeyDictionary()
"""Slots of the keys of a store. Between two flushes values only come, and it is the small stores that change."""


def scattered(columns: NDArray[np.int64]) -> bool:
    """Whether tokens that stand in these columns are more than a `FEW` stretches of neighbours."""
    return int(np.count_nonzero(np.diff(columns) != 1)) >= FEW


def slots_by_head(
    keys: Sequence[Tensor | None], values: Sequence[Tensor | None], common: Sequence[Sequence[int]], none: int
) -> tuple[Slots, ...]:
    """The slots of the keys of all stores, where tokens differ by row or head.

    Args:
        keys: of each store the columns of its tokens, `[batch, kv_heads or 1, tokens]`; None: it holds nothing.
        values: likewise.
        common: for each store of keys the stores of values that may hold the values of its tokens.
        none: the last column, that of places without a token.
    """
    import torch

    like = next(columns for columns in keys if columns is not None)
    found = torch.full((*like.shape[:2], none + 1), -1, dtype=torch.int32, device=like.device)
    lengths = [0 if columns is None else columns.shape[2] for columns in values]
    for number, columns in enumerate(values):
        if columns is not None:
            first = number << SLOT_BITS
            own = torch.arange(first, first + lengths[number], dtype=torch.int32, device=like.device)
            found.scatter_(2, columns, own.expand_as(columns))
    found[..., none] = -1
    slots = []
    for columns, stores in zip(keys, common, strict=True):
        index = found[..., :0] if columns is None else found.gather(2, columns)
        ranges = tuple((s << SLOT_BITS, (s << SLOT_BITS) + lengths[s]) for s in stores if lengths[s])
        slots.append(Slots(index, (Segment(index.shape[2], ((-1, 0), *ranges), False),)))
    return tuple(slots)


def slots_by_position(keys: PositionList, values: Sequence[PositionList], device: torch.device) -> Slots:
    """The slots of the keys of a store, where tokens are in the same places in all rows and heads.

    Args:
        keys: the positions of the tokens of the store, in its order.
        values: those of each store of values.
        device: where the index is to be.
    """
    import torch

    known = _known.get(keys)
    if known is None or known.device != device or not all(map(_follows, values, known.values)):
        found = _slots(keys.array, values)
        index = torch.from_numpy(found).to(device, non_blocking=True)
        known = _known[keys] = _Known(tuple(values), device, Slots(index, _segments(found, values)))
    return known.slots


def _follows(order: PositionList, before: PositionList) -> bool:
    """Whether tokens at most came at the end since."""
    return order.buffer is before.buffer and order.length >= before.length


def _slots(keys: NDArray[np.int32], values: Sequence[PositionList]) -> NDArray[np.int32]:
    found = np.full(len(keys), -1, dtype=np.int32)
    for number, order in enumerate(values):
        if not order.length or not len(keys):
            continue
        array = order.array
        if order.contiguous:
            at = keys - array[0]
        else:
            inverse = np.full(max(int(keys.max()), int(array.max())) + 1, -1, dtype=np.int32)
            inverse[array] = np.arange(len(array), dtype=np.int32)
            at = inverse[keys]
        here = (at >= 0) & (at < len(array))
        found[here] = at[here] + (number << SLOT_BITS)
    return found


def _segments(slots: NDArray[np.int32], values: Sequence[PositionList]) -> tuple[Segment, ...]:
    """What the host tells of an index: stretches that are a whole store on one side, and blocks of the rest."""
    if not len(slots):
        return ()
    cuts = np.flatnonzero(np.diff(slots) != 1) + 1
    bounds = np.concatenate([[0], cuts, [len(slots)]])
    sizes = np.diff(bounds)
    lengths = np.array([order.length for order in values])
    whole = (sizes == len(slots)) | (sizes == lengths[slots[bounds[:-1]] >> SLOT_BITS])
    found: list[Segment] = []
    at = 0
    for first, size in zip(bounds[:-1][whole].tolist(), sizes[whole].tolist(), strict=True):
        found += _blocks(slots[at:first])
        found.append(Segment(size, ((int(slots[first]), int(slots[first]) + size),), True))
        at = first + size
    return (*found, *_blocks(slots[at:]))


def _blocks(slots: NDArray[np.int32]) -> list[Segment]:
    found: list[Segment] = []
    for first, last in pairwise([*range(0, len(slots), BLOCK), len(slots)]):
        own = slots[first:last]
        stores = own >> SLOT_BITS
        ranges: Ranges = tuple(
            (int(some.min()), int(some.max()) + 1) for some in (own[stores == s] for s in np.unique(stores))
        )
        found.append(Segment(last - first, ranges, False))
    return found
