"""Tiny models with random weights, one for each kind of cache that transformers builds."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel

__all__ = ["FAMILIES", "bundled", "exact", "ids", "llama", "tiny"]

VOCAB = 97
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"head_dim": 32},
    "qwen2": {},
    "qwen3": {"head_dim": 32},
    "mistral": {"sliding_window": 48, "head_dim": 32},
    "gemma3_text": {
        "num_hidden_layers": 4,
        "head_dim": 32,
        "sliding_window": 24,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        "query_pre_attn_scalar": 32,
    },
    "phi3": {"sliding_window": None},
    "gpt_oss": {
        "num_hidden_layers": 4,
        "head_dim": 32,
        "sliding_window": 24,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
    },
    "deepseek_v3": {
        "num_key_value_heads": 4,
        "first_k_dense_replace": 1,
        "moe_intermediate_size": 16,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "n_shared_experts": 1,
        "q_lora_rank": 16,
        "kv_lora_rank": 32,
        "qk_rope_head_dim": 16,
        "qk_nope_head_dim": 16,
        "v_head_dim": 24,
    },
}


def build(family: str, dtype: torch.dtype, **options: Any) -> PreTrainedModel:
    config = AutoConfig.for_model(family, **{**COMMON, **options})
    transformers.set_seed(0)
    model = AutoModelForCausalLM.from_config(config).to(dtype).eval()
    # Random weights of the usual size give nearly constant logits, which would hide differences.
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1 and "embed" not in name:
                weight.mul_(3)
    return model


@lru_cache(maxsize=64)
def tiny(family: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A model of a family."""
    return build(family, dtype, **FAMILIES[family])


@lru_cache(maxsize=64)
def llama(head_dim: int, heads: int, kv_heads: int, dtype: torch.dtype) -> PreTrainedModel:
    """A Llama whose heads have a given shape."""
    return build("llama", dtype, head_dim=head_dim, num_attention_heads=heads, num_key_value_heads=kv_heads)


@lru_cache(maxsize=1)
def bundled() -> tuple[PreTrainedModel, Any]:
    """The model and the tokenizer that kvpolicy ships."""
    from pathlib import Path

    import kvpolicy

    path = Path(kvpolicy.__file__).parent / "model"
    model = AutoModelForCausalLM.from_pretrained(path, local_files_only=True).eval()
    return model, transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)


def exact(model: PreTrainedModel) -> DynamicCache:
    """The library's own cache."""
    return DynamicCache(config=model.config)


def ids(tokens: int, batch: int = 1, seed: int = 0) -> torch.Tensor:
    """Random token ids, none of them a special one."""
    return torch.randint(3, VOCAB, (batch, tokens), generator=torch.Generator().manual_seed(seed))
