"""Attached models: the same numbers as unattached, nothing else changed, nothing left behind."""

from __future__ import annotations

import copy
import gc
import itertools
import weakref
from typing import Any

import pytest
import torch
import transformers
from models import FAMILIES, bundled, exact, ids, llama, tiny
from recipes import BY_POSITION
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, StaticCache
from words import CACHE, cache_of

import kvpolicy
from kvpolicy import attach, load_recipe, make_cache
from kvpolicy.errors import CacheError
from kvpolicy.hf.layer import TieredLayer

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield


def cache_for(name: str, model: PreTrainedModel) -> Any:
    recipe = load_recipe(name)
    small = {"group_size": 16, "window": 20, "residual": 32}
    return make_cache(recipe, model, **{k: v for k, v in small.items() if k in recipe.params})


def logits(model: PreTrainedModel, cache: Any, tokens: torch.Tensor, prompt: int, **options: Any) -> torch.Tensor:
    """Of a prompt, a chunk of 20 tokens, and single steps."""
    cuts = [0, prompt, prompt + 20, *range(prompt + 21, tokens.shape[1] + 1)]
    found = []
    for a, b in itertools.pairwise(cuts):
        given = {k: v[:, :b] for k, v in options.items()}
        found.append(model(tokens[:, a:b], **{CACHE: cache}, **given).logits)
    return torch.cat(found, dim=1)


def check(model: PreTrainedModel, name: str, tokens: torch.Tensor, prompt: int, tolerance: float, **mask: Any) -> None:
    expected = logits(model, cache_for(name, model), tokens, prompt, **mask)
    with attach(model):
        found = logits(model, cache_for(name, model), tokens, prompt, **mask)
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()
    assert found.isfinite().all()


def check_each(model: PreTrainedModel, name: str, tokens: torch.Tensor, prompt: int, tolerance: float) -> None:
    """`check`, each step from one and the same cache: so no code is on the other side of a boundary by rounding.

    Of single steps every fifth is compared.
    """
    cache = cache_for(name, model)
    cuts = [0, prompt, prompt + 20, *range(prompt + 21, tokens.shape[1] + 1)]
    attached = attach(model)
    try:
        for a, b in itertools.pairwise(cuts):
            expected = None
            if b - a > 1 or a % 5 == 0:
                attached.detach()
                expected = model(tokens[:, a:b], **{CACHE: copy.deepcopy(cache)}).logits
                attached = attach(model)
            found = model(tokens[:, a:b], **{CACHE: cache}).logits
            if expected is not None:
                assert (found - expected).abs().max() <= tolerance * expected.abs().max()
    finally:
        attached.detach()


@pytest.mark.parametrize("name", BY_POSITION)
def test_every_recipe_over_300_steps(name: str) -> None:
    check_each(tiny("llama"), name, ids(380, batch=2), 60, 1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["logquant", "kivi", "logquant-evict"])
def test_every_family(family: str, name: str) -> None:
    check_each(tiny(family), name, ids(210, batch=2), 70, 1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", BY_POSITION)
def test_every_recipe_in_half_precision(name: str, dtype: torch.dtype) -> None:
    check(tiny("llama", dtype), name, ids(150), 70, 16 * torch.finfo(dtype).eps)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (4, 1)], ids=["MHA", "GQA", "MQA"])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
def test_heads_of_every_shape(head_dim: int, heads: int, kv_heads: int) -> None:
    for name in ("logquant", "balanced"):
        check(llama(head_dim, heads, kv_heads, torch.float32), name, ids(110), 70, 1e-5)


@pytest.mark.parametrize("quantizer", ["quanto", "hqq"])
def test_other_quantizers(quantizer: str) -> None:
    model = tiny("llama")
    tokens = ids(140)
    expected = logits(model, make_cache("logquant", model, window=20, quantizer=quantizer), tokens, 70)
    with attach(model):
        found = logits(model, make_cache("logquant", model, window=20, quantizer=quantizer), tokens, 70)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_logit_softcapping() -> None:
    options = {"num_hidden_layers": 4, "head_dim": 32, "attn_logit_softcapping": 5.0, "sliding_window": 24}
    config = AutoConfig.for_model("gemma2", vocab_size=97, hidden_size=64, intermediate_size=64, **options)
    transformers.set_seed(0)
    check(AutoModelForCausalLM.from_config(config).eval(), "logquant", ids(140), 70, 1e-5)


