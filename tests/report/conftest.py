"""Tests that adjust by Holm."""

from __future__ import annotations

import gc

import pytest


@pytest.fixture(autouse=True, scope="module")
def _kept() -> None:
    """statsmodels collects garbage in each of Holm's adjustments, which takes long where torch is loaded."""
    gc.freeze()
