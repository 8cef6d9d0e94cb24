"""Moves tokens between the stores of a layer, as a planner says. Nothing else does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvpolicy.placement.moves import NEW, AllMoves, Arrival, Moves
from kvpolicy.storage.affine import AffineStore
from kvpolicy.storage.base import Store
from kvpolicy.storage.exact import ExactStore
from kvpolicy.storage.gather import gather_tokens
from kvpolicy.storage.later import Later, append_all
from kvpolicy.storage.pages import Leaving

Stores = dict[str, list[Store | None]]


def move(
    stores: Sequence[Stores], new: Sequence[Mapping[str, Tensor]], moves: AllMoves, later: Later | None = None
) -> None:
    """Let tokens arrive in stores and leave them.

    Args:
        stores: of both sides, of each layer.
        new: the tokens that come in, `[batch, kv_heads, tokens, head_dim]`, of each layer; none for a crop.
        moves: what each store does, the same in all layers.
        later: codes what arrives in stores that nothing leaves, if it is given.
    """
    for side, planned in moves.items():
        held, arriving = [own[side] for own in stores], [own[side] for own in new]
        # All that moves is decoded before any store changes.
        coming = [_coming(m, planned, held, arriving) for m in planned]
        for s, (m, parts) in enumerate(zip(planned, coming, strict=True)):
            stays = m.leaving is None and m.flat is None
            if not m.arrivals and stays:
                continue
            changed = [(own[s], x) for own, x in zip(held, parts, strict=True)]
            if len(changed) > 1 and all(type(store) is ExactStore and len(x) == 1 for store, x in changed):
                append_all(
                    [store.parts["exact"] for store, _ in changed if store is not None], [x[0] for _, x in changed]
                )
                if stays:
                    continue
                changed = [(store, []) for store, _ in changed]
            for store, x in changed:
                if store is not None:
                    _change(store, x, m, later)


def _coming(
    m: Moves, planned: list[Moves], held: Sequence[list[Store | None]], new: Sequence[Tensor]
) -> list[list[Tensor]]:
    """The tokens that arrive in a store of each layer, decoded, in order: of each run."""
    if not m.arrivals:
        return [[] for _ in held]
    first = m.arrivals[0]
    if len(m.arrivals) == 1 and first.sources == (NEW,) and first.span == (0, new[0].shape[2]):
        return [[x] for x in new]
    return [_collected(m.arrivals, own, x, planned) for own, x in zip(held, new, strict=True)]


def _change(store: Store, parts: list[Tensor], m: Moves, later: Later | None) -> None:
    places = _positions(m.arrivals) if parts and store.by_position else [None] * len(parts)
    for x, positions in zip(parts, places, strict=True):
        empty = _partial(store, m.empty[0], x.shape[2])
        full = all(arrival.full for arrival in m.arrivals)
        if later is not None and m.leaving is None and m.flat is None and isinstance(store, AffineStore):
            store.append(x, empty, positions, full, later)
        else:
            store.append(x, empty, positions, full)
    # After the arrivals, so that groups close as they would token by token.
    if isinstance(m.leaving, Leaving):
        store.remove(m.leaving, _partial(store, m.empty[1], 0))
    elif m.leaving is not None:
        store.drop(m.leaving)
    if m.flat is not None:
        store.flatten(*m.flat)


def _partial(store: Store, empty: Tensor | None, arriving: int) -> Tensor | None:
    """Of a store per channel the empty ones among the tokens that lack a full group, and those arriving."""
    if empty is None or store.waiting is None:
        return None
    return empty[..., empty.shape[2] - store.waiting - arriving :]


def _positions(arrivals: list[Arrival]) -> list[Tensor]:
    """The positions of what `_collected` gives: `[tokens]`, or `[batch, kv_heads or 1, tokens]`."""
    runs: dict[int, list[Tensor]] = {}
    for arrival in arrivals:
        at = arrival.positions
        assert at is not None
        runs.setdefault(arrival.run, []).append(at() if callable(at) else torch.from_numpy(at))
    return [torch.cat(parts, dim=-1) for parts in runs.values()]


def _collected(arrivals: list[Arrival], stores: list[Store | None], new: Tensor, planned: list[Moves]) -> list[Tensor]:
    """The tokens that arrive in a store, decoded, in order: a tensor for each run."""
    if len(arrivals) == 1:
        return [_decoded(arrivals[0], stores, new, planned)]
    runs: dict[int, list[Tensor]] = {}
    for arrival in arrivals:
        runs.setdefault(arrival.run, []).append(_decoded(arrival, stores, new, planned))
    return [torch.cat(parts, dim=2) if len(parts) > 1 else parts[0] for parts in runs.values()]


def _decoded(arrival: Arrival, stores: list[Store | None], new: Tensor, planned: list[Moves]) -> Tensor:
    index = arrival.indices
    if isinstance(index, Tensor):
        return _by_head(arrival, index, stores, new)
    (source,) = arrival.sources
    store = None if source == NEW else stores[source]
    if arrival.span is not None:
        first, last = arrival.span
        if store is not None:
            if isinstance(store, ExactStore) and _stays(store, planned[source].leaving):
                return store.parts["exact"].slice(first, last)
            return store.take(index, new.dtype)
        return new if last - first == new.shape[2] else new[:, :, first:last]
    if store is not None:
        ascending = np.sort(index)
        x, lookup = store.take(ascending, new.dtype), np.searchsorted(ascending, index)
    else:
        x, lookup = new, index
    return x.index_select(2, torch.from_numpy(lookup).to(x.device, non_blocking=True))


def _stays(store: ExactStore, leaving: Any) -> bool:
    """Whether nothing is written to the memory of an exact store: at most its first tokens leave it."""
    first = leaving is None or (isinstance(leaving, np.ndarray) and leaving[0] == 0 and leaving[-1] == len(leaving) - 1)
    return first and not store.parts["exact"].whole


def _by_head(arrival: Arrival, index: Tensor, stores: list[Store | None], new: Tensor) -> Tensor:
    """Each row and head from its own sources; zeros in empty places."""
    out: Tensor | None = None
    for source, (first, end) in zip(arrival.sources, arrival.bounds, strict=True):
        if first == end:
            continue
        whole = arrival.full and len(arrival.sources) == 1
        local = index if whole else (index - first).clamp_(0, end - first - 1)
        store = None if source == NEW else stores[source]
        x = gather_tokens(new, local) if store is None else store.gather(local, new.dtype)
        out = x if out is None else torch.where((index >= first).unsqueeze(3), x, out)
    assert out is not None
    return out if arrival.full else out.masked_fill((index < 0).unsqueeze(3), 0.0)
