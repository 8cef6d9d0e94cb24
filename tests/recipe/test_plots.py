"""The picture of a recipe: colours say how precise a tier is, and no text is cut."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvpolicy.recipe.load import bundled_names, load_recipe
from kvpolicy.recipe.plot import _DROPPED, _EXACT, _QUANTIZED, _colours, _label, _title, plot_placement

COLOURS = {
    "full": [_EXACT[0]],
    "logquant": [*_EXACT[:2], _QUANTIZED[0]],
    "kivi": [_EXACT[0], *_QUANTIZED[1::-1]],
    "partial-logquant": [_EXACT[0], *_QUANTIZED[2::-1]],
    "streaming-llm": [*_EXACT[:2], _DROPPED],
    "atom": [_QUANTIZED[0]],
}


@pytest.mark.parametrize("name", COLOURS)
def test_colours_tell_exact_tiers_from_quantized_and_dropped_ones(name: str) -> None:
    assert _colours(load_recipe(name).tiers) == COLOURS[name]


def test_many_tiers_have_colours() -> None:
    store = {"kind": "int", "nbits": 8}
    tiers = [{"policy": {"kind": "recent", "window": 9}, "store": store}] * 6
    recipe = load_recipe({"tiers": [*tiers, {"store": {**store, "nbits": 2}}]})
    colours = _colours(recipe.tiers)
    assert len(colours) == 7
    assert set(colours) == set(_QUANTIZED)


@pytest.mark.parametrize("name", bundled_names())
def test_lines_are_wrapped(name: str) -> None:
    recipe = load_recipe(name).model_copy(update={"name": "long-$name" * 40})
    lines = [*_title(recipe, 64).splitlines(), *(x for t in recipe.tiers for x in _label(0, t).splitlines())]
    assert max(map(len, lines)) <= 92
    assert max(map(len, _title(recipe, 64).splitlines())) <= 60


def test_the_title_says_how_tokens_are_fed(tmp_path: Path) -> None:
    assert "the first 10 tokens are the prompt" in _title(load_recipe("hf-quantized"), 10)
    assert "prompt" not in _title(load_recipe("kivi"), 10)
    recipe = load_recipe("hf-quantized").model_copy(update={"name": "long $name $" * 40})
    assert plot_placement(recipe, 40, tmp_path / "x.png").stat().st_size
