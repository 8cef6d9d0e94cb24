"""Views of staged tokens: one pair shows all layers of a pass in turn, where no layer reads another's."""

from __future__ import annotations

import copy

import torch
from models import build, ids
from words import CACHE

import kvpolicy
from kvpolicy.layer.held import Reading
from kvpolicy.layer.layer import LayerCache
from kvpolicy.layer.view import Scratch, View
from kvpolicy.placement.planner import Placement
from kvpolicy.placement.step import Step
from kvpolicy.recipe.load import load_recipe


def layers(scratch: Scratch | None, reading: Reading, *tokens: int) -> list[LayerCache]:
    """Some layers that hold so many tokens."""
    first = Step.first(Placement(load_recipe("logquant", window=12).tiers))
    found = [LayerCache(first, scratch, reading) for _ in tokens]
    for layer, n in zip(found, tokens, strict=True):
        layer.add(torch.randn(1, 2, n, 32), torch.randn(1, 2, n, 32))
        layer.commit()
    return found


def drawn() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(1, 2, 1, 32), torch.randn(1, 2, 1, 32)


def test_one_pair_shows_one_layer_after_the_other() -> None:
    reading = Reading(attached=True)
    pairs = []
    for layer in layers(Scratch(), reading, 50, 50):
        new = drawn()
        keys, values = layer.stage(*new)
        assert isinstance(keys, View)
        assert isinstance(values, View)
        assert keys.shape == values.shape == (1, 2, layer.planner.width + 1, 32)
        assert (keys.tiers, values.tiers) == (layer, layer)
        right = layer.densified()
        assert torch.equal(keys + 0.0, right["keys"])
        assert torch.equal(values + 0.0, right["values"])
        assert torch.equal(keys.dense()[:, :, -1:], new[0])
        layer.hold()
        pairs.append((keys, values))
    assert pairs[0][0] is pairs[1][0]
    assert pairs[0][1] is pairs[1][1]
    reading.forget()
    assert reading.views.pair is None


def test_layers_of_other_shapes_have_a_pair_of_their_own() -> None:
    one, other = layers(Scratch(), Reading(attached=True), 50, 60)
    first, second = one.stage(*drawn())[0], other.stage(*drawn())[0]
    assert first is not second
    assert first.shape[2] == one.planner.width + 1
    assert second.shape[2] == other.planner.width + 1


def test_layers_whose_keys_others_read_have_views_of_their_own() -> None:
    one, other = layers(None, Reading(attached=True), 50, 50)
    first, second = one.stage(*drawn())[0], other.stage(*drawn())[0]
    assert isinstance(first, View)
    assert isinstance(second, View)
    assert (first.tiers, second.tiers) == (one, other)


def test_no_view_outlives_a_pass_in_a_cache_or_its_copies() -> None:
    model = build("llama", torch.float32)
    with torch.no_grad(), kvpolicy.attach(model):
        cache = kvpolicy.make_cache("logquant", model, window=8)
        model(ids(40), **{CACHE: cache})
        model(ids(1), **{CACHE: cache})
    for own in (cache, copy.deepcopy(cache)):
        assert own.reading.views.pair is None
        assert own.reading.views.shown is None
