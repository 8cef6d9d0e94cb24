"""What a cache says of itself in words."""

from __future__ import annotations

import pytest

from kvpolicy.layer.report import LayerSummary, Memory, StoreMemory, Summary


def test_equal_consecutive_layers_share_a_line() -> None:
    kinds = ["a", "a", "a", "b", "a"]
    layers = tuple(LayerSummary(i, kind, (f"tier of {kind}",), 7) for i, kind in enumerate(kinds))
    text = str(Summary("x", layers))
    assert [line.split()[1] for line in text.splitlines() if "tier of" in line] == ["0-2", "3", "4"]


@pytest.mark.parametrize(
    ("exact", "words"),
    [(400, "4.00x smaller than"), (100, ", as large as"), (50, "2.00x as large as"), (0, ", as large as")],
)
def test_memory_is_compared_with_the_exact_cache(exact: int, words: str) -> None:
    memory = Memory((StoreMemory(0, "keys", (0,), 5, codes=100),), exact, 100, 0, 0)
    assert str(memory).endswith(f"{words} the exact cache")
