"""Stores that count: their tokens have one number in place of all rows, heads and channels.

They are the stores of a real cache, so that tokens group, wait, leave and fill pages as they do there; only coding is
left out. What an entry takes is learnt of a small real store.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvpolicy.interfaces.quantizer import AffineQuantizer, Quantizer
from kvpolicy.interfaces.site import Site
from kvpolicy.storage.affine import AT_ONCE, AffineStore
from kvpolicy.storage.base import Ints, Store
from kvpolicy.storage.beside import _pieces
from kvpolicy.storage.coded import POSITIONS, CodedStore
from kvpolicy.storage.exact import ExactStore
from kvpolicy.storage.later import Later
from kvpolicy.storage.make import make_store
from kvpolicy.storage.named import NamedStore
from kvpolicy.storage.named_parts import Format, NamedParts
from kvpolicy.storage.pages import Pages

__all__ = ["Counting", "Learnt", "Scale"]

ROWS, SOME = 2, 32
"""Rows of the small store, so that what is kept once for all rows is told apart; and its tokens, where any will do."""


class Scale(NamedTuple):
    """What one number of a counting store stands for."""

    batch: int
    kv_heads: int
    dim: int
    itemsize: int
    """Bytes of a number of keys and values."""
    apart: int
    """Heads that hold other tokens than each other, where rows differ; else 1."""
    dtype: torch.dtype

    @property
    def exact(self) -> int:
        """Bytes of a token as it came."""
        return self.batch * self.kv_heads * self.dim * self.itemsize


class Amount(NamedTuple):
    """Bytes of something, of each row and once for all rows."""

    row: int
    once: int

    def of(self, batch: int) -> int:
        """For so many rows."""
        return self.row * batch + self.once


class Entries(NamedTuple):
    """What the small store held: bytes of an entry, of all heads."""

    parts: dict[str, Amount]
    scales: float
    """The share of scales in `params`."""
    state: tuple[Amount, ...]
    """Of transforms, once something is coded."""
    kept: list[tuple[dict[str, Format], dict[str, Amount], tuple[Amount, ...]]]
    """For each of the named parts beside: formats, an entry of each, and what is kept once."""


class Learnt:
    """What was learnt of stores, so that a plan of many lengths and batches learns it once."""

    def __init__(self) -> None:
        self._entries: list[tuple[Any, Entries]] = []  # no dict: options of a plugin may not be hashable
        self._checked: list[Any] = []

    def checked(self, *key: Any) -> bool:
        """Whether this was asked before."""
        known = key in self._checked
        if not known:
            self._checked.append(key)
        return known

    def store(self, spec: Quantizer | str, site: Site, scale: Scale) -> Store | None:
        """The counting store for what `make_store` makes a store for.

        Raises:
            RecipeError, PluginError: as `make_store`.
        """
        if spec == "evict":
            return None
        if not isinstance(spec, Quantizer):
            return CountedExact(scale)
        key = spec, site.side, scale.kv_heads, scale.dim, scale.dtype, bool(site.fitted)
        entries = next((found for known, found in self._entries if known == key), None)
        if entries is None:
            entries = _learnt(spec, site, scale)
            self._entries.append((key, entries))
        if isinstance(spec, AffineQuantizer):
            return CountedAffine(spec, site, scale, entries)
        return CountedNamed(spec, site, scale, entries)


def _learnt(spec: Quantizer, site: Site, scale: Scale) -> Entries:
    store = make_store(spec, scale.dim, site)
    assert isinstance(store, CodedStore)
    n = store.group_size or SOME if isinstance(store, AffineStore) and store.by_channel else SOME
    count = ROWS * site.kv_heads * n * scale.dim
    x = torch.linspace(-1.0, 1.0, count).view(ROWS, site.kv_heads, n, scale.dim).to(scale.dtype)
    if store.chain is not None:
        store.chain.heed(torch.ones((ROWS, site.kv_heads, 2, scale.dim)))
    with torch.no_grad():
        store.append(x, None, torch.arange(n))
    parts = {name: _entry(part) for name, part in _held(store).items() if part.length}
    share = 0.0
    if isinstance(store, AffineStore):
        share = float(store.scales.share(store.parts["params"].pages[0], store.numbers))
    state = [_amount(t) for kept in store.chain.state for t in kept.values()] if store.chain is not None else []
    kept = []
    for named in store._kept:
        own = {name: _entry(part) for name, part in named.parts.items()}
        kept.append((named.formats, own, tuple(_amount(t) for t in named.kept.values())))
    return Entries(parts, share, tuple(state), kept)


def _amount(t: Tensor, entries: int = 1) -> Amount:
    """Of an entry, of the tensor of a small store."""
    size = t.numel() * t.element_size() // entries
    return Amount(size // ROWS, 0) if t.shape[0] == ROWS else Amount(0, size)


def _entry(part: Pages) -> Amount:
    return _amount(part.slice(0, part.length), part.length)


def _held(store: CodedStore) -> dict[str, Pages]:
    return {name: part for name, part in store.parts.items() if name != POSITIONS}


def _thin(n: int, dtype: torch.dtype) -> Tensor:
    return torch.zeros((1, 1, n, 1), dtype=dtype)


def _once(part: Pages, entry: int) -> tuple[int, int]:
    """Bytes used and reserved by entries of so many bytes."""
    return part.length * entry, part.capacity * entry


class CountedExact(ExactStore):
    """Tokens as they came."""

    def __init__(self, scale: Scale) -> None:
        super().__init__()
        self.scale = scale

    def bytes(self) -> dict[str, int]:
        return {"exact": _once(self.parts["exact"], self.scale.exact)[0]}

    def reserved(self) -> int:
        return _once(self.parts["exact"], self.scale.exact)[1]


class Counting(CodedStore):
    """What counting stores of codes have in common."""

    scale: Scale
    entries: Entries
    coded = False
    """Whether anything was coded yet, so that transforms keep their state."""
    asked = False
    """Whether queries were shown before."""

    @property
    def width(self) -> int:
        """Bytes of a position, or a number of a group, of each row and head that differ."""
        return 4 * self.scale.batch * self.scale.apart

    def take(self, index: Ints, dtype: torch.dtype) -> Tensor:
        return _thin(len(index), dtype)

    def gather(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        return _thin(index.shape[2], dtype)

    def decoded(self, block: int, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
        yield 0, _thin(self.length, dtype)

    def _keep_beside(self, named: list[NamedParts], arrivals: list[list[int]]) -> None:
        """Let entries in beside the codes of tokens that came in arrivals of so many."""
        for own, (formats, _, _), sizes in zip(named, self.entries.kept, arrivals, strict=True):
            counts = {"token": sum(sizes), "arrival": len(sizes)}
            given = {
                name: torch.zeros((1, 1, counts[form.axis], 1), dtype=torch.uint8)
                for name, form in formats.items()
                if form.axis != "store"
            }
            own.append(given, sizes)

    def _own(self) -> tuple[dict[str, int], int]:
        """Bytes of positions, of what transforms keep and of what extras keep; and those reserved."""
        found: dict[str, int] = {"indices": 0}
        reserved = 0
        if self.by_position:
            found["indices"], reserved = _once(self.parts[POSITIONS], 4 * self.scale.batch * self._heads_of_positions)
        for named, (_, entry, once) in zip(self._kept, self.entries.kept, strict=True):
            sizes = [_once(part, entry[name].of(self.scale.batch)) for name, part in named.parts.items()]
            fixed = sum(amount.of(self.scale.batch) for amount in once) if self.coded else 0
            used, taken = (sum(x) + fixed for x in (zip(*sizes, strict=True) if sizes else ((), ())))
            kind = "codes" if named is getattr(self, "named", None) else "extras"
            found[kind] = found.get(kind, 0) + used
            groups, numbers = self._of_groups(named.groups)
            found["indices"] += groups
            reserved += taken + numbers
        if self.chain is not None:
            found["state"] = self._state()
            reserved += found["state"]
        return found, reserved

    def _state(self) -> int:
        """Bytes of what transforms keep; until something is coded, of what they noted of queries."""
        if self.coded:
            return sum(amount.of(self.scale.batch) for amount in self.entries.state)
        return self.scale.batch * self.scale.kv_heads * 2 * self.scale.dim * 4 if self.asked else 0

    @property
    def _heads_of_positions(self) -> int:
        return self.scale.apart if self._apart else 1

    _apart = False

    def differ_by_head(self, row_heads: tuple[int, int]) -> None:
        self._apart = True
        super().differ_by_head(row_heads)

    def _of_groups(self, groups: Any) -> tuple[int, int]:
        """Bytes that say which token is of which group, and those reserved."""
        used, reserved = (0, 0) if groups.numbers is None else _once(groups.numbers, self.width)
        return groups.sizes.nbytes + used, reserved


class CountedAffine(Counting, AffineStore):
    """Codes with scale and offset."""

    def __init__(self, quantizer: AffineQuantizer, site: Site, scale: Scale, entries: Entries) -> None:
        super().__init__(quantizer, scale.dim, site)
        self.scale, self.entries = scale, entries

    def _append_codes(self, x: Tensor, size: int, later: Later | None = None) -> None:
        n = x.shape[2]
        before, self.coded = self.coded, True
        if self.beside is None and self.quantizer.independent and self._fixed(before):
            numbers = self.scale.batch * self.scale.kv_heads * self.scale.dim
            step = max(AT_ONCE // numbers // size, 1) * size
            for first in range(0, n, step):
                self._count(min(step, n - first), size)
            return
        self._count(n, size)
        if self.beside is not None:
            sizes = []
            for extra in self.beside.extras:
                pieces = _pieces(x, self.beside._arrival(extra))
                sizes.append([part.shape[2] // count for part, count in pieces for _ in range(count)])
            self._keep_beside(self.beside.kept, sizes)

    def _fixed(self, before: bool) -> bool:
        """Whether tokens come in steps: nothing is kept by the transforms, as is known before the first or after it."""
        chain = self.chain
        alone = chain is None or before or (len(chain.transforms) == 1 and not chain.asks)
        return chain is None or (alone and not self.entries.state and not chain.by_position)

    def _count(self, n: int, size: int) -> None:
        self.keep(_thin(n, torch.uint8), _thin(n // size if self.by_channel else n, torch.uint8))

    def bytes(self) -> dict[str, int]:
        used = {name: _once(part, self._entry(name))[0] for name, part in _held(self).items()}
        own, _ = self._own()
        scales = int(used["params"] * self.entries.scales)
        groups, _ = self._of_groups(self.groups)
        own["indices"] += groups
        return {
            "codes": used["codes"],
            "scales": scales,
            "zeros": used["params"] - scales,
            "exact": used["exact"],
            **own,
        }

    def _entry(self, name: str) -> int:
        return self.scale.exact if name == "exact" else self.entries.parts[name].of(self.scale.batch)

    def reserved(self) -> int:
        parts = sum(_once(part, self._entry(name))[1] for name, part in _held(self).items())
        return parts + self._own()[1] + self._of_groups(self.groups)[1]


class CountedNamed(Counting, NamedStore):
    """What a `TensorQuantizer` keeps."""

    def __init__(self, quantizer: Any, site: Site, scale: Scale, entries: Entries) -> None:
        super().__init__(quantizer, scale.dim, site)
        self.scale, self.entries = scale, entries

    def append(
        self, x: Tensor, empty: Tensor | None = None, positions: Tensor | None = None, full: bool = False
    ) -> None:
        n = x.shape[2]
        if not n:
            return
        self._note(x, positions, full)
        self.coded = True
        sizes = [[n]]
        for extra in self.beside.extras if self.beside is not None else ():
            assert self.beside is not None
            pieces = _pieces(x, self.beside._arrival(extra))
            sizes.append([part.shape[2] // count for part, count in pieces for _ in range(count)])
        self._keep_beside(self._kept, sizes)

    def bytes(self) -> dict[str, int]:
        return self._own()[0]

    def reserved(self) -> int:
        return self._own()[1]
