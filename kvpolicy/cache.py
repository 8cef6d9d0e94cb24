"""Recipes as caches of transformers. The only file that touches transformers' cache classes."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer

from kvpolicy.errors import CacheError, MissingDependencyError, RecipeError
from kvpolicy.layer import Positions, Scratch, Tiers
from kvpolicy.placement import Placement
from kvpolicy.quantizer import Quantizer
from kvpolicy.recipe import Recipe, load_recipe
from kvpolicy.report import Memory, Summary, measure, summarize
from kvpolicy.stores import make_store

__all__ = ["CompressedCache", "TieredLayer", "make_cache"]


class TieredLayer(CacheLayerMixin):
    """One full-attention layer of a `CompressedCache`."""

    is_compileable = False
    is_croppable = True
    is_sliding = False
    supports_early_init = False

    def __init__(self, placement: Placement, scratch: Scratch | None) -> None:
        super().__init__()
        self.tiers = Tiers(placement, scratch)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.tiers.start(key_states, value_states)
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    @torch.no_grad()
    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add keys and values `[batch, kv_heads, tokens, head_dim]`; returns all of them, decoded, in token order."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        return self.tiers.update(key_states, value_states)

    def get_seq_length(self, *args: Any) -> int:
        return self.tiers.seen

    def get_mask_sizes(self, query_length: int, *args: Any) -> tuple[int, int]:
        held = self.tiers.held_after_settling()
        return held + query_length, self.tiers.seen - held

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        return -1

    @property
    def batch_size(self) -> int:
        return self.tiers.like["keys"].shape[0] if self.is_initialized else -1

    def crop(self, tokens: int) -> None:
        """Keep the first `tokens` positions (above 0), or remove the last `-tokens` (0 or below)."""
        length = tokens if tokens > 0 else max(self.tiers.seen + tokens, 0)
        if length < self.tiers.seen:
            with torch.no_grad():
                self.tiers.crop(length)

    @torch.no_grad()
    def _select(self, rows: Tensor) -> None:
        if self.is_initialized:
            self.tiers.select(rows)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._select(torch.arange(max(self.batch_size, 0)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        rows = torch.as_tensor(indices)
        self._select(rows.nonzero()[:, 0] if rows.dtype == torch.bool else rows)

    def reset(self) -> None:
        self.tiers.clear()
        self.is_initialized = False

    def offload(self) -> None:
        self.tiers.to(torch.device("cpu"))

    def prefetch(self) -> None:
        if self.is_initialized:
            self.tiers.to(self.device)


class CompressedCache(Cache):
    """A cache that keeps the full-attention layers of a model as its recipe says.

    Made by `make_cache`. Pass it to `generate(past_key_values=...)` or to a model's forward; it serves
    everything that transformers' `DynamicCache` does. With only `full` stores it gives the same logits.

    The cache carries no gradients.
    """

    def __init__(self, recipe: Recipe, layers: list[Any], scratch: Scratch | None) -> None:
        super().__init__(layers=layers)
        self.recipe = recipe
        self.scratch = scratch

    def _tiers(self, layer: int) -> Tiers:
        n = len(self.layers)
        if not -n <= layer < n:
            raise CacheError(f"layer must be in [0, {n}), found {layer}")
        found = self.layers[layer]
        if not isinstance(found, TieredLayer):
            compressed = [i for i, x in enumerate(self.layers) if isinstance(x, TieredLayer)]
            raise CacheError(
                f"layer {layer} is a {type(found).__name__} of transformers and has no tiers; "
                f"ask for one of {compressed}"
            )
        return found.tiers

    def positions(self, layer: int = 0) -> Positions:
        """Positions and tier of every token that a layer holds; `PENDING` (-1) is the tier of pending ones."""
        return self._tiers(layer).positions()

    def dense(self, layer: int = 0) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer, decoded, in token order: two tensors `[batch, kv_heads, tokens, head_dim]`."""
        tiers = self._tiers(layer)
        if not tiers.stores:
            raise CacheError(f"layer {layer} holds no tokens yet; run the model with this cache first")
        with torch.no_grad():
            return tiers.dense()

    @torch.no_grad()
    def settle(self) -> None:
        """Let the pending tokens into the tiers; `crop` of them is no exact rollback afterwards."""
        for layer in self.layers:
            if isinstance(layer, TieredLayer):
                layer.tiers.settle()

    def memory(self) -> Memory:
        """Bytes by layer, side and store, counted from the tensors held. Settles pending tokens first."""
        self.settle()
        return measure(self)

    def summary(self) -> Summary:
        """Which layer is kept how, and what it holds. Settles pending tokens first."""
        self.settle()
        return summarize(self)

    def save(self, path: str | Path) -> None:
        """Write the cache as safetensors, its recipe and versions in the header. Settles pending tokens first.

        Raises:
            CacheError: nothing is cached, a layer can't be saved, or the file can't be written.
        """
        from kvpolicy.persistence import save_cache

        self.settle()
        save_cache(self, Path(path))

    @classmethod
    def load(cls, path: str | Path, model_or_config: Any) -> CompressedCache:
        """Read what `save` wrote, for the same model (or one of the same shape), onto its device.

        Raises:
            CacheError: the file is missing, damaged, foreign, or of another model.
        """
        from kvpolicy.persistence import load_cache

        return load_cache(Path(path), model_or_config)

    def crop(self, tokens_to_remove: int) -> None:
        """Keep the first n positions (n > 0), or remove the last -n (n <= 0), in every layer.

        Exact for pending tokens (the last update's, 64 at most); a longer crop keeps past descents.
        """
        seen = self.get_seq_length()
        removed = tokens_to_remove if tokens_to_remove <= 0 else min(tokens_to_remove - seen, 0)
        for layer in self.layers:
            layer.crop(removed)

    def reset(self) -> None:
        """Forget everything, in every layer."""
        fresh = [copy.deepcopy(x) if not isinstance(x, TieredLayer) else None for x in self._blank]
        for i, layer in enumerate(self.layers):
            if isinstance(layer, TieredLayer):
                layer.reset()
            else:
                self.layers[i] = fresh[i]

    _blank: Sequence[Any] = ()


