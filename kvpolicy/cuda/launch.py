"""One layer's attention in one launch."""

from __future__ import annotations

import ctypes
import functools
import math
import struct
import warnings
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from kvpolicy.cuda.compile import FEW, MANY, Variant, compiled, missing, resources
from kvpolicy.cuda.sources import EXACT, Format, Run, format_of, kind_of, lay_out, new_piece, refuses_store, run_of

if TYPE_CHECKING:
    from kvpolicy.layer import Tiers
    from kvpolicy.placement import Placement
    from kvpolicy.scores import Observer

__all__ = ["HEAD_DIMS", "attend", "refuses"]

HEAD_DIMS = (64, 80, 96, 128, 256)
MOST_ROWS = 256
"""Query rows of a KV head (queries x query heads) at most; with more it is faster to decode the tokens once."""
KINDS = 6
WARPS = 4
LOG2E = math.log2(math.e)
HEADER, KIND = struct.Struct("<8q7q6i2f"), struct.Struct("<2q6i")
_LAST = struct.Struct("<4i")
RUN_BYTES = 128


class _Layer(NamedTuple):
    """What all layers of a placement have in common, for one type and shape of keys and values."""

    reasons: list[str]
    forms: dict[str, list[Format]]
    kinds: list[str]


class _Kernel(NamedTuple):
    function: Any
    shared: int
    slots: int
    """Blocks that the card holds at once."""


_layers: WeakKeyDictionary[Placement, dict[Any, _Layer]] = WeakKeyDictionary()
_counters: dict[tuple[int, int], Tensor] = {}


