"""What a kernel does with its arguments, in float64 on a CPU: a second reading of `plan.cuh`."""

from __future__ import annotations

import ctypes
import re
import struct
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvpolicy.attention.cuda.compile import Variant
from kvpolicy.attention.cuda.kernel import Kernel
from kvpolicy.storage.packing import packed_width, unpack

NUMBERS = [torch.float16, torch.bfloat16, torch.float32, torch.float8_e4m3fn]
LN2 = 0.6931471805599453


def fake_kernel(variant: Variant, device: int | None) -> Kernel:
    """What `kernel_of` gives, its function the variant itself."""
    return Kernel(variant, 0, 128, 264)


def read(address: int, count: int, dtype: torch.dtype) -> Tensor:
    data = ctypes.string_at(address, count * dtype.itemsize)
    return torch.frombuffer(bytearray(data), dtype=dtype) if count else torch.empty(0, dtype=dtype)


def warps_take(count: int, busy: list[int], weight: int, inverse: int, warps: int, start: int) -> list[list[int]]:
    """The tiles of a kind that each warp takes, round by round; `busy` is changed to what they have had to do."""
    order = sorted(range(4), key=lambda u: (busy[u], u))
    taken: list[list[int]] = [[] for _ in range(4)]
    if warps < 4:
        for rank, u in enumerate(order[:warps]):
            taken[u] = list(range(rank, count, warps))
            busy[u] += start + len(taken[u]) * weight
        return taken
    begin = [(x + weight // 2) * inverse >> 32 for x in busy]
    at = number = 0
    while at < count:
        for u in order:
            if begin[u] <= number and at < count:
                taken[u].append(at)
                at += 1
        number += 1
    busy[:] = [0] * 4
    return taken


class Header(NamedTuple):
    pointers: tuple[int, ...]
    strides: tuple[int, ...]
    mask: tuple[int, ...]
    places: tuple[int, ...]
    numbers: tuple[int, ...]
    scale: float
    cap: float
    hidden: float


class Reader:
    """The arguments of one launch."""

    def __init__(self, variant: Variant, arguments: bytes, grid: tuple[int, int, int]) -> None:
        self.variant, self.grid = variant, grid
        found = struct.unpack_from("<12q5q3q6i3fi13Q", arguments)
        self.header = Header(found[30:], found[:12], found[12:17], found[17:20], found[20:26], *found[26:29])
        at = 304
        runs, pages = variant.room
        self.pages = struct.unpack_from(f"<{pages}Q", arguments, at)
        at += 8 * pages
        self.steps, self.parts = struct.unpack_from("<4Q", arguments, at), struct.unpack_from("<6i", arguments, at + 32)
        at += 56
        self.kinds = [struct.unpack_from("<4iIi4Bi", arguments, at + 32 * i) for i in range(len(variant.kinds))]
        at += 32 * len(variant.kinds)
        self.before = struct.unpack_from(f"<{runs}i", arguments, at)
        at += 4 * runs
        self.runs = [struct.unpack_from("<16i", arguments, at + 64 * i) for i in range(runs)]
        at += 64 * runs
        self.strides = [struct.unpack_from("<2q", arguments, at + 16 * i) for i in range(pages)]
        assert len(arguments) == at + 16 * pages
        assert len(arguments) <= (4096 if runs == 40 else 32764)

    def queries(self, which: int, row: int, head: int) -> Tensor:
        """`[rows, head_dim]` of a KV head."""
        _, groups, queries, *_ = self.header.numbers
        dtype = torch.float16 if which else (torch.bfloat16 if self.variant.bfloat else torch.float16)
        strides = self.header.strides[3 * which : 3 * which + 3]
        found = [
            read(
                self.header.pointers[which]
                + 2 * (row * strides[0] + (head * groups + g) * strides[1] + q * strides[2]),
                self.variant.dims[0],
                dtype,
            )
            for g in range(groups)
            for q in range(queries)
        ]
        return torch.stack(found).double()

    def place(self, page: int, row: int, head: int) -> int:
        """Where the tokens of a row and head begin in a page."""
        by_row, by_head = self.strides[page]
        if by_row >= 0:
            return self.pages[page] + row * by_row + head * by_head
        starts = read(self.pages[-by_row], self.header.numbers[0] * (row + 1), torch.int32)
        return self.pages[page] + int(starts[row * self.header.numbers[0] + head]) * by_head

    def side(self, numbers: tuple[int, ...], name: str, tokens: int, dim: int, row: int, head: int) -> Tensor:
        """Keys or values of a run, `[tokens, dim]`."""
        data, params, offset, params_offset, token, group = numbers
        at = self.place(data, row, head) + offset
        if name.startswith("Exact"):
            dtype = torch.bfloat16 if self.variant.bfloat else torch.float16
            return torch.stack([read(at + t * token, dim, dtype) for t in range(tokens)]).double()
        bits, *sizes, number, _ = map(int, re.findall(r"\d+", name))
        width, by_channel = packed_width(dim, bits), name.startswith("Channel")
        codes = unpack(read(at, tokens * width, torch.uint8).view(tokens, width), bits, dim).double()
        if name.startswith("Group"):
            at = self.place(params, row, head) + params_offset
            of = read(at, tokens, torch.int32).long()
            assert of.max() <= group >> 8
            group &= 255
            at = self.place(group, row, head) + token
            lines = int(of.max()) + 1
            scale, shift = read(at, lines * 2 * dim, NUMBERS[number]).view(lines, 2, dim).double()[of].unbind(1)
            return codes * scale + shift
        assert token == width
        (size,) = sizes
        at = self.place(params, row, head) + params_offset
        groups = dim if by_channel else dim // size
        if number >= 4:
            scale = read(at, tokens * groups, NUMBERS[number - 4]).view(tokens, groups).double()
            return (codes - (2**bits - 1) / 2) * scale.repeat_interleave(dim // groups, 1)
        lines = (group + tokens - 1) // size + 1 if by_channel else tokens
        both = read(at, lines * 2 * groups, NUMBERS[number]).view(lines, 2, groups).double()
        if by_channel:
            both = both[(torch.arange(tokens) + group) // size]
        scale, shift = both.repeat_interleave(dim // groups, 2).unbind(1)
        return codes * scale + shift

    def values(
        self, numbers: tuple[int, ...], name: str, tokens: int, dim: int, row: int, head: int
    ) -> tuple[Tensor, Tensor]:
        """Values of a run, `[tokens, dim]`, and which of them are there: by slot others lie in another run."""
        if not name.startswith("Slots"):
            return self.side(numbers, name, tokens, dim, row, head), torch.ones(tokens, dtype=torch.bool)
        data, params, offset, first, token, group = numbers
        inside = name[len("Slots<") : -1]
        size, number = (int(x) for x in re.findall(r"\d+", inside)[1:3]) if "Token" in inside else (dim, 0)
        own = 0 if "Exact" in inside else (dim // size) * NUMBERS[number % 4].itemsize * (1 if number >= 4 else 2)
        slots = read(self.place(group & 255, row, head) + offset, tokens, torch.int32) - first
        count = group >> 8
        there = (slots >= 0) & (slots < count) if count else torch.ones(tokens, dtype=torch.bool)
        found = torch.zeros((tokens, dim), dtype=torch.float64)
        for t in there.nonzero().flatten().tolist():
            at = int(slots[t])
            assert at >= 0
            found[t] = self.side((data, params, at * token, at * own, token, 0), inside, 1, dim, row, head)[0]
        return found, there

    def scores(self, run: tuple[int, ...], raw: Tensor, row: int, head: int) -> Tensor:
        """Scores of a run `[rows, tokens]` in units of log2, masked."""
        tokens, column, slot, causal = run[12:]
        _, _, queries, *_ = self.header.numbers
        x = raw * self.header.scale
        if self.variant.softcap:
            x = self.header.cap * torch.tanh(x / self.header.cap)
        at = torch.arange(tokens) + slot
        if slot < 0:
            assert self.variant.places
            first = row * self.header.places[0] + head * self.header.places[1] + column
            dtype = torch.int32 if self.variant.places == 4 else torch.int64
            at = read(self.header.pointers[5] + first * dtype.itemsize, tokens, dtype).long()
        query = torch.arange(x.shape[0])
        hidden = (at < 0).expand_as(x).clone()
        if self.variant.causal:
            hidden |= torch.arange(tokens) > causal + (query % queries)[:, None]
        if self.variant.mask:
            rows, heads, groups, own, step = self.header.mask
            where = row * rows + head * heads + (query // queries * groups + query % queries * own)[:, None]
            where = where + at.clamp(min=0) * step
            dtype = [torch.bool, torch.float32, torch.bfloat16, torch.float16][self.variant.mask - 1]
            values = torch.stack([
                read(self.header.pointers[4] + int(i) * dtype.itemsize, 1, dtype)[0] for i in where.flatten()
            ]).view(x.shape)  # fmt: skip
            if dtype == torch.bool:
                hidden |= ~values
            else:
                hidden |= values.float() <= self.header.hidden
                x = x + values.double() / LN2
        return x.masked_fill(hidden, -torch.inf)

    def shared(self) -> None:
        """Check that each tile is the share of one warp, as blocks find their shares."""
        spaces = self.header.numbers[5]
        for space in range(spaces):
            kinds = [kind for kind in self.kinds if kind[7] == space]
            blocks, ends = self.parts[space + 1] - self.parts[space], [0] * len(kinds)
            for block in range(blocks):
                begin, end = (self.steps[space] * i >> 32 for i in (block, block + 1))
                busy = [0] * 4
                for i, (_, _, tiles, weight, inverse, before, _, _, warps, _, start) in enumerate(kinds):
                    first, last = (min((max(x - before, 0) + weight - 1) * inverse >> 32, tiles) for x in (begin, end))
                    assert first == ends[i]
                    ends[i] = last
                    if last > first:
                        taken = warps_take(last - first, busy, weight, inverse, warps, start)
                        assert sorted(x for own in taken for x in own) == list(range(last - first))
            assert ends == [kind[2] for kind in kinds]

    def run(self) -> None:
        """Write what the kernel would write."""
        kv_heads, groups, queries, parts, columns, spaces = self.header.numbers
        pointers, dims = self.header.pointers, self.variant.dims
        assert self.grid[0] == parts == self.parts[spaces]
        batch, rows = self.grid[1] // kv_heads, groups * queries
        size = self.variant.rows
        self.shared()
        assert self.grid[2] == -(-rows // size)
        dtype = torch.float32 if self.variant.wide else torch.bfloat16 if self.variant.bfloat else torch.float16
        out = torch.zeros((spaces, batch, queries, kv_heads * groups, dims[1]), dtype=torch.float64)
        lse = torch.empty((batch, kv_heads * groups, queries), dtype=torch.float64)
        every = torch.full((batch, kv_heads, rows, columns), -torch.inf, dtype=torch.float64)
        for row in range(batch):
            for head in range(kv_heads):
                found = []
                for kind, name in zip(self.kinds, self.variant.kinds, strict=True):
                    keys, values = re.fullmatch(r"Pair<(.*>), (.*>), \d+>", name).groups()  # type: ignore[union-attr]
                    first, last, tiles, _, _, _, query, space, *_ = kind
                    tile, before = int(re.findall(r"\d+", name)[-1]), 0
                    for run, number in zip(self.runs[first:last], self.before[first:last], strict=True):
                        assert number == before
                        before += -(-run[12] // tile)
                        if keys.startswith("Channel"):  # a tile lies in as many groups as it is told of
                            assert run[5] % min(tile, int(re.findall(r"\d+", keys)[1])) == 0 or run[12] <= tile
                        k = self.side(run[:6], keys, run[12], dims[0], row, head)
                        v, there = self.values(run[6:12], values, run[12], dims[1], row, head)
                        s = self.scores(run, self.queries(query, row, head) @ k.T, row, head)
                        every[row, head, :, run[13] : run[13] + run[12]][:, there] = s[:, there]
                        s = s.masked_fill(~there, -torch.inf)
                        found.append((s, v, space))
                    assert before == tiles
                scores = torch.cat([s for s, _, _ in found], dim=1) * LN2
                own = slice(head * groups, (head + 1) * groups)
                if pointers[11]:
                    sinks = read(pointers[11], kv_heads * groups, torch.float32)[own].repeat_interleave(queries)
                    scores = torch.cat([scores, sinks[:, None].double()], dim=1)
                total = scores.logsumexp(1)
                for s, v, space in found:
                    share = (s * LN2 - total.masked_fill(total == -torch.inf, 0)[:, None]).exp()
                    out[space, row, :, own] += (share @ v).view(groups, queries, -1).transpose(0, 1)
                lse[row, own] = total.view(groups, queries)
        self.write(pointers[6], out.to(dtype))
        self.write(pointers[7], lse.float())
        if self.variant.scores:
            self.write(pointers[9], every.float())
            self.write(pointers[10], (lse / LN2).view(batch, kv_heads, rows).nan_to_num(neginf=0.0).float())

    def write(self, address: int, x: Tensor) -> None:
        x = x.contiguous()
        ctypes.memmove(address, x.data_ptr(), x.nbytes)


def fake_launch(kernel: Kernel, arguments: bytes, grid: tuple[int, int, int], device: Any) -> None:
    """What `launch` does, at once and on a CPU."""
    Reader(kernel.function, arguments, grid).run()
