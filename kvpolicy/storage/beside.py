"""The extras of a store, one after the other, and what they keep beside the codes."""

from __future__ import annotations

import torch
from torch import Tensor

from kvpolicy.errors import CacheError, RecipeError
from kvpolicy.interfaces.checks import added, fitted_to_error, taken
from kvpolicy.interfaces.component import check_answer
from kvpolicy.interfaces.extra import Extra, Grouping
from kvpolicy.interfaces.site import Site
from kvpolicy.storage.base import Ints
from kvpolicy.storage.named_parts import NamedParts

__all__ = ["EXTRAS", "Beside", "Parts"]

EXTRAS = "extras."
"""How the names of what extras keep begin."""
Parts = list[dict[str, Tensor]]
"""What each extra keeps of some tokens."""


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

    def take(self, x: Tensor, arrivals: int) -> tuple[Tensor, Parts]:
        """What is to be coded of `x`, which is so many arrivals of the same length; and what was taken of it."""
        folded, found = _folded(x, arrivals), []
        for i, extra in enumerate(self.extras):
            try:
                folded, parts = taken(extra, folded, self.grouping, self.site)
            except RecipeError as error:
                raise error.at("extras", i) from None
            found.append(parts)
        return _unfolded(folded, arrivals), found

    def keep(self, found: Parts, error: Tensor | None, like: Tensor, arrivals: int) -> None:
        """Keep what was taken, and what is fitted to the error that coding made."""
        left = None if error is None else _folded(error, arrivals)
        for extra, parts, kept in zip(self.extras, found, self.kept, strict=True):
            if left is not None and type(extra).fit is not Extra.fit:
                parts.update(fitted_to_error(extra, left, self.grouping, self.site))
                gained = torch.zeros_like(left)
                added(extra, "add", None, gained, parts)
                left = left - gained
            whole = {n: t if kept.axis(n) == "store" else _unfolded(t, arrivals) for n, t in parts.items()}
            kept.append(whole, [like.shape[2] // arrivals] * arrivals)

    def add(self, out: Tensor, parts: Parts) -> None:
        """Add what is kept of the tokens of `out`, float32."""
        for extra, own in zip(reversed(self.extras), reversed(parts), strict=True):
            added(extra, "add", None, out, own)

    def add_scores(self, rows: Tensor, out: Tensor, first: int) -> None:
        """Add the products with what is kept of the tokens from `first` on, one for each column of `out`."""
        for extra, parts in zip(self.extras, self.slice(first, first + out.shape[3]), strict=True):
            added(extra, "add_scores", rows, out, parts)

    def add_values(self, weights: Tensor, out: Tensor, first: int) -> None:
        """Add what is kept of the tokens from `first` on, weighted, one for each column of `weights`."""
        for extra, parts in zip(self.extras, self.slice(first, first + weights.shape[3]), strict=True):
            added(extra, "add_values", weights, out, parts)

    def slice(self, first: int, last: int) -> Parts:
        return [kept.slice(first, last) for kept in self.kept]

    def of_taken(self, index: Ints) -> Parts:
        return [kept.take(index) for kept in self.kept]

    def gather(self, index: Tensor) -> Parts:
        return [kept.gather(index) for kept in self.kept]

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


def _folded(x: Tensor, arrivals: int) -> Tensor:
    """Each arrival as a row of the batch."""
    return x if arrivals == 1 else x.unflatten(2, (arrivals, -1)).transpose(1, 2).flatten(0, 1)


def _unfolded(x: Tensor, arrivals: int) -> Tensor:
    """The inverse of `_folded`, also of tensors per arrival."""
    return x if arrivals == 1 else x.unflatten(0, (-1, arrivals)).transpose(1, 2).flatten(2, 3)
