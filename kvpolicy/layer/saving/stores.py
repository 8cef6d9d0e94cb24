"""What stores save, checked before it is restored."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvpolicy.errors import CacheError, MissingDependencyError, PluginError
from kvpolicy.interfaces.quantizer import AffineQuantizer
from kvpolicy.layer.layer import LayerCache
from kvpolicy.layer.saving.file import Damaged, Held
from kvpolicy.layer.saving.flat import Ints, packed, unpacked
from kvpolicy.placement.per_head import PerHeadPlacement
from kvpolicy.storage.affine import AffineStore
from kvpolicy.storage.base import LARGE, Store
from kvpolicy.storage.beside import EXTRAS
from kvpolicy.storage.chain import QUERIES
from kvpolicy.storage.coded import POSITIONS, CodedStore
from kvpolicy.storage.exact import ExactStore
from kvpolicy.storage.make import make_store
from kvpolicy.storage.named import NamedStore
from kvpolicy.storage.named_parts import GROUPS, SIZES, NamedParts

Formats = dict[str, tuple[torch.dtype, tuple[int, ...]]]
"""For each tensor of a store its dtype, and its shape after batch, heads and tokens."""


def save_stores(tiers: LayerCache, number: int, tensors: dict[str, Tensor]) -> None:
    """Add what the stores of a layer hold to `tensors`, and an empty slice that shows shape and type."""
    for side, like in tiers.like.items():
        tensors[f"{number}.{side}.like"] = like
        for s, store in enumerate(tiers.stores[side]):
            held = store.tensors() if store is not None else {}
            counts = _flat(tiers, side, s)
            if store is not None and counts is not None:
                held |= packed({name: x for name, x in held.items() if not _of_store(store, name)}, counts)
            tensors |= {f"{number}.{side}.{s}.{name}": x for name, x in held.items()}


def fill_stores(tiers: LayerCache, number: int, held: Held, device: torch.device) -> None:
    """Restore the stores of a layer, which are made and empty; its placement is known."""
    for side, stores in tiers.stores.items():
        for s, store in enumerate(stores):
            if store is None:
                continue
            parts, like = held.below(f"{number}.{side}.{s}."), tiers.like[side]
            try:
                counts = _flat(tiers, side, s)
                parts = parts if counts is None else unpacked(parts, counts)
                _check(parts, store, like, _formats(tiers.placement.store_spec(side, s), store, like, parts))
                store.restore(
                    {name: t if name == "sizes" or name.endswith(SIZES) else t.to(device) for name, t in parts.items()}
                )
                if isinstance(store, CodedStore) and store.chain is not None and not store.chain.invertible:
                    raise CacheError("with what they keep its transforms must be invertible")
                if isinstance(store, NamedStore) or (isinstance(store, AffineStore) and store.beside is not None):
                    _check_decoded(store, like)
                if isinstance(store, CodedStore) and store.beside is not None:
                    store.beside.check(store.parts["codes"].length if isinstance(store, AffineStore) else store.length)
                expected = tiers.planner.length(side, s)
                if store.length != expected:
                    raise CacheError(f"it must hold {expected} tokens, found {store.length}")
                _mark_late(tiers, side, s, store)  # last: what was tried above must not be taken for its tokens
            except CacheError as error:
                raise Damaged(f"layer {number}, {side}, store {s}: {error}") from None


def _flat(tiers: LayerCache, side: str, s: int) -> Ints | None:
    """How many of the first tokens of a store each row and head has, where they take no more room than these need."""
    planner = tiers.planner
    table = planner.table(side, s) if isinstance(planner, PerHeadPlacement) else None
    return None if table is None else table.flat


def _mark_late(tiers: LayerCache, side: str, s: int, store: Store) -> None:
    """Rows without a token in a store: what it keeps of first tokens is to be found for them once some come."""
    planner = tiers.planner
    if not isinstance(planner, PerHeadPlacement) or not isinstance(store, CodedStore) or not store.length:
        return
    table = planner.table(side, s)
    assert table is not None
    none = (table.positions < 0).flatten(1).all(1)
    if len(none) > 1 and bool(none.any()):
        if store.chain is not None and store.chain.state:
            store.chain.late.rows = none
        if isinstance(store, NamedStore) and store.named.kept:
            store.late.rows = none


def _formats(spec: Any, store: Store, like: Tensor, parts: dict[str, Tensor]) -> Formats:
    """The formats of a store's tensors, found on a store of zeros, one group of them."""
    exact = like.dtype, (like.shape[3],)
    if isinstance(store, ExactStore):
        return {"exact": exact}
    n = 1
    if isinstance(store, AffineStore) and store.by_channel:
        assert isinstance(spec, AffineQuantizer)
        coded = parts["codes"].shape[2] if "codes" in parts and parts["codes"].ndim > 2 else 0
        if store.group_size <= coded:
            n = store.group_size or 1
        else:  # no group is full
            spec = spec.model_copy(update={"group_size": 1})
    sample = make_store(spec, like.shape[3], store.site if isinstance(store, CodedStore) else None)
    assert sample is not None
    if _lines(store) is not None:
        sample.differ_by_head((1, 1))
    if isinstance(sample, CodedStore) and sample.chain is not None:
        sample.chain.heed(torch.ones((1, like.shape[1], 2, like.shape[3])))
    sample.append(torch.zeros((1, like.shape[1], n, like.shape[3]), dtype=like.dtype), None, torch.arange(n))
    formats: Formats = {
        name: (t.dtype, tuple(t.shape[2 + (not _of_store(sample, name)) :])) for name, t in sample.tensors().items()
    }
    if isinstance(store, AffineStore) and store.by_channel:
        formats["exact"] = exact
    if isinstance(store, CodedStore) and store.chain is not None and store.chain.asks:
        formats[QUERIES] = torch.float32, (2, like.shape[3])
    return formats


