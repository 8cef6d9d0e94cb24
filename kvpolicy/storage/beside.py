"""The extras of a store, one after the other, and what they keep beside the codes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from kvpolicy.errors import CacheError, PluginError, RecipeError
from kvpolicy.interfaces.checks import added, fitted_to_error, taken
from kvpolicy.interfaces.component import TRY, call, check_answer
from kvpolicy.interfaces.extra import Extra, Grouping
from kvpolicy.interfaces.site import Site
from kvpolicy.storage.base import Ints
from kvpolicy.storage.named_parts import NamedParts

__all__ = ["EXTRAS", "Beside", "Run", "Runs"]

EXTRAS = "extras."
"""How the names of what extras keep begin."""
Parts = list[dict[str, Tensor]]
"""What each extra takes of some tokens."""


class Run(NamedTuple):
    """What an extra keeps of neighbouring tokens whose arrivals are all as long."""

    at: slice
    """Which tokens, counted from the first that was asked for."""
    arrivals: int
    """Of how many arrivals they are; 1 also where they are not neighbours, or nothing is kept per arrival."""
    parts: dict[str, Tensor]
    """What is kept, each arrival as a row of the batch."""


Runs = list[list[Run]]
"""What each extra keeps of some tokens."""
ALL = slice(None)


class Beside:
    """Extras, which take from left to right and add from right to left.

    Raises:
        RecipeError: an extra doesn't fit the place of the store.
    """

    def __init__(self, extras: tuple[Extra, ...], site: Site, grouping: Grouping) -> None:
        for i, extra in enumerate(extras):
            try:
                check_answer(extra, "check_grouping", grouping)
                check_answer(extra, "check", site)
            except RecipeError as error:
                raise error.at("extras", i) from None
        self.extras, self.site, self.grouping = extras, site, grouping
        self.kept = [NamedParts(extra.axes, f"extra {extra.kind!r}") for extra in extras]
        self.additive = all(extra.additive for extra in extras)
        self.fits = any(type(extra).fit is not Extra.fit for extra in extras)
        """Whether any looks at the error of coding."""

    def take(self, x: Tensor) -> tuple[Tensor, Parts]:
        """What is to be coded of `x`, tokens that are coded together; and what was taken of it."""
        found = []
        for i, (extra, kept) in enumerate(zip(self.extras, self.kept, strict=True)):
            rest, parts = [], []
            for piece, arrivals in _pieces(x, self._arrival(extra)):
                try:
                    left, own = taken(extra, _folded(piece, arrivals), self.grouping, self.site)
                except RecipeError as error:
                    raise error.at("extras", i) from None
                rest.append(_unfolded(left, arrivals))
                parts.append(_unfolded_parts(own, kept, arrivals))
            x = _joined(rest)
            found.append(_joined_parts(parts, kept))
        return x, found

    def keep(self, found: Parts, error: Tensor | None, like: Tensor) -> None:
        """Keep what was taken of tokens like `like`, and what is fitted to the error that coding made."""
        left = error
        for extra, parts, kept in zip(self.extras, found, self.kept, strict=True):
            span = self._arrival(extra)
            if left is not None and type(extra).fit is not Extra.fit:
                parts, left = self._fitted(extra, parts, kept, left)
            sizes = [n for piece, arrivals in _pieces(like, span) for n in [piece.shape[2] // arrivals] * arrivals]
            kept.append(parts, sizes)

    def _fitted(
        self, extra: Extra, parts: dict[str, Tensor], kept: NamedParts, error: Tensor
    ) -> tuple[dict[str, Tensor], Tensor]:
        """What an extra keeps besides what it took, and the error that is left."""
        whole, left, token, entry = [], [], 0, 0
        for piece, arrivals in _pieces(error, self._arrival(extra)):
            n = piece.shape[2]
            own = _folded_parts(parts, kept, slice(token, token + n), slice(entry, entry + arrivals), arrivals)
            folded = _folded(piece, arrivals)
            own.update(fitted_to_error(extra, folded, self.grouping, self.site))
            gained = torch.zeros_like(folded)
            added(extra, "add", None, gained, own)
            whole.append(_unfolded_parts(own, kept, arrivals))
            left.append(_unfolded(folded - gained, arrivals))
            token, entry = token + n, entry + arrivals
        return _joined_parts(whole, kept), _joined(left)

    def _arrival(self, extra: Extra) -> int:
        """Tokens of an arrival of an extra.

        Raises:
            PluginError: it gives no number of them.
        """
        size = call(extra, "arrival", self.grouping)
        if not isinstance(size, int) or isinstance(size, bool) or size < 0:
            raise PluginError(
                f"extra {extra.kind!r} must give a number of tokens, 0 or more, from arrival, found {size!r:.80}. {TRY}"
            )
        return size

    def add(self, out: Tensor, runs: Runs) -> None:
        """Add what is kept of the tokens of `out`, float32."""
        for extra, own in zip(reversed(self.extras), reversed(runs), strict=True):
            for at, arrivals, parts in own:
                tokens = out[:, :, at]
                if arrivals == 1:
                    added(extra, "add", None, tokens, parts)
                    continue
                folded = _folded(tokens, arrivals).clone()
                added(extra, "add", None, folded, parts)
                tokens.copy_(_unfolded(folded, arrivals))

    def add_scores(self, rows: Tensor, out: Tensor, first: int) -> None:
        """Add the products with what is kept of the tokens from `first` on, one for each column of `out`."""
        for extra, kept in zip(self.extras, self.kept, strict=True):
            for at, arrivals, parts in _runs(kept, first, first + out.shape[3]):
                columns = out[..., at]
                if arrivals == 1:
                    added(extra, "add_scores", rows, columns, parts)
                    continue
                found = rows.new_zeros((rows.shape[0] * arrivals, *rows.shape[1:3], columns.shape[3] // arrivals))
                added(extra, "add_scores", _repeated(rows, arrivals), found, parts)
                columns += found.unflatten(0, (-1, arrivals)).permute(0, 2, 3, 1, 4).flatten(3)

    def add_values(self, weights: Tensor, out: Tensor, first: int) -> None:
        """Add what is kept of the tokens from `first` on, weighted, one for each column of `weights`."""
        for extra, kept in zip(self.extras, self.kept, strict=True):
            for at, arrivals, parts in _runs(kept, first, first + weights.shape[3]):
                columns = weights[..., at]
                if arrivals == 1:
                    added(extra, "add_values", columns, out, parts)
                    continue
                found = out.new_zeros((out.shape[0] * arrivals, *out.shape[1:]))
                shared = columns.unflatten(3, (arrivals, -1)).permute(0, 3, 1, 2, 4).flatten(0, 1)
                added(extra, "add_values", shared, found, parts)
                out += found.unflatten(0, (-1, arrivals)).sum(1)

    def slice(self, first: int, last: int) -> Runs:
        return [list(_runs(kept, first, last)) for kept in self.kept]

    def of_taken(self, index: Ints) -> Runs:
        return [[Run(ALL, 1, kept.take(index))] for kept in self.kept]

    def gather(self, index: Tensor) -> Runs:
        return [[Run(ALL, 1, kept.gather(index))] for kept in self.kept]

    def tensors(self) -> dict[str, Tensor]:
        return {
            f"{EXTRAS}{i}.{name}": t for i, kept in enumerate(self.kept) for name, t in kept.tensors("arrivals").items()
        }

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of `tensors`, into a store that is empty."""
        for i, kept in enumerate(self.kept):
            own = f"{EXTRAS}{i}."
            kept.restore({n[len(own) :]: t for n, t in tensors.items() if n.startswith(own)}, "arrivals")

    def check(self, tokens: int) -> None:
        """After `restore`.

        Raises:
            CacheError: what is kept is not of so many tokens.
        """
        for extra, kept in zip(self.extras, self.kept, strict=True):
            if kept.formats and kept.length != tokens:
                raise CacheError(f"extra {extra.kind!r} must hold {tokens} tokens, found {kept.length}")
            if tokens and not kept.formats:
                raise CacheError(f"extra {extra.kind!r} must hold {tokens} tokens, found nothing")


