"""What a launch is given that is the same for all layers of a step: kinds, blocks, runs, and the kernel."""

from __future__ import annotations

import functools
import math
import struct
from typing import NamedTuple

import torch
from torch import Tensor

from kvpolicy.attention.cuda.compile import FEW, MANY, Variant
from kvpolicy.attention.cuda.formats import EXACT, affine_form, is_large, kind_of, weight_of
from kvpolicy.attention.cuda.kernel import Kernel, kernel_of
from kvpolicy.attention.cuda.layout import MAPS, Declined, Kind, Laid, Run, lay_out, width_of
from kvpolicy.interfaces.backend import AttentionOptions, Part
from kvpolicy.storage.affine import AffineStore

__all__ = ["KINDS", "WARPS", "Plan", "columns_of", "make_plan"]

KINDS, WARPS = 6, 4
POINTERS = MAPS + 9
"""Addresses before those of pages."""
LOG2E = math.log2(math.e)
NUMBERS = struct.Struct(f"<{3 * MAPS}q5q3q6i3fI")
PARTS, KIND, RUN = struct.Struct(f"<{MAPS}Q{MAPS + 2}i"), struct.Struct("<4iIi4Bi"), struct.Struct("<4i")
TILE_BYTES, RUN_BYTES, PAGE_BYTES = 4, 64, 16
MASKS = {torch.bool: 1, torch.float32: 2, torch.bfloat16: 3, torch.float16: 4}
NEVER = 1 << 30
TILE, START = 4, 48
"""What a tile of codes costs, and what it costs a block to begin with another kind of tokens, as `weight_of` counts."""
FEW_TILE, FEW_START = 5, 18
"""Likewise for some warps of a block that serve a kind with few tiles, while the others keep the memory busy."""
NEW = Kind(kind_of(EXACT, EXACT)[0], 0, 0)
"""The kind of new tokens."""
_known: dict[tuple[object, ...], list[Kind]] = {}
"""The kinds that parts of some formats had, in order: a kernel serves them all, so that few are compiled."""


class Plan(NamedTuple):
    """All that is known of a launch before the addresses."""

    kernel: Kernel
    parts: int
    """Blocks of a line."""
    lines: int
    turns: int
    """Turns over the query rows of a KV head."""
    maps: tuple[int, ...]
    """The views of keys whose transforms queries go through, in the order of their numbers."""
    spaces: tuple[int, ...]
    """For each output the view of values whose transforms it goes through, -1 for none."""
    partial: int
    """Numbers that blocks write for each other."""
    numbers: bytes
    """The arguments are these, then addresses, then `layout`."""
    addresses: struct.Struct
    layout: bytes
    out: tuple[int, ...]
    """The shape of the output: `[batch, queries, heads, head_dim of values]`, of each space if there are several."""
    dtype: torch.dtype


