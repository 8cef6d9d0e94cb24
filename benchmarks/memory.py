"""Peak memory of a decode step of an attached model, per layer: what a step allocates beyond what the cache holds.

The bound that is printed is 5% of a whole model's compressed cache, 32 layers like this one, plus 4 MB.

    python benchmarks/memory.py
    python benchmarks/memory.py --device cuda
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from itertools import product
from pathlib import Path

import torch
from arms import DTYPES, HEAD_DIM, HEADS, KV_HEADS, Ours, data, machine, ours
from torch.profiler import ProfilerActivity, profile

LAYERS = 32


def peak(step: Callable[[], None], device: str) -> int:
    """Most bytes that `step` has allocated at any time, what it keeps included."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        step()
    assert seen.profiler is not None
    assert seen.profiler.kineto_results is not None
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def measure(
    recipe: str, tokens: int, batch: int, nbits: int, dtype: str, options: argparse.Namespace
) -> tuple[float, float, float]:
    """Megabytes: the most of any step, the compressed cache of the whole model, the bound."""
    like = (batch, DTYPES[dtype], options.device)
    with torch.no_grad():
        arm = Ours(recipe, ours(recipe, nbits), data(tokens, 0, *like), attend=True)
        keys, values = data(options.steps + 2, 1, *like)

        def step(i: int) -> None:
            arm.step(keys[:, :, i : i + 1], values[:, :, i : i + 1])

        step(0)
        peak(lambda: step(1), options.device)  # what is allocated once
        most = max(peak(lambda i=i: step(i), options.device) for i in range(2, options.steps + 2))
    whole = LAYERS * arm.cache.memory().bytes / 1e6
    return most / 1e6, whole, 0.05 * whole + 4


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 16384, 65536])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4], help="rows of the batch")
    parser.add_argument("--most", type=int, default=1 << 18, help="skip sizes of more tokens in all rows together")
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--recipes", nargs="+", default=["logquant", "kivi"])
    parser.add_argument("--nbits", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--steps", type=int, default=130, help="decode steps, of which the worst counts")
    parser.add_argument("--md", type=Path, help="write the table here")
    return parser.parse_args()


def main() -> None:
    options = parse()
    about = (
        f"{machine(options.device)}; per layer, {HEADS} query heads, {KV_HEADS} key-value heads, head_dim {HEAD_DIM}; "
        f"the worst of {options.steps} steps"
    )
    lines = ["| recipe | nbits | dtype | batch |", "|---|---:|---|---:|"]
    for tokens in options.tokens:
        lines[0] += f" {tokens:,} tokens: peak, MB | bound, MB |"
        lines[1] += "---:|---:|"
    print("\n".join([about, "", *lines]), flush=True)
    for recipe, dtype, batch, nbits in product(options.recipes, options.dtype, options.batch, options.nbits):
        cells = [recipe, str(nbits), dtype, str(batch)]
        for tokens in options.tokens:
            fits = tokens * batch <= options.most
            found = measure(recipe, tokens, batch, nbits, dtype, options) if fits else None
            cells += ["", ""] if found is None else [f"{found[0]:.1f}", f"{found[2]:.1f}"]
        lines.append(f"| {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    if options.md:
        options.md.parent.mkdir(parents=True, exist_ok=True)
        options.md.write_text("\n".join([f"{about}.", "", *lines]) + "\n")


if __name__ == "__main__":
    main()
