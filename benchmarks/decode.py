"""Time one decode step of a cache, per layer, against the caches of transformers.

A decode step is an update with one token that returns all keys and values as dense tensors: what attention of any
implementation needs. The layer is that of an 8-billion-parameter Llama: 32 query heads, 8 key-value heads of 128
channels, batch 1. All caches of one length and dtype are filled with the same random prompt and then take turns, ten
steps at a time, so that whatever else the machine does meets all alike. A run is `--steps` steps, so that flushes
count; what is printed is the median over the runs of each run's mean.

`store` is the part of an update that stores and descends alone: nothing is decoded for attention.

With `--attend` a step is the update and the attention of one query over all tokens: transformers' own
`sdpa_attention_forward` without a mask for the peers, the stores read directly for kvpolicy, as in an attached model.

    python benchmarks/decode.py --tokens 16384 --md table.md
    python benchmarks/decode.py --attend --batch 4
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, QuantizedCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from kvpolicy import make_cache
from kvpolicy.attention import attention_forward

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
RESIDUAL = 128
SLICE = 10
"""Steps that a cache takes before the next one has its turn."""
SLOW_STEPS = 16
"""Steps of HQQ around a flush; its flush runs an optimiser over the whole cache."""
REFERENCE = "QuantizedCache quanto"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass
class Row:
    """One cache at one length and dtype."""

    tokens: int
    dtype: str
    cache: str
    ms: float
    runs: list[float]
    bits: float
    """Bits per number held, everything included but scratch space, which all layers share."""
    scratch_mb: float = 0.0
    store_ms: float | None = None
    steps: int = 0
    versus: dict[str, float] = field(default_factory=dict)


def clock() -> float:
    """Seconds: of the processor with one thread, so that a busy machine may be measured on too; else of the wall."""
    return time.thread_time() if torch.get_num_threads() == 1 else time.perf_counter()


def config() -> LlamaConfig:
    return LlamaConfig(
        hidden_size=HEADS * HEAD_DIM,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        num_hidden_layers=1,
        intermediate_size=HEAD_DIM,
    )


class Module:
    """What the attention functions ask of a layer of the model."""

    num_key_value_groups = HEADS // KV_HEADS
    is_causal = True
    layer_idx = 0


def data(tokens: int, dtype: torch.dtype, seed: int, batch: int = 1) -> tuple[Tensor, Tensor]:
    shape = (2, batch, KV_HEADS, tokens, HEAD_DIM)
    keys, values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return keys, values


def held_bytes(thing: Any) -> int:
    """Bytes of all tensors inside a peer's layer, wrapper tensors opened."""
    if isinstance(thing, Tensor):
        if hasattr(thing, "__tensor_flatten__"):
            return sum(held_bytes(getattr(thing, name)) for name in thing.__tensor_flatten__()[0])
        return thing.numel() * thing.element_size()
    if isinstance(thing, dict):
        return sum(map(held_bytes, thing.values()))
    return sum(map(held_bytes, thing)) if isinstance(thing, (list, tuple)) else 0


class Arm:
    """A cache being timed."""

    steps: int | None = None
    attention = staticmethod(sdpa_attention_forward)

    def __init__(self, name: str, make: Callable[[], Any], prompt: tuple[Tensor, Tensor], attend: bool = False) -> None:
        self.name, self.cache = name, make()
        self.layer = self.cache.layers[0]
        shape = (prompt[0].shape[0], HEADS, 1, HEAD_DIM)
        self.query = torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(prompt[0]) if attend else None
        self.seconds: list[float] = []
        self.batch = prompt[0].shape[0]
        self.cache.update(*prompt, 0)

    def step(self, keys: Tensor, values: Tensor) -> None:
        start = clock()
        found = self.cache.update(keys, values, 0)
        if self.query is not None:
            found = self.attention(Module, self.query, *found, None, scaling=HEAD_DIM**-0.5)
        self.seconds.append(clock() - start)
        del found  # freed outside the time

    def mean(self) -> float:
        """Milliseconds per step of the run that ends here."""
        mean, self.seconds = statistics.fmean(self.seconds) * 1e3, []
        return mean

    def bits(self) -> float:
        seen: int = self.layer.get_seq_length()
        numbers = 2 * seen * KV_HEADS * HEAD_DIM * self.batch
        return 8 * held_bytes(vars(self.layer)) / numbers

    def scratch(self) -> float:
        return 0.0


