"""What a model does with its cache decides which recipes it can be given."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import pytest
import torch
from transformers import AutoConfig, DynamicCache, MllamaConfig, MllamaForConditionalGeneration
from transformers.cache_utils import DynamicLayer

from kvpolicy import attach, make_cache
from kvpolicy.errors import CacheError
from kvpolicy.hf.layer import TieredLayer
from tests.support.models import COMMON, build, exact, ids, tiny
from tests.support.words import CACHE

EVICT = {
    "name": "window",
    "tiers": [{"policy": {"kind": "recent", "window": 24}, "store": "full"}, {"store": "evict"}],
}
QUANTIZE = {
    "name": "q",
    "tiers": [
        {"policy": {"kind": "recent", "window": 16}, "store": "full"},
        {"store": {"kind": "int", "nbits": 8, "group_size": 16}},
    ],
}
BY_INDEX: dict[str, tuple[str, dict[str, Any], str]] = {
    "bloom": ("bloom", {"n_layer": 2, "n_head": 4}, "BloomAttention adds biases by distance"),
    "mpt": ("mpt", {"d_model": 64, "n_heads": 4, "n_layers": 2}, "asks for biases by distance"),
    "falcon-alibi": ("falcon", {"alibi": True}, "asks for biases by distance"),
    "cpmant": ("cpmant", {"num_attention_heads": 4, "dim_head": 16, "dim_ff": 64}, "CpmAntAttention adds biases"),
    "gpt_neo": (
        "gpt_neo",
        {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 40},
        "local window",
    ),
}
BY_KEY: dict[str, tuple[str, dict[str, Any]]] = {
    "falcon-rotary": ("falcon", {"alibi": False}),
    "gpt_neo-global": ("gpt_neo", {"num_layers": 2, "num_heads": 4, "attention_types": [[["global"], 2]]}),
    "gpt2": ("gpt2", {}),
    "opt": ("opt", {"word_embed_proj_dim": 64, "ffn_dim": 64}),
    "gptj": ("gptj", {"rotary_dim": 8}),
    "codegen": ("codegen", {"rotary_dim": 8}),
    "xglm": ("xglm", {"d_model": 64, "num_layers": 2, "attention_heads": 4, "ffn_dim": 64}),
    "llama": ("llama", {}),
}


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield


def made(family: str, options: dict[str, Any], as_config: bool) -> Any:
    if as_config:
        return AutoConfig.for_model(family, **{**COMMON, **options})
    return build(family, torch.float32, **options)


@pytest.mark.parametrize("as_config", [False, True], ids=["model", "config"])
@pytest.mark.parametrize("name", BY_INDEX)
def test_eviction_is_refused_where_biases_or_windows_go_by_index(name: str, as_config: bool) -> None:
    family, options, reason = BY_INDEX[name]
    given = made(family, options, as_config)
    with pytest.raises(CacheError, match=r"recipe 'window' drops tokens.*such as kivi") as found:
        make_cache(EVICT, given)
    assert reason in str(found.value)
    make_cache(QUANTIZE, given)  # what drops nothing is served


def test_a_local_window_is_found_in_the_table_when_the_config_says_nothing() -> None:
    family, options, _ = BY_INDEX["gpt_neo"]
    model = build(family, torch.float32, **options)
    model.config.attention_layers = ["global", "global"]
    with pytest.raises(CacheError, match="GPTNeoSelfAttention cuts a local window"):
        make_cache(EVICT, model)


@pytest.mark.parametrize("name", BY_KEY)
def test_eviction_is_right_where_positions_are_part_of_keys(name: str) -> None:
    """Against the exact cache with the dropped tokens hidden by a mask."""
    family, options = BY_KEY[name]
    model = made(family, options, False)
    make_cache(EVICT, model.config)
    cache, truth, tokens = make_cache(EVICT, model), exact(model), ids(60)
    positioned = "position_ids" in inspect.signature(model.forward).parameters
    model(tokens[:, :40], **{CACHE: cache})
    model(tokens[:, :40], **{CACHE: truth})
    for at in range(40, 60):
        mask = torch.zeros(1, at + 1, dtype=torch.long)
        mask[0, at - 24 :] = 1
        where = {"position_ids": torch.tensor([[at]])} if positioned else {}
        got = model(tokens[:, at : at + 1], **{CACHE: cache}).logits
        want = model(tokens[:, at : at + 1], attention_mask=mask, **where, **{CACHE: truth}).logits
        torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("family", "options", "kind"),
    [
        ("mistral", {"sliding_window": 48}, "DynamicSlidingWindowLayer"),
        ("phi3", {"sliding_window": 48}, "DynamicSlidingWindowLayer"),
        (
            "falcon_h1",
            {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1},
            "LinearAttentionAndFullAttentionLayer",
        ),
    ],
)
def test_nothing_to_compress_is_told(family: str, options: dict[str, Any], kind: str) -> None:
    config = AutoConfig.for_model(family, **{**COMMON, **options})
    with pytest.warns(UserWarning, match=f"'q' compresses nothing of this model.*found none, among 2 {kind}") as told:
        make_cache(QUANTIZE, config)
    assert [w.filename for w in told] == [__file__]
    with pytest.raises(CacheError, match=f"2 {kind}"):
        make_cache(QUANTIZE, config, strict=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_cache("full", config, strict=True)  # which asks for nothing


def test_a_recipe_that_keeps_the_only_compressible_layers_in_full_is_told() -> None:
    model = tiny("gemma3_text")
    recipe = {**QUANTIZE, "layers": {"1": "full", "3": "full"}}
    with pytest.raises(CacheError, match=r"found \[1, 3\], which its own `layers` keep in full, among"):
        make_cache(recipe, model, strict=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_cache(QUANTIZE, model, strict=True)


def mllama() -> Any:
    text = {**COMMON, "vocab_size": 107, "num_hidden_layers": 4, "cross_attention_layers": [1, 3]}
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0}
    vision = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_global_layers": 1,
        "attention_heads": 2,
        "intermediate_size": 32,
        "vision_output_dim": 64,
        "image_size": 28,
        "patch_size": 14,
        "max_num_tiles": 1,
        "supported_aspect_ratios": [[1, 1]],
        "intermediate_layers_indices": [0],
    }
    torch.manual_seed(0)
    model = MllamaForConditionalGeneration(
        MllamaConfig(vision_config=vision, text_config=text, image_token_index=98)
    ).eval()
    for name, weight in model.named_parameters():
        if "gate" in name:
            weight.fill_(1.0)  # zero lets nothing of the image through
        elif weight.ndim > 1 and "embed" not in name:
            weight.mul_(3)
    return model


def picture() -> dict[str, torch.Tensor]:
    pixels = torch.randn(1, 1, 1, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    ones = torch.ones(1, 1, 1, dtype=torch.long)
    return {"pixel_values": pixels, "aspect_ratio_ids": ones[:, :, 0], "aspect_ratio_mask": ones}


def chat(model: Any, cache: Any, image: bool) -> torch.Tensor:
    tokens, given = ids(40), {}
    if image:
        tokens[0, 1] = 98
        given = {**picture(), "cross_attention_mask": torch.ones(1, 40, 1, 1, dtype=torch.long)}
    out = model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        **given,
        **{CACHE: cache},
        max_new_tokens=8,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return torch.stack(out.logits, dim=1)


@pytest.mark.parametrize("image", [False, True], ids=["text", "image"])
def test_mllama(image: bool) -> None:
    model = mllama()
    truth = DynamicCache(config=model.config)
    want = chat(model, truth, image)
    cache = make_cache("full", model)
    assert torch.equal(chat(model, cache, image), want)
    assert [isinstance(x, TieredLayer) for x in cache.layers] == [True, False, True, False]
    close = make_cache(QUANTIZE, model)
    got = chat(model, close, image)
    assert 0 < (got - want).abs().max() < 0.1 * want.abs().max()
    with attach(model):
        attached = chat(model, make_cache(QUANTIZE, model), image)
        torch.testing.assert_close(attached, got, atol=1e-4, rtol=1e-4)
        chat(model, make_cache(EVICT, model), image)
    if image:
        assert cache.memory().bytes
        assert len(cache.summary().layers) == 4
        held = cache.layers[1].keys
        cache.crop(-5)
        assert cache.get_seq_length() == truth.get_seq_length() - 5
        assert torch.equal(cache.layers[1].keys, held)  # the image is no part of the text
        cache.reset()
        assert torch.equal(chat(model, cache, image), want)


def test_mllama_without_an_image_keeps_library_layers() -> None:
    layers = make_cache(QUANTIZE, mllama().config).layers
    assert all(isinstance(layers[i], DynamicLayer) for i in (1, 3))
