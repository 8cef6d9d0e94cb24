"""The bundled recipes: each loads, survives YAML, and places tokens as its method says."""

from __future__ import annotations

import numpy as np
import pytest

from kvpolicy.interfaces.quantizer import AffineQuantizer
from kvpolicy.placement.simulate import simulate
from kvpolicy.recipe.inherit import BUNDLED, read_bundled
from kvpolicy.recipe.load import Recipe, bundled_names, load_recipe, load_yaml
from kvpolicy.recipe.yaml import read_file

NAMES = bundled_names()


def held(recipe: Recipe, tokens: int) -> list[list[int]]:
    return [part.tolist() for part in simulate(recipe.tiers, tokens)]


def test_all_are_there() -> None:
    promised = (
        "full best-2bit best-3bit best-4bit logquant partial-logquant kivi kivi-sink hf-quantized streaming-llm "
        "streaming-quant "
        "logquant-evict kivi-evict flexgen atom balanced h2o mas mikv zipcache zipcache-code turboquant "
        "turboquant-2.5 turboquant-3.5 turboquant-prod quarot fp8 mxfp4 nvfp4 nf4 gear gear-l "
        "gear-kcvt gear-code kvtuner-llama-3.1-8b kvtuner-mistral-7b-v0.3 kvtuner-qwen2.5-3b kvtuner-qwen2.5-7b "
        "kvtuner-llama-3.1-8b-per-token kvtuner-mistral-7b-v0.3-per-token kvtuner-qwen2.5-3b-per-token "
        "kvtuner-qwen2.5-7b-per-token qaq kvquant kvquant-post-rope skvq skvq-post-rope wkvquant-rtn "
        "snapkv pyramidkv adakv tova key-norm expected-attention kvzip quest cam logquant-attention logquant-jitter "
        "logquant-exponent skvq-1.5"
    )
    assert sorted(promised.split()) == NAMES


def test_what_is_done_to_a_document_is_not_seen_in_the_next() -> None:
    path = BUNDLED / "logquant.yaml"
    first = read_bundled(path)
    first.data["tiers"][0]["policy"]["window"] = 3
    first.data["params"].clear()
    first.marks.clear()
    first.add("no good", "a file", 1)
    assert read_bundled(path) == read_file(path) != first


@pytest.mark.parametrize("name", NAMES)
def test_it_is_described(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.summary.endswith(".")
    assert recipe.source.startswith("https://") or name == "full"


@pytest.mark.parametrize("name", NAMES)
def test_it_round_trips_through_yaml(name: str) -> None:
    recipe = load_recipe(name)
    again = load_yaml(recipe.to_yaml())
    assert again == recipe
    assert hash(again) == hash(recipe)
    assert again.to_yaml() == recipe.to_yaml()
    resolved = load_yaml(recipe.to_yaml(resolved=True))
    assert (resolved.tiers, resolved.layers) == (recipe.tiers, recipe.layers)


@pytest.mark.parametrize("name", NAMES)
def test_it_needs_no_optional_library(name: str) -> None:
    for tier in load_recipe(name).tiers:
        for store in (tier.keys, tier.values):
            assert isinstance(store, str) or type(store).requires is None


@pytest.mark.parametrize("name", NAMES)
def test_every_token_is_in_one_tier_or_dropped(name: str) -> None:
    recipe = load_recipe(name)
    for tokens in (1, 43, 127, 128, 129, 300, 2500):
        positions = np.concatenate(simulate(recipe.tiers, tokens))
        assert len(np.unique(positions)) == len(positions)
        if recipe.tiers[-1].keys != "evict":
            assert len(positions) == tokens


@pytest.mark.parametrize("name", ["logquant", "partial-logquant", "hf-quantized", "streaming-quant"])
@pytest.mark.parametrize("quantizer", ["quanto", "hqq"])
def test_the_quantizer_is_a_parameter(name: str, quantizer: str) -> None:
    recipe = load_recipe(f"{name}:quantizer={quantizer},nbits=4")
    assert recipe.tiers[-1].keys.kind == quantizer
    assert recipe.tiers[-1].keys.nbits == 4


def test_logquant_keeps_window_to_twice_window_and_as_many_log_spaced() -> None:
    for tokens in range(130, 400):
        recent, spaced, low = held(load_recipe("logquant", window=20), tokens)
        assert 20 <= len(recent) < 40
        assert recent == list(range(tokens - len(recent), tokens))
        assert 10 <= len(spaced) <= 20
        assert len(recent) + len(spaced) + len(low) == tokens


def test_partial_logquant_keeps_only_the_newest_values_exactly() -> None:
    recipe = load_recipe("partial-logquant", window=20)
    assert [tier.values == "full" for tier in recipe.tiers] == [True, False, False, False]
    assert [tier.keys == "full" for tier in recipe.tiers] == [True, True, True, False]
    logquant = load_recipe("logquant", window=20)
    for tokens in range(1, 300):
        newest, window, spaced, low = held(recipe, tokens)
        assert len(newest) < 20
        assert [sorted(window + newest), spaced, low] == held(logquant, tokens)


def test_kivi_flushes_keys_in_blocks_and_slides_values() -> None:
    recipe = load_recipe("kivi", residual=32)
    for tokens in range(1, 200):
        block, window, low = held(recipe, tokens)
        assert len(block) == tokens % 32
        assert len(block) + len(window) == min(tokens, 32)
        assert low == list(range(max(0, tokens - 32)))
    keys, values = recipe.tiers[-1].keys, recipe.tiers[-1].values
    assert isinstance(keys, AffineQuantizer)
    assert isinstance(values, AffineQuantizer)
    assert (keys.per, keys.group_size, values.per, values.group_size) == ("channel", 32, "token", 32)


def test_kivi_sink_keeps_the_first_tokens_too() -> None:
    recipe = load_recipe("kivi-sink", residual=32, sink=2)
    assert held(recipe, 200)[1] == [0, 1]
    assert recipe.tiers[1].keys == recipe.tiers[1].values == "full"


def test_hf_quantized_takes_the_prompt_whole_and_then_flushes_whole() -> None:
    recipe = load_recipe("hf-quantized", residual=16)
    assert held(recipe, 100) == [[], list(range(100))]
    residual, low = simulate(recipe.tiers, 140, prompt=100)
    assert residual.tolist() == list(range(132, 140))
    assert low.tolist() == list(range(132))


@pytest.mark.parametrize(("name", "window"), [("streaming-llm", 10), ("streaming-quant", 10)])
def test_streaming_keeps_the_sink_and_the_newest(name: str, window: int) -> None:
    recent, sink, _ = held(load_recipe(name, window=window), 100)
    assert sink == [0, 1, 2, 3]
    assert recent[0] <= 100 - window
    assert recent[-1] == 99


def test_evicting_recipes_drop_what_the_others_quantize() -> None:
    assert held(load_recipe("logquant-evict"), 500)[:2] == held(load_recipe("logquant"), 500)[:2]
    assert held(load_recipe("logquant-evict"), 500)[2] == []
    assert held(load_recipe("kivi-evict"), 500) == [list(range(372, 500)), []]


@pytest.mark.parametrize(("name", "size"), [("flexgen", "auto"), ("atom", "head")])
def test_whole_cache_recipes_have_one_tier_in_four_bits(name: str, size: str) -> None:
    (tier,) = load_recipe(name).tiers
    assert tier.keys == tier.values
    assert isinstance(tier.keys, AffineQuantizer)
    assert (tier.keys.nbits, tier.keys.group_size, tier.keys.per) == (4, size, "token")
