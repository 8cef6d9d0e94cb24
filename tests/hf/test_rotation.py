"""Keys before RoPE: what `unrotate` codes is what a model's keys are where it rotates by nothing."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from kvpolicy import CompressedCache, attach, load_recipe, make_cache
from kvpolicy.errors import RecipeError
from kvpolicy.hf.rotary import rotaries
from kvpolicy.interfaces.rotation import find_rotation, rotate, unrotate
from kvpolicy.interfaces.site import Site
from tests.support.models import COMMON, exact, ids, tiny
from tests.support.words import CACHE

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"head_dim": 32},
    "qwen3": {"head_dim": 32},
    "phi": {"partial_rotary_factor": 0.5},
    "gpt_neox": {"rotary_pct": 0.25},
    "glm": {"head_dim": 32, "partial_rotary_factor": 0.5},
    "cohere": {},
    "helium": {"head_dim": 16},
    "gemma3_text": {"head_dim": 32, "layer_types": ["full_attention", "sliding_attention"], "sliding_window": 24},
    "olmo2": {},
    "gpt_oss": {
        "head_dim": 32,
        "layer_types": ["full_attention", "sliding_attention"],
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    },
}
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 64}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "rope_theta": 1e4, "original_max_position_embeddings": 64}
LLAMA3 |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}


def made(family: str, **options: Any) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**COMMON, **options})).eval()


def first_keys(model: Any, positions: torch.Tensor) -> torch.Tensor:
    cache = exact(model)
    with torch.no_grad():
        model(ids(40), position_ids=positions[None], **{CACHE: cache})
    return cache.layers[0].keys


@pytest.mark.parametrize("rope", [None, YARN, LLAMA3], ids=["default", "yarn", "llama3"])
@pytest.mark.parametrize("family", FAMILIES)
def test_keys_are_those_that_the_model_has_before_rope(family: str, rope: Any) -> None:
    if rope and family != "llama":
        pytest.skip("scaled as in any other family")
    model = made(family, **FAMILIES[family], **({"rope_parameters": rope} if rope else {}))
    own = rotaries(model, 2)[0]
    assert own is not None
    state = find_rotation(Site(rotary=own, interleaved=own.interleaved))
    positions = torch.arange(40) * 3
    keys, bare = first_keys(model, positions), first_keys(model, positions * 0)
    count = state["frequencies"].shape[-1]
    bare[..., :count] /= state["factor"]  # the model's own, of position 0: only scaled
    found = unrotate(keys, state, positions.view(1, 1, -1))
    torch.testing.assert_close(found, bare, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(rotate(found, state, positions.view(1, 1, -1)), keys, rtol=1e-5, atol=1e-5)
    assert (keys - bare).abs().max() > 0.1 * bare.abs().max()
    if rope is YARN:
        assert float(state["factor"]) > 1.1


def test_layers_without_rope_are_refused_by_name() -> None:
    recipe = {"tiers": [{"keys": {"kind": "int", "transforms": ["unrotate"]}, "values": "full"}]}
    model = made("smollm3", no_rope_layers=[1, 0])
    assert [own is not None for own in rotaries(model, 2)] == [True, False]
    told = r"keys\.transforms\[0\], layer {}: keys before RoPE take a model whose rotary .* found none in this layer"
    with pytest.raises(RecipeError, match=told.format(1)):
        make_cache(recipe, model)
    make_cache({**recipe, "layers": {"1": "full"}}, model)
    cohere2 = made("cohere2", sliding_window=24, layer_types=["sliding_attention", "full_attention"])
    for other in (
        made("gpt2", n_layer=2, n_head=4),
        tiny("llama").config,
        cohere2,
        made("llama", rope_parameters=MOVING),
    ):
        with pytest.raises(RecipeError, match=r"make the cache for the model, not for its config"):
            make_cache(recipe, other)
    values = {"tiers": [{"keys": "full", "values": {"kind": "int", "transforms": ["unrotate"]}}]}
    with pytest.raises(RecipeError, match=r"values\.transforms\[0\].*only keys are rotated by RoPE"):
        make_cache(values, tiny("llama"))


MOVING = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
RECIPE = {
    "tiers": [
        {"policy": {"kind": "recent", "window": 8}, "store": "full"},
        {"policy": {"kind": "sink", "tokens": 2}, "store": "full"},
        {
            "keys": {"kind": "int", "nbits": 8, "group_size": 8, "transforms": ["unrotate", "reorder"]},
            "values": {"kind": "int", "nbits": 8, "group_size": 8, "transforms": ["reorder"]},
        },
    ]
}


def test_a_padded_batch_reads_the_same_attached_and_not(tmp_path: Any) -> None:
    model = tiny("llama")
    mask = torch.ones(2, 60, dtype=torch.long)
    mask[1, :13] = 0
    given = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    found = []
    for attached in (True, False):
        cache, other = make_cache(RECIPE, model), exact(model)
        handle = attach(model) if attached else None
        with torch.no_grad():
            for held in (cache, other):
                model(ids(60, 2), **given, **{CACHE: held})
            cache.save(tmp_path / "cache")
            cache = CompressedCache.load(tmp_path / "cache", model)
            cache.crop(-2)
            other.crop(-2)
            more = {"attention_mask": torch.cat([mask[:, :-2], mask[:, -1:]], 1)}
            more["position_ids"] = more["attention_mask"].sum(1, keepdim=True) - 1
            found.append(model(ids(1, 2), **more, **{CACHE: cache}).logits)
            truth = model(ids(1, 2), **more, **{CACHE: other}).logits
        if handle is not None:
            handle.detach()
        torch.testing.assert_close(found[-1], truth, rtol=0.02, atol=0.02 * float(truth.abs().max()))
    torch.testing.assert_close(*found, rtol=0.01, atol=0.01 * float(truth.abs().max()))


def test_a_cache_needs_the_model_for_its_first_tokens_alone() -> None:
    model = made("llama", head_dim=32)
    cache = make_cache(load_recipe(RECIPE), model)
    with torch.no_grad():
        model(ids(30), **{CACHE: cache})
    cache.commit()
    copied = copy.deepcopy(cache)
    del model
    gc.collect()
    keys, values = torch.randn(2, 1, 2, 1, 32)
    for held in (cache, copied):
        for layer in (0, 1):
            held.update(keys, values, layer)
    assert torch.equal(cache.layers[1].keys, copied.layers[1].keys)
