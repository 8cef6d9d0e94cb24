"""Named tensors of the tokens of a store, each with an entry per token, per arrival or for the store."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kvpolicy.errors import CacheError, PluginError
from kvpolicy.interfaces.component import TRY
from kvpolicy.storage.base import Ints
from kvpolicy.storage.gather import gather_tokens
from kvpolicy.storage.groups import Groups
from kvpolicy.storage.pages import Leaving, Pages

__all__ = ["GROUPS", "SIZES", "Format", "NamedParts"]

SIZES, GROUPS = ":sizes", ":groups"
"""How saved names end of the tokens of each arrival, and of the arrival of each token where tokens differ by row."""


class Format(NamedTuple):
    """What one of the tensors is like, apart from rows, heads and entries."""

    axis: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"(..., {', '.join(map(str, self.shape))}) in {self.dtype} per {self.axis}"


class NamedParts:
    """Tensors of the same tokens, held as bytes whatever their type.

    An arrival is kept as long as a token of it is.
    """

    def __init__(self, axes: Mapping[str, str], who: str) -> None:
        self.axes, self.who = axes, who
        self.formats: dict[str, Format] = {}
        self.parts: dict[str, Pages] = {}
        self.kept: dict[str, Tensor] = {}
        """The tensors of the store."""
        self.groups = Groups()
        """The arrival of each token, if anything is kept per arrival."""
        self.length = 0

    @property
    def row_heads(self) -> tuple[int, int] | None:
        """Rows and heads that differ, once some do."""
        return self.groups.row_heads

    @property
    def arriving(self) -> bool:
        """Whether anything is kept per arrival."""
        return any(form.axis == "arrival" for form in self.formats.values())

    def axis(self, name: str) -> str:
        return self.axes.get(name, "token")

    def append(self, tensors: dict[str, Tensor], sizes: list[int]) -> None:
        """Take in the tensors of tokens that came in arrivals of so many each.

        Raises:
            PluginError: they are not like those before.
        """
        formats = {}
        for name, t in tensors.items():
            axis = self.axis(name)
            formats[name] = Format(axis, t.dtype, tuple(t.shape[2 if axis == "store" else 3 :]))
        if self.formats and formats != self.formats:
            raise PluginError(
                f"{self.who} must give the same tensors each time, found {_listed(formats)} after "
                f"{_listed(self.formats)}. {TRY}"
            )
        as_bytes = {name: as_flat_bytes(t) for name, t in tensors.items() if self.axis(name) != "store"}
        self.formats = formats
        for name, t in tensors.items():
            if self.axis(name) == "store" and name not in self.kept:
                with torch.inference_mode(False):
                    self.kept[name] = t.detach().clone()
        for name, t in as_bytes.items():
            self.parts.setdefault(name, Pages(self.row_heads is not None)).append(t)
        self.length += sum(sizes)
        if not self.arriving:
            return
        arrivals = next(part.length for _, part in self._of("arrival"))
        self.groups.add(sizes, arrivals - len(sizes), next(iter(tensors.values())).device)

    def _of(self, axis: str) -> Iterator[tuple[str, Pages]]:
        return ((name, part) for name, part in self.parts.items() if self.axis(name) == axis)

    def drop(self, index: Ints) -> None:
        """Remove the tokens at `index` (ascending)."""
        for _, part in self._of("token"):
            part.drop(index)
        self.length -= len(index)
        if self.arriving and len(index):
            gone = self.groups.drop(index)
            for _, part in self._of("arrival"):
                part.drop(gone)

    def remove(self, leaving: Leaving) -> None:
        """Remove tokens; the last ones move into their places."""
        for _, part in self._of("token"):
            part.remove(leaving)
        self.length -= leaving.places.shape[2]
        if self.arriving:
            self.groups.remove(leaving, [part for _, part in self._of("arrival")])

    def flatten(self, places: Tensor, counts: Ints) -> None:
        """Keep the tokens at some places, as `Store.flatten`. Of use where nothing is kept per arrival."""
        for _, part in self._of("token"):
            part.flatten(places, counts)
        self.length = places.shape[2]

    def differ_by_head(self, row_heads: tuple[int, int]) -> None:
        """From now on tokens differ by row or head."""
        for part in self.parts.values():
            part.join()
        held = next((part.pages[0].device for _, part in self._of("arrival") if part.length), None)
        self.groups.differ_by_head(row_heads, held)

    def slice(self, first: int, last: int) -> dict[str, Tensor]:
        """The tensors of the tokens from `first` to `last`."""
        found = {name: part.slice(first, last) for name, part in self._of("token")}
        if self.arriving and self.row_heads is None:
            found |= self._entries(np.arange(first, last))
        elif self.arriving:
            groups = self.groups.slice(first, last)
            found |= {name: gather_tokens(part.all(), groups) for name, part in self._of("arrival")}
        return self._shaped(found)

    def slice_of_arrivals(self, first: int, last: int, arrivals: int) -> dict[str, Tensor]:
        """The tensors of the tokens from `first` to `last`, which are of so many arrivals: an entry for each of these.

        Of use where arrivals are neighbours.
        """
        at = int(self.groups.of(np.asarray(first)))
        found = {name: part.slice(first, last) for name, part in self._of("token")}
        found |= {name: part.slice(at, at + arrivals) for name, part in self._of("arrival")}
        return self._shaped(found)

    def take(self, index: Ints) -> dict[str, Tensor]:
        """The tensors of the tokens at `index` (ascending)."""
        found = {name: part.take(index) for name, part in self._of("token")}
        return self._shaped({**found, **(self._entries(index) if self.arriving else {})})

    def gather(self, index: Tensor) -> dict[str, Tensor]:
        """The tensors of the tokens at `index`, `[batch, kv_heads or 1, tokens]`."""
        found = {name: part.gather(index) for name, part in self._of("token")}
        if self.arriving:
            groups = self.groups.gather(index)
            found |= {name: gather_tokens(part.all(), groups) for name, part in self._of("arrival")}
        return self._shaped(found)

    def _entries(self, index: Ints) -> dict[str, Tensor]:
        """Of the arrivals the entry of each token at `index`, or one for all of them."""
        number = self.groups.of(index)
        lowest, highest = int(number.min()), int(number.max())
        found = {name: part.slice(lowest, highest + 1) for name, part in self._of("arrival")}
        if lowest == highest:
            return found
        chosen = torch.from_numpy(number - lowest)
        return {name: t.index_select(2, chosen.to(t.device, non_blocking=True)) for name, t in found.items()}

    def _shaped(self, flat: dict[str, Tensor]) -> dict[str, Tensor]:
        shaped = {
            name: from_flat_bytes(t, self.formats[name].dtype, self.formats[name].shape) for name, t in flat.items()
        }
        return {**shaped, **self.kept}

    def select(self, rows: Tensor) -> None:
        """Keep the batch rows `rows`."""
        for part in self.parts.values():
            part.select(rows)
        for name, t in self.kept.items():
            if t.shape[0] > 1:
                with torch.inference_mode(False):
                    self.kept[name] = t.index_select(0, rows.to(t.device, non_blocking=True))
        self.groups.select(rows)

    def to(self, device: torch.device) -> None:
        for part in self.parts.values():
            part.to(device)
        self.groups.to(device)
        self.kept = {name: t.to(device, non_blocking=True) for name, t in self.kept.items()}

    def used(self) -> int:
        """Bytes of all tensors but those that say which token is of which arrival."""
        kept = sum(t.numel() * t.element_size() for t in self.kept.values())
        return kept + sum(part.used() for part in self.parts.values())

    def used_by_groups(self) -> int:
        """Bytes of those."""
        return self.groups.used()

    def reserved(self) -> int:
        kept = sum(t.numel() * t.element_size() for t in self.kept.values())
        return kept + self.groups.reserved() + sum(part.reserved() for part in self.parts.values())

    def tensors(self, own: str) -> dict[str, Tensor]:
        """All that is held, by name; `own` begins the names of what says which token is of which arrival."""
        held = {name: part.slice(0, part.length).contiguous() for name, part in self.parts.items() if part.length}
        found = self._shaped(held)
        return {**found, **(self.groups.tensors(own + SIZES, own + GROUPS) if self.arriving else {})}

    def restore(self, tensors: dict[str, Tensor], own: str) -> None:
        """The inverse of `tensors`, into what is empty.

        Raises:
            CacheError: the tensors don't belong together.
        """
        rest = dict(tensors)
        sizes, groups = rest.pop(own + SIZES, None), rest.pop(own + GROUPS, None)
        of = {axis: {n: t for n, t in rest.items() if self.axis(n) == axis} for axis in ("token", "arrival", "store")}
        lengths = {t.shape[2] if t.ndim > 2 else -1 for t in of["token"].values()}
        arrivals = {t.shape[2] if t.ndim > 2 else -1 for t in of["arrival"].values()}
        if len(lengths) > 1 or len(arrivals) > 1 or min([*lengths, *arrivals], default=0) < 0:
            raise CacheError(
                "a saved store must hold tensors [batch, kv_heads, tokens, ...] of the same tokens, found "
                f"{[tuple(t.shape) for t in rest.values()]}"
            )
        count, n = next(iter(arrivals), 0), next(iter(lengths), None)
        if n is None:
            n = int(sizes.sum()) if sizes is not None else groups.shape[2] if groups is not None else 0
        if rest:
            self.append(rest, [])
        if arrivals or sizes is not None or groups is not None:
            self.groups.restore(sizes, groups, n, count, n)
        self.length = n


def _listed(formats: dict[str, Format]) -> str:
    return ", ".join(f"{name} of {form}" for name, form in formats.items())


def as_flat_bytes(x: Tensor) -> Tensor:
    """`[batch, kv_heads, entries, bytes]`."""
    shape = (*x.shape[:3], math.prod(x.shape[3:]))
    if not shape[3]:
        return x.new_empty(shape, dtype=torch.uint8)
    return x.resolve_conj().resolve_neg().contiguous().view(shape).view(torch.uint8)


def from_flat_bytes(x: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """The inverse of `as_flat_bytes`."""
    if not math.prod(shape):
        return x.new_empty((*x.shape[:3], *shape), dtype=dtype)
    return x.view(dtype).reshape(*x.shape[:3], *shape)
