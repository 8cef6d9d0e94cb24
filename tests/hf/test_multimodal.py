"""Models that build their masks above the decoder: the cache and its padding are known there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from models import COMMON, ids
from transformers import PreTrainedModel
from words import CACHE, cache_of

from kvpolicy import attach, make_cache

GREEDY: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
BOI = {"boi_token_index": 99, "eoi_token_index": 100}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
    "vision_use_head": False,
}


def gemma3() -> PreTrainedModel:
    text = {
        **COMMON,
        "vocab_size": 107,
        "num_hidden_layers": 4,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "sliding_window": 24,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    }
    config = transformers.Gemma3Config(
        vision_config=VISION, text_config=text, image_token_id=98, mm_tokens_per_image=4, **BOI
    )
    transformers.set_seed(0)
    return transformers.Gemma3ForConditionalGeneration(config).eval()


def paligemma() -> PreTrainedModel:
    config = transformers.PaliGemmaConfig(
        vision_config={**VISION, "model_type": "siglip_vision_model", "projection_dim": 64},
        text_config={**COMMON, "model_type": "gemma", "vocab_size": 107, "head_dim": 16},
        image_token_id=98,
        projection_dim=64,
        hidden_size=64,
        vocab_size=107,
    )
    transformers.set_seed(0)
    return transformers.PaliGemmaForConditionalGeneration(config).eval()


@pytest.mark.parametrize("make", [gemma3, paligemma])
class TestMultimodal:
    def test_policies_by_attention(self, make: Any) -> None:
        model = make()
        with attach(model, recipe="h2o"):
            found = model.generate(ids(80), **GREEDY, return_dict_in_generate=True)
        assert cache_of(found).recipe.name == "h2o"
        assert cache_of(found).get_seq_length() == 87

    def test_a_second_turn(self, make: Any) -> None:
        model = make()
        with attach(model):
            cache = make_cache("streaming-llm", model, window=24)
            first = model.generate(ids(80), **{CACHE: cache}, **GREEDY)
            second = torch.cat([first, ids(20, seed=1)], 1)
            assert model.generate(second, **{CACHE: cache}, **GREEDY).shape == (1, 116)

    def test_padding_is_known(self, make: Any) -> None:
        model, alone = make(), ids(60, seed=12)
        tokens = torch.cat([ids(100, seed=11), torch.cat([torch.zeros(1, 40, dtype=torch.long), alone], 1)])
        mask = torch.ones_like(tokens)
        mask[1, :40] = 0
        with attach(model):
            cache = make_cache("streaming-llm", model, window=24)
            model.generate(tokens, attention_mask=mask, **{CACHE: cache}, **GREEDY)
            cache.commit()
            assert cache.padding is not None
            places = cache.positions(1).positions[1, 0]
            single = make_cache("streaming-llm", model, window=24)
            model.generate(alone, **{CACHE: single}, **GREEDY)
            single.commit()
            assert (places - 40).tolist() == single.positions(1).positions.tolist()
