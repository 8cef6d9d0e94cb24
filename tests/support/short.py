"""Comparisons that take little time."""

from __future__ import annotations

from typing import Any

from kvpolicy.experiment.comparison import compare
from kvpolicy.experiment.result import Comparison

__all__ = ["short"]


def short(loaded: tuple[Any, Any], arms: Any, **options: Any) -> Comparison:
    """One of a model and its tokenizer, over one short sample."""
    model, tokenizer = loaded
    options = {"n": 1, "tokens": 96, "progress": False, **options}
    return compare(arms, model=model, tokenizer=tokenizer, **options)
