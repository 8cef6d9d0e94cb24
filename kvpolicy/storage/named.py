"""The tensors of quantizers that are not affine."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from kvpolicy.errors import CacheError, PluginError
from kvpolicy.interfaces.checks import decoded, encoded
from kvpolicy.interfaces.component import TRY
from kvpolicy.interfaces.quantizer import TensorQuantizer
from kvpolicy.interfaces.site import Site
from kvpolicy.storage.base import Ints
from kvpolicy.storage.coded import Aside, CodedStore
from kvpolicy.storage.pages import Pages

__all__ = ["NamedStore"]


class NamedStore(CodedStore):
    """The tensors of a quantizer that is not affine, one entry per token, held as bytes whatever their type."""

    def __init__(self, quantizer: TensorQuantizer, head_dim: int, site: Site | None = None) -> None:
        super().__init__(quantizer, head_dim, site)
        self.quantizer = quantizer
        self.formats: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        """Of each tensor its type and its shape after `[batch, kv_heads, tokens]`."""
        self._length = 0
        self._whole = False

    @property
    def length(self) -> int:
        return self._length

    def append(self, x: Tensor, empty: Tensor | None = None, positions: Tensor | None = None) -> None:
        if not x.shape[2]:
            return
        self._note(x, positions)
        if self.chain is not None:
            x = self.chain.forward(x, self._places(self._length, self._length + x.shape[2]))
        x, beside = self.beside.take(x, 1) if self.beside is not None else (x, [])
        tensors = encoded(self.quantizer, x)
        self._add(tensors)
        if self.beside is not None:
            error = None
            if self.beside.fits:
                error = x.float() - decoded(self.quantizer, tensors, torch.float32, self.head_dim)
            self.beside.keep(beside, error, x, 1)

    def _add(self, tensors: dict[str, Tensor]) -> None:
        formats = {name: (t.dtype, tuple(t.shape[3:])) for name, t in tensors.items()}
        if self.formats and formats != self.formats:
            raise PluginError(
                f"quantizer {self.quantizer.kind!r} must give the same tensors each time, found {_listed(formats)} "
                f"after {_listed(self.formats)}. {TRY}"
            )
        as_bytes = {name: _bytes(t) for name, t in tensors.items()}
        self.formats = formats
        for name, t in as_bytes.items():
            self.parts.setdefault(name, Pages(self._whole)).append(t)
        self._length += next(iter(as_bytes.values())).shape[2]

    def ragged(self, lines: tuple[int, int]) -> None:
        self._whole = True
        super().ragged(lines)

    def gather(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        return self._decode(
            {name: self.parts[name].gather(index) for name in self.formats}, dtype, self._gathered(index)
        )

    def remove(self, index: Tensor, empty: Tensor | None = None) -> None:
        super().remove(index)
        for kept in self._kept:
            kept.remove(index)
        self._length -= index.shape[2]

    def drop(self, index: Ints) -> None:
        for part in self.parts.values():
            part.drop(torch.from_numpy(index))
        for kept in self._kept:
            kept.drop(index)
        self._length -= len(index)

    def decoded(self, block: int, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
        block = min(block, 1024)
        for offset in range(0, self._length, block):
            end = min(offset + block, self._length)
            parts = {name: self.parts[name].slice(offset, end) for name in self.formats}
            yield offset, self._decode(parts, dtype, self._sliced(offset, end))

    def _decode(self, parts: dict[str, Tensor], dtype: torch.dtype, aside: Aside) -> Tensor:
        return self._finished(decoded(self.quantizer, self._shaped(parts), dtype, self.head_dim), aside).to(dtype)

    def _shaped(self, parts: dict[str, Tensor]) -> dict[str, Tensor]:
        shaped = {name: _from_bytes(parts[name], *form) for name, form in self.formats.items() if name in parts}
        return {**parts, **shaped}

    def bytes(self) -> dict[str, int]:
        return {"codes": sum(self.parts[name].used() for name in self.formats), **self._own_bytes()}

    def tensors(self) -> dict[str, Tensor]:
        return self._shaped(super().tensors())

    def restore(self, tensors: dict[str, Tensor]) -> None:
        tensors = self._restore_own(tensors)
        if not tensors:
            return
        if len({tuple(t.shape[:3]) for t in tensors.values()}) != 1 or any(t.ndim < 3 for t in tensors.values()):
            raise CacheError(
                "a saved store must hold tensors [batch, kv_heads, tokens, ...] of the same tokens, found "
                f"{[tuple(t.shape) for t in tensors.values()]}"
            )
        self._add(tensors)


def _listed(formats: dict[str, tuple[torch.dtype, tuple[int, ...]]]) -> str:
    return ", ".join(f"{name} of (..., {', '.join(map(str, shape))}) in {t}" for name, (t, shape) in formats.items())


def _bytes(x: Tensor) -> Tensor:
    """`[batch, kv_heads, tokens, bytes]`."""
    shape = (*x.shape[:3], math.prod(x.shape[3:]))
    if not shape[3]:
        return x.new_empty(shape, dtype=torch.uint8)
    return x.resolve_conj().resolve_neg().contiguous().view(shape).view(torch.uint8)


def _from_bytes(x: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """The inverse of `_bytes`."""
    if not math.prod(shape):
        return x.new_empty((*x.shape[:3], *shape), dtype=dtype)
    return x.view(dtype).reshape(*x.shape[:3], *shape)
