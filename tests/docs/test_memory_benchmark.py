"""What a step of an attached layer takes beyond its cache is as little as the page on benchmarks promises."""

from __future__ import annotations

import importlib
import sys
from argparse import Namespace
from pathlib import Path

import pytest

BENCHMARKS = str(Path(__file__).parents[2] / "benchmarks")


@pytest.mark.parametrize("nbits", [2, 4])
@pytest.mark.parametrize("recipe", ["logquant", "kivi"])
def test_a_step_of_4096_tokens_stays_below_the_bound(recipe: str, nbits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    memory = importlib.import_module("memory")
    try:
        most, whole, bound = memory.measure(recipe, 4096, 1, nbits, "bfloat16", Namespace(steps=3, device="cpu"))
    finally:
        for name in ("memory", "arms"):
            sys.modules.pop(name, None)
    assert bound == pytest.approx(0.05 * whole + 4)
    assert 0 < most < bound
