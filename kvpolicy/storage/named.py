"""The tensors of quantizers that are not affine."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from kvpolicy.errors import CacheError, PluginError
from kvpolicy.interfaces.checks import check_fit, decoded, encoded
from kvpolicy.interfaces.component import TRY
from kvpolicy.interfaces.quantizer import TensorQuantizer
from kvpolicy.storage.base import Ints, Store
from kvpolicy.storage.pages import Pages


class NamedStore(Store):
    """The tensors of a quantizer that is not affine, one entry per token, held as bytes whatever their type."""

    def __init__(self, quantizer: TensorQuantizer, head_dim: int) -> None:
        check_fit(quantizer, head_dim)
        self.quantizer, self.head_dim = quantizer, head_dim
        self.parts = {}
        self.formats: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        """Of each tensor its type and its shape after `[batch, kv_heads, tokens]`."""
        self._length = 0
        self._whole = False

    @property
    def length(self) -> int:
        return self._length

    def append(self, x: Tensor, empty: Tensor | None = None) -> None:
        if x.shape[2]:
            self._add(encoded(self.quantizer, x))

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
        return self._decode({name: part.gather(index) for name, part in self.parts.items()}, dtype)

    def remove(self, index: Tensor, empty: Tensor | None = None) -> None:
        super().remove(index)
        self._length -= index.shape[2]

    def drop(self, index: Ints) -> None:
        for part in self.parts.values():
            part.drop(torch.from_numpy(index))
        self._length -= len(index)

    def decoded(self, block: int, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
        block = min(block, 1024)
        for offset in range(0, self._length, block):
            end = min(offset + block, self._length)
            yield offset, self._decode({name: part.slice(offset, end) for name, part in self.parts.items()}, dtype)

    def _decode(self, parts: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
        return decoded(self.quantizer, self._shaped(parts), dtype, self.head_dim)

    def _shaped(self, parts: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: _from_bytes(part, *self.formats[name]) for name, part in parts.items()}

    def bytes(self) -> dict[str, int]:
        return {"codes": sum(part.used() for part in self.parts.values())}

    def tensors(self) -> dict[str, Tensor]:
        return self._shaped(super().tensors())

    def restore(self, tensors: dict[str, Tensor]) -> None:
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