class Ours(Arm):
    attention = staticmethod(partial(attention_forward, "sdpa"))

    def __init__(self, name: str, make: Callable[[], Any], prompt: tuple[Tensor, Tensor], attend: bool = False) -> None:
        super().__init__(name, make, prompt, attend)
        self.layer.attached = attend

    def bits(self) -> float:
        return float(self.cache.memory().bits_per_value)

    def scratch(self) -> float:
        return float(self.cache.scratch.bytes) / 1e6


class Store(Ours):
    """Storing and descending alone."""

    def step(self, keys: Tensor, values: Tensor) -> None:
        with torch.no_grad():
            start = clock()
            self.layer.tiers.add(keys, values)
            self.seconds.append(clock() - start)


class Slow(Arm):
    """A peer timed over fewer steps: those around a flush, the flush weighted as often as it comes."""

    steps = SLOW_STEPS

    def mean(self) -> float:
        flush, rest = max(self.seconds), sorted(self.seconds)[:-1]
        self.seconds = []
        return (flush + (RESIDUAL - 1) * statistics.fmean(rest)) / RESIDUAL * 1e3

    def approach(self, keys: Tensor, values: Tensor) -> None:
        """Fill the residual up to half a window before its flush, in one update."""
        held = self.layer.keys.shape[-2] if self.layer.keys.dim() == 4 else 0
        n = RESIDUAL - SLOW_STEPS // 2 - held
        self.cache.update(keys[:, :, :n], values[:, :, :n], 0)


def arms_of(options: argparse.Namespace, prompt: tuple[Tensor, Tensor]) -> list[Arm]:
    quantized = partial(QuantizedCache, config=config(), nbits=2, residual_length=RESIDUAL, q_group_size=64)
    attend = options.attend
    arms: list[Arm] = [Ours(f"kvpolicy {r}", partial(make_cache, r, config()), prompt, attend) for r in options.recipes]
    arms.append(Arm("DynamicCache", partial(DynamicCache, config=config()), prompt, attend))
    arms.append(Arm(REFERENCE, partial(quantized, "quanto"), prompt, attend))
    if not options.no_hqq:
        arms.append(Slow("QuantizedCache HQQ", partial(quantized, "hqq"), prompt, attend))
    return arms


def turns(arms: Sequence[Arm], steps: int, feed: tuple[Tensor, Tensor]) -> None:
    """Let the caches take `steps` steps each, a few at a time in turn."""
    keys, values = feed
    for slow in (arm for arm in arms if isinstance(arm, Slow)):
        slow.approach(keys, values)
    for first in range(0, steps, SLICE):
        for arm in arms:
            last = min(first + SLICE, arm.steps or steps)
            for i in range(first, last):
                arm.step(keys[:, :, i : i + 1], values[:, :, i : i + 1])


def measure(tokens: int, dtype: str, options: argparse.Namespace) -> list[Row]:
    prompt = data(tokens, DTYPES[dtype], 0, options.batch)
    feed = data(max(options.steps, RESIDUAL), DTYPES[dtype], 1, options.batch)
    with torch.no_grad():
        arms = arms_of(options, prompt)
        for arm in arms:
            arm.step(feed[0][:, :, :1], feed[1][:, :, :1])
            arm.seconds = []
        runs: dict[str, list[float]] = {arm.name: [] for arm in arms}
        for _ in range(options.runs):
            turns(arms, options.steps, feed)
            for arm in arms:
                runs[arm.name].append(arm.mean())
    rows = [
        Row(tokens, dtype, arm.name, statistics.median(runs[arm.name]), runs[arm.name], arm.bits(), arm.scratch())
        for arm in arms
    ]
    peers = {row.cache: row.ms for row in rows if not row.cache.startswith("kvpolicy")}
    for row, arm in zip(rows, arms, strict=True):
        row.steps = arm.steps or options.steps
        row.versus = {name: row.ms / ms for name, ms in peers.items()}
    return rows


def measure_store(rows: list[Row], dtype: str, options: argparse.Namespace) -> None:
    """Time storing and descending at all lengths, in turn, for each recipe."""
    feed = data(options.steps, DTYPES[dtype], 1)
    mine = [row for row in rows if row.dtype == dtype and row.cache.startswith("kvpolicy")]
    for recipe in options.recipes:
        of = [row for row in mine if row.cache == f"kvpolicy {recipe}"]
        with torch.no_grad():
            make = partial(make_cache, recipe, config())
            arms = [Store(str(row.tokens), make, data(row.tokens, DTYPES[dtype], 0)) for row in of]
            runs: list[list[float]] = []
            for _ in range(2 * options.runs + 2):
                turns(arms, options.steps, feed)
                runs.append([arm.mean() for arm in arms])
        for row, run in zip(of, zip(*runs[1:], strict=True), strict=True):  # the first one warmed up
            row.store_ms = statistics.median(run)


