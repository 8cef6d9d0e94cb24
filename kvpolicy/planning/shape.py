"""What a plan must know of a model: layers, heads, parameters. Weights are not needed."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

__all__ = ["DTYPES", "LayerShape", "ModelShape"]

DTYPES = {"float32": 4, "float16": 2, "bfloat16": 2}
"""Bytes of a number of each type that a plan can be made for."""


@dataclass(frozen=True)
class LayerShape:
    """One layer of a cache."""

    heads: int
    """Query heads."""
    kv_heads: int
    """Heads of keys and values; 0 where the layer caches neither."""
    key_dim: int
    value_dim: int
    rotated: int = 0
    """Channels of a key that a rotary embedding turns; 0 where there is none that is a function of the position."""
    kind: str = "DynamicLayer"
    """The class of transformers' own layer."""
    compressible: bool = True
    """Whether a recipe can keep it."""
    own: Any = field(default=None, compare=False, repr=False)
    """Transformers' own layer, empty, where a recipe can't."""

    def own_layer(self) -> Any:
        """A layer of transformers' own to be fed."""
        return copy.deepcopy(self.own)


@dataclass(frozen=True)
class ModelShape:
    """A model as a plan sees it."""

    name: str
    layers: tuple[LayerShape, ...]
    parameters: int
    """Numbers in all its weights."""
    read: int
    """Numbers of weights that a decoding step reads for one token: the rows of the embedding and the experts that a
    token does not go to left out."""
    expert: int
    """Numbers of weights of all experts; 0 without experts."""
    active: float
    """The share of experts that a token goes to."""
    dtype: str
    hidden: int
    widest: int
    """Numbers of a token that a layer computes at once, by the wider of attention and feed-forward."""
    vocab: int
    positions: int | None = None
    """Tokens that the model was made for, where its config says so."""
    shares_kv: bool = False
    """Whether layers read the keys and values of others."""
    notes: tuple[str, ...] = ()

    @property
    def itemsize(self) -> int:
        """Bytes of a number."""
        return DTYPES[self.dtype]

    @property
    def torch_dtype(self) -> torch.dtype:
        import torch

        found: torch.dtype = getattr(torch, self.dtype)
        return found

    @property
    def weights(self) -> int:
        """Bytes of all weights."""
        return self.parameters * self.itemsize

    def weights_read(self, batch: int) -> int:
        """Bytes of weights that a step reads at least for so many rows."""
        touched = self.expert * min(1.0, self.active * batch)
        return int((self.read + touched) * self.itemsize)
