"""Where keys or values lie: what all stores have in common, and those that keep them exactly or as a quantizer likes.

All stores keep tokens in order of arrival; shapes are `[batch, kv_heads, tokens, head_dim]`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvpolicy.errors import CacheError, PluginError
from kvpolicy.interfaces.checks import check_fit, decoded, encoded
from kvpolicy.interfaces.component import TRY
from kvpolicy.interfaces.quantizer import TensorQuantizer
from kvpolicy.storage.pages import Pages

__all__ = ["LARGE", "ExactStore", "NamedStore", "Store"]

Ints = NDArray[np.int64]
BLOCK = 256
"""Tokens decoded at a time where they must be scattered: small enough to stay in cache."""


class Store(ABC):
    """Keys or values of the tiers that share a storage format, in order of arrival."""

    parts: dict[str, Pages]

    @property
    @abstractmethod
    def length(self) -> int:
        """Tokens held."""

    @abstractmethod
    def append(self, x: Tensor, empty: Tensor | None = None) -> None:
        """Encode and keep `x`; it is one arrival.

        Args:
            x: the tokens.
            empty: of a store per channel, which of the tokens that wait for their group, and then of `x`, are none:
                `[batch, kv_heads or 1, tokens]`.
        """

    @abstractmethod
    def drop(self, index: Ints) -> None:
        """Remove the tokens at `index` (ascending)."""

    @abstractmethod
    def decoded(self, block: int, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
        """All tokens in order, decoded some `block` at a time, each with the index of its first token."""

    @abstractmethod
    def bytes(self) -> dict[str, int]:
        """Bytes used, by what they hold: codes, scales, zeros, exact, indices."""

    def take(self, index: Ints, dtype: torch.dtype) -> Tensor:
        """The tokens at `index` (ascending), decoded."""
        parts = []
        for offset, x in self.decoded(LARGE, dtype):
            lo, hi = np.searchsorted(index, [offset, offset + x.shape[2]])
            if lo < hi:
                parts.append(x.index_select(2, torch.from_numpy(index[lo:hi] - offset).to(x.device)))
        return torch.cat(parts, dim=2)

    def write(self, out: Tensor, start: int) -> None:
        """Decode all tokens into `out[:, :, start:start + length]`."""
        for offset, x in self.decoded(LARGE, out.dtype):
            out[:, :, start + offset : start + offset + x.shape[2]] = x

    def scatter(self, out: Tensor, index: Tensor) -> None:
        """Decode token i into `out[:, :, index[i]]`."""
        for offset, x in self.decoded(BLOCK, out.dtype):
            out.index_copy_(2, index[offset : offset + x.shape[2]], x.to(out.dtype))

    def spread(self, out: Tensor, index: Tensor) -> None:
        """Like `scatter`, but may write anything into the places of `out` that `index` leaves out."""
        self.scatter(out, index)

    def ragged(self, lines: tuple[int, int]) -> None:
        """From now on tokens differ by row or head, and are taken and removed by `gather` and `remove`.

        Args:
            lines: rows and heads of what these are given, `[batch, kv_heads or 1, tokens]`.
        """
        for part in self.parts.values():
            part.join()

    @abstractmethod
    def gather(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        """The tokens at `index`, `[batch, kv_heads or 1, tokens]`, decoded."""

    def remove(self, index: Tensor, empty: Tensor | None = None) -> None:
        """Remove the tokens at `index`, ascending in each head; the last ones move into their places.

        `empty` as in `append`.
        """
        for part in self.parts.values():
            part.remove(index)

    def select(self, rows: Tensor) -> None:
        for part in self.parts.values():
            part.select(rows)

    def to(self, device: torch.device) -> None:
        for part in self.parts.values():
            part.to(device)

    def reserved(self) -> int:
        return sum(part.reserved() for part in self.parts.values())

    def tensors(self) -> dict[str, Tensor]:
        """All that is held, by name, for saving."""
        return {name: p.slice(0, p.length).contiguous() for name, p in self.parts.items() if p.length}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of `tensors`, into an empty store."""
        for name, tensor in tensors.items():
            if name not in self.parts or tensor.ndim != 4:
                raise CacheError(f"a saved store must hold 4-D tensors named {list(self.parts)}, found {name}")
            self.parts[name].append(tensor)


LARGE = 1 << 40


class ExactStore(Store):
    """Keys or values as they came."""

    def __init__(self) -> None:
        self.parts = {"exact": Pages()}

    @property
    def length(self) -> int:
        return self.parts["exact"].length

    def append(self, x: Tensor, empty: Tensor | None = None) -> None:
        self.parts["exact"].append(x)

    def drop(self, index: Ints) -> None:
        self.parts["exact"].drop(torch.from_numpy(index))

    def decoded(self, block: int, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
        return self.parts["exact"].blocks()

    def take(self, index: Ints, dtype: torch.dtype) -> Tensor:
        return self.parts["exact"].take(torch.from_numpy(index))

    def gather(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        return self.parts["exact"].gather(index)

    def bytes(self) -> dict[str, int]:
        return {"exact": self.parts["exact"].used()}


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
