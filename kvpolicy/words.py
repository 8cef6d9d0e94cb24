"""Words of error messages: what was found, shortened, and what may have been meant."""

from __future__ import annotations

import difflib
import math
import os
import re
from collections.abc import Collection, Iterable
from itertools import islice
from typing import Any

LONGEST = 80
"""Characters of a name or a value that a message repeats."""
_COMPARED = 200
"""Names that a mistyped one is compared with."""
_CACHED = "models--"
"""Begins the directory of a model in the cache of the hub."""
_PLAIN = re.compile(r"models?|weights|final|hf|best|last|latest|(checkpoint|step|epoch)([-_]?\d+)?|[0-9a-f]{40}")


def clip(text: str, longest: int = LONGEST) -> str:
    """`text`, on one line and at most `longest` characters long."""
    line = text if text.isprintable() else repr(text)[1:-1]
    return line if len(line) <= longest else line[: longest - 3] + "..."


def in_line(path: Any) -> str:
    """A path, on one line and not too long."""
    return clip(str(path), 300)


def model_name(given: str) -> str:
    """What a model is called where results are shown: of a path that is absolute or has `..` in it the last part.

    Any other name is as it was given: an id of the hub, a directory below. A symlink keeps its name. A directory that
    is called after what it is alone (`model`, `checkpoint-500`) has the name of the one around it before its own.
    """
    if not os.path.isabs(given) and not {".", ".."} & set(given.split(os.sep)):
        return given
    parts = [part for part in os.path.abspath(given).split(os.sep) if part]
    cached = next((part for part in parts[:-2] if part.startswith(_CACHED)), None)
    if cached is not None and parts[-2] == "snapshots":
        return cached[len(_CACHED) :].replace("--", "/")
    return clip("/".join(parts[-2:] if parts and _PLAIN.fullmatch(parts[-1]) else parts[-1:]) or given)


def quoted(text: str) -> str:
    """A name in quotes, shortened."""
    return repr(text) if len(text) <= LONGEST - 2 else repr(text[: LONGEST - 5]) + "..."


def in_words(value: Any) -> str:
    """What stands in the place of something else, in words."""
    if isinstance(value, str):
        return repr(value) if len(value) <= LONGEST - 2 else f"a text of {len(value):,} characters"
    if isinstance(value, float) and math.isnan(value):
        return "nan"
    if isinstance(value, list | dict) and not value:
        return "an empty list" if isinstance(value, list) else "an empty mapping"
    named = {dict: "a mapping", list: "a list", type(None): "nothing"}
    return named.get(type(value)) or clip(_repr(value))


def a(noun: str) -> str:
    """A noun with its article."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _repr(value: Any) -> str:
    try:
        return repr(value)
    except Exception:  # an integer of thousands of digits, an object of somebody's
        return f"a value of type {type(value).__name__}"


def listed(names: Collection[str], most: int = 40) -> str:
    """Names in a row, not too many of them."""
    shown = [clip(name, 40) for name in islice(names, most)]
    return ", ".join(shown) + (f" and {len(names) - most} more" if len(names) > most else "")


def suggest(name: str, allowed: Iterable[str]) -> str:
    """` (did you mean 'x'?)`, or nothing."""
    known: dict[str, str] = {}
    for word in islice(allowed, _COMPARED):
        if len(word) <= LONGEST:
            known.setdefault(word.lower(), word)
    close = difflib.get_close_matches(name[:LONGEST].lower(), known, n=1, cutoff=0.5)
    return f" (did you mean {known[close[0]]!r}?)" if close else ""
