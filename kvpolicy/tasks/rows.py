"""Rows of files: JSON Lines, and with the library `datasets` whatever it reads."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Final

from kvpolicy.errors import MissingDependencyError, TaskError
from kvpolicy.words import clip, listed

MAX_ROW: Final = 1 << 24
"""Bytes of a row of JSON Lines."""
LINES: Final = (".jsonl", ".json", ".ndjson")


def json_rows(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """The rows of a file of JSON Lines, each with its place, for errors. Blank lines are skipped.

    Raises:
        TaskError: the file can't be read as text, holds no row, a row is longer than 16 MiB or is no object.
    """
    shown = clip(str(path), 300)
    try:
        if path.exists() and not path.is_file():
            raise ValueError("a directory" if path.is_dir() else "something that is no regular file")
        with open(path, "rb") as stream:
            found = [_row(f"{shown}, line {number}", row) for number, row in _lines(stream, shown)]
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise TaskError(f"{shown}: must be a readable file of JSON Lines, found {reason!r}; check the path") from error
    if not found:
        raise TaskError(f"{shown}: must hold at least one row, found none; write one JSON object per line")
    return found


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


def _row(place: str, text: str) -> tuple[str, dict[str, Any]]:
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise TaskError(
            f"{place}: must be a JSON object, found {clip(str(error), 120)}; write one JSON object per line"
        ) from error
    if not isinstance(row, dict):
        raise TaskError(f"{place}: must be a JSON object, found a {type(row).__name__}; write one JSON object per line")
    return place, row


def rows_of(path: str, split: str, config: str | None = None) -> list[tuple[str, dict[str, Any]]]:
    """The rows of a split: of a file, of a directory, or of a dataset of the Hugging Face hub.

    Args:
        path: a file of JSON Lines; a directory with `SPLIT.jsonl`, or whatever `datasets` reads from one; another file
            that `datasets` reads (Parquet, CSV); or the id of a dataset on the hub, which takes a network or a cache.
        split: such as `test`.
        config: of a dataset that has several.

    Raises:
        TaskError: nothing can be read there.
        MissingDependencyError: it takes `datasets`, which is not installed.
    """
    file = Path(path).expanduser()
    if file.is_dir():
        inner = next((file / f"{split}{end}" for end in LINES if (file / f"{split}{end}").is_file()), None)
        return json_rows(inner) if inner is not None else _from_datasets(str(file), split, config)
    if file.suffix in LINES or (file.is_file() and file.suffix not in (".parquet", ".csv", ".arrow")):
        return json_rows(file)
    return _from_datasets(str(file) if file.exists() else path, split, config)


def _from_datasets(path: str, split: str, config: str | None) -> list[tuple[str, dict[str, Any]]]:
    shown = clip(path, 300)
    try:
        import datasets
    except ImportError as error:
        raise MissingDependencyError(
            f"{shown}: reading it needs the library datasets, which is not installed; pip install 'kvpolicy[tasks]', "
            "or give a file of JSON Lines"
        ) from error
    kinds = {".parquet": "parquet", ".csv": "csv", ".arrow": "arrow"}
    file = Path(path)
    try:
        if (file / "dataset_dict.json").is_file() or (file / "state.json").is_file():
            found = datasets.load_from_disk(path)
            data = found[split] if isinstance(found, dict) else found
        elif file.suffix in kinds and file.is_file():
            data = datasets.load_dataset(kinds[file.suffix], data_files=path, split="train")
        else:
            data = datasets.load_dataset(path, config, split=split)
        found_rows = [(f"{shown}, row {number + 1}", dict(row)) for number, row in enumerate(data)]
    except Exception as error:  # of many kinds: the network's, pyarrow's, those of datasets
        cause = clip(f"{type(error).__name__}: {error}", 200)
        raise TaskError(
            f"{shown}: must be a file or directory of rows with a split {split!r}, or a dataset of the Hugging Face "
            f"hub that can be reached, found {cause}; give the path of a local copy (path=...)"
        ) from error
    if not found_rows:
        raise TaskError(f"{shown}: must hold at least one row in the split {split!r}, found none; choose another split")
    return found_rows


def text_field(place: str, row: dict[str, Any], name: str, *, numbers: bool = False, empty: bool = False) -> str:
    """A text of a row; a number, where one may stand, is written as JSON writes it.

    Raises:
        TaskError: it is missing, no text, or empty.
    """
    value = row.get(name)
    if numbers and isinstance(value, int | float) and not isinstance(value, bool):
        value = json.dumps(value)
    if not isinstance(value, str):
        found = f"a {type(value).__name__}" if name in row else f"none among {listed(list(row), 8) or 'no field'}"
        raise TaskError(f'{place}: "{name}" must be a string, found {found}; write {{"{name}": "..."}}')
    if not value and not empty:
        raise TaskError(f'{place}: "{name}" must not be empty, found ""; write {{"{name}": "..."}}')
    return _unicode(place, name, value)


def text_list(place: str, row: dict[str, Any], name: str) -> tuple[str, ...]:
    """A list of texts of a row, at least one; a text stands for a list of itself."""
    value = row.get(name)
    if isinstance(value, str | int | float):
        return (text_field(place, row, name, numbers=True),)
    if not isinstance(value, list) or not value:
        found = f"a {type(value).__name__}" if value else "none"
        raise TaskError(f'{place}: "{name}" must be a list of strings, found {found}; write {{"{name}": ["..."]}}')
    return tuple(text_field(place, {name: item}, name, numbers=True) for item in value)


def _unicode(place: str, name: str, value: str) -> str:
    if re.search("[\ud800-\udfff]", value):
        raise TaskError(f'{place}: "{name}" must be Unicode text, found a lone surrogate; write it as UTF-8')
    return value
