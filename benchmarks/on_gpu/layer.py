"""Attention of one layer on compressed stores, against flash attention on the same number of tokens.

Random data. Times are medians of replayed graphs; `cold` goes round several layers, as a model does, so that no cache
of the card holds the last one's tokens.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from kvpolicy.attention.attend import attend
from kvpolicy.layer.held import Reading
from kvpolicy.layer.layer import LayerCache
from kvpolicy.placement.planner import Placement
from kvpolicy.placement.step import Step
from kvpolicy.recipe.load import load_recipe

from .card import HEAD_DIM, HEADS, KV_HEADS, drawn, exact_bytes, release
from .checks import attention_bound, by_reference, distance
from .rows import Book, Check, Row

RECIPES: dict[str, tuple[str, dict[str, Any]]] = {
    "logquant": ("logquant", {}),
    "kivi": ("kivi", {}),
    "logquant, 4 bits": ("logquant", {"nbits": 4}),
}
SHAPES = ((16, 16384), (1, 131072), (16, 4096), (1, 16384), (1, 4096))
FLASH = "flash attention"


def timed(run: Callable[[int], Any], layers: int, stream: torch.cuda.Stream) -> float:
    """Seconds of a call, the median of replays of a graph that calls `run` for one layer after the other."""
    calls = layers * max(1, 24 // layers)
    with torch.cuda.stream(stream):
        for layer in range(layers):
            run(layer)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for call in range(calls):
                run(call % layers)
        times = []
        for _ in range(12):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record(stream)
            graph.replay()
            end.record(stream)
            torch.cuda.synchronize()
            times.append(begin.elapsed_time(end) / calls / 1e3)
    return statistics.median(times[2:])


def filled(recipe: str, params: dict[str, Any], batch: int, tokens: int) -> LayerCache:
    placement = Placement(load_recipe(recipe, **params).tiers)
    tiers = LayerCache(Step.first(placement), None, Reading(attached=True))
    tiers.add(drawn(batch, KV_HEADS, tokens, HEAD_DIM), drawn(batch, KV_HEADS, tokens, HEAD_DIM))
    return tiers


def held(tiers: LayerCache) -> int:
    return sum(sum(s.bytes().values()) for side in tiers.stores.values() for s in side if s is not None)


def host_time(run: Callable[[int], Any], layers: int) -> float:
    """Seconds of the host for a call, while the device has nothing to wait for: the least of some."""
    best = float("inf")
    for _ in range(10):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for call in range(20):
            run(call % layers)
        best = min(best, (time.perf_counter() - begin) / 20)
    torch.cuda.synchronize()
    return best


def flash_times(batch: int, tokens: int, layers: int, query: Tensor, stream: torch.cuda.Stream) -> tuple[float, float]:
    keys = [drawn(batch, KV_HEADS, tokens + 1, HEAD_DIM) for _ in range(layers)]
    values = [drawn(batch, KV_HEADS, tokens + 1, HEAD_DIM) for _ in range(layers)]

    def run(layer: int) -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return scaled_dot_product_attention(query, keys[layer], values[layer], enable_gqa=True)

    return timed(run, 1, stream), timed(run, layers, stream)


def one_arm(row: Row, layers: int, query: Tensor, flash: tuple[float, float], stream: torch.cuda.Stream) -> Row:
    recipe, params = RECIPES[row.arm]
    new = (drawn(row.batch, KV_HEADS, 1, HEAD_DIM), drawn(row.batch, KV_HEADS, 1, HEAD_DIM))
    tiers = [filled(recipe, params, row.batch, row.tokens) for _ in range(layers)]
    for one in tiers:
        one.stage(*new)

    def run(layer: int) -> Tensor:
        return attend(tiers[layer], query, new)

    found = run(0)
    if tiers[0].backends != ("cuda",):
        row.failed = f"served by {tiers[0].backends}, not by the kernels"
        return row
    with by_reference():
        right = attend(tiers[0], query.float(), new)
    row.checks = [Check("attention", distance(found, right), attention_bound(query.dtype))]
    if row.wrong:
        return row
    warm, cold, size = timed(run, 1, stream), timed(run, layers, stream), held(tiers[0])
    row.seconds, row.base = warm, (row.batch, flash[0])
    row.more = {
        "times as fast": flash[0] / warm,
        "cold us": cold * 1e6,
        "cold times as fast": flash[1] / cold,
        "at most, by bytes": row.batch * exact_bytes(1, row.tokens + 1) / size,
        "TB/s": size / cold / 1e12,
        "host us": host_time(run, layers) * 1e6,
    }
    return row


def layer(book: Book, shapes: tuple[tuple[int, int], ...] = SHAPES) -> None:
    stream = torch.cuda.Stream()
    for batch, tokens in shapes:
        layers = 1 if batch * tokens > 200_000 else 6
        query = drawn(batch, 1, HEADS, HEAD_DIM).transpose(1, 2)
        base = Row("layer", FLASH, batch, tokens)
        flash = book.attempt(base, lambda n=layers, q=query, b=batch, t=tokens: flash_times(b, t, n, q, stream))
        if flash is None:
            continue
        base.seconds, base.more = flash[0], {"cold us": flash[1] * 1e6}
        book.add(base)
        for name in RECIPES:
            row = Row("layer", name, batch, tokens)
            found = book.attempt(row, lambda r=row, n=layers, q=query, f=flash: one_arm(r, n, q, f, stream))
            if found is not None:
                book.add(found)
            release()