def _pieces(x: Tensor, size: int) -> Iterator[tuple[Tensor, int]]:
    """Tokens as some arrivals of `size` tokens each, with their number, and what is left as one."""
    n = x.shape[2]
    count = n // size if size else 0
    if count:
        yield x[:, :, : count * size], count
    if not count or count * size < n:
        yield x[:, :, count * size :], 1


def _runs(kept: NamedParts, first: int, last: int) -> Iterator[Run]:
    """What is kept of the tokens from `first` to `last`, cut where the length of arrivals changes."""
    if not kept.arriving or kept.row_heads is not None:
        yield Run(slice(0, last - first), 1, kept.slice(first, last))
        return
    for begin, end, arrivals in kept.groups.runs(first, last):
        own = kept.slice_of_arrivals(begin, end, arrivals)
        yield Run(slice(begin - first, end - first), arrivals, _folded_parts(own, kept, ALL, ALL, arrivals))


def _repeated(x: Tensor, times: int) -> Tensor:
    """Each row of the batch so many times."""
    return x.unsqueeze(1).expand(-1, times, *x.shape[1:]).flatten(0, 1)


def _folded(x: Tensor, arrivals: int) -> Tensor:
    """Each arrival as a row of the batch."""
    return x if arrivals == 1 else x.unflatten(2, (arrivals, -1)).transpose(1, 2).flatten(0, 1)


def _unfolded(x: Tensor, arrivals: int) -> Tensor:
    """The inverse of `_folded`, also of tensors per arrival."""
    return x if arrivals == 1 else x.unflatten(0, (-1, arrivals)).transpose(1, 2).flatten(2, 3)


def _folded_parts(
    parts: dict[str, Tensor], kept: NamedParts, tokens: slice, entries: slice, arrivals: int
) -> dict[str, Tensor]:
    """Of what is kept the part of some tokens, and of the arrivals that they are."""
    at = {"token": tokens, "arrival": entries}
    return {
        name: t if kept.axis(name) == "store" else _folded(t[:, :, at[kept.axis(name)]], arrivals)
        for name, t in parts.items()
    }


def _unfolded_parts(parts: dict[str, Tensor], kept: NamedParts, arrivals: int) -> dict[str, Tensor]:
    return {name: t if kept.axis(name) == "store" else _unfolded(t, arrivals) for name, t in parts.items()}


def _joined(pieces: list[Tensor]) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=2)


def _joined_parts(pieces: list[dict[str, Tensor]], kept: NamedParts) -> dict[str, Tensor]:
    first = pieces[0]
    if len(pieces) == 1:
        return first
    if any({n: t.dtype for n, t in piece.items()} != {n: t.dtype for n, t in first.items()} for piece in pieces):
        raise PluginError(f"{kept.who} must give the same tensors each time, found others. {TRY}")
    return {n: t if kept.axis(n) == "store" else torch.cat([p[n] for p in pieces], dim=2) for n, t in first.items()}
