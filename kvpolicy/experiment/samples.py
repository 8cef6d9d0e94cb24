"""Samples of an evaluation, and files of them: JSON Lines."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

from kvpolicy.errors import TaskError
from kvpolicy.words import clip

MAX_ROW: Final = 1 << 24
"""Bytes of a row of JSON Lines."""


@dataclass(frozen=True)
class Sample:
    """One prompt and the answer expected of greedy decoding.

    Attributes:
        task: Name of the task the sample belongs to; it selects the scoring rule.
        prompt: Text the model reads.
        answer: Text that should follow the prompt.
    """

    task: str
    prompt: str
    answer: str


def from_jsonl(path: str | Path) -> list[Sample]:
    """Read samples from a JSON Lines file: one object per line with `prompt` and `answer`.

    Blank lines are skipped. Answers are scored by exact match.

    Args:
        path: The file, UTF-8 text.

    Raises:
        TaskError: If the file cannot be read as text, holds no row, a row is longer than
            16 MiB, or a row is not an object with a string `prompt` and a string
            `answer`, both non-empty.
    """
    file = Path(path)
    shown = clip(str(file), 300)
    try:
        if file.exists() and not file.is_file():
            raise ValueError("a directory" if file.is_dir() else "something that is no regular file")
        with open(file, "rb") as stream:
            samples = [_row(f"{shown}, line {number}", row) for number, row in _lines(stream, shown)]
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise TaskError(f"{shown}: must be a readable file of JSON Lines, found {reason!r}; check the path") from error
    if not samples:
        raise TaskError(
            f"{shown}: must hold at least one row, found none; "
            'write one JSON object with "prompt" and "answer" per line'
        )
    return samples


def _lines(stream: BinaryIO, file: str) -> Iterator[tuple[int, str]]:
    """The lines that are not blank, with their numbers."""
    number = 0
    while raw := stream.readline(MAX_ROW + 1):
        number += 1
        if len(raw) > MAX_ROW:
            raise TaskError(
                f"{file}, line {number}: a row must have at most {MAX_ROW:,} bytes, found more; "
                "write one JSON object per line, and shorter texts"
            )
        try:
            text = raw.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise TaskError(
                f"{file}, line {number}: must be UTF-8 text, found the byte "
                f"0x{raw[error.start]:02x}; save the file as UTF-8 JSON Lines"
            ) from error
        if text.strip():
            yield number, text


def _row(place: str, text: str) -> Sample:
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _bad_row(place, "must be a JSON object", clip(str(error), 120)) from error
    if not isinstance(row, dict):
        raise _bad_row(place, "must be a JSON object", f"a {type(row).__name__}")
    for field in ("prompt", "answer"):
        value = row.get(field)
        if not isinstance(value, str):
            found = f"a {type(value).__name__}" if field in row else "none"
            raise _bad_row(place, f'"{field}" must be a string', found)
        if not value:
            raise _bad_row(place, f'"{field}" must not be empty', '""')
        if re.search("[\ud800-\udfff]", value):
            raise _bad_row(place, f'"{field}" must be Unicode text', "a lone surrogate")
    return Sample("jsonl", row["prompt"], row["answer"])


def _bad_row(place: str, rule: str, found: str) -> TaskError:
    remedy = 'write {"prompt": "...", "answer": "..."}'
    return TaskError(f"{place}: {rule}, found {found}; {remedy}")
