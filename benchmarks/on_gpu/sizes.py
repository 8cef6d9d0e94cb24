"""Steps over lengths of context, and rows per second over as many rows as equal memory holds: what the picture shows.

Caches of random keys and values; kvpolicy with graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from arms import held_bytes

import kvpolicy

from .card import exact_bytes, prompt_of, release
from .checks import attention_checks, eager_checks, graph_checks
from .peers import dynamic, quanto, quanto_check, quanto_missing, quanto_time
from .prompts import STEPS, filled, step_time
from .rows import EXACT, Book, Check, Row

CONTEXT = (1024, 4096, 8192, 16384, 32768)
CONTEXT_ROWS = 8
ROW_TOKENS = 8192


@dataclass(frozen=True)
class Arm:
    """A cache that is timed over sizes."""

    name: str
    make: Callable[[Any], Any]
    nbits: int = 0
    """Of quanto's; 0: another."""
    steps: int = 90

    @property
    def ours(self) -> bool:
        return self.name != EXACT and not self.nbits


def _recipe(name: str, recipe: str, **params: Any) -> Arm:
    return Arm(name, lambda model: kvpolicy.make_cache(recipe, model, **params), steps=STEPS.get(recipe, 90))


ARMS: tuple[Arm, ...] = (
    Arm(EXACT, dynamic, steps=24),
    Arm("quanto, 2 bits", lambda model: quanto(model, 2), 2),
    Arm("quanto, 4 bits", lambda model: quanto(model, 4), 4),
    _recipe("logquant", "logquant"),
    _recipe("logquant, 4 bits", "logquant", nbits=4),
    _recipe("kivi", "kivi"),
)
EQUAL_ARMS = tuple(arm for arm in ARMS if arm.nbits != 4)


def checked(model: Any, arm: Arm, batch: int, tokens: int) -> list[Check]:
    """Checks of an arm with so many rows: without graphs against PyTorch's code, and with graphs to the bit."""
    if arm.nbits:
        return [quanto_check(model, arm.nbits)]
    if not arm.ours:
        return []
    cache, token = filled(arm.make(model), model, batch, tokens), prompt_of(model, batch, 1)
    found = eager_checks(model, cache, token)
    graphs = graph_checks(model, cache, token)
    return [*found, *graphs] if graphs else []


def measured(model: Any, arm: Arm, row: Row, few: Sequence[Check], count: int | None) -> bool:
    """Fill in a row. `few` are the checks of few rows; the attention of every eighth layer is looked at here too."""
    row.checks = list(few)
    row.skipped = quanto_missing() if arm.nbits else ""
    if row.wrong or row.skipped:
        return True
    before = allocated()
    cache, token = filled(arm.make(model), model, row.batch, row.tokens), prompt_of(model, row.batch, 1)
    if arm.nbits:
        row.seconds = quanto_time(model, cache, token)
    elif not arm.ours:
        row.seconds = step_time(model, cache, token, min(count or arm.steps, arm.steps))
    else:
        here, _ = attention_checks(model, cache, token, every=8)
        row.checks = [*few, *(Check(f"{x.what} of these rows", x.error, x.bound) for x in here)] if few else []
        if not row.wrong:
            steps = count or arm.steps
            with kvpolicy.attach(model, graphs=True) as handle:
                row.seconds = step_time(model, cache, token, steps)
            if handle.graphs is None or handle.graphs.replayed < steps:
                row.skipped = f"not replayed: {dict(handle.graphs.reasons) if handle.graphs else 'no graphs here'}"
    row.more["allocated GB"] = (allocated() - before) / 1e9
    return True


def context(
    book: Book,
    model: Any,
    lengths: Sequence[int] = CONTEXT,
    rows: int = CONTEXT_ROWS,
    arms: Sequence[Arm] = ARMS[:-1],
    count: int | None = None,
) -> None:
    for tokens in lengths:
        base = None
        for arm in arms:
            row = Row("context", arm.name, rows, tokens, base=base, graphs=arm.ours)

            def run(row: Row = row, arm: Arm = arm) -> bool:
                return measured(model, arm, row, checked(model, arm, min(2, row.batch), row.tokens), count)

            if book.attempt(row, run):
                book.add(row)
                base = (rows, row.seconds) if arm.name == EXACT else base
            release()


def allocated() -> int:
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0


def row_bytes(model: Any, arm: Arm, tokens: int) -> float:
    """Bytes that a row of a cache holds."""
    if arm.name == EXACT:
        return exact_bytes(model.config.num_hidden_layers, tokens)
    cache = filled(arm.make(model), model, 2, tokens)
    if arm.nbits:
        return sum(held_bytes(vars(layer)) for layer in cache.layers) / 2
    return float(cache.memory().bytes) / 2


def room() -> float:
    """Gigabytes for keys and values: 64, or what leaves a quarter of the free memory for all else."""
    release()
    return min(64.0, 0.75 * torch.cuda.mem_get_info()[0] / 1e9)


def rows(
    book: Book,
    model: Any,
    gigabytes: float | None = None,
    tokens: int = ROW_TOKENS,
    arms: Sequence[Arm] = EQUAL_ARMS,
    points: Sequence[int] = (1, 4, 16, 64),
    count: int | None = None,
) -> None:
    """Rows per second of as many rows as so much memory holds, and of fewer."""
    gigabytes = gigabytes or room()
    base: tuple[int, float] | None = None
    for arm in arms:
        row = Row("rows", arm.name, 0, tokens, graphs=arm.ours)
        row.skipped = quanto_missing() if arm.nbits else ""
        each = None if row.skipped else book.attempt(row, lambda arm=arm: row_bytes(model, arm, tokens))
        few = None if each is None else book.attempt(row, lambda arm=arm: checked(model, arm, 2, tokens))
        release()
        if each is None or few is None:
            if row.skipped and row not in book.rows:
                book.add(row)
            continue
        most = int(gigabytes * 1e9 / each)
        for batch in [*(n for n in points if n < most), most]:
            row = Row("rows", arm.name, batch, tokens, graphs=arm.ours)
            row.more = {"tokens/s": 0.0, "of GB": gigabytes}
            if batch == most:
                row.base, row.more["most"] = base, 1.0
            if book.attempt(row, lambda row=row, arm=arm, few=few: measured(model, arm, row, few, count)):
                row.more["tokens/s"] = batch / row.seconds if row.seconds else 0.0
                if base is not None and batch == most:
                    row.more["times the rows"] = batch / base[0]
                book.add(row)
                if arm.name == EXACT and batch == most and row.seconds:
                    base = (batch, row.seconds)
            release()
