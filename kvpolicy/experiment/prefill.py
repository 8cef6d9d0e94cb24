"""A prompt computed once: its keys and values, which every cache is given that would have been given the same.

A first update attends to its own tokens alone, before anything is compressed. So the keys and values of a prompt that
is read at once don't depend on the cache, and filling a cache with them is what a forward pass would have done. It is
not where the cache is told more than keys and values in that pass: see `can_share`.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from kvpolicy.experiment.attention_error import Prefix
from kvpolicy.hf.layer import TieredLayer

if TYPE_CHECKING:
    from kvpolicy.hf.cache import CompressedCache


def can_share(cache: CompressedCache) -> bool:
    """Whether a cache may be filled with the prompt of another run.

    Not where a policy ranks tokens by attention or a scorer reads queries, nor where a transform is fitted to queries:
    only a forward pass shows them, and there an attached model computes the prompt's attention by itself, which rounds
    otherwise.
    """
    tiers = [layer.tiers for layer in cache.layers if isinstance(layer, TieredLayer)]
    return not any(layer.placement.attends or layer.wants_queries for layer in tiers)


@dataclass(frozen=True)
class Prompt:
    """What a run of the exact cache computed for a prompt."""

    logits: Tensor
    """After its last token, of each row."""
    seconds: float
    layers: list[Any]
    """Keys and values of each layer, or the layer itself where transformers keeps it: sliding windows, states."""
    seen: Prefix | None = None
    """What a watcher of attention saw."""
    mask: Tensor | None = None
    """Which of its tokens are none of padding, if some are."""

    @classmethod
    def of(
        cls, cache: CompressedCache, logits: Tensor, seconds: float, seen: Prefix | None = None,
        mask: Tensor | None = None,
    ) -> Prompt:  # fmt: skip
        """That of an exact cache which holds a prompt and nothing else."""
        layers = [x.tiers.dense() if isinstance(x, TieredLayer) else copy.deepcopy(x) for x in cache.layers]
        return cls(logits, seconds, layers, seen, mask)

    def fill(self, cache: CompressedCache, attached: bool) -> None:
        """Give an empty cache the prompt, as a forward pass would."""
        tokens = max((held[0].shape[2] for held in self.layers if isinstance(held, tuple)), default=0)
        cache.begin(tokens, self.mask, attached)
        for i, held in enumerate(self.layers):
            if isinstance(held, tuple):
                cache.update(*held, i)
            else:
                cache.layers[i] = copy.deepcopy(held)
        cache.finish()
        cache.commit()
