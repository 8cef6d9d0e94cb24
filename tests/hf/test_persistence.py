"""Saved caches: read back equal, continued many times; damaged and foreign files are refused with a reason."""

from __future__ import annotations

import copy
import json
import os
from contextlib import nullcontext
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from models import build, ids, llama, tiny
from recipes import DISTINCT, NAMED, named
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from saved import rewritten
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from words import CACHE

from kvpolicy import CompressedCache, Recipe, attach, load_recipe, make_cache
from kvpolicy.errors import CacheError
from kvpolicy.interfaces.policy import RankPolicy
from kvpolicy.recipe.load import load_yaml

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield


def filled(recipe: Any, model: PreTrainedModel, tokens: int = 150, **params: Any) -> CompressedCache:
    cache = make_cache(recipe, model, **params)
    model(ids(tokens, batch=2), **{CACHE: cache})
    for t in range(5):
        model(ids(1, batch=2, seed=t), **{CACHE: cache})
    return cache


def logits(model: PreTrainedModel, cache: CompressedCache, steps: int = 20) -> torch.Tensor:
    return torch.stack([model(ids(1, batch=2, seed=50 + t), **{CACHE: cache}).logits for t in range(steps)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", NAMED)
def test_round_trip(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny("llama", dtype)
    cache = filled(named(name), model)
    file = tmp_path / "cache.safetensors"
    cache.save(file)
    loaded = CompressedCache.load(file, model)
    assert loaded.get_seq_length() == cache.get_seq_length() == 155
    assert loaded.recipe == cache.recipe
    assert str(loaded.summary()) == str(cache.summary())
    for i in range(2):
        assert all((a == b).all() for a, b in zip(loaded.positions(i), cache.positions(i), strict=True))
        for a, b in zip(loaded.dense(i), cache.dense(i), strict=True):
            assert a.dtype == dtype
            assert torch.equal(a, b)
    a, b = loaded.memory(), cache.memory()
    assert (a.bytes, a.exact_bytes, a.values) == (b.bytes, b.exact_bytes, b.values)
    assert torch.equal(logits(model, loaded), logits(model, cache))


@pytest.mark.parametrize("name", DISTINCT)
def test_bundled_recipes_with_parameters_survive(name: str, tmp_path: Path) -> None:
    model = llama(64, 4, 2, torch.float32)
    params = {"window": 20} if name in ("logquant", "streaming-llm", "balanced") else {}
    by_attention = any(isinstance(tier.policy, RankPolicy) for tier in load_recipe(name).tiers)
    with attach(model) if by_attention else nullcontext():
        cache = filled(name, model, **params)
        cache.save(tmp_path / "cache")
        loaded = CompressedCache.load(tmp_path / "cache", model.config)
        assert isinstance(loaded.recipe, Recipe)
        assert loaded.recipe == cache.recipe
        found, expected = logits(model, loaded, 5), logits(model, cache, 5)
        assert torch.equal(found, expected) or by_attention
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


LAYERED = {"num_hidden_layers": 4, "head_dim": 32, "sliding_window": 24, "hidden_size_per_layer_input": 8}
LAYERED |= {"layer_types": ["sliding_attention", "full_attention"] * 2, "vocab_size_per_layer_input": 97}
LATER: dict[str, Any] = {
    "gemma3n_text": {**LAYERED, "num_kv_shared_layers": 2, "laurel_rank": 8, "activation_sparsity_pattern": [0.0] * 4},
    "gemma4_text": {**LAYERED, "num_kv_shared_layers": 0, "global_head_dim": 64},
}


@pytest.mark.parametrize("family", LATER)
def test_round_trip_of_models_whose_layers_differ(family: str, tmp_path: Path) -> None:
    """Layers that share a cache hold nothing; heads of different layers have different shapes."""
    model = build(family, torch.float32, **LATER[family])
    cache = filled("balanced", model, tokens=90, window=16)
    cache.save(tmp_path / "cache")
    loaded = CompressedCache.load(tmp_path / "cache", model)
    assert [type(x) for x in loaded.layers] == [type(x) for x in cache.layers]
    assert torch.equal(logits(model, loaded), logits(model, cache))


@pytest.mark.parametrize("family", ["mistral", "gemma3_text", "gpt_oss", "deepseek_v3"])
def test_round_trip_of_other_models(family: str, tmp_path: Path) -> None:
    model = tiny(family)
    cache = filled("logquant", model, tokens=90)
    cache.save(tmp_path / "cache")
    loaded = CompressedCache.load(tmp_path / "cache", model)
    assert [layer.get_seq_length() for layer in loaded.layers] == [95] * len(loaded.layers)
    assert [layer.get_mask_sizes(1) for layer in loaded.layers] == [layer.get_mask_sizes(1) for layer in cache.layers]
    assert torch.equal(logits(model, loaded, 60), logits(model, cache, 60))


def test_a_prompt_is_cached_once_and_continued_many_times(tmp_path: Path) -> None:
    model = tiny("llama")
    prompt = ids(140)
    cache = make_cache("logquant", model)
    model(prompt, **{CACHE: cache})
    cache.save(tmp_path / "prompt")
    for seed in range(3):
        tokens = torch.cat([prompt, ids(10, seed=seed)], dim=1)
        results = []
        for continued in (CompressedCache.load(tmp_path / "prompt", model), copy.deepcopy(cache)):
            options = {"attention_mask": torch.ones_like(tokens), "do_sample": False, "max_new_tokens": 20}
            results.append(model.generate(tokens, **{CACHE: continued}, **options))
            assert continued.get_seq_length() == 169
        assert torch.equal(*results)
    assert cache.get_seq_length() == 140


def test_saving_twice_gives_the_same_file_and_a_loaded_cache_can_be_saved(tmp_path: Path) -> None:
    model = tiny("llama")
    cache = filled("kivi", model, group_size=16)
    cache.save(tmp_path / "a")
    CompressedCache.load(tmp_path / "a", model).save(tmp_path / "b")
    a, b = load_file(tmp_path / "a"), load_file(tmp_path / "b")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_the_header_holds_recipe_and_versions(tmp_path: Path) -> None:
    import kvpolicy

    filled("logquant", tiny("llama"), window=10).save(tmp_path / "cache")
    with safe_open(tmp_path / "cache", "pt") as file:
        header = file.metadata()
    assert header["format"] == "kvpolicy-cache"
    assert load_yaml(header["recipe"]).tiers == kvpolicy.load_recipe("logquant", window=10).tiers
    assert json.loads(header["versions"])["kvpolicy"] == kvpolicy.__version__


def test_the_file_is_as_small_as_the_cache(tmp_path: Path) -> None:
    cache = filled("logquant", tiny("llama"), tokens=900)
    cache.save(tmp_path / "cache")
    memory = cache.memory()
    assert memory.bytes < (tmp_path / "cache").stat().st_size < memory.bytes + memory.shared_indices + 16_384
    assert (tmp_path / "cache").stat().st_size < memory.exact_bytes / 3


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    filled(named("kivi"), tiny("llama")).save(tmp_path / "cache")
    return tmp_path / "cache"


def refused(file: Path, model: Any, match: str) -> None:
    with pytest.raises(CacheError, match=match) as info:
        CompressedCache.load(file, model)
    assert str(file) in str(info.value)
    assert len(str(info.value)) < 600


@pytest.mark.parametrize("part", [0.0, 0.001, 0.1, 0.5, 0.999])
def test_truncated(saved: Path, part: float) -> None:
    content = saved.read_bytes()
    saved.write_bytes(content[: int(part * len(content))])
    refused(saved, tiny("llama"), "must be a cache written by CompressedCache.save; it can't be read")


@pytest.mark.parametrize("content", [b"", b"\x00" * 100, b"\xff" * 5000, b"tiers: []\n", bytes(range(256)) * 40])
def test_random_bytes(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "cache").write_bytes(content)
    refused(tmp_path / "cache", tiny("llama"), "must be a cache written by CompressedCache.save")


def test_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    refused(tmp_path / "none", tiny("llama"), "there is none")
    refused(tmp_path, tiny("llama"), "there is none")


def test_foreign_safetensors(tmp_path: Path) -> None:
    for metadata in (None, {"format": "pt"}):
        save_file({"weight": torch.zeros(3)}, tmp_path / "model", metadata=metadata)
        refused(tmp_path / "model", tiny("llama"), "found other safetensors")


def test_a_later_format(saved: Path) -> None:
    refused(
        rewritten(saved, header=lambda h: {**h, "format_version": "99"}),
        tiny("llama"),
        "cache format 99, this version of kvpolicy reads 1",
    )


def test_another_model(saved: Path) -> None:
    refused(saved, llama(64, 4, 2, torch.float32), "2 KV heads of 64 channels; layer 0 holds 2 of 32")
    refused(saved, llama(32, 4, 4, torch.float32), "4 KV heads of 32 channels; layer 0 holds 2 of 32")
    refused(saved, tiny("gemma3_text"), "of a gemma3_text model, found a cache of llama")
    refused(saved, tiny("qwen3"), "of a qwen3 model, found a cache of llama")
    refused(saved, tiny("llama", torch.bfloat16), "holds torch.float32, the model computes in torch.bfloat16")
    longer = copy.deepcopy(tiny("llama").config)
    longer.num_hidden_layers = 3
    refused(saved, longer, "of a model with the same layers: it holds 2 layers")


def test_under_autocast_the_type_is_up_to_the_model(tmp_path: Path) -> None:
    model = tiny("llama")
    with torch.autocast("cpu", torch.bfloat16):
        cache = filled(named("kivi"), model)
        cache.save(tmp_path / "cache")
        assert torch.equal(logits(model, CompressedCache.load(tmp_path / "cache", model)), logits(model, cache))
    refused(tmp_path / "cache", model, "holds torch.bfloat16, the model computes in torch.float32; use model.to")


def gpt2(heads: int) -> PreTrainedModel:
    config = AutoConfig.for_model("gpt2", n_embd=64, n_layer=2, n_head=heads, vocab_size=97)
    return AutoModelForCausalLM.from_config(config).eval()


def test_heads_are_checked_where_the_config_names_them_otherwise(tmp_path: Path) -> None:
    cache = filled(named("logquant"), gpt2(4))
    cache.save(tmp_path / "cache")
    assert CompressedCache.load(tmp_path / "cache", gpt2(4)).get_seq_length() == 155
    refused(tmp_path / "cache", gpt2(2), "of a model with 2 KV heads of 32 channels; layer 0 holds 4 of 16")


def test_the_file_may_change_or_vanish_once_it_is_read(saved: Path) -> None:
    model = tiny("llama")
    expected = logits(model, CompressedCache.load(saved, model))
    loaded = CompressedCache.load(saved, model)
    os.truncate(saved, 0)
    assert torch.equal(logits(model, loaded), expected)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_each_layer_is_loaded_to_the_device_of_the_models_layer(family: str, tmp_path: Path) -> None:
    """The meta device stands for a second one."""
    model = gpt2(4) if family == "gpt2" else copy.deepcopy(tiny(family))
    filled(named("kivi"), model).save(tmp_path / "cache")
    (model.transformer.h if family == "gpt2" else model.model.layers)[1].to("meta")
    first, second = CompressedCache.load(tmp_path / "cache", model).layers
    for layer, device in ((first, "cpu"), (second, "meta")):
        assert layer.device.type == device
        assert {x.device.type for x in layer.tiers.like.values()} == {device}
        pages = [p for s in layer.tiers.stores["keys"] for part in s.parts.values() for p in part.pages]
        assert {page.device.type for page in pages} == {device}


def test_layers_whose_weights_are_offloaded_are_loaded_where_they_compute(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    model = copy.deepcopy(tiny("llama"))
    cache = filled(named("kivi"), model)
    cache.save(tmp_path / "cache")
    expected = logits(model, cache)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert next(model.model.layers[0].parameters()).device.type == "meta"
    assert torch.equal(logits(model, CompressedCache.load(tmp_path / "cache", model)), expected)


def test_any_flipped_byte_is_found(saved: Path) -> None:
    content = saved.read_bytes()
    for at in range(8, len(content), len(content) // 40):
        saved.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        with pytest.raises(CacheError):
            CompressedCache.load(saved, tiny("llama"))


@pytest.mark.parametrize("kind", ["codes", "params", "exact", "like", "keys.0", "tier.0", "sizes"])
def test_tensors_of_another_kind_are_refused_when_they_are_read(kind: str, tmp_path: Path) -> None:
    model = tiny("gemma3_text")
    filled(named("kivi"), model).save(tmp_path / "cache")
    content = (tmp_path / "cache").read_bytes()
    changes = [lambda t: t.to(torch.float16), lambda t: torch.cat([t, t]), lambda t: t[..., :-1], lambda t: -t - 1]
    for name in [n for n in names(tmp_path / "cache") if n.endswith(kind)]:
        for change in changes:
            (tmp_path / "cache").write_bytes(content)
            changed = change(load_file(tmp_path / "cache")[name]).contiguous()
            file = rewritten(tmp_path / "cache", tensors=lambda t, name=name, changed=changed: {**t, name: changed})
            try:
                cache = CompressedCache.load(file, model)
            except CacheError:
                continue
            assert logits(model, cache, 40).isfinite().all()


def test_groups_and_tiers_that_can_not_be(saved: Path) -> None:
    content = saved.read_bytes()
    tensors = load_file(saved)
    sizes, tier = tensors["0.keys.1.sizes"], tensors["state.0.tier.1"]
    moved = sizes.clone()
    moved[-1], moved[-2] = -1, sizes[-1] + sizes[-2] + 1
    for name, changed in {"0.keys.1.sizes": moved, "state.0.tier.1": tier.flip(0)}.items():
        saved.write_bytes(content)
        changes = {name: changed.contiguous()}
        refused(rewritten(saved, tensors=lambda t, changes=changes: {**t, **changes}), tiny("llama"), "damaged")


def test_rows_must_be_of_one_batch(saved: Path) -> None:
    def doubled(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {n: torch.cat([t, t]) if n.startswith("1.") and t.ndim == 4 else t for n, t in tensors.items()}

    refused(rewritten(saved, tensors=doubled), tiny("llama"), "layer 1 must hold heads in 2 rows")


IMPOSSIBLE = ["155", -1, 5_000_000_000_000, 1.5, None, 3, True]


@pytest.mark.parametrize(("entry", "seen"), [("states", 200), *product(["states", "layers"], IMPOSSIBLE)])
def test_a_count_that_can_not_be(entry: str, seen: Any, tmp_path: Path) -> None:
    def changed(header: dict[str, str]) -> dict[str, str]:
        counted = json.loads(header[entry])
        return {**header, entry: json.dumps([{**counted[0], "seen": seen}, *counted[1:]])}

    filled(named("kivi"), tiny("gemma3_text")).save(tmp_path / "cache")
    refused(rewritten(tmp_path / "cache", header=changed), tiny("gemma3_text"), "damaged")


def test_a_saved_recipe_stands_alone(saved: Path) -> None:
    refused(rewritten(saved, header=lambda h: {**h, "recipe": "extends: /etc/passwd"}), tiny("llama"), "stands alone")


@pytest.mark.parametrize("entry", ["format", "layers", "states", "recipe"])
def test_a_missing_header_entry(saved: Path, entry: str) -> None:
    refused(rewritten(saved, header=lambda h: {k: v for k, v in h.items() if k != entry}), tiny("llama"), "cache")


@pytest.mark.parametrize("entry", ["layers", "states", "recipe"])
@pytest.mark.parametrize("value", ["", "null", "[]", "{", "[1, 2]", "3", '[{"a": 1}, {"a": 1}]'])
def test_a_damaged_header_entry(saved: Path, entry: str, value: str) -> None:
    refused(rewritten(saved, header=lambda h: {**h, entry: value}), tiny("llama"), "cache")


def names(file: Path) -> list[str]:
    return sorted(load_file(file))


def test_a_missing_tensor_of_every_kind(saved: Path) -> None:
    content = saved.read_bytes()
    for name in names(saved):
        saved.write_bytes(content)
        file = rewritten(saved, tensors=lambda t, name=name: {k: v for k, v in t.items() if k != name})
        with pytest.raises(CacheError, match="damaged"):
            CompressedCache.load(file, tiny("llama"))


def test_a_tensor_of_another_length(saved: Path) -> None:
    content = saved.read_bytes()
    for name in names(saved):
        tensor = load_file(saved)[name]
        axis = 2 if tensor.ndim == 4 else 0
        if name.endswith("like") or not tensor.shape[axis]:
            continue
        saved.write_bytes(content)
        file = rewritten(
            saved, tensors=lambda t, name=name, axis=axis: {**t, name: t[name].narrow(axis, 0, 1).contiguous()}
        )
        with pytest.raises(CacheError, match="damaged"):
            CompressedCache.load(file, tiny("llama"))
        saved.write_bytes(content)


def test_a_recipe_that_asks_for_an_unknown_plugin(saved: Path) -> None:
    refused(
        rewritten(saved, header=lambda h: {**h, "recipe": "tiers: [{store: {kind: nonsense}}]"}),
        tiny("llama"),
        "holds a recipe that can't be used here.*nonsense",
    )


def test_an_empty_cache_and_an_unwritable_place(tmp_path: Path) -> None:
    model = tiny("llama")
    with pytest.raises(CacheError, match="must hold tokens to be saved, found an empty one"):
        make_cache("logquant", model).save(tmp_path / "cache")
    with pytest.raises(CacheError, match="could not be written to"):
        filled("logquant", model).save(tmp_path / "none" / "cache")


def test_evicting_recipe_after_a_reset_and_a_crop(tmp_path: Path) -> None:
    model = tiny("llama")
    cache = filled("logquant-evict", model, window=10)
    cache.crop(120)
    cache.save(tmp_path / "cache")
    loaded = CompressedCache.load(tmp_path / "cache", model)
    assert loaded.get_seq_length() == 120
    assert torch.equal(logits(model, loaded), logits(model, cache))
