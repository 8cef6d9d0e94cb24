"""What a cache holds, counted from its tensors."""

from __future__ import annotations

import io
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from kvpolicy.interfaces.component import in_brief

if TYPE_CHECKING:
    from kvpolicy.hf.cache import CompressedCache
    from kvpolicy.layer.layer import LayerCache

__all__ = ["LayerSummary", "Memory", "StoreMemory", "Summary", "measure", "summarize"]

UNSEEN = (
    "no model tells this cache of padding while it is not attached, so that padded rows can't be told apart; make it "
    "for the model that runs: make_cache(recipe, model)"
)
KINDS = ("codes", "scales", "zeros", "exact", "indices", "scores", "state", "extras")


@dataclass(frozen=True)
class StoreMemory:
    """Bytes of one store: the keys or the values of tiers that share a storage format."""

    layer: int
    side: str
    """`keys`, `values`, or `both` for layers of transformers' own."""
    tiers: tuple[int, ...]
    """The tiers whose tokens it holds; empty for layers of transformers' own."""
    tokens: int
    codes: int = 0
    scales: int = 0
    zeros: int = 0
    exact: int = 0
    indices: int = 0
    scores: int = 0
    """The attention that tokens received, where policies ask for it."""
    state: int = 0
    """What transforms keep, once per store."""
    extras: int = 0
    """What extras keep beside the codes."""
    reserved: int = 0
    """Bytes of all pages, free ones included; not those of `indices`."""

    @property
    def bytes(self) -> int:
        """Bytes used."""
        return sum(int(getattr(self, kind)) for kind in KINDS)


@dataclass(frozen=True)
class Memory:
    """What a cache takes, counted from the tensors that it holds."""

    stores: tuple[StoreMemory, ...]
    exact_bytes: int
    """What the exact cache would take for the same tokens."""
    values: int
    """Numbers (keys and values) of all tokens seen."""
    scratch: int
    """Bytes of the dense buffer that all layers share while decoding. Not in `bytes`."""
    shared_indices: int
    """Bytes of the positions, kept once for all layers with the same tiers."""

    @property
    def bytes(self) -> int:
        """Bytes used by all layers, and the positions."""
        return sum(s.bytes for s in self.stores) + self.shared_indices

    @property
    def reserved(self) -> int:
        """Bytes allocated: free room in pages and the scratch buffer included."""
        return sum(s.reserved + s.indices for s in self.stores) + self.shared_indices + self.scratch

    @property
    def ratio(self) -> float:
        """Bytes of the exact cache per byte used; 1 if nothing is held."""
        return self.exact_bytes / self.bytes if self.bytes and self.exact_bytes else 1.0

    @property
    def bits_per_value(self) -> float:
        """Effective bits per key or value of the tokens seen; evicted ones count as seen."""
        return 8 * self.bytes / self.values if self.values else 0.0

    def total(self, kind: str) -> int:
        """Bytes of one kind (codes, scales, zeros, exact, indices, scores, state, extras) over all layers."""
        return sum(int(getattr(s, kind)) for s in self.stores) + (self.shared_indices if kind == "indices" else 0)

    def table(self) -> str:
        """A table of bytes by layer, side and tiers."""
        table = Table(title=str(self))
        for name in ("layer", "side", "tiers", "tokens", *KINDS, "total"):
            table.add_column(name, justify="left" if name in ("side", "tiers") else "right")
        for s in self.stores:
            tiers = ",".join(map(str, s.tiers)) or "-"
            row = [s.layer, s.side, tiers, s.tokens, *(getattr(s, kind) for kind in KINDS), s.bytes]
            table.add_row(*map(str, row))
        return _render(table)

    def __str__(self) -> str:
        return (
            f"{self.bytes:,} bytes, {self.bits_per_value:.2f} bits per value, {_compared(self.ratio)} the exact cache"
        )


@dataclass(frozen=True)
class LayerSummary:
    """How one layer is kept."""

    layer: int
    type: str
    tiers: tuple[str, ...]
    """Each tier in words: its policy, and how keys and values are stored."""
    tokens: int


@dataclass(frozen=True)
class Summary:
    """How the layers of a cache are kept."""

    recipe: str
    layers: tuple[LayerSummary, ...]
    notes: tuple[str, ...] = ()
    """What the cache can't see or do."""

    def __str__(self) -> str:
        table = Table(title=f"recipe {self.recipe}")
        for name in ("layer", "kept by", "tiers", "tokens"):
            table.add_column(name)
        for (kept, tiers, tokens), group in groupby(self.layers, lambda x: (x.type, x.tiers, x.tokens)):
            numbers = [x.layer for x in group]
            shown = str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}"
            table.add_row(shown, kept, "\n".join(tiers), str(tokens))
        return "\n".join([_render(table), *self.notes])


