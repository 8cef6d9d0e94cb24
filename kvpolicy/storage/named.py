"""The tensors of quantizers that are not affine."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kvpolicy.interfaces.checks import decoded, encoded
from kvpolicy.interfaces.quantizer import TensorQuantizer
from kvpolicy.interfaces.site import Site
from kvpolicy.storage.base import Ints
from kvpolicy.storage.coded import Aside, CodedStore
from kvpolicy.storage.named_parts import NamedParts
from kvpolicy.storage.pages import Leaving

BLOCK = 1024
"""Tokens decoded at a time, at most."""


class NamedStore(CodedStore):
    """The tensors of a quantizer that is not affine, per token, per arrival and per store."""

    def __init__(self, quantizer: TensorQuantizer, head_dim: int, site: Site | None = None) -> None:
        self.named = NamedParts(quantizer.axes, f"quantizer {quantizer.kind!r}")
        super().__init__(quantizer, head_dim, site)
        self.quantizer = quantizer

    @property
    def _kept(self) -> list[NamedParts]:
        return [self.named, *super()._kept]

    @property
    def format(self) -> str:
        return self.quantizer.kind

    @property
    def length(self) -> int:
        return self.named.length

    def append(self, x: Tensor, empty: Tensor | None = None, positions: Tensor | None = None) -> None:
        n = x.shape[2]
        if not n:
            return
        self._note(x, positions)
        if self.chain is not None:
            x = self.chain.forward(x, self._places(self.length, self.length + n))
        x, beside = self.beside.take(x, 1) if self.beside is not None else (x, [])
        tensors = encoded(self.quantizer, x, self.named.kept)
        self.named.append(tensors, [n])
        if self.beside is not None:
            error = None
            if self.beside.fits:
                error = x.float() - decoded(self.quantizer, tensors, torch.float32, self.head_dim)
            self.beside.keep(beside, error, x, 1)

    def gather(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        return self._decode(self.named.gather(index), dtype, self._gathered(index))

    def remove(self, leaving: Leaving | Tensor, empty: Tensor | None = None) -> None:
        leaving = Leaving.of(leaving, self.length)
        super().remove(leaving)
        for kept in self._kept:
            kept.remove(leaving)

    def drop(self, index: Ints) -> None:
        for part in self.parts.values():
            part.drop(index)
        for kept in self._kept:
            kept.drop(index)

    def decoded(self, block: int, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
        for first in range(0, self.length, min(block, BLOCK)):
            last = min(first + min(block, BLOCK), self.length)
            yield first, self._decode(self.named.slice(first, last), dtype, self._sliced(first, last))

    def _decode(self, tensors: dict[str, Tensor], dtype: torch.dtype, aside: Aside) -> Tensor:
        return self._finished(decoded(self.quantizer, tensors, dtype, self.head_dim), aside).to(dtype)

    def bytes(self) -> dict[str, int]:
        own = self._own_bytes()
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
