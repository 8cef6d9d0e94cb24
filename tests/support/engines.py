"""A small experiment, and its rows without times, which no engine may change."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from kvpolicy import compare
from kvpolicy.statistics.rows import Evidence, Row

ARMS = ["logquant:window=8,nbits=4", "h2o"]
GIVEN: dict[str, Any] = {"n": 4, "tokens": 48, "device": "cpu", "progress": False}
SECONDS = ("prefill_seconds", "decode_seconds", "step_seconds")


def facts_of(row: Row) -> tuple[Any, ...]:
    metrics = {name: value for name, value in row.metrics.items() if name not in SECONDS}
    return row.arm, row.task, row.sample, metrics, row.facts, row.output, row.error


@lru_cache(maxsize=1)
def serial() -> Evidence:
    """The rows of a run in this process."""
    return compare(ARMS, **GIVEN).evidence