@pytest.mark.parametrize("use", ["greedy", "beams", "sampling", "prompt_lookup", "assisted", "chunks"])
def test_generation_gives_the_tokens_of_the_unattached_model(use: str) -> None:
    model = tiny("llama")
    options: dict[str, Any] = {
        "greedy": {},
        "beams": {"num_beams": 3},
        "sampling": {"do_sample": True, "top_k": 5},
        "prompt_lookup": {"prompt_lookup_num_tokens": 5},
        "assisted": {"assistant_model": llama(32, 2, 1, torch.float32)},
        "chunks": {"prefill_chunk_size": 32},
    }[use]
    tokens = ids(12).repeat(1, 7)

    def run(cache: Any) -> torch.Tensor:
        transformers.set_seed(1)
        arguments: dict[str, Any] = {"do_sample": False, "max_new_tokens": 60, **options}
        return model.generate(tokens, **{CACHE: cache}, attention_mask=torch.ones_like(tokens), **arguments)

    names = ("full", "logquant", "kivi")
    expected = {name: run(cache_for(name, model)) for name in names}
    plain = run(exact(model))
    with attach(model):
        for name in names:
            assert torch.equal(run(cache_for(name, model)), expected[name]), name
        assert torch.equal(run(exact(model)), plain)
    if use != "chunks":
        assert torch.equal(expected["full"], plain)


@pytest.mark.parametrize("family", FAMILIES)
def test_any_other_cache_is_served_as_before_to_the_bit(family: str) -> None:
    model = tiny(family)
    tokens, mask = ids(90, batch=2), torch.ones(2, 90, dtype=torch.long)
    mask[0, :20] = 0

    def run() -> list[torch.Tensor]:
        found = [model(tokens).logits, model(tokens, attention_mask=mask, use_cache=False).logits]
        found.append(logits(model, exact(model), tokens, 40))
        found.append(logits(model, exact(model), tokens, 40, attention_mask=mask))
        if family != "deepseek_v3":
            found.append(logits(model, StaticCache(config=model.config, max_cache_len=96), tokens, 40))
        return found

    before = run()
    with attach(model):
        for a, b in zip(run(), before, strict=True):
            assert torch.equal(a.nan_to_num(), b.nan_to_num())


