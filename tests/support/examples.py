"""How many cases a property test draws."""

from __future__ import annotations

import os

__all__ = ["examples"]


def examples(usual: int) -> int:
    """`usual`, or what the environment variable EXAMPLES says."""
    return int(os.environ.get("EXAMPLES", usual))
