"""The commonest decoders, whose shape follows from config.json alone: transformers need not be loaded, which takes
seconds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvpolicy.planning.shape import LayerShape, ModelShape

__all__ = ["plain_shape"]

ESSENTIAL = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
NEEDED = {
    "llama": (),
    "mistral": ("num_key_value_heads",),
    "qwen2": ("num_key_value_heads",),
    "qwen3": ("num_key_value_heads", "head_dim"),
}
"""For each type of model what a config must say besides, as transformers has a default of its own for it."""
ODD = (
    "text_config", "num_kv_shared_layers", "cross_attention_layers", "partial_rotary_factor", "auto_map",
    "per_layer_config", "kv_lora_rank", "num_experts", "num_local_experts", "quantization_config",
)  # fmt: skip
"""What takes transformers to understand."""
MOVING = ("dynamic", "longrope")
"""Rotary embeddings that depend on more than the position."""


def plain_shape(name: str, config: Mapping[str, Any]) -> ModelShape | None:
    """The shape of a model of one of these types; None: it takes transformers to say it.

    A config that names no type, and says the sizes of a Llama, is taken for one.
    """
    kind = config.get("model_type")
    notes: tuple[str, ...] = ()
    if kind is None and not config.get("architectures"):
        kind, notes = "llama", ("the config names no model_type: counted as a Llama",)
    known = kind in NEEDED and all(isinstance(config.get(key), int) for key in (*ESSENTIAL, *NEEDED[kind]))
    if not known or any(config.get(key) for key in ODD) or not _all_full(kind, config):
        return None
    vocab, hidden, inner, layers, heads = (config[key] for key in ESSENTIAL)
    kv_heads = config.get("num_key_value_heads") or heads
    dim = config.get("head_dim") or hidden // heads
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if "partial_rotary_factor" in rope or heads % kv_heads:
        return None
    moving = str(rope.get("rope_type", rope.get("type"))) in MOVING
    layer = LayerShape(heads, kv_heads, dim, dim, 0 if moving else dim)
    table = vocab * hidden
    rest = layers * _of_layer(kind, config, (hidden, inner, heads, kv_heads, dim)) + hidden
    tied = config.get("tie_word_embeddings") is True
    return ModelShape(
        name=name,
        layers=(layer,) * layers,
        parameters=rest + table * (1 if tied else 2),
        read=rest + table,
        expert=0,
        active=1.0,
        dtype="bfloat16",
        hidden=hidden,
        widest=max((2 * heads + 2 * kv_heads) * dim, 3 * inner),
        vocab=vocab,
        positions=found if isinstance(found := config.get("max_position_embeddings"), int) else None,
        notes=notes,
    )


def _all_full(kind: Any, config: Mapping[str, Any]) -> bool:
    """Whether all layers attend to all tokens."""
    if any(word != "full_attention" for word in config.get("layer_types") or ()):
        return False
    if kind == "mistral":
        return "sliding_window" in config and config["sliding_window"] is None
    return kind == "llama" or not config.get("use_sliding_window")


def _of_layer(kind: Any, config: Mapping[str, Any], sizes: tuple[int, int, int, int, int]) -> int:
    """Numbers in the weights of a layer."""
    hidden, inner, heads, kv_heads, dim = sizes
    attention = 2 * hidden * heads * dim + 2 * hidden * kv_heads * dim
    if kind == "qwen2":
        attention += (heads + 2 * kv_heads) * dim
    elif kind in ("llama", "qwen3") and config.get("attention_bias"):
        attention += (heads + 2 * kv_heads) * dim + hidden
    if kind == "qwen3":
        attention += 2 * dim
    biases = 2 * inner + hidden if kind == "llama" and config.get("mlp_bias") else 0
    return attention + 3 * hidden * inner + biases + 2 * hidden
