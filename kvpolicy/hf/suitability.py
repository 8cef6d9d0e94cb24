"""What a model does that decides which of its layers a recipe can serve, and how."""

from __future__ import annotations

import inspect
import warnings
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import DynamicLayer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from kvpolicy.errors import CacheError
from kvpolicy.recipe.load import Recipe

CACHE = frozenset({"cache", "past_key_values", "past_key_value", "layer_past"})
"""What the forward of an attention module calls the cache."""
BIAS = frozenset({"alibi", "position_bias"})
"""What it calls biases by distance."""


class CrossAttentionLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values of what is no text (the image of Mllama), as they came; `crop` of tokens leaves them alone."""

    def crop(self, *_: Any) -> None:
        pass


def set_apart(layers: list[Any], text: Any) -> None:
    """Give the layers that attend to something other than the text a cache of their own, in place.

    The text's config names them in `cross_attention_layers`. Their keys have no positions in the text, so no policy
    could choose among them, and models read them from the cache as they came.
    """
    for i in getattr(text, "cross_attention_layers", None) or ():
        if i < len(layers) and type(layers[i]) is DynamicLayer:
            layers[i] = CrossAttentionLayer()


def compressible(layers: list[Any]) -> list[int]:
    """The layers whose keys and values a recipe can keep."""
    return [i for i, layer in enumerate(layers) if type(layer) is DynamicLayer]


def check_effect(recipe: Recipe, layers: list[Any], chosen: dict[int, Any], strict: bool) -> None:
    """Tell the user of a recipe that would compress nothing of a model.

    Args:
        recipe: what is asked for.
        layers: the library's own layers for this model.
        chosen: the tiers of each layer that a recipe can keep.
        strict: raise an error; else warn.

    Raises:
        CacheError: nothing would be compressed, and `strict` is True.
    """
    asked = any(_compresses(tiers) for tiers in (recipe.tiers, *recipe.layers.values()))
    if not asked or any(_compresses(tiers) for tiers in chosen.values()):
        return
    types = " and ".join(f"{n} {name}" for name, n in Counter(type(x).__name__ for x in layers).items())
    served = f"{sorted(chosen)}, which its own `layers` keep in full" if chosen else "none"
    message = (
        f"recipe {recipe.name!r} compresses nothing of this model: a recipe can serve full-attention layers, found "
        f"{served}, among {types}. The cache will be as large as transformers' DynamicCache"
    )
    if strict:
        raise CacheError(message)
    warnings.warn(message, UserWarning, stacklevel=4)


def _compresses(tiers: Any) -> bool:
    return tiers != "full" and any(tier.keys != "full" or tier.values != "full" for tier in tiers)


def check_positions(recipe: Recipe, model_or_config: Any, config: Any, chosen: dict[int, Any]) -> None:
    """Refuse a recipe that drops tokens of a model that counts distances in the cache.

    Rotary and learned positions are part of a key before it enters the cache, so what is dropped does not change the
    rest. Biases by distance and windows that are cut out by index are not: with gaps between the tokens held, they
    belong to other tokens.

    Raises:
        CacheError: such a layer would lose tokens.
    """
    dropping = {i for i, tiers in chosen.items() if tiers[-1].keys == "evict"}
    found = next(_by_index(model_or_config, config, dropping), None) if dropping else None
    if found is not None:
        raise CacheError(
            f"recipe {recipe.name!r} drops tokens, so the model's attention must not depend on where a token stands in "
            f"the cache, and {found}; the biases or windows of those left would be wrong. Use a recipe that drops "
            "none, such as kivi"
        )


def _by_index(model_or_config: Any, config: Any, layers: set[int]) -> Iterator[str]:
    """What of a model goes by the index of a token in the cache, in the given layers.

    The config may say so in words of its own. Else attention modules (what takes a cache in its forward) tell it: they
    take biases by distance as an argument, or own a causal table whose last row does not show the first token. Of a
    config alone the classes are searched that a model of it would be built from.
    """
    text = config.get_text_config(decoder=True)
    if getattr(text, "alibi", None) is True or getattr(getattr(text, "attn_config", None), "alibi", None) is True:
        yield f"{type(text).__name__} asks for biases by distance (alibi)"
    windows = {i for i, name in enumerate(getattr(text, "attention_layers", None) or ()) if name == "local"}
    if windows & layers:
        yield f"{type(text).__name__} asks for local windows by index (attention_layers: local)"
    classes: list[Any] = []
    if isinstance(model_or_config, nn.Module):
        indexed = [(m, getattr(m, "layer_idx", getattr(m, "layer_id", None))) for m in model_or_config.modules()]
        classes = [type(module) for module, index in indexed if index in layers]
        for module, index in indexed:
            if (index is None or index in layers) and _windowed(module):
                yield f"{type(module).__name__} cuts a local window out of a table by index"
    elif type(text) in MODEL_FOR_CAUSAL_LM_MAPPING:
        classes = list(vars(inspect.getmodule(MODEL_FOR_CAUSAL_LM_MAPPING[type(text)])).values())
    if getattr(text, "alibi", True) is not False:  # Falcon's attention has the argument, whether used or not
        for cls in dict.fromkeys(c for c in classes if isinstance(c, type) and issubclass(c, nn.Module)):
            names = set(inspect.signature(cls.forward).parameters)
            if names & CACHE and names & BIAS:
                yield f"{cls.__name__} adds biases by distance (its argument {min(names & BIAS)!r})"


def _windowed(module: nn.Module) -> bool:
    """Whether a module owns a causal table that hides the oldest tokens from the newest."""
    for table in module.buffers(recurse=False):
        if table.dtype == torch.bool and table.ndim >= 2 and table.shape[-1] == table.shape[-2] > 1:
            return not table.is_meta and not bool(table.flatten(0, -3)[0, -1, 0] if table.ndim > 2 else table[-1, 0])
    return False
