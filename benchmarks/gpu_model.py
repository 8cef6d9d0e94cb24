"""Decode steps of a whole model on a GPU: recipes with and without graphs, against transformers' caches.

    python benchmarks/gpu_model.py                             # batch 1 and 16 at 4,096 tokens
    python benchmarks/gpu_model.py --shape 1 32768 --compiled  # StaticCache and torch.compile beside it
    python benchmarks/gpu_model.py --first                     # time to the first token
    python benchmarks/gpu_model.py --memory 24                 # tokens per second of 24 GB for keys and values
    python benchmarks/gpu_model.py --pictures out/gpu.json     # what gpu_plot.py draws: context, and rows of 24 GB

A Llama of 8 billion parameters with random weights; a prompt of random tokens. A time is the mean of steps over at
least two flushes; the device is waited for at the end. Steps with graphs are compared with steps without before they
are timed: no time is printed for results that differ.
"""

from __future__ import annotations

import argparse
import copy
import inspect
import json
import statistics
import time
from typing import Any

import torch
from gpu import HEAD_DIM, HEADS, KV_HEADS, card
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

import kvpolicy

LAYERS = 32
RECIPES = ("logquant", "kivi", "balanced", "streaming-llm", "h2o", "zipcache")
WORD = "cache" if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters else "past_key_values"
"""What the installed transformers calls a model's cache."""


def random_model() -> Any:
    config = LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, head_dim=HEAD_DIM, max_position_embeddings=131072,
        rope_theta=500000.0,
    )  # fmt: skip
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = LlamaForCausalLM(config).eval()
    torch.set_default_dtype(before)
    return model


def drawn(batch: int, tokens: int) -> Tensor:
    return torch.randint(0, 128000, (batch, tokens), device="cuda")


def prefilled(model: Any, cache: Any, prompt: Tensor) -> float:
    """Seconds until the first token."""
    torch.cuda.synchronize()
    begin = time.perf_counter()
    model(prompt, **{WORD: cache}, logits_to_keep=1)
    torch.cuda.synchronize()
    return time.perf_counter() - begin


def step_time(model: Any, cache: Any, token: Tensor, steps: int, **options: Any) -> float:
    """Seconds of a step, the mean of many."""
    for _ in range(6):
        model(token, **{WORD: cache}, logits_to_keep=1, **options)
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(steps):
        model(token, **{WORD: cache}, logits_to_keep=1, **options)
    torch.cuda.synchronize()
    return (time.perf_counter() - begin) / steps


def same(model: Any, cache: Any, token: Tensor) -> bool:
    """Whether steps with graphs give what steps without give, to the bit."""
    found = []
    for graphs in (False, True):
        twin = copy.deepcopy(cache)
        with kvpolicy.attach(model, graphs=graphs):
            found.append(torch.cat([model(token, **{WORD: twin}, logits_to_keep=1).logits for _ in range(5)]))
    return torch.equal(*found)


def said(name: str, seconds: float, than: float, batch: int, more: str = "") -> None:
    ratio = f", {seconds / than:.2f} of DynamicCache's" if than else ""
    print(f"  {name}: step {seconds * 1e3:.1f} ms{ratio}, {batch / seconds:.0f} tokens/s{more}", flush=True)


def compiled(model: Any, prompt: Tensor, token: Tensor, steps: int) -> float:
    """Seconds of a step of a compiled model with a StaticCache."""
    cache = StaticCache(config=model.config, max_cache_len=prompt.shape[1] + 256)
    prefilled(model, cache, prompt)
    step = torch.compile(model, mode="reduce-overhead", fullgraph=False)
    seen = prompt.shape[1]

    def run(count: int) -> float:
        nonlocal seen
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(count):
            places = torch.full((len(token), 1), seen, dtype=torch.int64, device="cuda")
            step(token, **{WORD: cache}, position_ids=places, logits_to_keep=1)
            seen += 1
        torch.cuda.synchronize()
        return (time.perf_counter() - begin) / count

    run(12)
    return run(steps)


def whole_model(model: Any, batch: int, tokens: int, names: list[str], with_compiled: bool) -> None:
    print(f"batch {batch}, {tokens:,} tokens", flush=True)
    prompt, token = drawn(batch, tokens), drawn(batch, 1)
    exact = DynamicCache(config=model.config)
    base = torch.cuda.memory_allocated()
    prefilled(model, DynamicCache(config=model.config), prompt[:, :64])
    prefilled(model, exact, prompt)
    than = step_time(model, exact, token, 32)
    said("DynamicCache", than, 0, batch)
    del exact
    if with_compiled:
        said("StaticCache, compiled", compiled(model, prompt, token, 32), than, batch)
    for name in names:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        with kvpolicy.attach(model, graphs=False):
            cache = kvpolicy.make_cache(name, model)
            prefilled(model, cache, prompt)
            steps = 256 if name == "kivi" else 90
            eager = step_time(model, cache, token, steps)
        peak = (torch.cuda.max_memory_allocated() - base) / 1e9
        said(name, eager, than, batch, f", peak {peak:.2f} GB")
        if not same(model, cache, token):
            print(f"  {name}: WRONG with graphs: no times")
            continue
        with kvpolicy.attach(model, graphs=True) as handle:
            replayed = step_time(model, cache, token, steps)
        if handle.graphs is not None and handle.graphs.replayed > steps:
            said(f"{name}, graphs", replayed, than, batch)
        del cache


