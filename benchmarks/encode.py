"""What it costs to code a prompt, and to flush, in all layers of a cache: with the kernel, and by PyTorch.

Shapes are those of an 8-billion-parameter Llama, 8 KV heads of 128 in 32 layers. Times are medians, from an idle device
until it is idle again, so that whatever the host waits for is seen. Both ways must leave the same bytes.

    python benchmarks/encode.py
    python benchmarks/encode.py --recipes kivi best-2bit --batch 1 4 --tokens 8192
"""

from __future__ import annotations

import argparse
import hashlib
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

import torch
from arms import machine
from transformers import LlamaConfig

import kvpolicy
from kvpolicy.layer.layer import LayerCache, commit_all
from kvpolicy.storage import fused


def layers_of(recipe: str, count: int) -> list[LayerCache]:
    config = LlamaConfig(
        hidden_size=4096, num_attention_heads=32, num_key_value_heads=8, head_dim=128, num_hidden_layers=count
    )
    return [layer.tiers for layer in kvpolicy.make_cache(recipe, config).layers]


def timed(call: Callable[[], Any]) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e3


def launches(call: Callable[[], Any]) -> int:
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        call()
        torch.cuda.synchronize()
    return len([event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA])


def digest(layers: list[LayerCache]) -> str:
    found = hashlib.sha256()
    for layer in layers:
        for store in (store for stores in layer.stores.values() for store in stores if store is not None):
            for name, x in sorted(store.tensors().items()):
                found.update(name.encode() + x.contiguous().view(torch.uint8).cpu().numpy().tobytes())
    return found.hexdigest()[:16]


def run(recipe: str, keys: torch.Tensor, values: torch.Tensor, count: int, runs: int) -> tuple[str, str]:
    """A line of figures, and a digest of what is held."""
    prompts, flushes, layers = [], [], []
    for turn in range(runs + 1):
        layers = layers_of(recipe, count)

        def prompt(own: list[LayerCache] = layers) -> None:
            for layer in own:
                layer.add(keys, values)

        took = timed(prompt)
        steps = []
        for step in range(48):

            def flush(own: list[LayerCache] = layers, at: int = step) -> None:
                commit_all([[layer] for layer in own], 1)
                for layer in own:
                    layer.add(keys[:, :, at : at + 1], values[:, :, at : at + 1])

            steps.append(timed(flush))
        if turn:  # the first compiles
            prompts.append(took)
            flushes.append(sum(steps) / len(steps))
    own = layers_of(recipe, count)
    number = launches(lambda: [layer.add(keys, values) for layer in own])
    median = statistics.median(prompts), statistics.median(flushes)
    return f"prompt {median[0]:7.2f} ms, {number:6d} launches; a step {median[1]:6.3f} ms", digest(layers)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=["logquant", "kivi", "best-2bit", "best-3bit", "best-4bit"])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    print(machine("cuda"))
    wrong = False
    for batch in options.batch:
        # As a model gives them: heads side by side within a token.
        shape = (batch, options.tokens, 8, 128)
        keys, values = (torch.randn(shape, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for _ in range(2))
        for recipe in options.recipes:
            found, lines = [], []
            for name in ("kernel", "PyTorch"):
                alone = patch.object(fused, "_encoders", lambda device: ()) if name == "PyTorch" else nullcontext()
                with alone:
                    line, held = run(recipe, keys, values, options.layers, options.runs)
                found.append(held)
                lines.append(f"batch {batch}, {recipe:10} {name:8} {line}")
            if found[0] != found[1]:
                wrong, lines = True, [f"batch {batch}, {recipe:10} WRONG, the two leave other bytes: no times"]
            print("\n".join(lines), flush=True)
    if wrong:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
