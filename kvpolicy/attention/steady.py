"""Layers that stand alike: what attention found out for the first of them in a step serves the others.

Layers of one recipe move the same tokens at the same time. Where their stores are alike, what kernels are given for
them differs in addresses alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from kvpolicy.layer.layer import LayerCache
from kvpolicy.placement.step import Step
from kvpolicy.storage.affine import AffineStore
from kvpolicy.storage.read import parts_read, words_of

__all__ = ["Stands", "stands"]

_kinds: dict[Any, Kind] = {}


class Kind:
    """Of layers all that stays the same while they hold tokens. There is one for each, so that they compare fast."""

    def __init__(self, words: Any) -> None:
        self.words = words

    def __deepcopy__(self, memo: dict[int, Any]) -> Kind:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return _kind, (self.words,)


def _kind(words: Any) -> Kind:
    return _kinds.setdefault(words, Kind(words))


class Stands(NamedTuple):
    """How a layer stands, and what it is asked."""

    kind: Kind
    step: Step
    marks: list[Any]
    asked: tuple[Any, ...]
    addresses: list[int]
    """Of its pages, in order: all that tells it from a layer that stands like it."""

    def again(
        self, tiers: LayerCache, query: Tensor, new: tuple[Tensor, Tensor], sinks: Tensor | None, observer: Any
    ) -> Tensor | None:
        """What attention gives, if the layer before it stood alike."""
        known: Known | None = tiers.reading.known.get(self.kind)
        if known is None:
            return None
        other = known.stands
        if other.step is not self.step or other.marks != self.marks or other.asked != self.asked:
            return None
        tiers.backends = known.backends
        return known.again(query, new, self.addresses, sinks, observer)

    def note(self, tiers: LayerCache, again: Callable[..., Tensor | None] | None) -> None:
        """Keep what serves those that stand like this layer."""
        if again is not None:
            tiers.reading.known[self.kind] = Known(self, tiers.backends, again)


class Known(NamedTuple):
    """What was found out for a layer."""

    stands: Stands
    backends: tuple[str, ...]
    again: Callable[..., Tensor | None]
    """See `Backend.again`."""


def stands(tiers: LayerCache, query: Tensor, new: tuple[Tensor, Tensor], *asked: Any) -> Stands | None:
    """How a layer stands, and what it is asked besides; None where more than that counts."""
    kind = tiers.kind
    if kind is None:
        kind = tiers.kind = _kind_of(tiers)
    if not kind.words or tiers.page_table is not None or not tiers.planner.plain:
        return None
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
    keys, values = new
    shapes = (
        query.dtype, query.shape, query.stride(), query.get_device(), tiers.like["keys"].get_device(),
        keys.dtype, keys.shape, keys.stride(), values.dtype, values.shape, values.stride(),
    )  # fmt: skip
    return Stands(kind, tiers.planner.step, marks, (*shapes, *asked), addresses)


def _kind_of(tiers: LayerCache) -> Kind:
    """The kind of a layer; without words where there is more to say of its stores."""
    stores = [store for side in tiers.stores.values() for store in side if store is not None]
    words = [words_of(store) for store in stores]
    shapes = [(x.dtype, x.shape[1], x.shape[3]) for x in tiers.like.values()]
    if None in words:
        return _kind(())
    try:
        return _kind((*words, *shapes))
    except TypeError:  # a quantizer of somebody's that has no hash
        return _kind(())