def _compared(ratio: float) -> str:
    if f"{ratio:.2f}" == "1.00":
        return "as large as"
    return f"{ratio:.2f}x smaller than" if ratio > 1 else f"{1 / ratio:.2f}x as large as"


def _render(table: Table) -> str:
    console = Console(file=io.StringIO(), width=120, color_system=None)
    console.print(table)
    file = console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue().rstrip()


def measure(cache: CompressedCache) -> Memory:
    """Count the tensors of a committed cache."""
    from kvpolicy.hf.layer import TieredLayer

    stores: list[StoreMemory] = []
    exact = values = shared = 0
    counted: set[int] = set()
    for number, layer in enumerate(cache.layers):
        if not isinstance(layer, TieredLayer):
            held = [t for t in (getattr(layer, "keys", None), getattr(layer, "values", None)) if t is not None]
            used = sum(t.numel() * t.element_size() for t in held)
            tokens = held[0].shape[2] if held and held[0].ndim == 4 else 0
            stores.append(StoreMemory(number, "both", (), tokens, exact=used, reserved=used))
            exact += used
            values += sum(t.numel() for t in held)
            continue
        tiers = layer.tiers
        for side, like in tiers.like.items():
            size = like.shape[0] * like.shape[1] * like.shape[3] * tiers.seen
            exact += size * like.element_size()
            values += size
            for s, store in enumerate(tiers.stores[side]):
                if store is not None:
                    stores.append(_store_memory(tiers, number, side, s))
        for state in tiers.step.rows:
            if id(state) not in counted:
                counted.add(id(state))
                orders = {id(s): s for held in state.stores.values() for s in held}
                shared += sum(t.nbytes for t in state.tiers) + sum(s.array.nbytes for s in orders.values())
    if cache.padding is not None:
        shared += cache.padding.real.size
    scratch = cache.scratch.bytes if cache.scratch is not None else 0
    scratch += sum({id(x.tiers.step): x.tiers.step.bytes for x in cache.layers if isinstance(x, TieredLayer)}.values())
    return Memory(tuple(stores), exact, values, scratch, shared)


def _store_memory(tiers: LayerCache, number: int, side: str, s: int) -> StoreMemory:
    store = tiers.stores[side][s]
    assert store is not None
    covers, used = tuple(tiers.placement.tiers_of_store(side, s)), store.bytes()
    table = tiers.ragged.tables[side][s] if tiers.ragged is not None and side in tiers.ragged.tables else None
    reserved = store.reserved()
    if tiers.ragged is not None:
        own = table.bytes() if table is not None else {}
        used = {kind: used.get(kind, 0) + own.get(kind, 0) for kind in KINDS}
        reserved += (table.reserved() if table is not None else 0) - used["indices"]
    return StoreMemory(number, side, covers, store.length, **used, reserved=reserved)


def _words(tier: Any) -> str:
    policy = "the rest" if tier.policy is None else _component(tier.policy)
    keys, values = (_component(getattr(tier, side)) for side in ("keys", "values"))
    return f"{policy}: {keys}" if keys == values else f"{policy}: keys {keys}, values {values}"


def _component(spec: Any) -> str:
    if isinstance(spec, str):
        return spec
    options = ", ".join(f"{k} {in_brief(v)}" for k, v in spec if k != "kind" and v != ())
    return f"{spec.kind}({options})"


def summarize(cache: CompressedCache) -> Summary:
    """Describe the layers of a committed cache."""
    from kvpolicy.hf.layer import TieredLayer

    rows = []
    for number, layer in enumerate(cache.layers):
        if isinstance(layer, TieredLayer):
            tiers = tuple(map(_words, cache.recipe.tiers_of(number, len(cache.layers))))
            kept = "kvpolicy, dense: the model computes on keys and values" if layer.tiers.densely else "kvpolicy"
            rows.append(LayerSummary(number, kept, tiers, layer.tiers.held_after_commit()))
        else:
            rows.append(LayerSummary(number, f"transformers' {type(layer).__name__}", (), 0))
    blind = cache.guard.evicts and (cache.lease is None or cache.guard.untold)
    return Summary(cache.recipe.name, tuple(rows), (UNSEEN,) if blind else ())