def make_plan(query: Tensor, part: Part, mask: Tensor | None, places: Tensor | None, options: AttentionOptions) -> Plan:
    """Plan a launch.

    Raises:
        Declined: the kernels can't serve the part.
    """
    _check(query, part, mask)
    laid = lay_out(part, query)
    kinds, spaces = _kinds(laid, query, part)
    room = FEW if len(laid.runs) <= FEW[0] and len(laid.pages) <= FEW[1] else MANY
    if len(kinds) > KINDS or len(laid.runs) > room[0] or len(laid.pages) > room[1]:
        raise Declined(f"{len(laid.runs)} runs of tokens in {len(laid.pages)} pages and {len(kinds)} ways")
    batch, heads, queries, _ = query.shape
    new, out = 0 if part.new is None else part.new[0].shape[2], (batch, queries, heads, part.value_dim)
    rows = heads // part.kv_heads * queries
    variant = Variant(
        (query.shape[3], part.value_dim),
        4 if rows <= 4 else 8,
        query.dtype == torch.bfloat16,
        tuple(kind.name for kind in kinds),
        room,
        0 if mask is None else MASKS[mask.dtype],
        0 if places is None else places.element_size(),
        queries > 1 and new > 0 and (mask is None or mask.shape[3] != queries),
        options.softcap is not None,
        not options.alone or any(spaces),
        options.observer is not None,
    )
    kernel = kernel_of(variant, query.get_device())
    if not kernel.slots:
        raise Declined(f"a block needs {kernel.shared} bytes of shared memory, more than this card has")
    lines, turns = batch * part.kv_heads, -(-rows // variant.rows)
    costs = _in_line(laid.runs, kinds, spaces).costs
    parts = _blocks(lines * turns, kernel.slots, costs)
    lined = _in_line(laid.runs, kinds, spaces, sum(costs) // (WARPS * sum(parts)))
    slot = mask.shape[-1] - new if mask is not None else 0
    later = new - queries if variant.causal else NEVER
    body = _pack(laid, part, lined, parts, slot, -1 if places is not None else None, later, room[0])
    size_of = PARTS.size + KIND.size * len(kinds) + (TILE_BYTES + RUN_BYTES) * room[0] + PAGE_BYTES * room[1]
    return Plan(
        kernel,
        sum(parts),
        lines,
        turns,
        tuple(laid.maps[0]),
        tuple(laid.maps[1][space - 1] if space else -1 for space in spaces),
        0 if sum(parts) == 1 else lines * turns * sum(parts) * variant.rows * (part.value_dim + 1),
        _numbers(query, part, mask, places, options, sum(parts), len(spaces)),
        struct.Struct(f"<{POINTERS + len(laid.pages)}Q{8 * (room[1] - len(laid.pages))}x"),
        body.ljust(size_of, b"\0"),
        out if len(spaces) == 1 else (len(spaces), *out),
        torch.float32 if variant.wide else query.dtype,
    )


def _check(query: Tensor, part: Part, mask: Tensor | None) -> None:
    """Decline what kernels can't read."""
    for x in (query, *(part.new or ())):
        if x.dtype != query.dtype or x.stride(3) != 1 or any(n % 8 for n in x.stride()[:3]):
            raise Declined(f"numbers in {x.dtype} with strides {x.stride()}")
    if mask is not None and mask.dtype not in MASKS:
        raise Declined(f"a mask in {mask.dtype}")


def _numbers(
    query: Tensor,
    part: Part,
    mask: Tensor | None,
    places: Tensor | None,
    options: AttentionOptions,
    parts: int,
    spaces: int,
) -> bytes:
    """Strides and numbers as the kernel reads them; queries behind transforms are in order of KV heads."""
    batch, heads, queries, dim = query.shape
    mapped = (heads * queries * dim, queries * dim, dim)
    hidden = 0.0 if mask is None or mask.dtype == torch.bool else torch.finfo(mask.dtype).min / 2
    return NUMBERS.pack(
        *query.stride()[:3], *mapped * (MAPS - 1), *_steps(mask, 5), *_steps(places, 2)[:2],
        batch * queries * heads * part.value_dim,
        part.kv_heads, heads // part.kv_heads, queries, parts, columns_of(part, options), spaces,
        options.scaling * LOG2E, (options.softcap or 0.0) * LOG2E, hidden, _inverse(part.kv_heads),
    )  # fmt: skip


def _inverse(n: int) -> int:
    """What numbers below 2^20 are multiplied by, and shifted by 32, to divide them by n, if that is not 1."""
    return -(-(1 << 32) // n) & 0xFFFFFFFF


def columns_of(part: Part, options: AttentionOptions) -> int:
    """Columns of the scores that are written for an observer."""
    new = 0 if part.new is None else part.new[0].shape[2]
    return max(width_of(part) + new, 0 if options.observer is None else options.observer.room)


def _steps(x: Tensor | None, dims: int) -> list[int]:
    """Elements from one to the next along each dimension, 0 where all are the same."""
    if x is None or x.ndim == 1:
        return [0] * dims
    return [step if size > 1 else 0 for step, size in zip(x.stride(), x.shape, strict=True)]


def _kinds(laid: Laid, query: Tensor, part: Part) -> tuple[list[Kind], list[int]]:
    """The kinds that the kernel is to serve, in order of space, and the spaces of values in which tokens lie.

    Of a space those with exact tokens come first, of which there are few as a rule.
    """
    own = {run.kind for run in laid.runs}
    forms = tuple(
        tuple(sorted({affine_form(s) for s, *_ in views if isinstance(s, AffineStore) and s.parts["codes"].length}))
        for views in (part.keys, part.values)
    )
    like = query.dtype, query.shape[3], part.value_dim, forms, laid.many
    known = _known.get(like, [NEW])
    if not own.issubset(known):
        known = _known[like] = sorted(own.union(known), key=_order)
    return known, sorted({kind.space for kind in own})


def _order(kind: Kind) -> tuple[object, ...]:
    return kind.space, is_large(kind.name), -weight_of(kind.name), kind


class Lined(NamedTuple):
    """The tiles of a head, in a line for each space of values, as long as they cost; a block takes a stretch of it."""

    kinds: list[bytes]
    """What the kernel reads of each kind."""
    runs: list[tuple[Run, int]]
    """Those of one kind after those of the other, each with the tiles of its kind before it."""
    costs: list[int]
    """How long the line of each space is."""


def _in_line(runs: list[Run], kinds: list[Kind], spaces: list[int], share: int = 0) -> Lined:
    """Where kinds stand, with gaps for what it costs to begin with them; `share`: what a warp has to do, about."""
    found: list[bytes] = []
    ordered: list[tuple[Run, int]] = []
    costs, many = [0] * len(spaces), [False] * len(spaces)
    for kind in kinds:
        first, tiles, weight = len(ordered), 0, weight_of(kind.name)
        space = spaces.index(kind.space) if kind.space in spaces else 0
        for run in runs:
            if run.kind == kind:
                ordered.append((run, tiles))
                tiles += -(-run.tokens // run.tile)
        few = FEW_TILE * (2 if is_large(kind.name) else 1)
        warps = WARPS if many[space] else _warps(tiles, few, share)
        gap = FEW_START * warps if warps < WARPS else START if many[space] else 0
        if warps < WARPS:
            weight = few
        before = costs[space] + (gap if tiles else 0)
        if tiles:
            many[space] = many[space] or warps == WARPS
            costs[space] = before + tiles * weight
        stands = (first, len(ordered), tiles, weight, _inverse(weight), before, kind.query, space, warps, 0, FEW_START)
        found.append(KIND.pack(*stands))
    return Lined(found, ordered, costs)


def _warps(tiles: int, cost: int, share: int) -> int:
    """How many warps of a block serve a kind, so that they have time for it: all, unless its tiles are few."""
    for warps in (1, 2):
        if FEW_START + -(-tiles // warps) * cost <= 0.75 * share:
            return warps
    return WARPS


def _blocks(lines: int, slots: int, costs: list[int]) -> list[int]:
    """Into how many blocks the tokens of a head are split, for each space of values."""
    total = sum(costs)
    parts = _parts(lines, total, slots)
    if len(costs) == 1:
        return [parts]
    return [max(1, round(max(parts, len(costs)) * cost / total)) for cost in costs]


@functools.lru_cache(maxsize=256)
def _parts(lines: int, cost: int, slots: int) -> int:
    """Into how many blocks the tokens of a head are split: what a simple account of time finds best.

    In microseconds, as measured on an H100: the warps of a block take some 0.95 for a tile each, a block takes 4
    besides, and the merge of several 0.5, and 1.5 for each 32.
    """
    best, least = 1, math.inf
    for parts in range(1, max(1, min(256, -(-cost // (WARPS * TILE)))) + 1):
        waves = -(-lines * parts // slots)
        time = waves * (4.0 + 0.95 * (0.5 + cost / (parts * WARPS * TILE)))
        time += 0.5 + 1.5 * -(-parts // 32) if parts > 1 else 0.0
        if time < least:
            best, least = parts, time
    return best


def _pack(
    laid: Laid, part: Part, lined: Lined, parts: list[int], slot: int, placed: int | None, later: int, room: int
) -> bytes:
    """Blocks, kinds, runs and pages as the kernel reads them; there is room for so many runs."""
    last = laid.runs[-1] if part.new is not None else None
    bodies = []
    for run, _ in lined.runs:
        new = run is last
        column = slot if new else placed if placed is not None else run.at
        bodies.append(run.where + RUN.pack(run.tokens, run.at, column, later if new else NEVER))
    ends = [sum(parts[:i]) for i in range(len(parts) + 1)]
    steps = [-(-(cost << 32) // n) for cost, n in zip(lined.costs, parts, strict=True)]
    blocks = PARTS.pack(*steps, *[0] * (MAPS - len(steps)), *ends, *[ends[-1]] * (MAPS + 2 - len(ends)))
    tiles = struct.pack(f"<{len(bodies)}i", *(before for _, before in lined.runs)).ljust(TILE_BYTES * room, b"\0")
    runs = b"".join(bodies).ljust(RUN_BYTES * room, b"\0")
    return b"".join([blocks, *lined.kinds, tiles, runs, *laid.pages])
