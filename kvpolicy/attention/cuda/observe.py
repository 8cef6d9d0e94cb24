"""What the tokens of a prompt receive of attention, summed by kernels that write no scores."""

from __future__ import annotations

import functools
import math
import struct
import threading
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvpolicy.attention.cuda.compile import Build
from kvpolicy.attention.cuda.kernel import Kernel, kernel_of, launch
from kvpolicy.interfaces.backend import AttentionOptions

__all__ = ["Call", "Queries", "Sums", "has_groups", "sums", "weighed"]

COLUMNS = 128
"""Queries that count are filled up to a multiple."""
WAVES = 4
"""Blocks for each that the card holds at once, so that the last to end are few."""
FEW = 256
"""Queries of all heads of a KV head, below which blocks of 256 tokens have too little to do."""
MASKS = 1 << 24
"""Numbers of masks that are summed at a time, about."""
UPDATES = 4
"""Updates whose queries are kept on the device: layers of other kinds, and those of other devices, have their own."""
LOG2E = math.log2(math.e)
AT_ONCE = 24 << 20
"""Bytes of queries that blocks work at together, about: those read again and again stay in the cache."""
LEAST = 8
"""Tiles of queries that a block of the second pass on warpgroups is worth."""
ADDRESSES = struct.Struct("<10q7Q10i2f")
_known = threading.local()


class Sums(NamedTuple):
    """A variant of the kernel that sums the weights of attention by token."""

    dim: int
    bfloat: bool
    weighs: bool
    """Whether it is the second pass, which weighs; the first one normalises."""
    mask: bool = False
    softcap: bool = False
    grouped: bool = False
    """Whether the second pass takes the products of warpgroups, which Hopper has and no other."""

    @property
    def build(self) -> Build:
        if self.grouped:
            return Build("weigh", blocks=1, threads=384, feature="a")
        return Build("observe", blocks=3 if self.dim <= 64 and self.weighs else 2)

    @property
    def columns(self) -> int:
        """Queries or keys of a tile."""
        return 128 if self.grouped else 64

    @property
    def rows(self) -> int:
        """Queries, or keys, of a block."""
        return 64 if self.dim > 128 else 256 if self.weighs or not self.mask else 128

    def defined(self, arch: str) -> dict[str, object]:
        if self.grouped:
            return {"HEAD_DIM": self.dim, "BFLOAT": int(self.bfloat)}
        return {
            "PASS": 1 + self.weighs,
            "HEAD_DIM": self.dim,
            "BFLOAT": int(self.bfloat),
            "BLOCKS": self.build.blocks,
            "MASK": int(self.mask),
            "SOFTCAP": int(self.softcap),
        }


