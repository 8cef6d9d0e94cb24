"""The shape of any decoder of transformers: it is built without memory and fed two tokens."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache
from transformers.models.auto.modeling_auto import AutoModelForImageTextToText

from kvpolicy.errors import CacheError, PlanError
from kvpolicy.hf.model_config import config_of, head_dim_of, layer_config
from kvpolicy.hf.models import cache_word
from kvpolicy.hf.rotary import MOVING
from kvpolicy.hf.suitability import compressible, set_apart
from kvpolicy.planning.shape import LayerShape, ModelShape
from kvpolicy.words import clip

__all__ = ["config_from", "shape_from"]

EXPERTS = re.compile(r"(^|\.)experts(\.|$)")


def config_from(name: str, found: Mapping[str, Any]) -> Any:
    """A config of transformers for what a config.json says.

    Raises:
        PlanError: it describes no model that transformers knows.
    """
    kind = found.get("model_type")
    if not isinstance(kind, str):
        raise PlanError(f"{clip(name)}: config.json must name a model_type that transformers knows, found none")
    try:
        return AutoConfig.for_model(kind, **{key: value for key, value in found.items() if key != "model_type"})
    except Exception as error:
        raise PlanError(f"{clip(name)}: the config can't be used: {_line(error)}") from error


def shape_from(name: str, given: Any) -> ModelShape:
    """The shape of the model that a config describes.

    Raises:
        PlanError: no cache can serve it, or no model can be built of it.
    """
    try:
        config = config_of(given)
    except CacheError as error:
        raise PlanError(f"{clip(name)}: {error}") from error
    text = config.get_text_config(decoder=True)
    own = list(DynamicCache(config=config).layers)
    if not own:
        raise PlanError(f"{clip(name)}: the config must say how many layers the model has, found none")
    set_apart(own, text)
    model = _built(name, config, text)
    fed, notes = _fed(model, config), []
    if fed is None:
        notes.append("the model can't be fed without weights: heads are those that its config names")
    chosen = set(compressible(own))
    layers = tuple(
        _layer(text, i, layer, None if fed is None else fed[i], i in chosen, model) for i, layer in enumerate(own)
    )
    if getattr(config, "quantization_config", None):
        notes.append("weights are counted unquantized, which the model's own quantization makes smaller")
    if any("linear" in layer.kind.lower() and not layer.kv_heads for layer in layers):
        notes.append("states of linear layers, which don't grow with the context, are not counted")
    return _model_shape(name, model, text, layers, tuple(notes))


def _model_shape(
    name: str, model: nn.Module, text: Any, layers: tuple[LayerShape, ...], notes: tuple[str, ...]
) -> ModelShape:
    decoder: Any = getattr(model, "get_decoder", lambda: model)() or model
    head, table = model.get_output_embeddings(), model.get_input_embeddings()  # type: ignore[operator]
    weights = {id(p): (n, p.numel()) for n, p in decoder.named_parameters()}
    if head is not None:
        weights.update((id(p), ("head", p.numel())) for p in head.parameters())
    expert = sum(n for where, n in weights.values() if EXPERTS.search(where))
    read = sum(n for _, n in weights.values()) - expert
    if table is not None and (head is None or head.weight is not table.weight):
        read -= table.weight.numel()
    many = next(
        (n for key in ("num_experts", "num_local_experts", "n_routed_experts") if (n := getattr(text, key, 0))), 0
    )
    active = (getattr(text, "num_experts_per_tok", None) or many or 1) / (many or 1)
    inner = getattr(text, "intermediate_size", None)
    inner = max(inner) if isinstance(inner, list | tuple) else inner
    hidden = int(getattr(text, "hidden_size", 0) or 0)
    widths = [2 * layer.heads * layer.key_dim + layer.kv_heads * (layer.key_dim + layer.value_dim) for layer in layers]
    positions = getattr(text, "max_position_embeddings", None)
    return ModelShape(
        name=name,
        layers=layers,
        parameters=sum(p.numel() for p in model.parameters()),
        read=read,
        expert=expert,
        active=float(active),
        dtype="bfloat16",
        hidden=hidden,
        widest=max([3 * (inner if isinstance(inner, int) else 4 * hidden), *widths]),
        vocab=int(getattr(text, "vocab_size", 0) or 0),
        positions=positions if isinstance(positions, int) else None,
        shares_kv=bool(getattr(text, "num_kv_shared_layers", 0)),
        notes=notes,
    )


def _built(name: str, config: Any, text: Any) -> nn.Module:
    """The model, its weights of the device `meta`."""
    errors = []
    for make, of in (
        (AutoModelForCausalLM, config),
        (AutoModelForImageTextToText, config),
        (AutoModelForCausalLM, text),
    ):
        try:
            with torch.device("meta"):
                built: nn.Module = make.from_config(of, trust_remote_code=False)
            return built.eval()
        except Exception as error:  # whatever the code of a model makes of a config
            errors.append(error)
    raise PlanError(f"{clip(name)}: no causal language model can be built of the config: {_line(errors[0])}")


def _fed(model: Any, config: Any) -> list[Any] | None:
    """The layers of a cache that the model was given with two tokens; None if it can't run without weights."""
    cache = DynamicCache(config=config)
    ids = torch.zeros((1, 2), dtype=torch.long, device="meta")
    try:
        with torch.no_grad():
            model(input_ids=ids, use_cache=True, **{cache_word(model): cache})
    except Exception:  # some code of models looks at numbers, which there are none of
        return None
    return list(cache.layers)


def _layer(text: Any, i: int, own: Any, fed: Any, chosen: bool, model: nn.Module) -> LayerShape:
    config = layer_config(text, i)
    heads = int(getattr(config, "num_attention_heads", 1) or 1)
    keys, values = (getattr(fed, side, None) for side in ("keys", "values"))
    if fed is not None:
        if keys is None or values is None or keys.ndim != 4:
            return LayerShape(heads, 0, 0, 0, 0, type(own).__name__, False, own)
        kv_heads, key_dim, value_dim = keys.shape[1], keys.shape[3], values.shape[3]
    else:
        kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
        key_dim = value_dim = head_dim_of(text, i) or 64
    rotated = _rotated(config, key_dim, model)
    return LayerShape(heads, kv_heads, key_dim, value_dim, rotated, type(own).__name__, chosen, None if chosen else own)


def _rotated(config: Any, dim: int, model: nn.Module) -> int:
    rope = getattr(config, "rope_parameters", None) or {}
    rope = rope.get("full_attention", rope) if isinstance(rope, dict) else {}
    there = any(name.rpartition(".")[2] == "rotary_emb" for name, _ in model.named_modules())
    apart = "mrope_section" in str(rope) or getattr(config, "qk_nope_head_dim", None)
    if not there or apart or str(rope.get("rope_type")) in MOVING:
        return 0
    return int(dim * float(rope.get("partial_rotary_factor") or getattr(config, "partial_rotary_factor", None) or 1.0))


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {clip(text, 300)}" if text else type(error).__name__
