"""The tensors of quantizers that are not affine."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kvpolicy.interfaces.checks import decoded, encoded, multiplied, placed
from kvpolicy.interfaces.quantizer import TensorQuantizer
from kvpolicy.interfaces.site import Site
from kvpolicy.storage.base import Ints
from kvpolicy.storage.coded import Aside, CodedStore
from kvpolicy.storage.front import Front
from kvpolicy.storage.late import LateRows
from kvpolicy.storage.named_parts import NamedParts
from kvpolicy.storage.pages import Leaving

BLOCK = 1024
"""Tokens decoded at a time, at most."""


class NamedStore(CodedStore):
    """The tensors of a quantizer that is not affine, per token, per arrival and per store."""

    def __init__(self, quantizer: TensorQuantizer, head_dim: int, site: Site | None = None) -> None:
        self.named = NamedParts(quantizer.axes, f"quantizer {quantizer.kind!r}")
        super().__init__(quantizer, head_dim, site)
        self.quantizer = quantizer = placed(quantizer, self.site)
        self.late = LateRows()

    @property
    def _kept(self) -> list[NamedParts]:
        return [self.named, *super()._kept]

    @property
    def direct(self) -> bool:
        """Whether attention can take products with its tensors as they lie."""
        alone = self.beside is None or self.beside.additive
        return type(self.quantizer).multiplies() and alone and (self.chain is None or self.chain.linear)

    @property
    def format(self) -> str:
        return self.quantizer.kind if self.front is None else f"{self.quantizer.kind}+flat"

    @property
    def front(self) -> Front | None:
        return next((part.front for part in self.named.parts.values() if part.front is not None), None)

    @property
    def length(self) -> int:
        return self.named.length

    def append(
        self, x: Tensor, empty: Tensor | None = None, positions: Tensor | None = None, full: bool = False
    ) -> None:
        n = x.shape[2]
        if not n:
            return
        self._note(x, positions, full)
        self.late.full = full
        if self.chain is not None:
            x = self.chain.forward(x, self._places(self.length, self.length + n))
        x, beside = self.beside.take(x) if self.beside is not None else (x, [])
        tensors = encoded(self.quantizer, x, self._known(x))
        self.named.append(tensors, [n])
        if self.beside is not None:
            error = None
            if self.beside.fits:
                error = x.float() - decoded(self.quantizer, tensors, torch.float32, self.head_dim)
            self.beside.keep(beside, error, x)

    def _known(self, x: Tensor) -> dict[str, Tensor]:
        """The tensors per store, found again for rows of which tokens come only now."""
        kept = self.named.kept
        if self.late.rows is not None:
            found = encoded(self.quantizer, x)
            kept.update(self.late.chosen(kept, {name: t for name, t in found.items() if name in kept}))
        if "store" in self.quantizer.axes.values() and (not kept or self.late.rows is not None):
            self.late.note(x)
        return kept

    def select(self, rows: Tensor) -> None:
        super().select(rows)
        self.late.select(rows)

    def to(self, device: torch.device) -> None:
        super().to(device)
        self.late.to(device)

    def differ_by_head(self, row_heads: tuple[int, int]) -> None:
        super().differ_by_head(row_heads)
        self.late.apart = True

    def gather(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        return self._decode(self.named.gather(index), dtype, self._gathered(index))

    def remove(self, leaving: Leaving | Tensor, empty: Tensor | None = None) -> None:
        leaving = Leaving.of(leaving, self.length)
        super().remove(leaving)
        for kept in self._kept:
            kept.remove(leaving)

    def flatten(self, places: Tensor, counts: Ints) -> None:
        super().flatten(places, counts)
        self.named.flatten(places, counts)

    def drop(self, index: Ints) -> None:
        for part in self.parts.values():
            part.drop(index)
        for kept in self._kept:
            kept.drop(index)

    def blocks(self, block: int) -> Iterator[tuple[int, int, dict[str, Tensor]]]:
        """The first token, the last + 1, and the tensors of runs of tokens."""
        for first in range(0, self.length, block):
            last = min(first + block, self.length)
            yield first, last, self.named.slice(first, last)

    def try_attention(self, x: Tensor) -> None:
        super().try_attention(x)
        if not self.direct:
            return
        rows, n = x.new_zeros((*x.shape[:2], 2, self.head_dim)), self.length
        for first, last, tensors in self.blocks(n):
            weights = multiplied(self.quantizer, "scores", rows, tensors, last - first)
            multiplied(self.quantizer, "combine", weights, tensors, self.head_dim)

    def decoded(self, block: int, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
        for first, last, tensors in self.blocks(min(block, BLOCK)):
            yield first, self._decode(tensors, dtype, self._sliced(first, last))

    def _decode(self, tensors: dict[str, Tensor], dtype: torch.dtype, aside: Aside) -> Tensor:
        return self._finished(decoded(self.quantizer, tensors, dtype, self.head_dim), aside).to(dtype)

    def bytes(self) -> dict[str, int]:
        own = self._own_bytes()
        if self.front is not None:
            own["indices"] = own.get("indices", 0) + sum(part.bounds() for part in self.named.parts.values())
        if self.named.arriving:
            own["indices"] = own.get("indices", 0) + self.named.used_by_groups()
        return {"codes": self.named.used(), **own}

    def of_store(self, name: str) -> bool:
        return super().of_store(name) or self.named.axis(name) == "store"

    def tensors(self) -> dict[str, Tensor]:
        return {**self.named.tensors("arrivals"), **super().tensors()}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        rest = self._restore_own(tensors)
        if rest:
            self.named.restore(rest, "arrivals")