def state(model: PreTrainedModel) -> Any:
    modules = {
        name: {k: repr(v) for k, v in vars(module).items() if k not in ("_parameters", "_buffers", "_modules")}
        for name, module in model.named_modules()
    }
    configs = {name: repr(vars(m.config)) for name, m in model.named_modules() if hasattr(m, "config")}
    return modules, configs, {name: id(x) for name, x in model.state_dict(keep_vars=True).items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_detaching_leaves_nothing_behind(family: str) -> None:
    model = copy.deepcopy(tiny(family))
    before = state(model)
    handle = attach(model, recipe="balanced")
    assert state(model) != before
    model.generate(ids(20), max_new_tokens=5, do_sample=False)
    handle.detach()
    handle.detach()
    assert state(model) == before
    with pytest.raises(ZeroDivisionError), attach(model):
        _ = 1 / 0
    assert state(model) == before


def test_a_model_that_is_never_detached_can_be_freed() -> None:
    model = copy.deepcopy(tiny("llama"))
    alive = weakref.ref(model)
    attach(model, recipe="balanced")
    del model
    gc.collect()
    assert alive() is None


def test_attaching_twice_is_refused_and_two_models_at_once_work() -> None:
    one, other = tiny("llama"), tiny("qwen3")
    with attach(one), attach(other):
        for model in (one, one.model):
            with pytest.raises(CacheError, match="attached already"):
                attach(model)
        for model in (one, other):
            cache = make_cache("logquant", model)
            model.generate(ids(100), **{CACHE: cache}, max_new_tokens=5, do_sample=False)
    with attach(one.model):
        pass


def test_calls_without_a_cache_get_one_of_the_recipe() -> None:
    model = tiny("llama")
    tokens = ids(100)
    options = {"max_new_tokens": 30, "do_sample": False, "return_dict_in_generate": True}
    expected = model.generate(tokens, **{CACHE: make_cache("logquant", model, window=20)}, **options)
    with attach(model, recipe="logquant", window=20):
        found = model.generate(tokens, **options)
        assert cache_of(found).recipe.name == "logquant"
        assert torch.equal(found.sequences, expected.sequences)
        again = model.generate(tokens, **options)
        assert cache_of(again) is not cache_of(found)
        assert type(cache_of(model(tokens))).__name__ == "CompressedCache"
        assert cache_of(model(tokens, use_cache=False)) is None
        mine = exact(model)
        assert cache_of(model.generate(tokens, **{CACHE: mine}, **options)) is mine
        nothing = model.generate(tokens, use_cache=False, **options)
        assert cache_of(nothing) is None
    assert type(cache_of(model.generate(tokens, **options))).__name__ == "DynamicCache"


def test_a_pipeline_gets_the_recipe() -> None:
    model, tokenizer = bundled()
    pipe = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    options = {"max_new_tokens": 20, "do_sample": False}
    expected = pipe("def add(a, b):", **{CACHE: make_cache("balanced", model)}, **options)
    with attach(model, recipe="balanced"):
        assert pipe("def add(a, b):", **options) == expected


def test_nothing_is_decoded_to_a_dense_copy() -> None:
    model = tiny("llama")
    cache = make_cache("logquant", model)
    with attach(model):
        model.generate(ids(300), **{CACHE: cache}, max_new_tokens=50, do_sample=False)
    assert cache.scratch.bytes == 0
    assert all(row.type == "kvpolicy, attention by reference" for row in cache.summary().layers)


def test_models_that_compute_on_what_they_are_given_get_tensors_and_the_summary_says_so() -> None:
    model = tiny("deepseek_v3")
    cache = make_cache("logquant", model)
    with attach(model):
        model.generate(ids(100), **{CACHE: cache}, max_new_tokens=5, do_sample=False)
    assert all("dense" in row.type for row in cache.summary().layers)


def test_layers_may_keep_different_numbers_of_tokens_if_attached() -> None:
    tiers = [{"policy": {"kind": "recent", "window": 30}, "store": "full"}, {"store": "evict"}]
    recipe = {"tiers": tiers, "layers": {"0": "full"}}
    model = tiny("llama")
    with pytest.raises(CacheError, match=r"layers \[0\] and layers \[1\].*attach"):
        make_cache(recipe, model)
    with attach(model):
        cache = make_cache(recipe, model)
        model.generate(ids(100), **{CACHE: cache}, max_new_tokens=20, do_sample=False)
        assert [len(cache.positions(i).positions) for i in (0, 1)] == [119, 31]
    with pytest.raises(CacheError, match="attach"):
        model(ids(1), **{CACHE: cache})


def test_a_step_after_an_error_goes_on() -> None:
    model = tiny("llama")
    cache = make_cache("logquant", model)
    with attach(model):
        model(ids(100), **{CACHE: cache})
        with pytest.raises(CacheError, match="a column for each"):
            model(ids(1), **{CACHE: cache}, attention_mask=torch.ones(1, 1, 1, 50, dtype=torch.bool))
    assert not any(layer.attached for layer in cache.layers if isinstance(layer, TieredLayer))


def test_what_can_not_be_served_is_refused_by_name() -> None:
    falcon = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("falcon", hidden_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=97)
    )
    before = state(falcon)
    with pytest.raises(CacheError, match="FalconModel does not use transformers' attention interface"):
        attach(falcon)
    assert state(falcon) == before
    with pytest.raises(CacheError, match="a transformers model, found int"):
        attach(3)
    with pytest.raises(kvpolicy.errors.RecipeError, match="did you mean"):
        attach(tiny("llama"), recipe="logquent")
    with attach(tiny("llama")) as handle:
        assert handle.recipe is None


