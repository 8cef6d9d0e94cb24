"""Where keys or values lie: exact, packed, or in a quantizer's own tensors.

All stores keep tokens in order of arrival; shapes are `[batch, kv_heads, tokens, head_dim]`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvpolicy.errors import CacheError, PluginError, RecipeError
from kvpolicy.packing import dequantize, pack
from kvpolicy.pages import FULL, Pages
from kvpolicy.quantizer import AffineQuantizer, Quantizer, TensorQuantizer

__all__ = ["ExactStore", "NamedStore", "PackedStore", "Store", "group_size_of", "make_store"]

Ints = NDArray[np.int64]
BLOCK = 256
"""Tokens decoded at a time where they must be scattered: small enough to stay in cache."""


def group_size_of(quantizer: AffineQuantizer, head_dim: int) -> int:
    """The group size that a quantizer uses for `head_dim` channels; 0 means one group per arrival.

    Raises:
        RecipeError: the size does not fit.
    """
    size = quantizer.group_size
    if size == "arrival":
        if quantizer.per != "channel":
            raise RecipeError("group_size: arrival needs per: channel, found per: token; give a number or auto")
        return 0
    if quantizer.per == "channel":
        return 32 if size == "auto" else head_dim if size == "head" else int(size)
    if size == "auto":
        return max(d for d in range(1, min(64, head_dim) + 1) if head_dim % d == 0)
    if size == "head":
        return head_dim
    if head_dim % int(size):
        fits = [d for d in range(1, head_dim + 1) if head_dim % d == 0]
        raise RecipeError(
            f"group_size must divide head_dim with per: token, found group_size {size} and head_dim {head_dim}; "
            f"use auto or one of {fits}"
        )
    return int(size)


def make_store(spec: Quantizer | str, head_dim: int) -> Store | None:
    """The store for `full`, a quantizer, or `evict` (None)."""
    if spec == "evict":
        return None
    if isinstance(spec, AffineQuantizer):
        return PackedStore(spec, head_dim)
    if isinstance(spec, TensorQuantizer):
        spec.check(head_dim)
        return NamedStore(spec)
    return ExactStore()


class Store(ABC):
    """Keys or values of the tiers that share a storage format, in order of arrival."""

    parts: dict[str, Pages]

    @property
    @abstractmethod
    def length(self) -> int:
        """Tokens held."""

    @abstractmethod
    def append(self, x: Tensor) -> None:
        """Encode and keep `x`; it is one arrival."""

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
            out.index_copy_(2, index[offset : offset + x.shape[2]], x)

    def spread(self, out: Tensor, index: Tensor) -> None:
        """Like `scatter`, but may write anything into the places of `out` that `index` leaves out."""
        self.scatter(out, index)

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

    def append(self, x: Tensor) -> None:
        self.parts["exact"].append(x)

    def drop(self, index: Ints) -> None:
        self.parts["exact"].drop(torch.from_numpy(index))

    def decoded(self, block: int, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
        return self.parts["exact"].blocks()

    def take(self, index: Ints, dtype: torch.dtype) -> Tensor:
        return self.parts["exact"].take(torch.from_numpy(index))

    def bytes(self) -> dict[str, int]:
        return {"exact": self.parts["exact"].used()}


class NamedStore(Store):
    """The tensors of a quantizer that is not affine, one entry per token."""

    def __init__(self, quantizer: TensorQuantizer) -> None:
        self.quantizer = quantizer
        self.parts = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._length = 0

    @property
    def length(self) -> int:
        return self._length

    def append(self, x: Tensor) -> None:
        for name, tensor in self.quantizer.encode(x).items():
            if tensor.shape[:3] != x.shape[:3]:
                raise PluginError(
                    f"quantizer {self.quantizer.kind!r} must give tensors [batch, kv_heads, tokens, ...] "
                    f"{tuple(x.shape[:3])}, found {name} of {tuple(tensor.shape)}"
                )
            self.shapes[name] = tuple(tensor.shape[3:])
            self.parts.setdefault(name, Pages()).append(tensor.reshape(*tensor.shape[:3], -1))
        self._length += x.shape[2]

    def drop(self, index: Ints) -> None:
        for part in self.parts.values():
            part.drop(torch.from_numpy(index))
        self._length -= len(index)

    def decoded(self, block: int, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
        block = min(block, 1024)
        for offset in range(0, self._length, block):
            end = min(offset + block, self._length)
            parts = {name: part.slice(offset, end) for name, part in self.parts.items()}
            shaped = {name: part.reshape(*part.shape[:3], *self.shapes[name]) for name, part in parts.items()}
            yield offset, self.quantizer.decode(shaped, dtype)

    def bytes(self) -> dict[str, int]:
        return {"codes": sum(part.used() for part in self.parts.values())}

    def tensors(self) -> dict[str, Tensor]:
        flat = super().tensors()
        return {name: t.reshape(*t.shape[:3], *self.shapes[name]) for name, t in flat.items()}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        for name, t in tensors.items():
            self.shapes[name] = tuple(t.shape[3:])
            self.parts.setdefault(name, Pages()).append(t.reshape(*t.shape[:3], -1))
            self._length = t.shape[2]


class PackedStore(Store):
    """Packed integer codes per token, with a scale and an offset per group.

    Per channel, a group is closed once `group_size` tokens have arrived; until then they wait exactly. The
    tokens of a group stay neighbours, so a count per group says which token belongs to which.
    """

    def __init__(self, quantizer: AffineQuantizer, head_dim: int) -> None:
        quantizer.check(head_dim)
        self.quantizer, self.head_dim = quantizer, head_dim
        self.group_size = group_size_of(quantizer, head_dim)
        self.by_channel = quantizer.per == "channel"
        self.parts = {"codes": Pages(), "params": Pages(), "exact": Pages()}
        self.sizes = np.empty(0, dtype=np.int64)

    @property
    def length(self) -> int:
        return self.parts["codes"].length + self.parts["exact"].length

    def append(self, x: Tensor) -> None:
        if not self.by_channel:
            self._append_codes(x, x.reshape(-1, self.group_size))
            return
        size = self.group_size or x.shape[2]
        waiting = self.parts["exact"]
        if waiting.length + x.shape[2] < size:
            waiting.append(x)
            return
        if waiting.length:
            x = torch.cat([waiting.slice(0, waiting.length), x], dim=2)
            self.parts["exact"] = Pages()
        whole = x.shape[2] // size * size
        head, tail = x[:, :, :whole], x[:, :, whole:]
        grouped = head.unflatten(2, (-1, size)).transpose(3, 4)
        self._append_codes(head, grouped.reshape(-1, size))
        self.sizes = np.concatenate([self.sizes, np.full(whole // size, size, dtype=np.int64)])
        if tail.shape[2]:
            self.parts["exact"].append(tail)

    def _append_codes(self, x: Tensor, groups: Tensor) -> None:
        batch, heads, n, dim = x.shape
        affine = self.quantizer.calibrate(groups)
        if [t.shape for t in affine] != [groups.shape, (len(groups), 1), (len(groups), 1)]:
            raise PluginError(
                f"quantizer {self.quantizer.kind!r} must give codes {tuple(groups.shape)} and scale and offset "
                f"{(len(groups), 1)}, found {[tuple(t.shape) for t in affine]}"
            )
        codes = affine.codes
        if codes.dtype != torch.uint8:
            raise PluginError(f"quantizer {self.quantizer.kind!r} must give codes as uint8, found {codes.dtype}")
        if self.by_channel:
            size = groups.shape[1]
            codes = codes.view(batch, heads, n // size, dim, size).transpose(3, 4)
            params = [p.view(batch, heads, n // size, dim) for p in affine[1:]]
        else:
            params = [p.view(batch, heads, n, dim // self.group_size) for p in affine[1:]]
        dtype = torch.float32 if self.quantizer.scale_dtype == "float32" else x.dtype
        self.parts["codes"].append(pack(codes.reshape(batch, heads, n, dim), self.quantizer.nbits))
        kept = torch.cat(params, dim=-1)
        if dtype == torch.float16:  # a range that float16 holds may have a scale that it doesn't
            limit = torch.finfo(dtype).max
            kept = torch.where(kept.isfinite(), kept.clamp(-limit, limit), kept)
        self.parts["params"].append(kept.to(dtype))

    def drop(self, index: Ints) -> None:
        coded = self.parts["codes"].length
        packed, waiting = index[index < coded], index[index >= coded] - coded
        self.parts["exact"].drop(torch.from_numpy(waiting))
        if self.by_channel and len(packed):
            group = np.searchsorted(np.cumsum(self.sizes), packed, side="right")
            sizes = self.sizes - np.bincount(group, minlength=len(self.sizes))
            self.parts["params"].drop(torch.from_numpy(np.flatnonzero(sizes == 0)))
            self.sizes = sizes[sizes > 0]
        elif len(packed):
            self.parts["params"].drop(torch.from_numpy(packed))
        self.parts["codes"].drop(torch.from_numpy(packed))

    def affine_blocks(self, block: int) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
        """Index of the first token, codes, scale and offset of runs of tokens.

        Per token, codes are `[batch, kv_heads, tokens, width]` and scale `[batch, kv_heads, tokens, groups]`;
        per channel `[batch, kv_heads, groups, tokens, width]` and `[batch, kv_heads, groups, 1, head_dim]`.
        """
        codes, params = self.parts["codes"], self.parts["params"]
        if not self.by_channel:
            for (offset, c), (_, p) in zip(codes.blocks(), params.blocks(), strict=True):
                half = p.shape[3] // 2
                for lo in range(0, c.shape[2], block):
                    part = p[:, :, lo : lo + block]
                    yield offset + lo, c[:, :, lo : lo + block], part[..., :half], part[..., half:]
            return
        cuts = [0, *(np.flatnonzero(np.diff(self.sizes)) + 1).tolist(), len(self.sizes)]
        token = 0
        for first, last in pairwise(cuts):
            size = int(self.sizes[first]) if last > first else 1
            step = max(1, min(block, FULL) // size)
            for group in range(first, last, step):
                n = min(step, last - group)
                p = params.slice(group, group + n).unsqueeze(3)
                c = codes.slice(token, token + n * size).unflatten(2, (n, size))
                yield token, c, p[..., : self.head_dim], p[..., self.head_dim :]
                token += n * size

    def _decode(self, codes: Tensor, scale: Tensor, offset: Tensor, out: Tensor) -> None:
        if codes.ndim == 5:
            out = out.unflatten(2, codes.shape[2:4])
        dequantize(codes, self.quantizer.nbits, self.head_dim, scale, offset, out)

    def decoded(self, block: int, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
        for first, codes, scale, offset in self.affine_blocks(block):
            n = math.prod(codes.shape[2:-1])
            out = torch.empty((*codes.shape[:2], n, self.head_dim), dtype=dtype, device=codes.device)
            self._decode(codes, scale, offset, out)
            yield first, out
        coded = self.parts["codes"].length
        for first, x in self.parts["exact"].blocks():
            yield coded + first, x

    def write(self, out: Tensor, start: int) -> None:
        for first, codes, scale, offset in self.affine_blocks(LARGE):
            at = start + first
            self._decode(codes, scale, offset, out[:, :, at : at + math.prod(codes.shape[2:-1])])
        at = start + self.parts["codes"].length
        for first, x in self.parts["exact"].blocks():
            out[:, :, at + first : at + first + x.shape[2]] = x

    def spread(self, out: Tensor, index: Tensor) -> None:
        if self.by_channel:
            self.scatter(out, index)
            return
        # Codes are a tenth of what they decode to: they are put in order first, and decoded where they belong.
        first = int(index.min())
        n, index = int(index.max()) - first + 1, index - first
        codes, params = (self.parts[name].spread(index, n) for name in ("codes", "params"))
        half = params.shape[3] // 2
        self._decode(codes, params[..., :half], params[..., half:], out[:, :, first : first + n])

    def take(self, index: Ints, dtype: torch.dtype) -> Tensor:
        coded = self.parts["codes"].length
        if self.by_channel or (len(index) and index[-1] >= coded):
            return super().take(index, dtype)
        codes, params = (self.parts[name].take(torch.from_numpy(index)) for name in ("codes", "params"))
        half = params.shape[3] // 2
        out = torch.empty((*codes.shape[:3], self.head_dim), dtype=dtype, device=codes.device)
        self._decode(codes, params[..., :half], params[..., half:], out)
        return out

    def bytes(self) -> dict[str, int]:
        params = self.parts["params"].used() // 2
        return {
            "codes": self.parts["codes"].used(),
            "scales": params,
            "zeros": params,
            "exact": self.parts["exact"].used(),
            "indices": self.sizes.nbytes,
        }

    def tensors(self) -> dict[str, Tensor]:
        held: dict[str, Tensor] = super().tensors()
        if self.by_channel:
            held["sizes"] = torch.from_numpy(self.sizes.copy())
        return held

    def restore(self, tensors: dict[str, Tensor]) -> None:
        rest: dict[str, Any] = dict(tensors)
        if self.by_channel:
            self.sizes = rest.pop("sizes").numpy().copy()
        super().restore(rest)
        coded, groups = self.parts["codes"].length, self.parts["params"].length
        expected = len(self.sizes) if self.by_channel else coded
        if groups != expected or (self.by_channel and self.sizes.sum() != coded):
            raise CacheError(f"a saved store must hold the parameters of every group, found {groups} for {coded} codes")
