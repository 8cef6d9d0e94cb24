"""A model's own rotary embedding, as a function of positions."""

from __future__ import annotations

import inspect
from typing import Any
from weakref import ref

import torch
from torch import Tensor

from kvpolicy.errors import CacheError

__all__ = ["ModelRotary", "rotaries"]

MOVING = ("dynamic", "longrope")
"""Embeddings whose frequencies depend on how much text was seen."""


class ModelRotary:
    """Positions to cos and sin, by the module of a model. It doesn't keep the model alive, and is copied as it is."""

    def __init__(self, module: Any, layer_type: str | None) -> None:
        self._module = ref(module)
        self._layer_type = layer_type

    def __call__(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin of positions `[batch or 1, tokens]`: float32 `[batch or 1, tokens, rotated channels]`.

        Raises:
            CacheError: the model is gone.
        """
        module = self._module()
        if module is None:
            raise CacheError("a transform must ask the model for its rotary embedding, and the model is gone; keep it")
        own = {} if self._layer_type is None else {"layer_type": self._layer_type}
        like = torch.empty(0, dtype=torch.float32, device=positions.device)
        with torch.no_grad():
            cos, sin = module(like, positions, **own)
        return cos.to(positions.device), sin.to(positions.device)

    def __deepcopy__(self, memo: dict[int, Any]) -> ModelRotary:
        return self

    def __reduce__(self) -> tuple[Any, tuple[()]]:
        return _gone, ()


def _gone() -> None:
    """What a rotary embedding is once it was pickled: unknown."""
    return


def rotaries(model: Any, layers: int) -> list[ModelRotary | None]:
    """The rotary embedding of each layer of a model; None where it is not a function of the position alone."""
    none: list[ModelRotary | None] = [None] * layers
    if not isinstance(model, torch.nn.Module):
        return none
    config: Any = model.config
    text = config.get_text_config(decoder=True)
    modules = (m for name, m in model.named_modules() if name.rpartition(".")[2] == "rotary_emb")
    module = next((m for m in modules if getattr(m, "config", None) in (text, config)), None)
    if module is None:
        return none
    types = getattr(text, "layer_types", None) or none
    by_type = "layer_type" in inspect.signature(module.forward).parameters
    return [_of_layer(module, str(types[i]) if by_type else None) for i in range(layers)]


def _of_layer(module: torch.nn.Module, layer_type: str | None) -> ModelRotary | None:
    kind = getattr(module, "rope_type", None)
    kind = kind.get(layer_type) if isinstance(kind, dict) else kind
    return None if kind is None or kind in MOVING else ModelRotary(module, layer_type)
