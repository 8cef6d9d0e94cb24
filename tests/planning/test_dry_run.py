"""A dry run counts what a real cache holds, to the byte."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from calibrations import calibrated
from models import COMMON, FAMILIES, tiny
from transformers import AutoConfig

from kvpolicy import load_recipe, make_cache
from kvpolicy.hf.attach import attention_forward
from kvpolicy.hf.prepare import asking, end_prompt
from kvpolicy.layer.report import Memory
from kvpolicy.planning import counted
from kvpolicy.planning.dry_run import DryRun, unsure
from kvpolicy.planning.read import read_shape
from kvpolicy.recipe.load import bundled_names
from kvpolicy.storage import affine


class Module:
    """What attention asks of the module of a layer."""

    is_causal, training = True, False

    def __init__(self, layer_idx: int, groups: int) -> None:
        self.layer_idx, self.num_key_value_groups = layer_idx, groups


def fed(cache: Any, shape: Any, batch: int, passes: list[int], attached: bool) -> Memory:
    """The memory of a real cache after some forward passes of random numbers."""
    generator = torch.Generator().manual_seed(0)
    dtype = shape.torch_dtype

    def random(layer: Any, heads: int, n: int, dim: int) -> torch.Tensor:
        return torch.randn(batch, heads, n, dim, generator=generator).to(dtype)

    for number, n in enumerate(passes):
        if number and asking(cache):  # whose prompt is what is read at first
            end_prompt(cache)
        cache.begin(n, attached=attached)
        for i, layer in enumerate(shape.layers):
            if not number and i in asking(cache):
                cache.layers[i].tiers.told = torch.rand(batch, layer.kv_heads, n, generator=generator)
            keys, values = (random(layer, layer.kv_heads, n, dim) for dim in (layer.key_dim, layer.value_dim))
            found = cache.update(keys, values, i)
            if attached and layer.compressible:
                module = Module(i, layer.heads // layer.kv_heads)
                query = random(layer, layer.heads, n, layer.key_dim)
                attention_forward("sdpa", module, query, *found, None, scaling=layer.key_dim**-0.5)
        cache.finish()
    return cache.memory()


def planned(recipe: Any, shape: Any, batch: int, passes: list[int], attached: bool) -> Memory:
    run = DryRun(recipe, shape, batch, "cpu", attached)
    for n in passes:
        run.feed(n)
    return run.memory()


PASSES = [[200, 1, 1], [64, 170, 1]]
ALIKE = [name for name in bundled_names() if name.startswith("kvtuner") and "qwen2.5-7b" not in name]
"""Recipes that differ from others in bits alone, and take time: models of 32 layers and more."""
SLOW = ("gear", "gear-kcvt", "gear-code", "gear-l")
"""Whose low rank takes time to find; they differ in options."""


@pytest.mark.parametrize("name", [name for name in bundled_names() if name not in ALIKE])
def test_bytes_are_those_of_a_real_cache(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (affine, counted):  # so that tokens are coded some at a time, as long prompts are
        monkeypatch.setattr(module, "AT_ONCE", 1 << 13)
    recipe = load_recipe(name)
    model: Any = tiny("llama")
    if recipe.calibration:
        recipe = calibrated(name, model)
    if recipe.model_layers:
        model = AutoConfig.for_model("llama", **{**COMMON, "head_dim": 32, "num_hidden_layers": recipe.model_layers})
    shape = read_shape(model, "float32")
    tiers = make_cache(recipe, model).layers[0].tiers
    bound = bool(unsure(recipe, len(shape.layers)))
    few = 1 if recipe.model_layers or name in SLOW or recipe.calibration or tiers.attending else 2
    for i, passes in enumerate(PASSES[:few]):
        attached = bool(tiers.attending or tiers.asking or bound or i % 2 == 0)
        batch = 1 + (i + 1) % 3
        real = fed(make_cache(recipe, model), shape, batch, passes, attached)
        found = planned(recipe, shape, batch, passes, attached)
        where = name, batch, passes, attached
        if bound:
            assert found.bytes >= real.bytes, where
            assert found.reserved >= real.reserved, where
            continue
        assert found.stores == real.stores, where
        assert found == real, where


@pytest.mark.parametrize("prompt", [3, 70])
def test_pages_are_counted_as_they_grow(prompt: int) -> None:
    shape = read_shape(tiny("llama"), "float32")
    window = {"policy": {"kind": "recent", "window": 9}, "store": "full"}
    for above, keys in (([], "full"), ([window], {"kind": "int", "nbits": 4})):
        last = {"keys": keys, "values": keys, "read": {"kind": "quest", "budget": 12, "page": 4}}
        recipe = load_recipe({"name": "paged", "tiers": [*above, last]})
        passes = [prompt, *[1] * 40]
        real = fed(make_cache(recipe, tiny("llama")), shape, 2, passes, True)
        assert planned(recipe, shape, 2, passes, True) == real, (prompt, above)


@pytest.mark.parametrize("family", ["gemma3_text", "deepseek_v3", "gpt_oss", "mistral"])
def test_layers_of_other_kinds_are_counted(family: str) -> None:
    """Sliding windows, latent attention, experts: what transformers keeps itself is counted with it."""
    config = AutoConfig.for_model(family, **{**COMMON, **FAMILIES[family]})
    shape = read_shape(config, "bfloat16")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        real = fed(make_cache("kivi:residual=16,group_size=8", config), shape, 2, [75, 1], False)
    found = planned(load_recipe("kivi:residual=16,group_size=8"), shape, 2, [75, 1], False)
    assert found == real
