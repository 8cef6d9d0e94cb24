"""Time to the first token of a prompt, and the peak memory of a layer's step."""

from __future__ import annotations

import statistics
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

import memory
import torch
from torch import Tensor

import kvpolicy

from .card import prompt_of, release
from .checks import logits_check
from .peers import dynamic
from .prompts import prefilled
from .rows import EXACT, Book, Check, Row

PROMPTS = ((1, 8192), (4, 8192))
RECIPES = ("logquant", "kivi", "best-2bit", "snapkv", "zipcache", "h2o")


def prompts(row: Row, model: Any, prompt: Tensor, runs: int) -> Tensor:
    """The logits of the first token. The first prompt of all compiles."""
    found, logits = [], torch.empty(0)
    for _ in range(runs):
        logits = torch.empty(0)
        if row.arm == EXACT:
            seconds, logits = prefilled(model, dynamic(model), prompt)
        else:
            with kvpolicy.attach(model):
                seconds, logits = prefilled(model, kvpolicy.make_cache(row.arm, model), prompt)
        found.append(seconds)
    row.seconds, row.more = statistics.median(found[min(2, runs - 1) :]), {"at first s": found[0]}
    return logits


def first(
    book: Book,
    model: Any,
    shapes: Sequence[tuple[int, int]] = PROMPTS,
    recipes: Sequence[str] = RECIPES,
    runs: int = 7,
) -> None:
    for batch, tokens in shapes:
        prompt, base, right = prompt_of(model, batch, tokens), None, None
        for name in (EXACT, *recipes):
            row = Row("first", name, batch, tokens, base=base)
            logits = book.attempt(
                row, lambda row=row, prompt=prompt: prompts(row, model, prompt, runs - 2 * (row.batch > 1))
            )
            release()
            if logits is None:
                continue
            if name == EXACT:
                base, right = (batch, row.seconds), logits
            elif right is not None:
                row.checks = [logits_check(model, logits, right)]
            book.add(row)


def peak(
    book: Book,
    tokens: Sequence[int] = (4096, 16384, 65536),
    recipes: Sequence[str] = ("logquant", "kivi"),
    nbits: Sequence[int] = (2, 4),
    steps: int = 130,
) -> None:
    """What a step of an attached layer allocates beyond its cache: at most 5% of a whole model's cache, and 4 MB."""
    for recipe in recipes:
        for bits in nbits:
            for count in tokens:
                row = Row("peak", f"{recipe}, {bits} bits", 1, count)
                options = Namespace(steps=steps, device="cuda")
                found = book.attempt(
                    row, lambda r=recipe, n=count, b=bits, o=options: memory.measure(r, n, 1, b, "bfloat16", o)
                )
                if found is not None:
                    most, whole, bound = found
                    row.checks = [Check("peak MB", most, bound)]
                    row.more = {"peak MB": most, "cache MB": whole, "bound MB": bound}
                    book.add(row)
                release()
