"""The word for a cache in calls and outputs of the transformers that is installed."""

from __future__ import annotations

from typing import Any

import transformers
from packaging.version import Version

__all__ = ["CACHE", "cache_of"]

CACHE = "cache" if Version(transformers.__version__) >= Version("5.24.0") else "past_key_values"
"""For `model(ids, **{CACHE: cache})` and `generate` alike."""


def cache_of(output: Any) -> Any:
    """The cache that a forward pass or `generate` gives back."""
    return getattr(output, CACHE)
