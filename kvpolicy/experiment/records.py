"""Rows as flat records, one for each arm and sample, with what the exact cache did beside it."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from kvpolicy.experiment.names import ATTENTION, EXACT
from kvpolicy.statistics.rows import Evidence, Row

FACTS = ("prompt_tokens", "answer_tokens", "nll_steps", "kl_steps", "first_divergence", "decode_steps")
MEASURED = (
    "score", "nll", "nll_first", "kl", "top1", "bits", "peak_bytes", "final_bytes", "exact_bytes", "prefill_seconds",
    "decode_seconds", *ATTENTION,
)  # fmt: skip


def number(sample: str) -> int | str:
    """A sample's name, as a number where it is one."""
    return int(sample) if sample.isdecimal() else sample


def records(evidence: Evidence, arms: Collection[str]) -> list[dict[str, Any]]:
    """A record for each row of these arms; None stands for what a row does not have."""
    exact = {(row.task, row.sample): row for row in evidence.rows if row.arm == EXACT}
    return [_record(row, exact.get((row.task, row.sample))) for row in evidence.rows if row.arm in arms]


def _record(row: Row, exact: Row | None) -> dict[str, Any]:
    beside = {} if exact is None else exact.metrics
    return {
        "sample": number(row.sample),
        "arm": row.arm,
        "task": row.task,
        **{name: row.metrics.get(name) for name in MEASURED},
        **{f"exact_{name}": beside.get(name) for name in ("score", "nll")},
        **{name: row.facts.get(name) for name in FACTS},
        **{f"{name}_layers": row.facts.get(f"{name}_layers") for name in ATTENTION},
        "answer": row.answer,
        "generated": row.output,
        "error": row.error,
    }
