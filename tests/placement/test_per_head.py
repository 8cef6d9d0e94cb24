"""Random recipes with policies by attention, random padding: what is held, and that attention reads just that."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from layers import Layer, random_tokens
from per_head import check, recipes, reference


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_random_recipes_hold_and_attend_what_they_should(data: st.DataObject) -> None:
    recipe = data.draw(recipes())
    assume(any(tier.keys != "full" or tier.values != "full" for tier in recipe.tiers))
    total = data.draw(st.integers(60, 240))
    real = torch.ones(2, total, dtype=torch.bool)
    for row in range(2):
        pad = data.draw(st.integers(0, 50))
        start = data.draw(st.sampled_from([0, total // 3]))
        real[row, start : start + pad] = False
    if data.draw(st.booleans()):
        real[:] = True
    query, keys, values = random_tokens(total, 11, 2)
    layer = Layer(recipe)
    cuts = sorted({0, total, *data.draw(st.lists(st.integers(1, total - 1), max_size=8))})
    cuts = [*cuts[:-1], *range(max(cuts[-2] + 1, total - 15), total + 1)]
    last_tier: list[list[set[int]]] | None = None
    for first, last in itertools.pairwise(cuts):
        now = slice(first, last)
        parts = [x[:, :, now] for x in (query, keys, values)]
        layer.tiers.commit(last - first if first else 0)  # as the update does: a prompt may end
        expected = reference(layer, parts[0], (parts[1], parts[2]), real[:, now], first) if first else None
        found = layer(*parts, real[:, now])
        if expected is not None:
            torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
        if data.draw(st.booleans()):
            k = data.draw(st.integers(0, last - first - 1))
            layer.cache.crop(-k)
            rest = slice(last - k, last)
            if k:
                layer(*(x[:, :, rest] for x in (query, keys, values)), real[:, rest])
        held = layer.held()
        check(layer, keys[:, :, :last], values[:, :, :last], real)
        tiers = [[[set(tier) for tier in head] for head in row] for row in held]
        if recipe.tiers[-1].keys != "evict":
            for row in range(len(tiers)):
                for head in tiers[row]:
                    assert set().union(*head) == set(real[row, :last].nonzero()[:, 0].tolist())
            lowest = [[head[-1] for head in row] for row in tiers]
            if last_tier is not None and len(last_tier) == len(lowest):
                for before, after in zip(last_tier, lowest, strict=True):
                    assert all(a <= b for a, b in zip(before, after, strict=True))
            last_tier = lowest