def test_training_and_attention_weights_are_refused() -> None:
    model = copy.deepcopy(tiny("llama"))
    with attach(model):
        cache = make_cache("logquant", model)
        model(ids(80), **{CACHE: cache})
        with pytest.raises(CacheError, match=r"model.eval\(\)"):
            model.train()(ids(1), **{CACHE: cache})
        model.eval()
        with pytest.raises(CacheError, match="output_attentions"):
            model(ids(1), **{CACHE: cache}, output_attentions=True)


@pytest.mark.parametrize("name", ["h2o", "zipcache"])
def test_policies_by_attention_are_refused_unattached_before_any_token(name: str) -> None:
    model = tiny("llama")
    cache = make_cache(name, model)
    with pytest.raises(CacheError, match=r"policy 'attention' selects tokens by the attention.*kvpolicy.attach"):
        model.generate(ids(100), **{CACHE: cache}, max_new_tokens=5)
    with pytest.raises(CacheError, match="policy 'attention'"):
        cache.update(torch.zeros(1, 2, 3, 32), torch.zeros(1, 2, 3, 32), 0)
    assert cache.get_seq_length() == 0
    with attach(model):
        model.generate(ids(100), **{CACHE: cache}, max_new_tokens=5)
    assert cache.get_seq_length() == 104


def test_policies_by_attention_are_refused_where_models_compute_on_keys() -> None:
    model = tiny("deepseek_v3")
    with attach(model), pytest.raises(CacheError, match="'attention' must see attention, and this model computes on"):
        model(ids(100), **{CACHE: make_cache("h2o", model)})


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in ("deepseek_v3", "mistral")])
@pytest.mark.parametrize("name", ["h2o", "zipcache", "mikv"])
def test_policies_by_attention_on_every_family(family: str, name: str) -> None:
    model = tiny(family)
    with attach(model):
        cache = make_cache(name, model, **({"period": 25} if name == "zipcache" else {}))
        found = model.generate(ids(180, batch=2), **{CACHE: cache}, max_new_tokens=40, do_sample=False)
    assert found.shape == (2, 220)
    layer = next(i for i, x in enumerate(cache.layers) if isinstance(x, TieredLayer))
    assert cache.positions(layer).positions.shape[:2] == (2, 2)
    assert cache.memory().ratio > 1.05


@pytest.mark.parametrize("name", ["h2o", "zipcache"])
def test_beams_and_assisted_decoding_with_policies_by_attention(name: str) -> None:
    model = tiny("llama")
    tokens = ids(12).repeat(1, 20)
    with attach(model):
        greedy = model.generate(tokens, **{CACHE: make_cache(name, model)}, max_new_tokens=40, do_sample=False)
        for options in ({"num_beams": 3}, {"prompt_lookup_num_tokens": 5}):
            cache = make_cache(name, model)
            found = model.generate(tokens, **{CACHE: cache}, max_new_tokens=40, do_sample=False, **options)
            assert found.shape == greedy.shape
            assert cache.get_seq_length() == 279


@pytest.mark.parametrize("select", ["head", "layer", "model"])
def test_what_selects_together(select: str) -> None:
    model = tiny("llama")
    tiers = [
        {"policy": {"kind": "recent", "window": 8}, "store": "full"},
        {"policy": {"kind": "attention", "budget": 20, "share": select}, "store": "full"},
        {"store": "evict"},
    ]
    cache = make_cache({"tiers": tiers}, model)
    with attach(model):
        model.generate(ids(130, batch=2), **{CACHE: cache}, max_new_tokens=40, do_sample=False)
    cache.commit()
    one, other = (cache.positions(layer).positions for layer in (0, 1))
    assert one.shape == other.shape == (2, 2 if select == "head" else 1, 28)
    assert (one == other).all() == (select == "model")
    assert select != "head" or not (one[:, 0] == one[:, 1]).all()
