"""The registry of attention functions: names stay, entries come back, and nobody else's attention is touched."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch
import transformers
from models import build, ids, tiny
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from words import CACHE

from kvpolicy import attach, make_cache
from kvpolicy.errors import CacheError

QUANTIZED = {
    "tiers": [
        {"policy": {"kind": "recent", "window": 8}, "store": "full"},
        {"store": {"kind": "int", "nbits": 4, "group_size": 16}},
    ]
}


@pytest.fixture
def model() -> PreTrainedModel:
    return copy.deepcopy(tiny("llama"))


@torch.no_grad()
def given(model: PreTrainedModel, cache: Any) -> None:
    """A prompt and two steps."""
    for a, b in ((0, 40), (40, 41), (41, 42)):
        model(ids(42)[:, a:b], **{CACHE: cache})


def test_the_name_stays_and_the_entry_is_restored(model: PreTrainedModel) -> None:
    other, before = tiny("qwen3"), ALL_ATTENTION_FUNCTIONS["sdpa"]
    first, second = attach(model), attach(other)
    assert model.config._attn_implementation == "sdpa"
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is not before
    first.detach()
    cache = make_cache(QUANTIZED, other)
    given(other, cache)
    assert cache.scratch.bytes == 0
    second.detach()
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is before
    assert "sdpa" not in ALL_ATTENTION_FUNCTIONS._local_mapping


def test_a_model_that_is_freed_attached_gives_the_entry_back() -> None:
    before = ALL_ATTENTION_FUNCTIONS["sdpa"]
    attach(copy.deepcopy(tiny("llama")))
    gc.collect()
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is before


def test_an_override_of_the_users_own_stays(model: PreTrainedModel) -> None:
    plain, calls = ALL_ATTENTION_FUNCTIONS["sdpa"], []

    def own(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return plain(*args, **kwargs)

    ALL_ATTENTION_FUNCTIONS["sdpa"] = own
    try:
        with attach(model):
            model(ids(5))
        assert len(calls) == 2
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is own
        del ALL_ATTENTION_FUNCTIONS["sdpa"]
        with attach(model):
            ALL_ATTENTION_FUNCTIONS["sdpa"] = own
            model(ids(5))
            with pytest.raises(CacheError, match="another function under this name; detach it"):
                given(model, make_cache(QUANTIZED, model))
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is own
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]


def test_a_change_of_the_implementation_is_noticed_and_not_undone(model: PreTrainedModel) -> None:
    handle = attach(model)
    model.set_attn_implementation("eager")
    model(ids(5))
    with pytest.raises(CacheError, match=r"must keep its attention, 'sdpa', found 'eager'; detach it"):
        given(model, make_cache(QUANTIZED, model))
    handle.detach()
    assert model.config._attn_implementation == "eager"
    cache = make_cache(QUANTIZED, model)
    with attach(model):
        given(model, cache)
    assert cache.scratch.bytes == 0
    assert "eager" not in ALL_ATTENTION_FUNCTIONS


def test_eager_models_of_the_process_are_left_alone(model: PreTrainedModel) -> None:
    model.set_attn_implementation("eager")
    others = [tiny("gpt_oss"), *(copy.deepcopy(tiny(f)) for f in ("qwen2", "gemma3_text"))]
    for other in others:
        other.set_attn_implementation("eager")
    vision = transformers.Kosmos2_5Config(
        text_config={"layers": 1, "embed_dim": 32, "ffn_dim": 32, "attention_heads": 2, "vocab_size": 97},
        vision_config={"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "d_kv": 16},
    )
    named = transformers.Kosmos2_5ForConditionalGeneration(vision).eval()
    named.set_attn_implementation("eager")
    text = named.text_model
    before = [m(ids(20)).logits for m in others] + [text(ids(20)).logits]
    with attach(model):
        after = [m(ids(20)).logits for m in others] + [text(ids(20)).logits]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_other_implementations_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama", torch.float32, head_dim=32)
    model.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(CacheError, match=r"\['sdpa', 'eager'\]; LlamaModel uses 'flash_attention_2'"):
        attach(model)
    assert not model.model._forward_pre_hooks
