"""Whether a saved cache is one of the model at hand, and where its layers go."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kvpolicy.errors import CacheError
from kvpolicy.hf.fingerprint import Fingerprint, blocks_of, differences, fingerprint_of
from kvpolicy.hf.model_config import head_dim_of, layer_config
from kvpolicy.layer.save_header import Damaged, Header, Held

if TYPE_CHECKING:
    from kvpolicy.hf.cache import CompressedCache

__all__ = ["check_kinds", "check_layers", "check_model", "devices_of", "take_kinds"]

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
PLAIN = {"head_dim", "num_key_value_heads"}
"""What a config says of the heads of keys and values where all layers are alike."""


def check_layers(cache: CompressedCache, header: Header, path: Path, any_model: bool) -> None:
    """The layers must be of the kinds that the model caches, and the model of the type that is named."""
    from kvpolicy.hf.layer import TieredLayer

    if header.model_type != cache.origin.model_type and not any_model:
        raise CacheError(
            f"{path} must be of a {cache.origin.model_type} model, found a cache of {header.model_type[:80]}; "
            "load it with the model that made it"
        )
    found = ["tiers" if isinstance(x, TieredLayer) else type(x).__name__ for x in cache.layers]
    saved = ["tiers" if x.type == "ragged" else x.type for x in header.layers]
    if found != saved:
        raise CacheError(
            f"{path} must be of a model with the same layers: it holds {len(saved)} layers {sorted(set(saved))}, "
            f"the model has {len(found)} {sorted(set(found))}"
        )


def take_kinds(cache: CompressedCache, number: int, held: Held) -> list[Tensor]:
    """Keys and values that show of which kind a layer holds some, or nothing where it holds nothing."""
    found = _kinds(cache, number, held)
    return [held.pop(name) for name in found]


def _kinds(cache: CompressedCache, number: int, held: Held) -> dict[str, Tensor]:
    from kvpolicy.hf.layer import TieredLayer

    tiered = isinstance(cache.layers[number], TieredLayer)
    names = [f"{number}.{side}.like" if tiered else f"{number}.own.{side}" for side in ("keys", "values")]
    if not tiered and not any(name in held for name in names):
        return {}
    missing = [name for name in names if name not in held]
    if missing:
        raise Damaged(f"it must hold a tensor {missing[0]}, found none")
    return {name: held[name] for name in names}


def check_kinds(cache: CompressedCache, held: Held, model_or_config: Any, path: Path) -> None:
    """Keys and values must be of one batch, in the model's type, with heads of its shape."""
    from kvpolicy.hf.layer import TieredLayer

    config = getattr(model_or_config, "config", model_or_config)
    text = config.get_text_config(decoder=True)
    dtype = getattr(model_or_config, "dtype", None)
    if any(map(torch.is_autocast_enabled, ("cpu", "cuda"))):
        dtype = None  # which type keys and values have is then up to each model
    bits = 8 * sum(x.numel() * x.element_size() for x in held.values())
    batch: int | None = None
    for number, layer in enumerate(cache.layers):
        kinds, tiered = list(_kinds(cache, number, held).values()), isinstance(layer, TieredLayer)
        for like in kinds:
            batch = like.shape[0] if batch is None and like.ndim else batch
            fits = like.ndim == 4 and like.shape[:3] == (batch, *kinds[0].shape[1:3]) and like.dtype in FLOATS
            numbers = math.prod((*like.shape[:2], *like.shape[3:]))  # of a token; each takes a bit at least
            if not fits or not 0 < numbers <= bits or (tiered and like.shape[2]):
                found = [f"{tuple(x.shape)} in {x.dtype}" for x in kinds]
                raise Damaged(f"layer {number} must hold heads in {batch} rows, found {found}")
            if isinstance(dtype, torch.dtype) and like.dtype != dtype:
                raise CacheError(
                    f"{path} holds {like.dtype}, the model computes in {dtype}; use model.to({like.dtype})"
                )
        own = layer_config(text, number)
        plain = {name for name in own.to_dict() if "head_dim" in name or "key_value_heads" in name} <= PLAIN
        for like in kinds if plain else kinds[:1] if tiered else []:  # others name the heads of other layers otherwise
            _check_heads(like, text, number, path)


def _check_heads(like: Tensor, text: Any, number: int, path: Path) -> None:
    dim, own = head_dim_of(text, number), layer_config(text, number)
    if dim is None:
        return
    heads = getattr(own, "num_key_value_heads", None)
    known = [heads] if isinstance(heads, int) else [1, getattr(own, "num_attention_heads", None)]
    if like.shape[3] != dim or like.shape[1] not in known:
        raise CacheError(
            f"{path} must be of a model with {known[-1]} KV heads of {dim} channels; "
            f"layer {number} holds {like.shape[1]} of {like.shape[3]}"
        )


def check_model(saved: Fingerprint | None, versions: dict[str, str], model_or_config: Any, path: Path) -> None:
    """The model must be the one that made the cache, as far as config and weights tell."""
    import transformers

    found = fingerprint_of(model_or_config)
    if found.weights is not None and (saved is None or saved.weights is None):
        why = "kvpolicy 0.1 wrote it" if saved is None else "its cache was made from a config, or outlived its model"
        warnings.warn(
            f"whether {path} is a cache of this model can't be told: it says nothing of the model's weights, because "
            f"{why}. Make caches with make_cache(recipe, model), and save them again",
            stacklevel=5,
        )
    told = differences(saved, found, versions.get("transformers") == transformers.__version__) if saved else []
    if told:
        more = f"; and {len(told) - 3} more" if len(told) > 3 else ""
        raise CacheError(
            f"{path} must be loaded for the model that made it, found another one: {'; '.join(told[:3])}{more}. "
            "Use that model, or any_model=True where keys and values of both mean the same"
        )


def devices_of(model: Any, count: int) -> list[torch.device]:
    """Where each layer of a model computes; a config has no device."""
    whole = getattr(model, "device", torch.device("cpu"))
    blocks = blocks_of(model, count)
    return [whole] * count if blocks is None else [_device(block, whole) for block in list(blocks)[:count]]


def _device(block: nn.Module, whole: torch.device) -> torch.device:
    for module in block.modules():  # accelerate keeps offloaded weights elsewhere than it computes
        device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
        if device is not None:
            return torch.device(device)
    weight = next(block.parameters(), None)
    return whole if weight is None else weight.device