def _lines(store: Store) -> tuple[int, int] | None:
    """Rows and heads that differ, once some do."""
    named = store.named if isinstance(store, NamedStore) else store
    return named.row_heads if isinstance(named, AffineStore | NamedParts) else None


def _of_store(store: Store, name: str) -> bool:
    return isinstance(store, CodedStore) and store.of_store(name)


def _check(parts: dict[str, Tensor], store: Store, like: Tensor, formats: Formats) -> None:
    rows_and_heads = tuple(like.shape[:2])
    for name, t in parts.items():
        if name not in formats:
            raise CacheError(f"its tensors must be {sorted(formats)}, found {name}")
        dtype, last = formats[name]
        first = store.row_heads if isinstance(store, AffineStore) and name == "groups" else rows_and_heads
        if name.endswith(GROUPS):
            first = _lines(store)
        if name == POSITIONS or _of_store(store, name):  # one for all rows or heads, or one for each
            first = tuple(n if n == 1 else most for n, most in zip(t.shape[:2], rows_and_heads, strict=False))
        tokens = () if _of_store(store, name) else t.shape[2:3]
        fits = (
            t.ndim == 1
            if name == "sizes" or name.endswith(SIZES)
            else tuple(t.shape) == (*(first or ()), *tokens, *last)
        )
        if t.dtype != dtype or not fits:
            raise CacheError(
                f"{name} must be {first} of tokens of {last} in {dtype}, found {str(tuple(t.shape))[:80]} in {t.dtype}"
            )
    if isinstance(store, CodedStore):
        _check_state(parts, formats, store)
    if isinstance(store, NamedStore) and parts:
        own, all_ = ({n for n in x if not n.startswith(EXTRAS) and ":" not in n} for x in (parts, formats))
        lengths = {parts[n].shape[2] for n in own if store.named.axis(n) == "token" and not _of_store(store, n)}
        if own != all_ or len(lengths) > 1:
            raise CacheError(
                f"{sorted(formats)} must be of the same tokens, found {sorted(parts)} of {sorted(lengths)}"
            )


def _check_state(parts: dict[str, Tensor], formats: Formats, store: Store) -> None:
    """What transforms keep is there once anything was coded, and of numbers."""
    expected = {name for name in formats if _of_store(store, name) and name != QUERIES}
    found = {name for name in parts if _of_store(store, name) and name != QUERIES}
    if QUERIES in parts and (found or not parts[QUERIES].isfinite().all()):
        raise CacheError(f"{QUERIES} must be finite and stand where nothing is coded yet")
    if found != expected and (found or any(name not in ("exact", POSITIONS, QUERIES, "sizes") for name in parts)):
        raise CacheError(f"what its transforms keep must be {sorted(expected)}, found {sorted(found)}")
    beside, kept = ({n for n in x if n.startswith(EXTRAS) and ":" not in n} for x in (formats, parts))
    if kept and kept != beside:
        raise CacheError(f"what its extras keep must be {sorted(beside)}, found {sorted(kept)}")
    for name in found:
        if parts[name].is_floating_point() and not parts[name].float().isfinite().all():
            raise CacheError(f"{name} must be finite")


def _check_decoded(store: NamedStore | AffineStore, like: Tensor) -> None:
    """What a quantizer, or an extra, keeps means something to itself alone: it must be able to read it."""
    try:
        for first, x in store.decoded(LARGE, like.dtype):
            n = min(1024, store.length - first) if isinstance(store, NamedStore) else x.shape[2]
            if tuple(x.shape) != (*like.shape[:2], n, like.shape[3]) or x.dtype != like.dtype:
                raise CacheError(f"it must decode to {like.shape[3]} channels, found {tuple(x.shape)} in {x.dtype}")
    except MissingDependencyError:
        raise
    except PluginError as error:  # it could write this once, so the file is not what it wrote
        cause, kind = error.__cause__ or error, store.quantizer.kind
        text = f"{type(cause).__name__}: {str(cause)[:120]}"
        also = " with its extras" if store.beside is not None else ""
        raise CacheError(f"quantizer {kind!r}{also} can't decode it: {text}") from None
