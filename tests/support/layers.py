"""One layer of a compressed cache, run as an attached model runs it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig

from kvpolicy import make_cache
from kvpolicy.hf.attach import attention_forward

__all__ = ["HEAD_DIM", "Layer", "random_tokens"]

HEAD_DIM = 16


class Layer:
    """Keys, values and queries go in, attention comes out; nothing else of a model is there."""

    num_key_value_groups = 2
    is_causal = True
    layer_idx = 0
    training = False

    def __init__(self, recipe: Any, heads: int = 4, kv_heads: int = 2, layers: int = 1, **params: Any) -> None:
        config = LlamaConfig(
            hidden_size=heads * HEAD_DIM,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=HEAD_DIM,
            num_hidden_layers=layers,
        )
        self.num_key_value_groups = heads // kv_heads
        self.cache = make_cache(recipe, config, **params)
        self.cache.layers[0].attached = True

    @property
    def tiers(self) -> Any:
        return self.cache.layers[0].tiers

    def __call__(self, query: Tensor, keys: Tensor, values: Tensor, real: Tensor | None = None) -> Tensor:
        """Attention `[batch, queries, heads, head_dim]` of an update; `real` says which tokens of it are no padding."""
        seen = self.tiers.seen
        mask = None
        if real is not None or self.cache.padding is not None:
            n = keys.shape[2]
            whole = torch.ones(keys.shape[0], seen + n, dtype=torch.long)
            if real is not None:
                whole[:, seen:] = real
            self.cache.guard.note_padding(whole, n)
            shown = whole > 0 if self.cache.padding is None else torch.from_numpy(self.cache.padding.real)
            causal = torch.arange(seen + n) <= torch.arange(seen, seen + n)[:, None]
            mask = (shown[:, None, None] & causal).to(keys.device)
        found = self.cache.update(keys, values, 0)
        out: Tensor = attention_forward("sdpa", self, query, *found, mask, scaling=HEAD_DIM**-0.5)[0]
        return out

    def held(self) -> list[list[list[list[int]]]]:
        """For each row, head and tier but an evicting one the positions held, all tokens committed."""
        self.cache.commit()
        found = self.cache.positions(0)
        places, tiers = (torch.as_tensor(x) for x in found)
        if places.ndim == 1:
            places, tiers = places[None, None], tiers[None, None]
        count = len(self.tiers.placement.policies)
        return [
            [[sorted(p[(t == i) & (p >= 0)].tolist()) for i in range(count)] for p, t in zip(ps, ts, strict=True)]
            for ps, ts in zip(places, tiers, strict=True)
        ]


def random_tokens(
    n: int, seed: int, batch: int = 1, heads: int = 4, kv_heads: int = 2
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, keys and values of `n` tokens, whose attention is peaked here and there."""
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, heads, n, HEAD_DIM, generator=generator) * 2
    keys, values = torch.randn(2, batch, kv_heads, n, HEAD_DIM, generator=generator)
    return query, keys, values