def make_cache(recipe: Any, model_or_config: Any, **params: Any) -> CompressedCache:
    """Make an empty cache for a model.

    Args:
        recipe: what `load_recipe` takes: a bundled name, a path, a mapping or a `Recipe`.
        model_or_config: a transformers decoder model, or its config.
        **params: parameters of the recipe.

    Returns:
        The cache, with the recipe's tiers for each full-attention layer and the library's own layers
        for sliding-window, chunked and linear attention.

    Raises:
        RecipeError: the recipe is not valid, or does not fit the model.
        CacheError: the model can't use the cache.
        MissingDependencyError: the recipe needs a library that is not installed.
    """
    loaded = load_recipe(recipe, **params)
    config = _config(model_or_config)
    text = config.get_text_config(decoder=True)
    layers = list(DynamicCache(config=config).layers)
    if not layers:
        raise CacheError(f"the config must say how many layers the model has; {type(config).__name__} gives none")
    compressed = [i for i, layer in enumerate(layers) if type(layer) is DynamicLayer]
    placements: dict[Any, Placement] = {}
    shared = getattr(text, "num_kv_shared_layers", 0)
    scratch = None if shared else Scratch()
    chosen: dict[int, Any] = {}
    for i in compressed:
        chosen[i] = tiers = loaded.tiers_of(i, len(layers))
        if tiers not in placements:
            _check_stores(tiers, text, i)
            placements[tiers] = Placement(tiers, loaded.placement)
        layers[i] = TieredLayer(placements[tiers], scratch)
    _check_one_mask(chosen)
    cache = CompressedCache(loaded, layers, scratch)
    cache._blank = [copy.deepcopy(layer) if not isinstance(layer, TieredLayer) else layer for layer in layers]
    return cache


def _config(model_or_config: Any) -> Any:
    config = getattr(model_or_config, "config", model_or_config)
    if not hasattr(config, "get_text_config"):
        raise CacheError(
            "make_cache needs a transformers model or its config, "
            f"found {type(model_or_config).__name__}; pass the model itself or model.config"
        )
    if getattr(config, "is_encoder_decoder", False):
        raise CacheError(
            f"make_cache serves decoder models; {type(config).__name__} is an encoder-decoder. "
            "Use transformers' EncoderDecoderCache for it"
        )
    for name, peft in (getattr(model_or_config, "peft_config", None) or {}).items():
        if getattr(peft, "is_prompt_learning", False) and "PREFIX" in str(getattr(peft, "peft_type", "")).upper():
            raise CacheError(
                f"PEFT adapter {name!r} is prefix tuning, which replaces the cache that it is given by one of its own; "
                "use an adapter that leaves the cache alone, such as LoRA"
            )
    return config


def _head_dim(text: Any) -> int | None:
    """Channels of a head, where the config says so; latent attention caches something else."""
    if getattr(text, "kv_lora_rank", None):
        return None
    dim = getattr(text, "head_dim", None)
    heads, hidden = getattr(text, "num_attention_heads", None), getattr(text, "hidden_size", None)
    if isinstance(dim, int):
        return dim
    return hidden // heads if isinstance(heads, int) and isinstance(hidden, int) and heads else None


def _check_stores(tiers: Any, text: Any, layer: int) -> None:
    """Encode a few zeros with every quantizer, so that what can't work fails now and by name."""
    dim = _head_dim(text) or 64
    for number, tier in enumerate(tiers):
        for side in ("keys", "values"):
            spec = getattr(tier, side)
            if not isinstance(spec, Quantizer):
                continue
            try:
                store = make_store(spec, dim)
                assert store is not None
                store.append(torch.zeros(1, 1, 128, dim))
            except MissingDependencyError:
                raise
            except RecipeError as error:
                if _head_dim(text) is None:
                    continue
                raise RecipeError(f"tiers[{number}].{side} ({spec.kind}), layer {layer}: {error}") from None


def _check_one_mask(chosen: dict[int, Any]) -> None:
    """One mask serves all layers, so all must hold equally many tokens."""
    shapes: dict[Any, list[int]] = {}
    for i, tiers in chosen.items():
        evicts = tiers[-1].keys == "evict"
        shapes.setdefault(tuple(t.policy for t in tiers) if evicts else None, []).append(i)
    if len(shapes) > 1:
        groups = " and ".join(f"layers {found}" for found in shapes.values())
        raise CacheError(
            "all full-attention layers must hold the same number of tokens, because one attention mask serves them "
            f"all; this recipe keeps different numbers in {groups}. Give all layers the same evicting tiers, or none"
        )