class Queries(NamedTuple):
    """Queries of an update that count."""

    at: Tensor
    """Their numbers, then the last one again: int32, on the device."""
    numbers: Tensor
    """Their numbers, on the host."""
    kinds: dict[int, tuple[Tensor, bool]]
    """Of each kind of scores the ones that count, `[rows or 1, queries]`, on the device; and whether all of them do."""
    ends: dict[Any, tuple[Tensor, int]]
    """What `tiles` found."""

    @property
    def length(self) -> int:
        return len(self.numbers)

    def tiles(self, variant: Sums, tokens: int, offset: int, causal: bool) -> tuple[Tensor, int]:
        """Tiles of queries that see each block of tokens, summed up from 0 on, on the device; and how many in all."""
        key = variant.rows, variant.columns, tokens, offset, causal
        if key not in self.ends:
            starts = torch.arange(0, tokens, variant.rows)
            first = torch.searchsorted(self.numbers, starts - offset) if causal else torch.zeros_like(starts)
            tiles = -(-self.length // variant.columns) - first // variant.columns
            ends = torch.nn.functional.pad(tiles.cumsum(0), (1, 0))
            self.ends[key] = ends.int().to(self.at.device, non_blocking=True), int(ends[-1])
        return self.ends[key]

    @classmethod
    def of(cls, counted: Any, offset: int, device: torch.device) -> Queries:
        """Those of an update whose first query is token `offset`; layers that share `counted` share them."""
        kept: list[tuple[Any, int, torch.device, Queries]] = _known.__dict__.setdefault("queries", [])
        for known in kept:
            if known[0] is counted and known[1:3] == (offset, device):
                return known[3]
        found = cls._of(counted, offset, device)
        kept[UPDATES - 1 :] = []
        kept.insert(0, (counted, offset, device, found))
        return found

    @classmethod
    def _of(cls, counted: Any, offset: int, device: torch.device) -> Queries:
        tokens = torch.tensor([n for n in counted.queries if n >= offset], dtype=torch.int64)
        if not len(tokens):
            return cls(tokens, tokens, {}, {})
        numbers = tokens - offset
        at = torch.nn.functional.pad(numbers, (0, -len(tokens) % COLUMNS), value=int(numbers[-1]))
        masks = {k: mask[:, tokens] for k, mask in enumerate(counted.masks)}
        kinds = {k: (mask.to(device, non_blocking=True), bool(mask.all())) for k, mask in masks.items() if mask.any()}
        return cls(at.int().to(device, non_blocking=True), numbers, kinds, {})


class Call(NamedTuple):
    """What both passes are given."""

    query: Tensor
    keys: Tensor
    mask: Tensor | None
    options: AttentionOptions
    queries: Queries
    causal: bool

    def variant(self, weighs: bool) -> Sums:
        capped, masked = self.options.softcap is not None, self.mask is not None
        heads, _, dim = self.query.shape[1:]
        many = self.queries.length * heads // self.keys.shape[1] >= FEW
        grouped = weighs and many and dim <= 128 and not (masked or capped) and has_groups(self.query.get_device())
        return Sums(dim, self.query.dtype == torch.bfloat16, weighs, masked, capped, grouped)

    def run(
        self,
        variant: Sums,
        lse: Tensor | None,
        grid: tuple[int, int, int],
        to: Tensor,
        ends: Tensor | None = None,
        lines: int = 0,
    ) -> None:
        """Launch a pass, whose result goes `to` a tensor `[splits, ...]`; `ends` and `lines` as of `_even`."""
        query, keys, mask, options, queries, causal = self
        heads, asked = query.shape[1:3]
        kv_heads, tokens = keys.shape[1:3]
        strides = (0, 0, 0, 0) if mask is None else _strides(mask)
        device = query.get_device()
        given = ADDRESSES.pack(
            *query.stride()[:3], *keys.stride()[:3], *strides,
            query.data_ptr(), keys.data_ptr(), 0 if mask is None else mask.data_ptr(), queries.at.data_ptr(),
            (to if lse is None else lse).data_ptr(), to.data_ptr(), 0 if ends is None else ends.data_ptr(),
            len(query), lines, queries.length, len(queries.at), tokens, heads, heads // kv_heads, tokens - asked,
            len(to), int(causal),
            options.scaling * LOG2E, (options.softcap or 0.0) * LOG2E,
        )  # fmt: skip
        launch(kernel_of(variant, device), given, grid, device)


@functools.cache
def has_groups(device: int) -> bool:
    """Whether a device has products of warpgroups."""
    return torch.cuda.get_device_capability(device) == (9, 0)


def _strides(mask: Tensor) -> tuple[int, ...]:
    """Of a mask `[batch or 1, heads or 1, queries or 1, tokens]`, 0 where it has one for all."""
    steps = [0 if n == 1 else step for n, step in zip(mask.shape[:3], mask.stride()[:3], strict=True)]
    return (*steps, mask.stride(3))


def _splits(kernel: Kernel, blocks: int, tiles: int) -> int:
    """Parts into which columns are cut, so that there is work for all of a card."""
    return max(1, min(-(-WAVES * kernel.slots // max(1, blocks)), tiles // 4, 64))


def normalised(call: Call) -> Tensor:
    """The logarithm (base 2) of the sum of exponentials of each query that counts: `[batch, heads, filled up]`.

    Infinite where a query sees nothing, and for those that fill up: its weights become zeros.
    """
    query, keys = call.query, call.keys
    batch, heads = query.shape[:2]
    room, count = len(call.queries.at), call.queries.length
    if call.options.lse is not None:
        known = call.options.lse.index_select(2, call.queries.at).mul_(LOG2E)
        known[..., count:] = torch.inf
        return known
    variant = call.variant(False)
    grid = batch * heads, -(-room // variant.rows)
    splits = _splits(kernel_of(variant, query.get_device()), grid[0] * grid[1], -(-keys.shape[2] // variant.columns))
    parts = query.new_empty((splits, batch, heads, room), dtype=torch.float32)
    call.run(variant, None, (*grid, splits), parts)
    lse = parts[0] if splits == 1 else parts.mul_(1 / LOG2E).logsumexp(0).mul_(LOG2E)
    if call.options.sinks is not None:
        lse = torch.logaddexp2(lse, call.options.sinks.float().mul(LOG2E).view(1, -1, 1))
    lse.masked_fill_(lse == -torch.inf, torch.inf)
    lse[..., count:] = torch.inf
    return lse


def weighed(call: Call, lse: Tensor) -> Tensor:
    """Weights of each key summed over queries and their heads: `[batch, kv_heads, tokens]`."""
    batch = call.query.shape[0]
    kv_heads, tokens = call.keys.shape[1:3]
    variant = call.variant(True)
    if variant.grouped:
        return _evenly(call, variant, lse)
    grid = batch * kv_heads, -(-tokens // variant.rows)
    tiles = lse.shape[2] // variant.columns * (call.query.shape[1] // kv_heads)
    splits = _splits(kernel_of(variant, call.query.get_device()), grid[0] * grid[1], tiles)
    parts = call.query.new_empty((splits, batch, kv_heads, tokens), dtype=torch.float32)
    call.run(variant, lse, (*grid, splits), parts)
    return parts[0] if splits == 1 else parts.sum(0)


def _evenly(call: Call, variant: Sums, lse: Tensor) -> Tensor:
    """As `weighed`; each block has as many tiles of queries, of one block of tokens after the other."""
    batch, heads, asked, dim = call.query.shape
    kv_heads, tokens = call.keys.shape[1:3]
    ends, each = call.queries.tiles(variant, tokens, tokens - asked, call.causal)
    groups, length = heads // kv_heads, call.queries.length
    most = -(-batch * kv_heads // max(1, AT_ONCE // (2 * groups * length * dim)))
    lines = -(-batch * kv_heads // min(most, batch * kv_heads))
    least = ((batch * kv_heads - 1) % lines + 1) * each * groups  # tiles that blocks share, where they are fewest
    blocks = max(1, min(kernel_of(variant, call.query.get_device()).slots, least // LEAST))
    splits = -(-length // variant.columns) * groups // max(1, least // blocks) + 2
    parts = call.query.new_zeros((splits, batch, kv_heads, tokens), dtype=torch.float32)
    call.run(variant, lse, (blocks, 1, 1), parts, ends, lines)
    return parts.sum(0)


def sums(query: Tensor, keys: Tensor, observer: Any, mask: Tensor | None, options: AttentionOptions) -> bool:
    """Tell an observer that asks for no more than sums; False where this can't be done here. See `Backend.observe`."""
    heads, asked = query.shape[1:3]
    kv_heads, tokens = keys.shape[1:3]
    if not observer.sums or not (_readable(query) and _readable(keys)) or options.scaling <= 0:
        return False
    if mask is not None and (
        mask.dtype != torch.bool
        or mask.ndim != 4
        or mask.shape[0] not in (1, len(query))
        or mask.shape[1] not in (1, heads)
        or mask.shape[2] not in (1, asked)
    ):
        return False
    queries = Queries.of(observer.counted, tokens - asked, query.device)
    if not queries.length:
        return True
    call = Call(query, keys, mask, options, queries, asked > 1 and (mask is None or mask.shape[2] != asked))
    if any(kernel_of(call.variant(weighs), query.get_device()).slots == 0 for weighs in (False, True)):
        return False
    lse = normalised(call)
    for k, (counted, every) in queries.kinds.items():
        known = lse
        if not every:
            filled = torch.nn.functional.pad(counted, (0, lse.shape[2] - queries.length))
            known = torch.where(filled[:, None], lse, torch.inf)
        observer.add_sums(k, weighed(call, known), _seen(call, counted.float()), heads // kv_heads)
    return True


def _readable(x: Tensor) -> bool:
    return x.stride(3) == 1 and not any(step % 8 for step in x.stride()[:3]) and x.data_ptr() % 16 == 0


def _seen(call: Call, counted: Tensor) -> Tensor:
    """How many of the queries that count could see each token: `[batch or 1, kv_heads or 1, tokens]`."""
    query, keys, mask, _, queries, causal = call
    at = queries.at[: queries.length].long()
    kv_heads, tokens = keys.shape[1:3]
    seeing = counted.sum(1, keepdim=True)
    if causal:
        ends = counted.new_zeros((len(counted), tokens)).index_add_(1, at + (tokens - query.shape[2]), counted)
        seeing = ends.flip(1).cumsum(1).flip(1)
    if mask is None:
        return seeing.expand(-1, tokens).unsqueeze(1)
    shown = mask if mask.shape[1] == 1 else mask[:, :: query.shape[1] // kv_heads]
    if shown.shape[2] == 1:
        return shown[:, :, 0] * seeing.unsqueeze(1)
    found: Tensor = counted.new_zeros((max(len(shown), len(counted)), shown.shape[1], tokens))
    step = max(1, MASKS // (shown.shape[0] * shown.shape[1] * tokens))
    for first in range(0, queries.length, step):
        visible = shown.index_select(2, at[first : first + step]).float()
        found += (counted[:, None, None, first : first + step] @ visible).squeeze(2)
    return found
