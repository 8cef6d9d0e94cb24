"""What make_cache and a cache refuse: what must hold, what was found, and the remedy."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import ids, llama, tiny
from recipes import named
from transformers import LlamaConfig, T5Config
from words import CACHE

from kvpolicy import load_recipe, make_cache
from kvpolicy.errors import CacheError, KvpolicyError, RecipeError


def test_a_group_size_that_does_not_divide_is_named_before_any_token() -> None:
    where = r"tiers\[2\]\.values \(int\), layer 0: group_size must divide head_dim"
    with pytest.raises(RecipeError, match=where) as info:
        make_cache("kivi", llama(80, 4, 2, torch.float32))
    assert "found group_size 32 and head_dim 80" in str(info.value)
    assert "use auto or one of [1, 2, 4, 5, 8, 10, 16, 20, 40, 80]" in str(info.value)
    make_cache("kivi", llama(80, 4, 2, torch.float32), group_size=20)
    make_cache("logquant", llama(80, 4, 2, torch.float32))


def test_the_layer_whose_override_does_not_fit_is_named() -> None:
    recipe = {
        "tiers": [{"store": "full"}],
        "layers": {"1": [{"store": {"kind": "int", "nbits": 2, "group_size": 7}}]},
    }
    with pytest.raises(RecipeError, match=r"tiers\[0\]\.keys \(int\), layer 1: .*group_size 7 and head_dim 32"):
        make_cache(recipe, tiny("llama"))


def test_head_dim_is_found_where_the_config_does_not_name_it() -> None:
    assert "head_dim" not in tiny("qwen2").config.to_diff_dict()
    with pytest.raises(RecipeError, match="group_size 32 and head_dim 16"):
        make_cache("kivi", tiny("qwen2"))


def test_latent_attention_whose_width_does_not_fit_fails_at_its_first_update() -> None:
    model = tiny("deepseek_v3")
    cache = make_cache("kivi", model, group_size=32)
    with torch.no_grad(), pytest.raises(RecipeError, match="group_size 32 and head_dim 16"):
        model(ids(5), **{CACHE: cache})


def test_encoder_decoder() -> None:
    with pytest.raises(CacheError, match=r"serves decoder models; T5Config is an encoder-decoder\. Use transformers'"):
        make_cache("full", T5Config())


@pytest.mark.parametrize("wrong", ["llama", None, 3, torch.nn.Linear(2, 2), {"hidden_size": 64}])
def test_something_that_is_no_model(wrong: Any) -> None:
    with pytest.raises(CacheError, match=f"needs a transformers model or its config, found {type(wrong).__name__}"):
        make_cache("full", wrong)


def test_prefix_tuning() -> None:
    peft = pytest.importorskip("peft")
    import copy

    model = peft.get_peft_model(
        copy.deepcopy(tiny("llama")), peft.PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")
    )
    with pytest.raises(CacheError, match=r"PEFT adapter 'default' is prefix tuning.*such as LoRA"):
        make_cache("full", model)


def test_layers_that_keep_different_numbers_of_tokens() -> None:
    evicting = {"policy": {"kind": "recent", "window": 5}, "store": "full"}, {"store": "evict"}
    other = {"policy": {"kind": "recent", "window": 6}, "store": "full"}, {"store": "evict"}
    recipe = {"tiers": list(evicting), "layers": {"0": list(other)}}
    with pytest.raises(CacheError, match=r"same number of tokens.*layers \[0\] and layers \[1\]"):
        make_cache(recipe, tiny("llama"))
    with pytest.raises(CacheError, match=r"layers \[0\] and layers \[1\]"):
        make_cache({"tiers": [{"store": "full"}], "layers": {"-1": list(evicting)}}, tiny("llama"))
    make_cache({"tiers": list(evicting), "layers": {"0": list(evicting)}}, tiny("llama"))
    # The same tokens kept in other stores need no other mask.
    low = {"kind": "int", "nbits": 8}
    same = [{**evicting[0], "store": low}, {"store": "evict"}]
    cache = make_cache({"tiers": list(evicting), "layers": {"0": same}}, tiny("llama"))
    with torch.no_grad():
        for _ in range(3):
            assert tiny("llama")(ids(30), **{CACHE: cache}).logits.isfinite().all()
    # Only the full-attention layers count: layers 0 and 2 are the library's own.
    make_cache({"tiers": list(evicting), "layers": {"0": "full", "2": "full"}}, tiny("gemma3_text"))


def test_an_override_for_a_layer_that_the_model_lacks() -> None:
    recipe = {"tiers": [{"store": "full"}], "layers": {"2-5": [{"store": {"kind": "int", "nbits": 2}}]}}
    with pytest.raises(RecipeError, match=r"layers\.2-5 must name layers of the model, which has 2"):
        make_cache(recipe, tiny("llama"))


def test_a_model_without_layers() -> None:
    config = LlamaConfig(num_hidden_layers=0)
    with pytest.raises(CacheError, match="must say how many layers the model has; LlamaConfig gives none"):
        make_cache("full", config)


def test_asking_for_a_layer_that_is_not_there() -> None:
    cache = make_cache("logquant", tiny("llama"))
    for layer in (2, -3, 100):
        with pytest.raises(CacheError, match=rf"layer must be in \[0, 2\), found {layer}"):
            cache.positions(layer)
    assert cache.positions(-1).positions.tolist() == []


def test_asking_a_layer_of_the_library_for_its_tiers() -> None:
    cache = make_cache("logquant", tiny("gemma3_text"))
    with pytest.raises(CacheError, match=r"layer 0 is a DynamicSlidingWindowLayer .* ask for one of \[1, 3\]"):
        cache.positions(0)


def test_dense_of_an_empty_cache() -> None:
    with pytest.raises(CacheError, match="layer 0 holds no tokens yet; run the model with this cache first"):
        make_cache("logquant", tiny("llama")).dense()


def test_recipe_errors_reach_the_caller() -> None:
    with pytest.raises(RecipeError, match="logquant"):
        make_cache("logqant", tiny("llama"))
    with pytest.raises(RecipeError, match="windw"):
        make_cache("logquant", tiny("llama"), windw=3)
    with pytest.raises(RecipeError, match="budget"):
        make_cache("logquant", tiny("llama"), window=-1)


def test_all_errors_have_one_base() -> None:
    for error in (CacheError, RecipeError):
        assert issubclass(error, KvpolicyError)


def test_configs_models_and_recipes_are_all_accepted() -> None:
    model = tiny("llama")
    for recipe in ("logquant", "logquant:window=4", load_recipe("logquant"), named("logquant")):
        for target in (model, model.config):
            assert len(make_cache(recipe, target).layers) == 2
    assert make_cache(load_recipe("logquant"), model, window=9).recipe.params["window"] == 9