def refuses(tiers: Tiers, query: Tensor, new: tuple[Tensor, Tensor]) -> list[str]:
    """Why the kernels can't serve a layer; empty if they can, unless keys and values lie in too different orders."""
    found = _layer(tiers, query, new).reasons
    rows = query.shape[2] * (query.shape[1] // new[0].shape[1])
    return [*found, f"{rows} query rows for a KV head, more than {MOST_ROWS}"] if rows > MOST_ROWS else found


def _layer(tiers: Tiers, query: Tensor, new: tuple[Tensor, Tensor]) -> _Layer:
    memo = _layers.setdefault(tiers.placement, {})
    key = (query.dtype, new[0].shape[3], new[1].shape[3], query.device)
    found = memo.get(key)
    if found is None:
        found = memo[key] = _examine(tiers, query, new)
    return found


def _examine(tiers: Tiers, query: Tensor, new: tuple[Tensor, Tensor]) -> _Layer:
    reasons = _reasons(query, new)
    dims = {"keys": new[0].shape[3], "values": new[1].shape[3]}
    specs = tiers.placement.specs
    if not reasons:
        for side, dim in dims.items():
            found = {refuses_store(spec, dim, side) for spec in specs[side]}
            reasons += sorted(f"{side}: {reason}" for reason in found if reason)
    if reasons:
        return _Layer(reasons, {}, [])
    placement = tiers.placement
    forms = {
        side: [format_of(placement.store_spec(side, s), dims[side], query.dtype) for s in range(len(first))]
        for side, first in placement.first_tier.items()
    }
    by_tier = (
        (format_of(k, dims["keys"], query.dtype), format_of(v, dims["values"], query.dtype))
        for k, v in zip(specs["keys"], specs["values"], strict=True)
        if k != "evict"
    )
    return _Layer([], forms, sorted({kind_of(k, v)[0] for k, v in [(EXACT, EXACT), *by_tier]}))


def _reasons(query: Tensor, new: tuple[Tensor, Tensor]) -> list[str]:
    reasons = []
    dim = new[0].shape[3]
    if query.device.type != "cuda" or torch.version.cuda is None:
        return [f"device {query.device}"]
    if query.dtype not in (torch.float16, torch.bfloat16):
        reasons.append(f"type {query.dtype}")
    if dim not in HEAD_DIMS or new[1].shape[3] != dim:
        reasons.append(f"head_dim {dim} of keys and {new[1].shape[3]} of values")
    if torch.cuda.get_device_capability(query.device) < (8, 0):
        reasons.append("a card before compute capability 8.0")
    absent = missing()
    if absent and not reasons:
        reasons.append(absent)
        _warn(absent)
    return reasons


@functools.cache
def _warn(absent: str) -> None:
    """Once in a process."""
    warnings.warn(
        f"attention on compressed stores is slow on this GPU, since {absent}; use: pip install 'kvpolicy[cuda]'",
        stacklevel=2,
    )


def attend(
    tiers: Tiers,
    query: Tensor,
    new: tuple[Tensor, Tensor],
    mask: Tensor | None,
    scaling: float | None,
    softcap: float | None,
    sinks: Tensor | None,
    observer: Observer | None,
) -> Tensor | None:
    """What `kvpolicy.attend.attend` returns, of the same arguments; None where keys and values lie in too many runs."""
    layer = _layer(tiers, query, new)
    held = lay_out(tiers, layer.forms)
    if held is None:
        return None
    query, keys, values = _aligned(query), _aligned(new[0]), _aligned(new[1])
    batch, heads, queries, dim = query.shape
    kv_heads, tokens = keys.shape[1:3]
    end = tiers.settled + tokens  # above all positions held
    runs = [*held, run_of(end, tokens, new_piece(keys, end), new_piece(values, end))]
    shown, causal, places = _masked(tiers, mask, queries, tokens, kv_heads, observer is not None)
    laid = _by_kind(runs, layer.kinds, places, tokens - queries if causal else -1)
    if laid is None:
        return None
    tiles, body, count = laid
    rows = heads // kv_heads * queries
    size = 4 if rows <= 4 else 8
    masked = 0 if shown is None else 1 if shown.dtype == torch.uint8 else 2
    flags = (masked, causal, softcap is not None, observer is not None)
    variant = Variant(dim, size, query.dtype == torch.bfloat16, tuple(layer.kinds), count, *flags)
    kernel = _kernel(variant, query.device.index)
    if kernel is None:
        return None
    lines, turns = batch * kv_heads, -(-rows // size)
    parts = _parts(lines * turns, tiles, kernel.slots)
    out = query.new_empty((batch, queries, heads, dim))
    partial = counters = scores = sums = None
    stream = torch.cuda.current_stream(query.device).cuda_stream
    if parts > 1:
        partial = query.new_empty(lines * turns * parts * size * (dim + 2), dtype=torch.float32)
        counters = _counter(query, stream, lines * turns)
    if observer is not None:
        assert places is not None
        scores = query.new_empty((batch, kv_heads, rows, places.width), dtype=torch.float32)
        sums = query.new_empty((batch, kv_heads, rows, 1), dtype=torch.float32)
    sinks = None if sinks is None else sinks.float().contiguous()
    pointers = [0 if x is None else x.data_ptr() for x in (query, shown, out, partial, scores, sums, sinks, counters)]
    numbers = (kv_heads, heads // kv_heads, queries, parts, places.width if places is not None else 0, 0)
    scales = ((dim**-0.5 if scaling is None else scaling) * LOG2E, (softcap or 0.0) * LOG2E)
    header = HEADER.pack(*pointers, *query.stride()[:3], *_strides(shown), *numbers, *scales)
    _launch(kernel, header + body, (parts, lines, turns), stream, query.device.index)
    if observer is not None and scores is not None and sums is not None:
        shaped = scores.view(batch, kv_heads, -1, queries, scores.shape[3])
        visible = shaped > -torch.inf
        scores.sub_(sums).exp2_()
        observer.watch(torch.arange(queries) + tokens - queries, shaped, visible, slice(0, kv_heads), kv_heads)
    return out


def _strides(mask: Tensor | None) -> list[int]:
    """Elements from row to row, KV head, query head and query of a mask; 0 where it is the same for all."""
    if mask is None:
        return [0] * 4
    return [step if size > 1 else 0 for step, size in zip(mask.stride()[:4], mask.shape[:4], strict=True)]


def _aligned(x: Tensor) -> Tensor:
    """`x` as the kernels read it: 16 bytes at a time."""
    row, head, token, one = x.stride()
    fine = one == 1 and not (row % 8 or head % 8 or token % 8) and x.data_ptr() % 16 == 0
    return x if fine else x.clone(memory_format=torch.contiguous_format)


class _Places(NamedTuple):
    """The columns of mask and scores."""

    width: int
    sorted: Any
    """Where runs stand by position: the positions held, ascending. None: they stand in columns."""


def _masked(
    tiers: Tiers, mask: Tensor | None, queries: int, new: int, kv_heads: int, scored: bool
) -> tuple[Tensor | None, bool, _Places | None]:
    """The mask in order of columns, whether later tokens are hidden, and the columns, where anything needs them."""
    from kvpolicy.attend import as_mask, gathered

    shaped = as_mask(mask, tiers.settled + new, kv_heads)
    causal = queries > 1 and (shaped is None or shaped.shape[3] != queries)
    gaps = tiers.ragged is not None and any(t is not None and t.gaps for t in tiers.ragged.tables["keys"])
    if shaped is None and not gaps and not scored:
        return None, causal, None
    columns = tiers.columns()
    by_position = tiers.ragged is None and not tiers.placement.alike
    places = _Places(columns.width + new, columns.positions().numpy() if by_position else None)
    part = gathered(shaped, columns, new)
    if part is None:
        return None, causal, places
    if part.shape[-1] < places.width:
        part = torch.nn.functional.pad(part, (0, places.width - part.shape[-1]), value=True)
    if part.dtype == torch.bool:
        part = part.contiguous().view(torch.uint8)
    else:
        hidden = part <= torch.finfo(part.dtype).min / 2
        part = part.float().masked_fill_(hidden, -torch.inf).contiguous()
    return part, causal, places


def _by_kind(runs: list[Run], kinds: list[str], places: _Places | None, causal: int) -> tuple[int, bytes, int] | None:
    """Tiles in all, kinds and runs as the kernel reads them, and for how many runs it is compiled."""
    sets: dict[str, list[Run]] = {kind: [] for kind in kinds}
    for run in runs:
        if run.kind not in sets:
            kinds.append(run.kind)
            sets[run.kind] = []
        sets[run.kind].append(run)
    if len(sets) > KINDS or len(runs) > MANY:
        return None
    count = FEW if len(runs) <= FEW else MANY
    heads, bodies, first, tiles = [], [], 0, 0
    for kind in kinds:
        own = sets[kind]
        of_kind = 0
        for run in own:
            last = run is runs[-1]
            later = causal if last and causal >= 0 else 1 << 30
            bodies += [run.where, _LAST.pack(run.tokens, of_kind, _column(run, last, places), later)]
            of_kind += -(-run.tokens // run.tile)
        channels = own[0].channels if own else (0, 0, 0, 0)
        heads.append(KIND.pack(*channels, first, first + len(own), of_kind, _weight(kind)))
        first, tiles = first + len(own), tiles + of_kind
    return tiles, b"".join(heads + bodies).ljust(KIND.size * len(kinds) + RUN_BYTES * count, b"\0"), count


@functools.lru_cache(maxsize=256)
def _weight(kind: str) -> int:
    """What a tile costs, about: with exact tokens there are more bytes, and fewer tiles on their way."""
    return 8 if kind.count("Exact") == 2 else 6 if "Exact" in kind else 4


def _column(run: Run, last: bool, places: _Places | None) -> int:
    if places is None:
        return 0
    if last:
        return places.width - run.tokens
    return run.at if places.sorted is None else int(np.searchsorted(places.sorted, run.at))


@functools.lru_cache(maxsize=256)
def _parts(lines: int, tiles: int, slots: int) -> int:
    """Into how many blocks the tokens of a head are split: what a simple account of time finds best.

    A tile takes a warp some 0.7 us where a card is full, and a block some 3 us apart from them.
    """
    best, least = 1, math.inf
    for parts in range(1, max(1, min(256, -(-tiles // WARPS))) + 1):
        waves = -(-lines * parts // slots)
        time = waves * (3.0 + 0.7 * -(-tiles // (parts * WARPS))) + 0.01 * parts
        if time < least:
            best, least = parts, time
    return best


def _counter(like: Tensor, stream: int, lines: int) -> Tensor:
    """A zero for each line, to which the kernel returns them; one set for each stream."""
    key = (like.device.index, stream)
    found = _counters.get(key)
    if found is None or found.numel() < lines:
        with torch.inference_mode(False):
            found = _counters[key] = torch.zeros(max(lines, 4096), dtype=torch.int32, device=like.device)
    return found


@functools.cache
def _kernel(variant: Variant, device: int) -> _Kernel | None:
    """None where the card has too little shared memory."""
    from cuda.bindings import driver

    major, minor = torch.cuda.get_device_capability(device)
    cubin = compiled(variant, f"sm_{major}{minor}")
    shared = resources(cubin).shared
    limit = driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
    if shared > _checked(driver.cuDeviceGetAttribute(limit, _checked(driver.cuDeviceGet(device)))):
        return None
    with torch.cuda.device(device):
        library = _checked(driver.cuLibraryLoadData(cubin, [], [], 0, [], [], 0))
        function = _checked(driver.cuKernelGetFunction(_checked(driver.cuLibraryGetKernel(library, b"attend"))))
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        _checked(driver.cuFuncSetAttribute(function, attribute, shared))
        blocks = _checked(driver.cuOccupancyMaxActiveBlocksPerMultiprocessor(function, 32 * WARPS, shared))
    blocks = max(1, min(blocks, variant.blocks))  # more of them read in too many places at once
    return _Kernel(function, shared, blocks * torch.cuda.get_device_properties(device).multi_processor_count)


def _launch(kernel: _Kernel, plan: bytes, grid: tuple[int, int, int], stream: int, device: int) -> None:
    from cuda.bindings import driver

    buffer = ctypes.create_string_buffer(plan, len(plan))
    arguments = (ctypes.c_void_p * 1)(ctypes.addressof(buffer))
    where = (32 * WARPS, 1, 1, kernel.shared, stream, ctypes.addressof(arguments), 0)
    if torch.cuda.current_device() != device:
        with torch.cuda.device(device):
            _checked(driver.cuLaunchKernel(kernel.function, *grid, *where))
        return
    _checked(driver.cuLaunchKernel(kernel.function, *grid, *where))


def _checked(result: tuple[Any, ...]) -> Any:
    from cuda.bindings import driver

    if result[0] != driver.CUresult.CUDA_SUCCESS:
        _, text = driver.cuGetErrorString(result[0])
        raise RuntimeError(f"CUDA: {text.decode() if text else result[0]}")
    return result[1] if len(result) > 1 else None
