"""Filling between the things that are asked for."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Final

from kvpolicy.errors import TaskError
from kvpolicy.tasks.vocabulary import sentence
from kvpolicy.words import clip, suggest

NOISE: Final = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
"""The sentences that RULER repeats."""
KINDS: Final = ("prose", "noise")
MAX_BYTES: Final = 1 << 26
"""Bytes of a text of the user's."""


def filling(kind: str, task: str, units: int, rng: random.Random) -> tuple[list[str], str]:
    """So many pieces of filling, and what stands between them.

    Args:
        kind: `prose` (drawn sentences), `noise` (the same five sentences again and again), or the path of a text, which
            is repeated where it is too short.
        task: named in errors.
        units: pieces: sentences, or eight words of a text.
        rng: draws the sentences.
    """
    if kind == "noise":
        return [NOISE] * units, "\n"
    if kind == "prose":
        return [sentence(rng) for _ in range(units)], " "
    words = _words(kind, task)
    starts = (8 * unit % len(words) for unit in range(units))
    return [" ".join(words[start : start + 8]) for start in starts], " "


@lru_cache(maxsize=4)
def _words(path: str, task: str) -> list[str]:
    shown, file = clip(path, 300), Path(path)
    try:
        if not file.is_file():
            raise TaskError(
                f"{task}: haystack must be {' or '.join(KINDS)} or the path of a text, found {shown!r}"
                f"{suggest(path, KINDS)}; check the path"
            )
        if file.stat().st_size > MAX_BYTES:
            raise TaskError(f"{shown}: a haystack must have at most {MAX_BYTES:,} bytes, found more; give another")
        words = file.read_text(encoding="utf-8-sig").split()
    except UnicodeDecodeError as error:
        raise TaskError(f"{shown}: a haystack must be UTF-8 text, found other bytes; save it as UTF-8") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise TaskError(f"{shown}: a haystack must be a readable text, found {reason!r}; check the path") from error
    if not words:
        raise TaskError(f"{shown}: a haystack must hold words, found none; give another text")
    return words


def hide(
    pieces: Sequence[str], things: Sequence[str], depths: Sequence[float], between: str
) -> tuple[str, list[float]]:
    """Pieces with things put among them at depths from 0 to 1, and the depths in characters that they come to have."""
    order = sorted(range(len(things)), key=lambda i: depths[i])
    after: dict[int, list[int]] = {}
    for i in order:
        after.setdefault(round(depths[i] * len(pieces)), []).append(i)
    parts: list[str] = []
    starts: dict[int, int] = {}
    length = 0

    def add(text: str) -> None:
        nonlocal length
        length += len(text) + (len(between) if parts else 0)
        parts.append(text)

    for place in range(len(pieces) + 1):
        for i in after.get(place, ()):
            starts[i] = length
            add(things[i])
        if place < len(pieces):
            add(pieces[place])
    whole = max(length, 1)
    return between.join(parts), [starts[i] / whole for i in range(len(things))]


def scatter(rng: random.Random, depth: float | None, drawn: float, count: int) -> list[float]:
    """Depths of several things: the first where it is asked to be, or was drawn to be; the others anywhere."""
    return [drawn if depth is None else depth, *(rng.random() for _ in range(count - 1))]