def first_tokens(model: Any, batch: int, tokens: int, names: list[str]) -> None:
    """Seconds until the first token, medians of 5 prompts after two; the first of all compiles."""
    print(f"batch {batch}, {tokens:,} tokens", flush=True)
    prompt, than = drawn(batch, tokens), 0.0
    for name in ("DynamicCache", *names):
        torch.cuda.empty_cache()
        found = []
        for _ in range(7):
            if name == "DynamicCache":
                found.append(prefilled(model, DynamicCache(config=model.config), prompt))
                continue
            with kvpolicy.attach(model):
                found.append(prefilled(model, kvpolicy.make_cache(name, model), prompt))
        seconds = statistics.median(found[2:])
        than = than or seconds
        print(
            f"  {name}: {seconds * 1e3:.0f} ms, {seconds / than:.2f} of DynamicCache's, at first {found[0]:.1f} s",
            flush=True,
        )


def filled(model: Any, cache: Any, batch: int, tokens: int) -> None:
    """Random keys and values in a cache, a layer at a time: no prompt of so many rows fits."""
    for layer in range(LAYERS):
        shape = (batch, KV_HEADS, tokens, HEAD_DIM)
        new = (torch.randn(shape, dtype=torch.bfloat16, device="cuda") for _ in range(2))
        cache.update(*new, layer)


def replayed(model: Any, recipe: str, params: dict[str, Any], batch: int, tokens: int) -> float:
    """Seconds of a step with graphs of a cache of random keys and values."""
    cache = kvpolicy.make_cache(recipe, model, **params)
    filled(model, cache, batch, tokens)
    with kvpolicy.attach(model, graphs=True):
        return step_time(model, cache, drawn(batch, 1), 90)


def exact(model: Any, batch: int, tokens: int) -> float:
    """Seconds of a step of a DynamicCache of random keys and values."""
    cache = DynamicCache(config=model.config)
    filled(model, cache, batch, tokens)
    return step_time(model, cache, drawn(batch, 1), 24)


def over(model: Any, points: list[tuple[int, int]], path: str) -> None:
    """Write seconds of a step for each batch and number of tokens."""
    arms: dict[str, tuple[str, dict[str, Any]]] = {
        "logquant, 2 bits": ("logquant", {}),
        "logquant, 4 bits": ("logquant", {"nbits": 4}),
    }
    found: dict[str, list[tuple[int, int, float]]] = {}
    for batch, tokens in points:
        for name in ("DynamicCache", *arms):
            torch.cuda.empty_cache()
            try:
                recipe = arms.get(name)
                seconds = replayed(model, *recipe, batch, tokens) if recipe else exact(model, batch, tokens)
            except torch.cuda.OutOfMemoryError:
                continue
            found.setdefault(name, []).append((batch, tokens, seconds))
            print(f"  batch {batch}, {tokens:,} tokens, {name}: {seconds * 1e3:.1f} ms", flush=True)
    with open(path, "w", encoding="utf-8") as file:
        json.dump({"card": card(), "steps": found}, file)


def equal_memory(model: Any, gigabytes: float, tokens: int, names: list[str]) -> None:
    """Tokens per second with as many rows as so much memory holds."""
    print(f"{gigabytes:g} GB for keys and values, {tokens:,} tokens a row", flush=True)
    exact = 2 * LAYERS * KV_HEADS * HEAD_DIM * tokens * 2
    rows, than = int(gigabytes * 1e9 / exact), 0.0
    for name in ("DynamicCache", *names):
        torch.cuda.empty_cache()
        if name == "DynamicCache":
            cache, batch = DynamicCache(config=model.config), rows
        else:
            probe = kvpolicy.make_cache(name, model)
            filled(model, probe, 2, tokens)
            batch = int(gigabytes * 1e9 / (probe.memory().bytes / 2))
            del probe
            cache = kvpolicy.make_cache(name, model)
        filled(model, cache, batch, tokens)
        token = drawn(batch, 1)
        if name == "DynamicCache":
            than = batch / step_time(model, cache, token, 24)
            print(f"  {name}: {batch} rows, {than:.0f} tokens/s", flush=True)
            continue
        with kvpolicy.attach(model, graphs=True):
            found = batch / step_time(model, cache, token, 90)
        print(f"  {name}: {batch} rows, {batch / rows:.2f} x; {found:.0f} tokens/s, {found / than:.2f} x", flush=True)
        del cache


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=2, action="append", metavar=("BATCH", "TOKENS"))
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES))
    parser.add_argument("--compiled", action="store_true", help="StaticCache with torch.compile(reduce-overhead) too")
    parser.add_argument("--first", action="store_true", help="time to the first token, at 8,192 tokens")
    parser.add_argument("--memory", type=float, help="gigabytes for keys and values: tokens per second of as many rows")
    parser.add_argument("--tokens", type=int, default=8192, help="tokens of a row, with --memory")
    parser.add_argument("--pictures", metavar="FILE", help="write the points that gpu_plot.py draws")
    given = parser.parse_args()
    print(card())
    with torch.no_grad():
        model = random_model()
        if given.pictures:
            context = [(8, tokens) for tokens in (1024, 4096, 8192, 16384, 32768)]
            over(model, context + [(batch, 8192) for batch in (1, 4, 16, 32, 64, 128)], given.pictures)
            return
        if given.memory:
            equal_memory(model, given.memory, given.tokens, [n for n in given.recipes if n in ("logquant", "kivi")])
            return
        if given.first:
            for batch, tokens in given.shape or ((1, 8192), (4, 8192)):
                first_tokens(model, batch, tokens, given.recipes)
            return
        for batch, tokens in given.shape or ((1, 4096), (16, 4096)):
            whole_model(model, batch, tokens, given.recipes, given.compiled)


if __name__ == "__main__":
    main()
