"""Packed integer codes with a scale and an offset per group."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from kvpolicy.errors import CacheError
from kvpolicy.interfaces.checks import calibrated, placed
from kvpolicy.interfaces.extra import Grouping
from kvpolicy.interfaces.quantizer import AffineQuantizer, Quantizer
from kvpolicy.interfaces.site import Site
from kvpolicy.storage.base import LARGE, Ints
from kvpolicy.storage.coded import NOTHING, POSITIONS, Aside, CodedStore
from kvpolicy.storage.fused import fuse
from kvpolicy.storage.gather import filled, gather_tokens
from kvpolicy.storage.group_size import group_size_of
from kvpolicy.storage.groups import Groups
from kvpolicy.storage.later import Later
from kvpolicy.storage.packing import dequantize, pack
from kvpolicy.storage.pages import FULL, Leaving, Pages, at_once
from kvpolicy.storage.scales import Scales, levels_of

AT_ONCE = 1 << 25
"""Numbers that are coded at a time at most: their temporary copies are in float32."""


class AffineStore(CodedStore):
    """Packed integer codes per token, with a scale and an offset per group.

    Per channel, a group is closed once `group_size` tokens have arrived; until then they wait exactly. The
    tokens of a group stay neighbours, so a count per group says which token belongs to which; where tokens differ by
    row or head they don't, and each has the number of its group.
    """

    def __init__(self, quantizer: AffineQuantizer, head_dim: int, site: Site | None = None) -> None:
        super().__init__(quantizer, head_dim, site)
        self.quantizer = quantizer = placed(quantizer, self.site)
        self.group_size = group_size_of(quantizer, head_dim)
        self.by_channel = quantizer.per == "channel"
        self.scales = Scales(quantizer, levels_of(quantizer, self.site))
        self.levels = self.scales.uneven
        """What codes stand for, if not for themselves."""
        self.numbers = head_dim if self.by_channel else head_dim // self.group_size
        """Scales of a token, or of the channels of a group."""
        self.parts |= {"codes": Pages(), "params": Pages(), "exact": Pages()}
        self.groups = Groups()
        """Of use per channel alone."""

    @property
    def row_heads(self) -> tuple[int, int] | None:
        """Rows and heads that differ, once some do."""
        return self.groups.row_heads

    @property
    def waiting(self) -> int | None:
        return self.parts["exact"].length if self.by_channel else None

    @property
    def grouped(self) -> bool:
        """Whether groups of tokens are neighbours, so that `affine_blocks` can tell them apart."""
        return not self.by_channel or self.row_heads is None

    @property
    def direct(self) -> bool:
        """Whether attention can take products with its codes as they lie."""
        alone = self.beside is None or self.beside.additive
        return self.grouped and alone and (self.chain is None or self.chain.linear)

    @property
    def format(self) -> str:
        if self.levels is None and self.chain is None and self.beside is None and self.front is None:
            return "affine"
        more = {"levels": self.levels, "transforms": self.chain, "extras": self.beside, "flat": self.front}
        return "+".join(["affine", *(name for name, found in more.items() if found is not None)])

    @property
    def length(self) -> int:
        return self.parts["codes"].length + self.parts["exact"].length

    def append(
        self,
        x: Tensor,
        empty: Tensor | None = None,
        positions: Tensor | None = None,
        full: bool = False,
        later: Later | None = None,
    ) -> None:
        """As of every store. With `later` what is to be coded is left to it, if that is the same in other layers."""
        if not x.shape[2]:
            return
        self._note(x, positions, full)
        if later is not None and self.row_heads is not None and not later.soon:
            later = None  # by row and head groups have numbers, which go by those kept already
        if not self.by_channel:
            self._append_codes(x, self.group_size, later)
            return
        size = self.group_size or x.shape[2]
        partial = self.parts["exact"]
        if partial.length + x.shape[2] < size:
            partial.append(x)
            return
        if partial.length:
            x = torch.cat([partial.slice(0, partial.length), x], dim=2)
        x = self._filled(x, empty)
        whole = x.shape[2] // size * size
        self._append_groups(x[:, :, :whole], size, later)
        self.parts["exact"] = Pages(partial.whole)
        if whole < x.shape[2]:
            self.parts["exact"].append(x[:, :, whole:])

    def _filled(self, x: Tensor, empty: Tensor | None) -> Tensor:
        """Of tokens that are to be coded those that are none replaced, as are their positions."""
        if empty is None:
            return x
        if self.by_position:
            places = self.parts[POSITIONS].all()[:, :, self.parts["codes"].length :]
            places.copy_(filled(places, empty))
        return filled(x, empty)

    def _append_groups(self, x: Tensor, size: int, later: Later | None = None) -> None:
        before, count = self.parts["params"].length, x.shape[2] // size
        self._append_codes(x, size, later)
        self.groups.add([size] * count, before, x.device)

    def differ_by_head(self, row_heads: tuple[int, int]) -> None:
        codes = self.parts["codes"]
        grouped = self.by_channel and codes.length > 0
        self.groups.differ_by_head(row_heads, codes.pages[0].device if grouped else None)
        super().differ_by_head(row_heads)

    def select(self, rows: Tensor) -> None:
        super().select(rows)
        self.groups.select(rows)

    def to(self, device: torch.device) -> None:
        super().to(device)
        self.groups.to(device)

    def reserved(self) -> int:
        return super().reserved() + self.groups.reserved()

    def gather(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        coded = self.parts["codes"].length
        partial = self.parts["exact"]
        if not coded:
            return partial.gather(index)
        at = index.clamp(max=coded - 1)
        codes = self.parts["codes"].gather(at)
        out = torch.empty((*codes.shape[:3], self.head_dim), dtype=dtype, device=codes.device)
        self._decode(codes, self._parameters(at), out, self._gathered(at))
        if partial.length:
            out = torch.where((index >= coded).unsqueeze(3), partial.gather((index - coded).clamp(min=0)), out)
        return out

    def _parameters(self, index: Tensor) -> Tensor:
        """What is kept of scales and offsets of the coded tokens at `index`."""
        if self.by_channel:
            index = self.groups.gather(index)
        return self.parts["params"].gather(index)

    def remove(self, leaving: Leaving | Tensor, empty: Tensor | None = None) -> None:
        leaving = Leaving.of(leaving, self.length)
        if not self.by_channel:
            for name in ("codes", "params", *self._along):
                self.parts[name].remove(leaving)
            for kept in self._kept:
                kept.remove(leaving)
            return
        partial = self.parts["exact"]
        if partial.length:  # rows and heads may lose different numbers of them, so they become a group of their own
            x, self.parts["exact"] = partial.all(), Pages(whole=True)
            self._append_groups(self._filled(x, empty), x.shape[2])
        for name in ("codes", *self._along):
            self.parts[name].remove(leaving)
        for kept in self._kept:
            kept.remove(leaving)
        self.groups.remove(leaving, [self.parts["params"]])

    def _append_codes(self, x: Tensor, size: int, later: Later | None = None) -> None:
        """Encode and keep tokens; per channel, `size` at a time are a group."""
        if self.chain is not None and self.beside is None:
            self.chain.begin(x)
        if self.beside is None and (self.chain is None or self.chain.fixed):
            if not self.quantizer.independent:
                self.keep(*self.encode(x, size))
                return
            step = max(AT_ONCE // (x.shape[0] * x.shape[1] * x.shape[3]) // size, 1) * size
            if later is not None and x.shape[2] <= step and self.levels is None:
                later.add(self, x, size)
                return
            for part in x.split(step, dim=2):
                if not fuse(self, part, size):
                    self.keep(*self.encode(part, size))
            return
        if self.beside is None and fuse(self, x, size, later):
            return
        arrivals = x.shape[2] // size if self.by_channel else 1
        if self.chain is not None:
            coded = self.parts["codes"].length
            x = self.chain.forward(x, self._places(coded, coded + x.shape[2]))
        x, beside = self.beside.take(x) if self.beside is not None else (x, [])
        packed, params = self._coded(x, size)
        self.keep(packed, params)
        if self.beside is not None:
            error = self._error(x, packed, params, arrivals) if self.beside.fits else None
            self.beside.keep(beside, error, x)

    def encode(self, x: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """Packed codes, and what is kept of scales and offsets, of tokens `[batch, kv_heads, tokens, head_dim]`.

        Transforms, if there are any, must be `fixed`.
        """
        return self._coded(x if self.chain is None else self.chain.forward(x, None), size)

    def _coded(self, x: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """The same of tokens that went through the transforms."""
        batch, heads, n, dim = x.shape
        groups = (x.unflatten(2, (-1, size)).transpose(3, 4) if self.by_channel else x).reshape(-1, size)
        if self.quantizer.clip < 1:
            low, high = (bound * self.quantizer.clip for bound in torch.aminmax(groups, dim=1, keepdim=True))
            groups = groups.clamp(low, high)
        affine = self.scales.rounded(calibrated(self.quantizer, groups, self.scales.codes), groups)
        codes = affine.codes
        if self.by_channel:
            codes = codes.view(batch, heads, n // size, dim, size).transpose(3, 4)
        scale, offset = (p.view(batch, heads, -1, self.numbers) for p in affine[1:])
        packed = pack(codes.reshape(batch, heads, n, dim), self.quantizer.bits)
        return packed, self.scales.join(scale, offset, x.dtype)

    def keep(self, packed: Tensor, params: Tensor) -> None:
        """Take in what `encode` gave."""
        self.parts["codes"].append(packed)
        self.parts["params"].append(params)

    def _error(self, x: Tensor, packed: Tensor, params: Tensor, arrivals: int) -> Tensor:
        """What coding lost of `x`, in float32."""
        out = torch.empty(x.shape, dtype=torch.float32, device=x.device)
        shaped = out
        if self.by_channel:
            packed, params = packed.unflatten(2, (arrivals, -1)), params.unsqueeze(3)
            shaped = out.unflatten(2, (arrivals, -1))
        self._dequantize(packed, params, shaped)
        return x.float() - out

    def _dequantize(self, codes: Tensor, params: Tensor, out: Tensor) -> None:
        scale, offset = self.scales.split(params, self.numbers)
        dequantize(codes, self.quantizer.bits, self.head_dim, scale, offset, out, self.levels_on(out.device))

    def _grouping(self, quantizer: Quantizer) -> Grouping:
        assert isinstance(quantizer, AffineQuantizer)
        return Grouping(quantizer.per, group_size_of(quantizer, self.head_dim))

    def drop(self, index: Ints) -> None:
        coded = self.parts["codes"].length
        packed, partial = index[index < coded], index[index >= coded] - coded
        self.parts["exact"].drop(partial)
        for name in self._along:
            self.parts[name].drop(index)
        for kept in self._kept:
            kept.drop(packed)
        if self.by_channel and len(packed):
            self.parts["params"].drop(self.groups.drop(packed))
        elif len(packed):
            self.parts["params"].drop(packed)
        self.parts["codes"].drop(packed)

    def affine_blocks(self, block: int) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Index of the first token, codes, and what is kept of their scales and offsets, of runs of tokens.

        Per token, codes are `[batch, kv_heads, tokens, width]` and the parameters `[batch, kv_heads, tokens, numbers]`;
        per channel `[batch, kv_heads, groups, tokens, width]` and `[batch, kv_heads, groups, 1, numbers]`.
        """
        codes, params = self.parts["codes"], self.parts["params"]
        if not self.by_channel:
            for (offset, c), (_, p) in zip(codes.blocks(), params.blocks(), strict=True):
                if c.shape[2] <= block:
                    yield offset, c, p
                    continue
                for lo in range(0, c.shape[2], block):
                    yield offset + lo, c[:, :, lo : lo + block], p[:, :, lo : lo + block]
            return
        most = at_once(codes.pages[0]) if codes.length else FULL
        sizes = self.groups.sizes
        cuts = [0, *(np.flatnonzero(np.diff(sizes)) + 1).tolist(), len(sizes)]
        token = 0
        for first, last in pairwise(cuts):
            size = int(sizes[first]) if last > first else 1
            step = max(1, min(block, most) // size)
            for group in range(first, last, step):
                n = min(step, last - group)
                c = codes.slice(token, token + n * size).unflatten(2, (n, size))
                yield token, c, params.slice(group, group + n).unsqueeze(3)
                token += n * size

    def _blocks(self, block: int) -> Iterator[tuple[int, Tensor, Tensor]]:
        """`affine_blocks`; where groups are no neighbours with parameters for each token."""
        if self.grouped:
            yield from self.affine_blocks(block)
            return
        coded = self.parts["codes"].length
        block = min(block, at_once(self.parts["codes"].all())) if coded else 1
        for first in range(0, coded, block):
            last = min(first + block, coded)
            groups = self.groups.slice(first, last)
            yield first, self.parts["codes"].slice(first, last), gather_tokens(self.parts["params"].all(), groups)

    def levels_on(self, device: torch.device) -> Tensor | None:
        """`levels` on a device."""
        if self.levels is not None and self.levels.device != device:
            self.levels = self.levels.to(device)
        return self.levels

    def _decode(self, codes: Tensor, params: Tensor, out: Tensor, aside: Aside) -> None:
        shaped = out.unflatten(2, codes.shape[2:4]) if codes.ndim == 5 else out
        self._dequantize(codes, params, shaped)
        if self.chain is not None or self.beside is not None:
            out.copy_(self._finished(out, aside))

    def decoded(self, block: int, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
        for first, codes, params in self._blocks(block):
            n = math.prod(codes.shape[2:-1])
            out = torch.empty((*codes.shape[:2], n, self.head_dim), dtype=dtype, device=codes.device)
            self._decode(codes, params, out, self._sliced(first, first + n))
            yield first, out
        coded = self.parts["codes"].length
        for first, x in self.parts["exact"].blocks():
            yield coded + first, x

    def write(self, out: Tensor, start: int) -> None:
        for first, codes, params in self.affine_blocks(LARGE):
            n = math.prod(codes.shape[2:-1])
            part = out[:, :, start + first : start + first + n]
            self._decode(codes, params, part, self._sliced(first, first + n))
        at = start + self.parts["codes"].length
        for first, x in self.parts["exact"].blocks():
            out[:, :, at + first : at + first + x.shape[2]] = x

    def scatter_between(self, out: Tensor, index: Tensor) -> None:
        if self.by_channel or self.by_position or self.beside is not None:
            self.scatter(out, index)
            return
        # Codes are a tenth of what they decode to: they are put in order first, and decoded where they belong.
        first = int(index.min())
        n, index = int(index.max()) - first + 1, index - first
        codes, params = (self.parts[name].scatter_between(index, n) for name in ("codes", "params"))
        self._decode(codes, params, out[:, :, first : first + n], NOTHING)

    def take(self, index: Ints, dtype: torch.dtype) -> Tensor:
        coded = self.parts["codes"].length
        if self.by_channel or (len(index) and index[-1] >= coded):
            return super().take(index, dtype)
        codes, params = (self.parts[name].take(index) for name in ("codes", "params"))
        out = torch.empty((*codes.shape[:3], self.head_dim), dtype=dtype, device=codes.device)
        self._decode(codes, params, out, self._taken(index))
        return out

    def bytes(self) -> dict[str, int]:
        params, own = self.parts["params"], self._own_bytes()
        scales = int(params.used() * self.scales.share(params.pages[0], self.numbers)) if params.length else 0
        return {
            "codes": self.parts["codes"].used(),
            "scales": scales,
            "zeros": params.used() - scales,
            "exact": self.parts["exact"].used(),
            **own,
            "indices": self.groups.used() + own.get("indices", 0),
        }

    def tensors(self) -> dict[str, Tensor]:
        return {**super().tensors(), **(self.groups.tensors("sizes", "groups") if self.by_channel else {})}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        rest = self._restore_own(tensors)
        sizes, numbers = rest.pop("sizes", None), rest.pop("groups", None)
        coded, groups, waiting = (rest[n].shape[2] if n in rest else 0 for n in ("codes", "params", "exact"))
        if self.by_channel:
            self.groups.restore(sizes, numbers, coded, groups, self.group_size or coded)
        elif groups != coded:
            raise CacheError(f"it must hold the parameters of {coded} tokens, found those of {groups}")
        most = max(self.group_size - 1, 0) if self.by_channel else 0
        if waiting > most:
            raise CacheError(f"at most {most} tokens may wait for their group, found {waiting}")
        if self.by_position and self.parts[POSITIONS].length != coded + waiting:
            raise CacheError(f"it must hold the positions of {coded + waiting} tokens")
        super().restore(rest)
