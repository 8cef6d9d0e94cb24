"""Attention of one layer on compressed stores on a GPU, against flash attention. `gpu_model.py` times whole models.

    python benchmarks/gpu.py

Random data. Times are medians of replayed graphs; `cold` goes round several layers, as a model does, so that no cache
of the card holds the last one's tokens. A ratio is printed for checked results alone.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from kvpolicy.attention import backend
from kvpolicy.attention.attend import attend
from kvpolicy.layer.held import Reading
from kvpolicy.layer.layer import LayerCache
from kvpolicy.placement.planner import Placement
from kvpolicy.placement.step import Step
from kvpolicy.recipe.load import load_recipe

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
RECIPES: dict[str, tuple[str, dict[str, Any]]] = {
    "logquant": ("logquant", {}),
    "kivi": ("kivi", {}),
    "4 bits": ("logquant", {"nbits": 4}),
}
SHAPES = ((16, 16384), (1, 131072), (16, 4096), (1, 16384), (1, 4096))
LARGEST_ERROR = 4e-3


def timed(run: Callable[[int], Any], layers: int, stream: torch.cuda.Stream) -> float:
    """Microseconds of a call, the median of replays of a graph that calls `run` for one layer after the other."""
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
            times.append(begin.elapsed_time(end) / calls * 1e3)
    return statistics.median(times[2:])


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def filled(recipe: str, params: dict[str, Any], batch: int, tokens: int) -> LayerCache:
    placement = Placement(load_recipe(recipe, **params).tiers)
    tiers = LayerCache(Step.first(placement), None, Reading(attached=True))
    tiers.add(drawn(batch, KV_HEADS, tokens, HEAD_DIM), drawn(batch, KV_HEADS, tokens, HEAD_DIM))
    return tiers


def held(tiers: LayerCache) -> int:
    return sum(sum(s.bytes().values()) for side in tiers.stores.values() for s in side if s is not None)


def by_reference(tiers: LayerCache, query: Tensor, new: tuple[Tensor, Tensor]) -> Tensor:
    others, backend.others = backend.others, tuple
    try:
        return attend(tiers, query.float(), new)
    finally:
        backend.others = others


def host_time(run: Callable[[int], Any], layers: int) -> float:
    """Microseconds of the host for a call, while the device has nothing to wait for: the least of some."""
    best = float("inf")
    for _ in range(10):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for call in range(20):
            run(call % layers)
        best = min(best, (time.perf_counter() - begin) / 20 * 1e6)
    torch.cuda.synchronize()
    return best


def flash_times(batch: int, tokens: int, layers: int, query: Tensor, stream: torch.cuda.Stream) -> tuple[float, float]:
    keys = [drawn(batch, KV_HEADS, tokens + 1, HEAD_DIM) for _ in range(layers)]
    values = [drawn(batch, KV_HEADS, tokens + 1, HEAD_DIM) for _ in range(layers)]

    def run(layer: int) -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return scaled_dot_product_attention(query, keys[layer], values[layer], enable_gqa=True)

    return timed(run, 1, stream), timed(run, layers, stream)


def one_layer(batch: int, tokens: int, stream: torch.cuda.Stream) -> None:
    layers = 1 if batch * tokens > 200_000 else 6
    query = drawn(batch, 1, HEADS, HEAD_DIM).transpose(1, 2)
    new = (drawn(batch, KV_HEADS, 1, HEAD_DIM), drawn(batch, KV_HEADS, 1, HEAD_DIM))
    flash = flash_times(batch, tokens, layers, query, stream)
    exact = 2 * batch * KV_HEADS * (tokens + 1) * HEAD_DIM * 2
    print(f"batch {batch}, {tokens:,} tokens: flash attention {flash[0]:.1f} us, cold {flash[1]:.1f}", flush=True)
    for name, (recipe, params) in RECIPES.items():
        tiers = [filled(recipe, params, batch, tokens) for _ in range(layers)]
        for one in tiers:
            one.stage(*new)

        def run(layer: int, tiers: list[LayerCache] = tiers) -> Tensor:
            return attend(tiers[layer], query, new)

        found = run(0)
        if tiers[0].backends != ("cuda",):
            print(f"  {name}: not served by the kernels: no times")
            continue
        right = by_reference(tiers[0], query, new)
        error = float((found.float() - right).norm() / right.norm())
        if not error < LARGEST_ERROR:
            print(f"  {name}: WRONG, error {error:.1e}: no times")
            continue
        warm, cold, host = timed(run, 1, stream), timed(run, layers, stream), host_time(run, layers)
        size = held(tiers[0])
        print(
            f"  {name}: {warm:.1f} us, {flash[0] / warm:.2f} x; cold {cold:.1f} us, {flash[1] / cold:.2f} x "
            f"(by bytes at most {exact / size:.2f}); {size / cold / 1e6:.2f} TB/s; host {host:.0f} us; "
            f"error {error:.1e}",
            flush=True,
        )


def card() -> str:
    """What the figures were measured on; cuDNN's attention is off from now on."""
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a CUDA device, found none")
    torch.backends.cuda.enable_cudnn_sdp(False)  # it plans anew for each length
    properties = torch.cuda.get_device_properties(0)
    return (
        f"{properties.name}, {properties.multi_processor_count} multiprocessors; torch {torch.__version__}, "
        f"CUDA {torch.version.cuda}, transformers {transformers.__version__}; {HEADS} query and {KV_HEADS} KV heads of "
        f"{HEAD_DIM}, bfloat16"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", type=int, default=len(SHAPES), help="how many shapes of a layer")
    arguments = parser.parse_args()
    print(card())
    stream = torch.cuda.Stream()
    with torch.no_grad():
        for batch, tokens in SHAPES[: arguments.shapes]:
            one_layer(batch, tokens, stream)


if __name__ == "__main__":
    main()
