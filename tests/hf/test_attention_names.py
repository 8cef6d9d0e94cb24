"""Families whose code looks at the name of the attention implementation compute the same attached, to the bit."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from models import COMMON, exact, ids
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel
from words import CACHE

from kvpolicy import attach, make_cache

_LOOKS = re.compile(r"_attn_implementation\s*(==|!=|in\b|not in\b)|(==|!=)\s*\w+(\.\w+)*\._attn_implementation")
HEADS = {**COMMON, "num_key_value_heads": 4, "head_dim": 16}
INDEXED = {
    **HEADS,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 16,
    "n_routed_experts": 2,
    "num_experts_per_tok": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "index_topk": 16,
    "index_n_heads": 2,
    "index_head_dim": 32,
}
TURNS = {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 24}
GEMMA = {**COMMON, **TURNS, "head_dim": 16, "global_head_dim": 16, "num_global_key_value_heads": 1}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}
TINY: dict[str, tuple[str, str | None, dict[str, Any]]] = {
    "axk2": ("axk2", None, INDEXED),
    "deepseek_v32": ("deepseek_v32", None, INDEXED),
    "diffusion_gemma": (
        "diffusion_gemma_text",
        "DiffusionGemmaEncoderTextModel",
        {**GEMMA, "num_experts": 2, "top_k_experts": 1, "moe_intermediate_size": 16},
    ),
    "dots3_note": ("dots3_note_text", None, {**INDEXED, "shared_experts_intermediate_size": 16}),
    "gemma4": (
        "gemma4_text",
        None,
        {**GEMMA, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 97, "num_kv_shared_layers": 2},
    ),
    "gemma4_unified": ("gemma4_unified_text", None, GEMMA),
    "glm5_next": (
        "glm5_next_text",
        "Glm5NextTextModel",
        {
            **INDEXED,
            "qk_rope_head_dim": 0,
            "head_dim": 0,
            "linear_head_dim": 16,
            "linear_num_heads": 4,
            "layer_types": ["linear_attention", "full_attention"],
        },
    ),
    "glm_moe_dsa": ("glm_moe_dsa", None, INDEXED),
    "gpt2": ("gpt2", None, {"vocab_size": 97, "n_embd": 64, "n_layer": 2, "n_head": 4}),
    "hy_v4": ("hy_v4", None, INDEXED),
    "hy_v4_vl": ("hy_v4_vl_text", "HYV4VLTextModel", {**INDEXED, "num_key_value_heads": 2, "rope_parameters": MROPE}),
    "minimax_m3_vl": (
        "minimax_m3_vl_text",
        None,
        {
            **HEADS,
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "dense_intermediate_size": 32,
            "shared_intermediate_size": 16,
            "rotary_dim": 8,
            "index_n_heads": 2,
            "index_head_dim": 16,
            "index_block_size": 16,
            "index_topk_blocks": 2,
        },
    ),
    "mistral_large4": ("mistral_large4_text", "MistralLarge4TextModel", INDEXED),
    "qwen2_5_omni": (
        "qwen2_5_omni_text",
        "Qwen2_5OmniThinkerTextModel",
        {**HEADS, "num_key_value_heads": 2, "rope_parameters": MROPE},
    ),
}
"""For each family a model type, its class where it is no causal language model by itself, and a tiny config."""
CUTS = [(0, 90), (90, 120), *((n, n + 1) for n in range(120, 150))]
LEFT_OUT = {
    "decision_transformer": "predicts actions from states and takes no token ids",
    "falcon": "has attention classes by name and is refused",
    "timm_backbone": "has no decoder",
    "timm_wrapper": "has no decoder",
}


def families() -> list[str]:
    """Those of the installed transformers whose modeling file compares the implementation's name."""
    folder = Path(transformers.__file__).parent / "models"
    files = sorted(folder.glob("*/modeling_*.py"))
    return [f.stem.removeprefix("modeling_") for f in files if _LOOKS.search(f.read_text(encoding="utf-8"))]


def build(family: str) -> PreTrainedModel:
    kind, name, options = TINY[family]
    config = CONFIG_MAPPING[kind](**options)
    transformers.set_seed(0)
    if name is None:
        return AutoModelForCausalLM.from_config(config).eval()
    module = importlib.import_module(type(config).__module__.replace("configuration_", "modeling_"))
    return getattr(module, name)(config).eval()


@torch.no_grad()
def outputs(model: PreTrainedModel, cache: Any, **mask: Any) -> list[torch.Tensor]:
    """Of a prompt, a step and a chunk."""
    tokens = ids(60, batch=2)
    found = []
    for a, b in ((0, 40), (40, 41), (41, 60)):
        given = {k: v[:, :b] for k, v in mask.items()}
        found.append(model(tokens[:, a:b], **{CACHE: cache}, **given)[0])
    return found


def test_every_family_that_looks_is_tried_or_left_out_with_a_reason() -> None:
    assert set(families()) <= {*TINY, *LEFT_OUT}


@pytest.mark.parametrize("family", [family for family in families() if family in TINY])
def test_attaching_changes_nothing_to_the_bit(family: str) -> None:
    model, tokens = build(family), ids(60, batch=2)
    mask = torch.ones_like(tokens)
    mask[0, :10] = 0
    with torch.no_grad():
        before = [model(tokens, use_cache=False)[0], model(tokens, use_cache=False, attention_mask=mask)[0]]
        before += [*outputs(model, exact(model)), *outputs(model, exact(model), attention_mask=mask)]
        with attach(model):
            after = [model(tokens, use_cache=False)[0], model(tokens, use_cache=False, attention_mask=mask)[0]]
            after += [*outputs(model, exact(model)), *outputs(model, exact(model), attention_mask=mask)]
            full = outputs(model, make_cache("full", model))
    for a, b in zip([*after, *full], [*before, *before[2:5]], strict=True):
        assert torch.equal(a.nan_to_num(), b.nan_to_num())


def test_layers_that_share_keys_of_others() -> None:
    model = build("gemma4")
    tokens, recent = ids(150), {"policy": {"kind": "recent", "window": 30}, "store": "full"}
    for store in ({"kind": "int", "nbits": 4, "group_size": 16}, "evict"):
        chosen = {"tiers": [recent, {"store": store}]}

        def run(cache: Any) -> torch.Tensor:
            found = [model(tokens[:, a:b], **{CACHE: cache}).logits for a, b in CUTS]
            return torch.cat(found, dim=1)

        with torch.no_grad():
            expected = run(make_cache(chosen, model))
            with attach(model):
                found = run(make_cache(chosen, model))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    with attach(model):
        given = model.generate(tokens, **{CACHE: make_cache("h2o", model)}, max_new_tokens=8, do_sample=False)
    assert given.shape == (1, 158)
