"""What a cache holds, counted from its tensors."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import Tensor

from kvpolicy.interfaces.component import in_brief
from kvpolicy.layer.layer import LayerCache
from kvpolicy.placement.planner import State

PARTS = ("codes", "scales", "zeros", "exact", "indices", "scores", "state", "extras")


@dataclass(frozen=True)
class StoreMemory:
    """Bytes of one store: the keys or the values of tiers that share a storage format."""

    layer: int
    side: str
    """`keys`, `values`, or `both` for layers of transformers' own."""
    tiers: tuple[int, ...]
    """The tiers whose tokens it holds; empty for layers of transformers' own."""
    tokens: int
    """Tokens of each row and KV head: of the one that holds most; or, where each takes no more room than it needs, of
    all in the mean, rounded up."""
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
        return sum(int(getattr(self, kind)) for kind in PARTS)


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

    def total(self, part: str) -> int:
        """Bytes over all layers of codes, scales, zeros, exact tokens, indices, scores, state or extras."""
        return sum(int(getattr(s, part)) for s in self.stores) + (self.shared_indices if part == "indices" else 0)

    def table(self) -> str:
        """A table of bytes by layer, side and tiers."""
        table = Table(title=str(self))
        for name in ("layer", "side", "tiers", "tokens", *PARTS, "total"):
            table.add_column(name, justify="left" if name in ("side", "tiers") else "right")
        for s in self.stores:
            tiers = ",".join(map(str, s.tiers)) or "-"
            row = [s.layer, s.side, tiers, s.tokens, *(getattr(s, part) for part in PARTS), s.bytes]
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
    read: int | None = None
    """Of these the tokens that each query of a decode step reads at most, where a reader chooses."""


@dataclass(frozen=True)
class Summary:
    """How the layers of a cache are kept."""

    recipe: str
    layers: tuple[LayerSummary, ...]
    notes: tuple[str, ...] = ()
    """What the cache can't see or do."""

    def __str__(self) -> str:
        table = Table(title=f"recipe {self.recipe}")
        chosen = any(x.read is not None for x in self.layers)
        for name in ("layer", "kept by", "tiers", "tokens", *(["read"] if chosen else [])):
            table.add_column(name)
        for (kept, tiers, *counts), group in groupby(self.layers, lambda x: (x.type, x.tiers, x.tokens, x.read)):
            numbers = [x.layer for x in group]
            shown = str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}"
            table.add_row(
                shown,
                kept,
                "\n".join(tiers),
                *(str(n) if n is not None else str(counts[0]) for n in counts[: 1 + chosen]),
            )
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


def measure(layers: Sequence[LayerCache | Sequence[Tensor]], shared: int, scratch: int) -> Memory:
    """Count the tensors of committed layers.

    Args:
        layers: each layer of a cache, or the keys and values that a layer of transformers' own holds.
        shared: bytes of indices that the cache keeps beside its layers.
        scratch: bytes of its dense buffers.
    """
    stores: list[StoreMemory] = []
    exact = values = 0
    states: dict[int, State] = {}
    steps: dict[int, int] = {}
    for number, layer in enumerate(layers):
        if not isinstance(layer, LayerCache):
            used = sum(t.numel() * t.element_size() for t in layer)
            tokens = layer[0].shape[2] if layer and layer[0].ndim == 4 else 0
            stores.append(StoreMemory(number, "both", (), tokens, exact=used, reserved=used))
            exact += used
            values += sum(t.numel() for t in layer)
            continue
        for side, like in layer.like.items():
            size = like.shape[0] * like.shape[1] * like.shape[3] * layer.seen
            exact += size * like.element_size()
            values += size
            held = [s for s, store in enumerate(layer.stores[side]) if store is not None]
            stores += [_store_memory(layer, number, side, s) for s in held]
        states.update((id(state), state) for state in layer.step.rows)
        steps[id(layer.step)] = layer.step.bytes
    shared += sum(map(_state_bytes, states.values()))
    return Memory(tuple(stores), exact, values, scratch + sum(steps.values()), shared)


def _state_bytes(state: State) -> int:
    """Of what layers with the same tiers share; keys and values may share their lists of positions."""
    lists = {id(positions): positions.array.nbytes for held in state.stores.values() for positions in held}
    return sum(t.nbytes for t in state.tiers) + sum(lists.values())


def _store_memory(tiers: LayerCache, number: int, side: str, s: int) -> StoreMemory:
    store = tiers.stores[side][s]
    assert store is not None
    covers, used = tuple(tiers.placement.tiers_of_store(side, s)), store.bytes()
    beside = tiers.planner.bytes(side, s)
    reserved = store.reserved() + beside.get("reserved", 0)
    if tiers.step.by_head:
        used = {part: used.get(part, 0) + beside.get(part, 0) for part in PARTS}
        reserved -= used["indices"]
    if side == "keys" and s == len(tiers.stores[side]) - 1 and (pages := tiers.pages()) is not None:
        more = pages.bytes(tiers.committed)
        reserved += more.pop("reserved", 0)
        used = {part: used.get(part, 0) + more.get(part, 0) for part in PARTS}
    return StoreMemory(number, side, covers, store.tokens, **used, reserved=reserved)


def _words(tier: Any) -> str:
    policy = "the rest" if tier.policy is None else _component(tier.policy)
    keys, values = (_component(getattr(tier, side)) for side in ("keys", "values"))
    words = f"{policy}: {keys}" if keys == values else f"{policy}: keys {keys}, values {values}"
    words = words if tier.read is None else f"{words}, read by {_component(tier.read)}"
    return words if tier.merge is None else f"{words}, values merged by {_component(tier.merge)}"


def _component(spec: Any) -> str:
    if isinstance(spec, str):
        return spec
    options = ", ".join(f"{k} {in_brief(v)}" for k, v in spec if k != "kind" and v != ())
    return f"{spec.kind}({options})"


def describe(number: int, layer: LayerCache, tiers: Sequence[Any]) -> LayerSummary:
    """How a committed layer is kept that goes by `tiers` of a recipe."""
    kept = "kvpolicy, dense: the model computes on keys and values" if layer.densely else "kvpolicy"
    if layer.backends and not layer.densely:
        kept = f"kvpolicy, attention by {' and '.join(layer.backends)}"
    tokens, read = layer.held_after_commit(), None
    if (pages := layer.pages()) is not None and pages.pages_of(layer.committed) * pages.reader.page > pages.most:
        last = layer.stores["keys"][-1]
        read = tokens - max(0, (0 if last is None else last.length) - pages.most)
    return LayerSummary(number, kept, tuple(map(_words, tiers)), tokens, read)
