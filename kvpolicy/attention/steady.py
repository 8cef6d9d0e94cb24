"""Layers that stand alike: what attention found out for the first of them in a step serves the others.

Layers of one recipe move the same tokens at the same time. Where their stores are alike, what kernels are given for
them differs in addresses alone. Layers that stood alike do so after they have moved together (`layer/standing.py`); of
others the marks of all pages are compared.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from kvpolicy.attention.backend import computed_again
from kvpolicy.interfaces.backend import AttentionOptions, Backend, Part
from kvpolicy.layer.layer import LayerCache
from kvpolicy.layer.standing import Kind, Standing, Stood
from kvpolicy.placement.step import Step
from kvpolicy.storage.affine import AffineStore
from kvpolicy.storage.clock import Clock
from kvpolicy.storage.read import parts_read, words_of

__all__ = ["Known", "asked_of", "computed_first", "known_of", "note", "stood_of"]


class Known(NamedTuple):
    """What was found out for a layer."""

    standing: Standing
    step: Step
    asked: tuple[Any, ...]
    backends: tuple[str, ...]
    again: Callable[..., Any]
    """See `Backend.again`; of a graph that is replayed, its `Renewal`."""


def asked_of(tiers: LayerCache, query: Tensor, new: tuple[Tensor, Tensor], *more: Any) -> tuple[Any, ...]:
    """What a layer is asked: the kinds of its query and new tokens, and more."""
    keys, values = new
    return (
        query.dtype, query.shape, query.stride(), query.get_device(), tiers.like["keys"].get_device(),
        keys.dtype, keys.shape, keys.stride(), values.dtype, values.shape, values.stride(), *more,
    )  # fmt: skip


def known_of(tiers: LayerCache, asked: tuple[Any, ...]) -> Known | None:
    """What was kept for a layer that stands like this one and was asked the same; `tiers.stood` has the addresses."""
    if tiers.kind is None:
        stood_of(tiers)
    known: Known | None = tiers.reading.known.get(tiers.kind)
    if known is None or known.step is not tiers.planner.step or known.asked != asked:
        return None
    stood, standing = tiers.stood, known.standing
    if stood is None or stood.standing is not standing or stood.grown != Clock.grown or standing.moved != Clock.moved:
        stood = tiers.stood = _looked_up(tiers)  # what is known of the two may be of different ages
        if stood is None or stood.standing is not standing:
            return None
    return known if tiers.page_table is None and tiers.planner.plain else None


def stood_of(tiers: LayerCache) -> Stood | None:
    """How a layer stands; None where more than its stores counts."""
    stood = tiers.stood
    if stood is None or stood.standing.moved != Clock.moved or stood.grown != Clock.grown:
        stood = tiers.stood = _looked_up(tiers)
    return stood if tiers.page_table is None and tiers.planner.plain else None


def computed_first(
    tiers: LayerCache,
    asked: tuple[Any, ...],
    backend: Backend,
    part: Part,
    query: Tensor,
    options: AttentionOptions,
) -> Tensor | None:
    """What attention gives, if what computes it can serve the layers to come; it is kept for them."""
    stood = stood_of(tiers)
    found = None if stood is None else computed_again(backend, query, part, options, stood.addresses, tiers.stores)
    if found is None:
        return None
    note(tiers, asked, found[0])
    return found[1]


def note(tiers: LayerCache, asked: tuple[Any, ...], again: Callable[..., Any]) -> None:
    """Keep what serves those that stand like this layer and are asked the same."""
    stood = stood_of(tiers)
    if stood is not None:
        standing = stood.standing
        if standing.marks is None:
            standing.marks = _marks(tiers)[0]
        tiers.reading.known[standing.kind] = Known(standing, tiers.planner.step, asked, tiers.backends, again)


def _looked_up(tiers: LayerCache) -> Stood | None:
    """How a layer stands, by all of its pages; None where there is more to say of its stores than their marks."""
    kind = tiers.kind
    if kind is None:
        kind = tiers.kind = _kind_of(tiers)
    if not kind.words:
        return None
    marks, addresses = _marks(tiers)
    known: Known | None = tiers.reading.known.get(kind)
    if known is not None and known.standing.moved == Clock.moved and known.standing.marks == marks:
        return Stood(known.standing, addresses, Clock.grown)
    return Stood(Standing(kind, Clock.moved, marks), addresses, Clock.grown)


def _marks(tiers: LayerCache) -> tuple[list[Any], list[int]]:
    """The marks of all pages of a layer, and their addresses in order."""
    marks: list[Any] = []
    addresses: list[int] = []
    for side in tiers.stores.values():
        for store in side:
            for pages in parts_read(store) or ():
                own, where = pages.marks
                marks.append(own)
                addresses += where
            if isinstance(store, AffineStore) and store.by_channel:
                marks.append(len(store.groups.sizes))
    return marks, addresses


def _kind_of(tiers: LayerCache) -> Kind:
    """The kind of a layer; without words where there is more to say of its stores."""
    stores = [store for side in tiers.stores.values() for store in side if store is not None]
    words = [words_of(store) for store in stores]
    shapes = [(x.dtype, x.device.type, x.shape[1], x.shape[3]) for x in tiers.like.values()]
    try:
        return Kind.of(() if None in words else (*words, *shapes))
    except TypeError:  # a quantizer of somebody's that has no hash
        return Kind.of(())
