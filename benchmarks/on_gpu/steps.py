"""Decode steps of a whole model: recipes with and without graphs, beside transformers' caches.

A prompt of random tokens, prefilled by the cache that is timed. A time is the mean of steps over at least two flushes;
the device is waited for at the end. Steps without graphs wait for the host, whose speed changes from minute to minute:
they take turns with a `DynamicCache`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

import kvpolicy

from .card import prompt_of, release
from .checks import eager_checks, graph_checks, logits_check, logits_of
from .peers import STATIC, compiled, dynamic, quanto, quanto_check, quanto_missing, quanto_time
from .prompts import STEPS, filled, prefilled, step_time
from .rows import EXACT, Book, Row

SHAPES = ((1, 4096), (1, 32768), (16, 4096), (64, 8192))
RECIPES = ("logquant", "kivi", "balanced", "best-3bit", "streaming-llm", "h2o", "zipcache")
TURN, THEIRS = 16, 8
"""Steps in a turn of a recipe, and of the `DynamicCache` beside it."""


def peaked(run: Callable[[], float]) -> tuple[float, float]:
    """What `run` gives, and the most megabytes that were allocated beyond those at its beginning."""
    if not torch.cuda.is_available():
        return run(), 0.0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found = run()
    return found, (torch.cuda.max_memory_allocated() - before) / 1e6


class Sizes:
    """All arms of one batch and length."""

    def __init__(self, book: Book, model: Any, batch: int, tokens: int, steps: int | None) -> None:
        self.book, self.model, self.batch, self.tokens, self.steps = book, model, batch, tokens, steps
        self.prompt, self.token = prompt_of(model, batch, tokens), prompt_of(model, batch, 1)
        self.base: tuple[int, float] | None = None
        self.first: Tensor | None = None

    def row(self, arm: str, graphs: bool = False) -> Row:
        return Row("steps", arm, self.batch, self.tokens, base=self.base, graphs=graphs)

    def attempt(self, row: Row, run: Callable[[Row], Any]) -> None:
        if self.book.attempt(row, lambda: run(row) or True) is not None:
            self.book.add(row)
        release()

    def exact(self, row: Row) -> None:
        prefilled(self.model, dynamic(self.model), self.prompt[:, :64])
        cache = self.held()
        self.first = logits_of(self.model, cache, self.token).clone()
        seconds, more = peaked(lambda: step_time(self.model, cache, self.token, self.steps or 32))
        row.seconds, row.more = seconds, {"peak MB": more}
        self.base = (self.batch, seconds)

    def held(self) -> Any:
        """A DynamicCache with the prompt, or with random numbers where there is no room to compute a prompt's."""
        cache = dynamic(self.model)
        try:
            prefilled(self.model, cache, self.prompt)
            return cache
        except torch.cuda.OutOfMemoryError:
            del cache
        release()
        print("  DynamicCache: filled with random numbers, its prompt does not fit", flush=True)
        return filled(dynamic(self.model), self.model, self.batch, self.tokens)

    def static(self, row: Row) -> None:
        seconds, first = compiled(self.model, self.prompt, self.token, self.steps or 32)
        assert self.first is not None
        row.checks = [logits_check(self.model, first, self.first)]
        row.seconds = seconds

    def quantized(self, row: Row, nbits: int) -> None:
        row.skipped = quanto_missing()
        if row.skipped:
            return
        row.checks = [quanto_check(self.model, nbits)]
        cache = quanto(self.model, nbits)
        prefilled(self.model, cache, self.prompt)
        row.seconds = quanto_time(self.model, cache, self.token)

    def recipe(self, name: str) -> None:
        row = self.row(name)
        cache = self.book.attempt(row, lambda: self.eager(row, name))
        if cache is None:
            return
        self.book.add(row)
        replayed = self.row(name, graphs=True)
        replayed.base = row.base
        self.attempt(replayed, lambda row: self.graphs(row, name, cache))

    def eager(self, row: Row, name: str) -> Any:
        cache = kvpolicy.make_cache(name, self.model)
        with kvpolicy.attach(self.model, graphs=False):
            prefilled(self.model, cache, self.prompt)
        row.checks = eager_checks(self.model, cache, self.token)
        release()
        if not row.wrong:
            self.in_turns(row, cache, self.steps or STEPS.get(name, 90))
            row.more["cache MB"] = cache.memory().bytes / 1e6
        return cache

    def in_turns(self, row: Row, cache: Any, steps: int) -> None:
        """Time steps of a cache in turns with those of a DynamicCache, as long as there is room for that."""
        exact = self.beside()
        ours, peaks, theirs = 0.0, [], list[float]()
        for first in range(0, steps, TURN):
            count, warm = min(TURN, steps - first), 0 if first else 6
            try:
                theirs += [] if exact is None else [step_time(self.model, exact, self.token, THEIRS, warm)]
                seconds, peak = self.turn(cache, count, warm)
            except torch.cuda.OutOfMemoryError:
                if exact is None:
                    raise
                exact, theirs = None, []
                release()
                seconds, peak = self.turn(cache, count, warm)
            ours += seconds * count
            peaks.append(peak)
        row.seconds, row.more = ours / steps, {"peak MB": max(peaks)}
        if theirs:
            row.base = (self.batch, sum(theirs) / len(theirs))
            row.more["DynamicCache ms"] = row.base[1] * 1e3

    def turn(self, cache: Any, count: int, warm: int) -> tuple[float, float]:
        """Seconds of a step of a recipe's cache, and the most megabytes."""
        with kvpolicy.attach(self.model, graphs=False):
            return peaked(partial(step_time, self.model, cache, self.token, count, warm))

    def beside(self) -> Any:
        """A DynamicCache of random numbers, as long as the prompt; None where it doesn't fit."""
        try:
            return filled(dynamic(self.model), self.model, self.batch, self.tokens)
        except torch.cuda.OutOfMemoryError:
            pass
        release()
        return None

    def graphs(self, row: Row, name: str, cache: Any) -> None:
        row.checks = graph_checks(self.model, cache, self.token)
        release()
        steps = self.steps or STEPS.get(name, 90)
        with kvpolicy.attach(self.model, graphs=True) as handle:
            row.seconds, more = peaked(lambda: step_time(self.model, cache, self.token, steps))
        row.more = {"peak MB": more}
        if handle.graphs is None or handle.graphs.replayed < steps:
            row.skipped = f"not replayed: {dict(handle.graphs.reasons) if handle.graphs else 'no graphs here'}"


def steps(
    book: Book,
    model: Any,
    shapes: Sequence[tuple[int, int]],
    recipes: Sequence[str] = RECIPES,
    peers: Sequence[str] = ("static", "quanto"),
    count: int | None = None,
) -> None:
    for batch, tokens in shapes:
        size = Sizes(book, model, batch, tokens, count)
        size.attempt(size.row(EXACT), size.exact)
        if "static" in peers and batch == 1 and size.base is not None:
            size.attempt(size.row(STATIC), size.static)
        if "quanto" in peers:
            size.attempt(size.row("quanto, 2 bits"), lambda row, size=size: size.quantized(row, 2))
        for name in recipes:
            size.recipe(name)
        del size
        release()
