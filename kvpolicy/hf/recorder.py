"""Notes what a model brings to its cache, layer by layer."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicCache

from kvpolicy.hf.suitability import compressible, set_apart

__all__ = ["Recorder", "recordable"]


class Recorder(DynamicCache):  # type: ignore[misc]
    """The library's own cache, which also notes the keys and values of each layer.

    Args:
        config: of the model.
        gradients: whether derivatives by these are asked for, of a model whose weights may have none.
    """

    def __init__(self, config: Any, gradients: bool) -> None:
        super().__init__(config=config)
        self.noted: dict[int, tuple[Tensor, Tensor]] = {}
        self.gradients = gradients

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        if self.gradients:
            key_states, value_states = (
                x if x.requires_grad else x.detach().requires_grad_() for x in (key_states, value_states)
            )
        self.noted[layer_idx] = (key_states, value_states)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


def recordable(config: Any) -> tuple[list[int], int]:
    """The layers of a model that recipes can keep, and how many it has in all."""
    layers = list(DynamicCache(config=config).layers)
    set_apart(layers, config.get_text_config(decoder=True))
    return compressible(layers), len(layers)
