"""Arguments of plans, checked before torch is loaded."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from kvpolicy.errors import PlanError
from kvpolicy.words import in_words

__all__ = ["MOST_ROWS", "MOST_TOKENS", "check_probe", "check_sizes", "in_units", "memory_bytes"]

MOST_TOKENS, MOST_ROWS = 1 << 22, 1 << 16
"""Tokens and rows that a plan is made for at most."""
MOST_GENERATED = 1 << 16
MOST_PASSES = 1 << 10
_UNITS = {"": 1, "b": 1} | {
    f"{p}{u}": k**n for n, p in enumerate("kmgt", 1) for u, k in (("b", 1000), ("ib", 1024), ("", 1024))
}


def check_sizes(lengths: Sequence[Any], batch: Any, generated: Any, chunk: Any, device: Any) -> None:
    """Refuse what no cache has.

    Raises:
        PlanError: naming the argument.
    """
    if not lengths:
        raise PlanError("tokens must be a number of tokens, or several, found none")
    asked = [("tokens", n, 1, MOST_TOKENS) for n in lengths] + [("batch", batch, 1, MOST_ROWS)]
    asked += [("generated", generated, 0, MOST_GENERATED)] if generated is not None else []
    asked += [("chunk", chunk, 1, MOST_TOKENS)] if chunk is not None else []
    for name, value, least, most in asked:
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise PlanError(f"{name} must be an integer from {least} to {most:,}, found {in_words(value)}")
    if generated is not None and generated >= min(lengths):
        raise PlanError(
            f"generated must be less than the tokens of all lengths, which a prompt begins, found {generated} of "
            f"{min(lengths)}"
        )
    if chunk is not None and max(lengths) > chunk * MOST_PASSES:
        raise PlanError(
            f"chunk must be long enough that a prompt takes at most {MOST_PASSES} passes, found {chunk} for "
            f"{max(lengths):,} tokens"
        )
    if not isinstance(device, str) or not device.isidentifier():
        raise PlanError(f"device must be a type such as cuda or cpu, found {in_words(device)}")


def check_probe(tokens: Any, limit: Any) -> None:
    """Refuse what no model can be tried with.

    Raises:
        PlanError: naming the argument.
    """
    if isinstance(tokens, bool) or not isinstance(tokens, int) or not 32 <= tokens <= MOST_TOKENS:
        raise PlanError(f"tokens must be an integer from 32 to {MOST_TOKENS:,}, found {in_words(tokens)}")
    if isinstance(limit, bool) or not isinstance(limit, int | float) or not 0 < limit < float("inf"):
        raise PlanError(f"limit, in nats per token, must be a number above 0, found {in_words(limit)}")


def memory_bytes(memory: Any) -> int:
    """Bytes that a size such as `80GiB`, `24 GB` or a number stands for.

    Raises:
        PlanError: it is no size.
    """
    if isinstance(memory, int) and not isinstance(memory, bool) and 0 < memory < 1 << 60:
        return memory
    parts = (
        re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,6})?)\s*([a-zA-Z]{0,3})\s*", memory) if isinstance(memory, str) else None
    )
    unit = None if parts is None else _UNITS.get(parts[2].lower())
    found = 0 if parts is None or unit is None else int(float(parts[1]) * unit)
    if not 0 < found < 1 << 60:
        raise PlanError(f"memory must be a size such as 80GiB, 24GB or a number of bytes, found {in_words(memory)}")
    return found


def in_units(size: float) -> str:
    """Bytes as people read them."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:,.0f} {unit}" if unit == "bytes" else f"{size:,.1f} {unit}"
        size /= 1024
    return f"{size:,.1f} TiB"
