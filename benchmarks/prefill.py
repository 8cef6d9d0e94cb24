"""Time to first token: a prompt through a small Llama with random weights, attached to a compressed cache.

The layers are those of a small model, 16 query heads and 4 key-value heads of 128 channels, with the feed-forward part
in proportion: what a layer computes beside attention belongs to the time that a user waits. DynamicCache and kvpolicy
take turns; what is printed is the median over the runs.

    python benchmarks/prefill.py
    python benchmarks/prefill.py --tokens 8192 --layers 32 --device cuda --dtype bfloat16
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch
from arms import DTYPES, clock, machine
from on_gpu.checks import logits_check
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import kvpolicy
from kvpolicy.hf.models import cache_word


def model(options: argparse.Namespace, dtype: str) -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=5632,
        num_attention_heads=16,
        num_key_value_heads=4,
        head_dim=128,
        num_hidden_layers=options.layers,
        vocab_size=1024,
        max_position_embeddings=max(options.tokens) + 1,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).to(options.device, DTYPES[dtype]).eval()


def first_token(llama: Any, ids: torch.Tensor, cache: Any) -> tuple[float, torch.Tensor]:
    """Seconds until the first token is known, and its logits."""
    start = clock(ids.device)
    logits = llama(ids, **{cache_word(llama): cache}, logits_to_keep=1).logits
    int(logits[0, -1].argmax())
    return clock(ids.device) - start, logits


def measure(llama: Any, tokens: int, options: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of each run, for each cache."""
    ids = torch.randint(1024, (1, tokens), generator=torch.Generator().manual_seed(0)).to(options.device)
    runs: dict[str, list[float]] = {}
    with torch.no_grad():
        for _ in range(options.runs):
            seconds, right = first_token(llama, ids, DynamicCache(config=llama.config))
            runs.setdefault("DynamicCache", []).append(seconds)
            for recipe in options.recipes:
                with kvpolicy.attach(llama):
                    cache = kvpolicy.make_cache(recipe, llama)
                    seconds, logits = first_token(llama, ids, cache)
                check = logits_check(llama, logits, right)
                if not check.holds:
                    raise SystemExit(f"{recipe}: WRONG, logits {check.error:.1e} from DynamicCache's: no times")
                runs.setdefault(f"kvpolicy {recipe}", []).append(seconds)
    return runs


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--recipes", nargs="+", default=["logquant", "kivi"])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--runs", type=int, default=3, help="runs in turn, of which the median counts")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="1: counts processor time")
    parser.add_argument("--md", type=Path, help="write the table here")
    return parser.parse_args()


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    about = (
        f"{machine(options.device)}; Llama of {options.layers} layers, hidden size 2048, 16 query heads, 4 key-value "
        f"heads, head_dim 128, batch 1; median of {options.runs} runs in turn"
    )
    lines = ["| tokens | dtype | cache | seconds to the first token | of DynamicCache's |", "|---:|---|---|---:|---:|"]
    print(f"{about}\n\n{lines[0]}\n{lines[1]}", flush=True)
    for dtype in options.dtype:
        llama = model(options, dtype)
        for tokens in options.tokens:
            found = {name: statistics.median(run) for name, run in measure(llama, tokens, options).items()}
            for name, seconds in found.items():
                ratio = seconds / found["DynamicCache"]
                lines.append(f"| {tokens:,} | {dtype} | {name} | {seconds:.2f} | {ratio:.2f} |")
                print(lines[-1], flush=True)
    if options.md:
        options.md.parent.mkdir(parents=True, exist_ok=True)
        options.md.write_text("\n".join([f"{about}.", "", *lines]) + "\n")


if __name__ == "__main__":
    main()
