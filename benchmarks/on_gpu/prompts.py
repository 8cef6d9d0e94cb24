"""Prompts through a model, and steps after them."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from kvpolicy.hf.models import cache_word

from .card import HEAD_DIM, KV_HEADS, drawn, wait
from .checks import logits_of

MOST = 1 << 17
"""Tokens of all rows that pass the feed-forward part of a layer at a time."""
STEPS = {"kivi": 256, "balanced": 128, "zipcache": 200}
"""Steps over two flushes at least, where they are not every 42 or less."""


@contextmanager
def in_parts(model: Any) -> Iterator[None]:
    """Let a long prompt's tokens pass in turn what knows no other tokens, which takes most memory on the way."""
    layers = model.model.layers
    parts = [part for one in layers for part in (one.mlp, one.input_layernorm, one.post_attention_layernorm)]
    parts.append(model.model.norm)

    def wrapped(forward: Any) -> Any:
        def run(x: Tensor) -> Tensor:
            out = torch.empty_like(x)
            for part, into in zip(
                x.view(-1, x.shape[-1]).split(MOST), out.view(-1, x.shape[-1]).split(MOST), strict=True
            ):
                into.copy_(forward(part))
            return out

        return run

    for part in parts:
        part.forward = wrapped(part.forward)
    try:
        yield
    finally:
        for part in parts:
            del part.forward


def prefilled(model: Any, cache: Any, prompt: Tensor) -> tuple[float, Tensor]:
    """Seconds until the first token, and its logits."""
    wait()
    begin = time.perf_counter()
    if prompt.numel() > MOST:
        with in_parts(model):
            logits = logits_of(model, cache, prompt)
    else:
        logits = logits_of(model, cache, prompt)
    wait()
    return time.perf_counter() - begin, logits


def step_time(model: Any, cache: Any, token: Tensor, steps: int, warm: int = 6) -> float:
    """Seconds of a step, the mean of many, after some that do not count.

    Python's garbage collector passes over what was there before: a look at all of that takes as long as some ten steps.
    """
    word = cache_word(model)
    for _ in range(warm):
        model(token, **{word: cache}, logits_to_keep=1)
    wait()
    gc.freeze()
    try:
        begin = time.perf_counter()
        for _ in range(steps):
            model(token, **{word: cache}, logits_to_keep=1)
        wait()
        return (time.perf_counter() - begin) / steps
    finally:
        gc.unfreeze()


def filled(cache: Any, model: Any, batch: int, tokens: int) -> Any:
    """Random keys and values in a cache, a layer at a time: no prompt of so many rows fits."""
    for layer in range(model.config.num_hidden_layers):
        shape = (batch, KV_HEADS, tokens, HEAD_DIM)
        new = [drawn(*shape, device=str(model.device), dtype=model.dtype) for _ in range(2)]
        cache.update(*new, layer)
        del new
    return cache