def environment(options: argparse.Namespace) -> str:
    packages = ("kvpolicy", "torch", "transformers", "optimum-quanto", "hqq")
    threads = f"{n} threads, wall time" if (n := torch.get_num_threads()) > 1 else "1 thread, processor time"
    found = ", ".join(f"{name} {version(name)}" for name in packages)
    step = "update and attention" if options.attend else "an update"
    return (
        f"{found}, Python {platform.python_version()}; {threads}; per layer, {HEADS} query heads, {KV_HEADS} key-value "
        f"heads, head_dim {HEAD_DIM}, batch {options.batch}; {options.runs} interleaved runs of {options.steps} steps "
        f"(HQQ: {SLOW_STEPS} around a flush, the flush counted once in {RESIDUAL}); a step is {step}; peers with nbits "
        f"2, q_group_size 64, residual_length {RESIDUAL}"
    )


def table(rows: Iterable[Row]) -> str:
    lines = [
        "| tokens | dtype | cache | ms per step | of quanto's | of HQQ's | of DynamicCache's | store, ms | bits "
        "| scratch, MB |",
        "|---:|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for r in rows:
        ratios = [r.versus.get(p) for p in (REFERENCE, "QuantizedCache HQQ", "DynamicCache")]
        shown = [f"{x:.2f}" if x is not None else "" for x in (*ratios, r.store_ms)]
        cells = [f"{r.tokens:,}", r.dtype, r.cache, f"{r.ms:.1f}", *shown, f"{r.bits:.2f}", f"{r.scratch_mb:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def store_ratios(rows: Sequence[Row]) -> list[str]:
    """What storing costs at the greatest length, as a multiple of that at the least."""
    lines = []
    for dtype, cache in dict.fromkeys((r.dtype, r.cache) for r in rows if r.store_ms is not None):
        of = sorted((r for r in rows if (r.dtype, r.cache) == (dtype, cache)), key=lambda r: r.tokens)
        if len(of) > 1:
            ratio = (of[-1].store_ms or 0.0) / (of[0].store_ms or 1.0)
            lines.append(f"{cache}, {dtype}: storing at {of[-1].tokens:,} tokens / at {of[0].tokens:,}: {ratio:.2f}")
    return lines


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 16384, 65536])
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--recipes", nargs="+", default=["logquant", "kivi"])
    parser.add_argument("--steps", type=int, default=200, help="decode steps of a run")
    parser.add_argument("--runs", type=int, default=3, help="interleaved runs, of which the median counts")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="1: counts processor time")
    parser.add_argument("--attend", action="store_true", help="time update and attention together")
    parser.add_argument("--store", action="store_true", help="time storing and descending only")
    parser.add_argument("--batch", type=int, default=1, help="rows of the batch")
    parser.add_argument("--no-hqq", action="store_true", help="leave the slowest peer out")
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("--md", type=Path, help="write the table here")
    return parser.parse_args()


def write(rows: Sequence[Row], about: str, options: argparse.Namespace) -> None:
    for path in filter(None, (options.json, options.md)):
        path.parent.mkdir(parents=True, exist_ok=True)
    if options.json:
        options.json.write_text(json.dumps({"about": about, "rows": [asdict(row) for row in rows]}, indent=1) + "\n")
    if options.md:
        options.md.write_text(
            "\n".join([f"{about}.", "", table(rows), "", *(f"- {note}" for note in store_ratios(rows))]) + "\n"
        )


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    about = environment(options)
    print(about, flush=True)
    rows: list[Row] = []
    for dtype in options.dtype:
        for tokens in options.tokens:
            if options.store:
                rows += [Row(tokens, dtype, f"kvpolicy {r}", 0.0, [], 0.0) for r in options.recipes]
                continue
            rows += measure(tokens, dtype, options)
            print(table(row for row in rows if (row.tokens, row.dtype) == (tokens, dtype)), flush=True)
            write(rows, about, options)
            gc.collect()
        if not options.attend:
            measure_store(rows, dtype, options)
        write(rows, about, options)
    print("\n".join([*([] if options.store else ["", table(rows)]), *store_ratios(rows)]))


if __name__ == "__main__":
    main()
