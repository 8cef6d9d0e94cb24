"""The caches of transformers that kvpolicy is compared with."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, QuantizedCache, StaticCache

from kvpolicy.hf.models import cache_word

from .card import HEAD_DIM, KV_HEADS, drawn, wait
from .prompts import prefilled
from .rows import Check

RESIDUAL, GROUP = 128, 64
STATIC = "StaticCache, compiled"


def dynamic(model: Any) -> Any:
    return DynamicCache(config=model.config)


def quanto(model: Any, nbits: int) -> Any:
    return QuantizedCache("quanto", model.config, nbits=nbits, q_group_size=GROUP, residual_length=RESIDUAL)


def quanto_missing() -> str:
    """Why quanto's kernel, which is compiled when it is first called, can't be; nothing if it can."""
    try:
        import optimum.quanto  # noqa: F401

        if torch.cuda.is_available():
            torch.ops.quanto.unpack(torch.zeros(64, dtype=torch.uint8, device="cuda"), 2)
    except Exception as error:  # of nvcc, of ninja, or of the import
        return f"{type(error).__name__}: {error}"[:200]
    return ""


def quanto_check(model: Any, nbits: int) -> Check:
    """Whether what it hands out of a prompt is that prompt to within its codes.

    Of 64 normal numbers the extremes are some 4.8 deviations apart; an error of steps of that over 2^bits - 1, uniform
    within a step, is 0.46 deviations for 2 bits, 0.092 for 4, and may be a half more.
    """
    cache = quanto(model, nbits)
    given = [drawn(1, KV_HEADS, 512, HEAD_DIM, device=str(model.device), dtype=model.dtype) for _ in range(2)]
    cache.update(*given, 0)
    token = [x[:, :, :1] for x in given]
    found = cache.update(*token, 0)
    errors = [
        float((a[:, :, :-1].float() - b.float()).norm() / b.float().norm()) for a, b in zip(found, given, strict=True)
    ]
    return Check("keys and values", max(errors), 1.5 * 4.8 / (2**nbits - 1) / 12**0.5)


def quanto_time(model: Any, cache: Any, token: Tensor, steps: int = 12) -> float:
    """Seconds of a step, its flushes included as often as they come: one in 128 steps codes the whole cache anew."""
    word = cache_word(model)

    def mean(count: int) -> float:
        wait()
        begin = time.perf_counter()
        for _ in range(count):
            model(token, **{word: cache}, logits_to_keep=1)
        wait()
        return (time.perf_counter() - begin) / count

    mean(2)
    plain = mean(max(2, min(steps, int(3 / mean(1)))))
    layer = cache.layers[0]
    missing = RESIDUAL - 1 - (layer.keys.shape[-2] if layer.keys.dim() == 4 else 0)
    for number in range(model.config.num_hidden_layers):
        shape = (len(token), KV_HEADS, missing, HEAD_DIM)
        cache.update(*(drawn(*shape, device=str(model.device), dtype=model.dtype) for _ in range(2)), number)
    flush = mean(1)
    assert cache.layers[0].keys.dim() != 4, "this step was to be a flush"
    return ((RESIDUAL - 1) * plain + flush) / RESIDUAL


def compiled(model: Any, prompt: Tensor, token: Tensor, steps: int) -> tuple[float, Tensor]:
    """Seconds of a step of a compiled model with a StaticCache, and the logits of the first."""
    word, seen = cache_word(model), prompt.shape[1]
    cache = StaticCache(config=model.config, max_cache_len=seen + 256)
    prefilled(model, cache, prompt)
    step = torch.compile(model, mode="reduce-overhead", fullgraph=False)

    def run(count: int) -> tuple[float, Tensor]:
        nonlocal seen
        logits = []
        wait()
        begin = time.perf_counter()
        for number in range(count):
            places = torch.full((len(token), 1), seen, dtype=torch.int64, device=token.device)
            out = step(token, **{word: cache}, position_ids=places, logits_to_keep=1)
            if not number:
                logits.append(out.logits.clone())
            seen += 1
        wait()
        return (time.perf_counter() - begin) / count, logits[0]

    _, first = run(12)
    seconds, _ = run(steps)
    torch._dynamo.reset()
    return seconds, first
