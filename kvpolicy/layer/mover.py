"""Moves tokens between the stores of a layer, as a planner says. Nothing else does."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvpolicy.placement.moves import NEW, AllMoves, Arrival, Ints, Moves
from kvpolicy.storage.affine import AffineStore
from kvpolicy.storage.base import Store
from kvpolicy.storage.exact import ExactStore
from kvpolicy.storage.gather import gather_all, gather_tokens, on_device
from kvpolicy.storage.later import Later, append_all, remove_all
from kvpolicy.storage.pages import Leaving
from kvpolicy.storage.together import append_coded, coded_alike, gather_from, layers_beside, remove_coded

Stores = dict[str, list[Store | None]]


def move(
    stores: Sequence[Stores], new: Sequence[Mapping[str, Tensor]], moves: Sequence[AllMoves], later: Later | None = None
) -> None:
    """Let tokens arrive in stores and leave them.

    Args:
        stores: of both sides, of each layer.
        new: the tokens that come in, `[batch, kv_heads, tokens, head_dim]`, of each layer; none for a crop.
        moves: what each store does, in each layer: as many tokens arrive and leave, from and to the same stores.
        later: codes what arrives in stores that nothing leaves, if it is given.
    """
    for side in moves[0]:
        held, arriving, planned = (
            [own[side] for own in stores],
            [own[side] for own in new],
            [own[side] for own in moves],
        )
        count = len(planned[0])
        # All that moves is decoded before any store changes.
        coming = [_coming(s, planned, held, arriving) for s in range(count)]
        for s in range(count):
            if planned[0][s].arrivals or planned[0][s].leaving is not None or planned[0][s].flat is not None:
                _move_in([own[s] for own in held], [own[s] for own in planned], coming[s], later)


def _coming(
    s: int, planned: Sequence[list[Moves]], held: Sequence[list[Store | None]], new: Sequence[Tensor]
) -> list[list[Tensor]]:
    """The tokens that arrive in a store of each layer, decoded, in order: of each run."""
    arrivals = planned[0][s].arrivals
    if not arrivals:
        return [[] for _ in held]
    if len(arrivals) == 1 and arrivals[0].sources == (NEW,) and arrivals[0].span == (0, new[0].shape[2]):
        return [[x] for x in new]
    found = _by_head_at_once(s, planned, held, new) if len(held) > 1 else None
    if found is not None:
        return [[x] for x in found]
    if all(own is planned[0] for own in planned):
        return _collected(arrivals, held, new, planned[0])
    each = zip(planned, held, new, strict=True)
    return [_collected(own[s].arrivals, [at], [x], own)[0] for own, at, x in each]


def _move_in(
    stores: Sequence[Store | None], moves: Sequence[Moves], parts: Sequence[list[Tensor]], later: Later | None
) -> None:
    """What moves in a store of each layer."""
    exact = [store for store in stores if type(store) is ExactStore] if len(stores) > 1 else []
    by_head = type(stores[0]) is AffineStore and stores[0].row_heads is not None and moves[0].flat is None
    coded = coded_alike(stores) if by_head and len(stores) > 1 and all(len(x) < 2 for x in parts) else []
    if coded:
        _move_coded(coded, moves, parts)
        return
    if len(exact) < len(stores) or any(len(x) > 1 for x in parts):
        for store, m, x in zip(stores, moves, parts, strict=True):
            if store is not None:
                _change(store, m, x, later)
        return
    if parts[0]:
        stays = later is not None and moves[0].leaving is None and moves[0].flat is None
        append = later.append if later is not None and stays else append_all
        append([store.parts["exact"] for store in exact], [x[0] for x in parts])
    leaving = [m.leaving for m in moves if isinstance(m.leaving, Leaving)]
    if len(leaving) == len(exact) and moves[0].flat is None:
        remove_all([store.parts["exact"] for store in exact], leaving)
    elif moves[0].leaving is not None or moves[0].flat is not None:
        for store, m in zip(exact, moves, strict=True):
            _change(store, m, [], later)


def _move_coded(stores: Sequence[AffineStore], moves: Sequence[Moves], parts: Sequence[list[Tensor]]) -> None:
    """What moves in stores of codes that are kept alike."""
    if parts[0]:
        coming = parts[0][0].shape[2]
        empty = [_partial(store, m.empty[0], coming) for store, m in zip(stores, moves, strict=True)]
        full = all(arrival.full for m in moves for arrival in m.arrivals)
        append_coded(stores, [x[0] for x in parts], empty, full)
    leaving = [m.leaving for m in moves if isinstance(m.leaving, Leaving)]
    if len(leaving) == len(stores):
        empty = [_partial(store, m.empty[1], 0) for store, m in zip(stores, moves, strict=True)]
        remove_coded(stores, leaving, empty)
    else:
        for store, m in zip(stores, moves, strict=True):
            _change(store, m, [], None)


def _change(store: Store, m: Moves, parts: list[Tensor], later: Later | None) -> None:
    """What moves in a store of a layer."""
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


def _collected(
    arrivals: list[Arrival], held: Sequence[list[Store | None]], new: Sequence[Tensor], planned: list[Moves]
) -> list[list[Tensor]]:
    """The tokens that arrive in a store of each of some layers that move alike, decoded, in order: of each run."""
    if len(arrivals) == 1:
        return [[x] for x in _decoded(arrivals[0], held, new, planned)]
    found: list[dict[int, list[Tensor]]] = [{} for _ in held]
    for arrival in arrivals:
        for runs, x in zip(found, _decoded(arrival, held, new, planned), strict=True):
            runs.setdefault(arrival.run, []).append(x)
    return [[torch.cat(parts, dim=2) if len(parts) > 1 else parts[0] for parts in runs.values()] for runs in found]


def _decoded(
    arrival: Arrival, held: Sequence[list[Store | None]], new: Sequence[Tensor], planned: list[Moves]
) -> list[Tensor]:
    """What an arrival brings to each layer."""
    index = arrival.indices
    if isinstance(index, Tensor):
        return [_by_head(arrival, index, own, x) for own, x in zip(held, new, strict=True)]
    (source,) = arrival.sources
    stores = [] if source == NEW else [store for own in held if (store := own[source]) is not None]
    if arrival.span is not None:
        first, last = arrival.span
        if not stores:
            return [x if last - first == x.shape[2] else x[:, :, first:last] for x in new]
        stays = _stays(planned[source].leaving)
        return [
            store.parts["exact"].slice(first, last)
            if stays and isinstance(store, ExactStore) and not store.parts["exact"].whole
            else store.take(index, x.dtype)
            for store, x in zip(stores, new, strict=True)
        ]
    if not stores:
        return [_chosen(x, index) for x in new]
    if bool((index[1:] > index[:-1]).all()):
        return [store.take(index, x.dtype) for store, x in zip(stores, new, strict=True)]
    ascending = np.sort(index)
    lookup = np.searchsorted(ascending, index)
    return [_chosen(store.take(ascending, x.dtype), lookup) for store, x in zip(stores, new, strict=True)]


def _chosen(x: Tensor, index: Ints) -> Tensor:
    return x.index_select(2, on_device(index, x.device))


def _stays(leaving: Any) -> bool:
    """Whether nothing is written to the memory of a store that lets its tokens go so: at most its first ones leave."""
    return leaving is None or (
        isinstance(leaving, np.ndarray) and leaving[0] == 0 and bool(leaving[-1] == len(leaving) - 1)
    )


def _by_head_at_once(
    s: int, planned: Sequence[list[Moves]], held: Sequence[list[Store | None]], new: Sequence[Tensor]
) -> list[Tensor] | None:
    """`_by_head` of the only arrival in a store of each layer; None where that is to be asked."""
    arrivals = [own[s].arrivals[0] for own in planned if len(own[s].arrivals) == 1]
    every = [x.indices for x in arrivals if isinstance(x.indices, Tensor)]
    if len(every) < len(held):
        return None
    found: list[Tensor] = []
    rows, heads, _, dim = new[0].shape
    most = layers_beside(rows * heads * every[0].shape[-1] * dim * new[0].element_size())
    for at in range(0, len(held) if most > 1 else 0, most):
        some = slice(at, at + most)

        def gathered(source: int, places: Tensor, some: slice = some) -> Tensor | None:
            if source == NEW:
                return gather_all(new[some], places)
            return gather_from([own[source] for own in held[some]], places, new[0].dtype)

        x = _of_sources(arrivals[0], torch.stack(every[some]), gathered)
        if x is None:
            return None
        found += x.unbind(0)
    return found or None


def _by_head(arrival: Arrival, index: Tensor, stores: list[Store | None], new: Tensor) -> Tensor:
    """Each row and head from its own sources; zeros in empty places."""

    def gathered(source: int, places: Tensor) -> Tensor:
        store = None if source == NEW else stores[source]
        return gather_tokens(new, places) if store is None else store.gather(places, new.dtype)

    found = _of_sources(arrival, index, gathered)
    assert found is not None
    return found


def _of_sources(arrival: Arrival, index: Tensor, gathered: Callable[[int, Tensor], Tensor | None]) -> Tensor | None:
    """The tokens at `index`, `[..., batch or 1, kv_heads or 1, tokens]`, of the sources of an arrival.

    `gathered` gives those at some places of a source; None where it can't, for all of them.
    """
    out: Tensor | None = None
    for source, (first, end) in zip(arrival.sources, arrival.bounds, strict=True):
        if first == end:
            continue
        whole = arrival.full and len(arrival.sources) == 1
        x = gathered(source, index if whole else (index - first).clamp_(0, end - first - 1))
        if x is None:
            return None
        out = x if out is None else torch.where((index >= first).unsqueeze(-1), x, out)
    return out if out is None or arrival.full else out.masked_fill((index < 0).unsqueeze(-1), 0.0)
