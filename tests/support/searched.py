"""A small search on the bundled model, in whose place tests put what they need."""

from __future__ import annotations

from pathlib import Path
from typing import Any

SPACE: dict[str, Any] = {
    "recipe": {
        "name": "small",
        "tiers": [
            {"policy": {"kind": "recent", "window": "$window"}, "store": "full"},
            {"store": "$store"},
        ],
    },
    "search": {
        "window": [8, 64],
        "store": [{"kind": "int", "nbits": "$nbits", "group_size": 32}, "evict"],
        "nbits": [8, 2],
    },
}
"""Six recipes: two windows, each with eight bits, two, or without the other tokens."""

SMALL: dict[str, Any] = {"tokens": 96, "samples": 4, "trials": 6, "progress": False}
"""Arguments of `tune` that take little time."""


def text(directory: Path) -> Path:
    """Program text of some 2,000 tokens of the bundled model."""
    import tarfile

    file = directory / "source.txt"
    file.write_text(Path(tarfile.__file__).read_text(encoding="utf-8")[4000:14000], encoding="utf-8")
    return file
