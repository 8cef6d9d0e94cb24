"""Recipes as caches of transformers. The only file that touches transformers' cache classes."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache

from kvpolicy.calls import PassAware
from kvpolicy.errors import CacheError, RecipeError
from kvpolicy.fitting import check_selectors, check_stores, config_of, head_dim_of, uneven_layers
from kvpolicy.layer import Positions, Tiers
from kvpolicy.modes import ATTACHED, barred, joined, precise, uncompiled, wants_gradients
from kvpolicy.padding import Padding
from kvpolicy.passes import Lease, check_announced, hold
from kvpolicy.placement import Placement
from kvpolicy.policy import RankPolicy
from kvpolicy.ranking import together
from kvpolicy.recipe import Recipe, load_recipe
from kvpolicy.report import Memory, Summary, measure, summarize
from kvpolicy.suitability import check_effect, check_positions, compressible
from kvpolicy.views import DenseAccess, Scratch

__all__ = ["CompressedCache", "TieredLayer", "make_cache"]


class TieredLayer(DenseAccess, CacheLayerMixin):
    """One full-attention layer of a `CompressedCache`."""

    is_compileable = False
    is_croppable = True
    is_sliding = False

    def __init__(self, placement: Placement, scratch: Scratch | None) -> None:
        super().__init__()
        self.tiers = Tiers(placement, scratch)
        self.readable = any(spec != "full" for specs in placement.specs.values() for spec in specs)
        self.attached = False
        """While an attached model runs: `update` returns views, and masks cover all tokens seen."""
        self.uneven: str | None = None
        self.unlinked = False
        """Whether tokens came with gradients, which end here."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.tiers.start(key_states, value_states)
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def check_attached(self) -> None:
        """Refuse what only an attached model can do, before any token is let in.

        Raises:
            CacheError: a policy must see attention, or rows are padded differently.
        """
        if self.attached:
            return
        if self.tiers.placement.kinds:
            kinds = [p.kind for p in self.tiers.placement.policies if isinstance(p, RankPolicy)]
            raise CacheError(
                f"policy {kinds[0]!r} selects tokens by the attention that they receive, which only an attached model "
                "shows; use: with kvpolicy.attach(model): ..."
            )
        if self.tiers.ragged is not None:
            raise CacheError(
                "a cache that was filled by padded batches must go on with an attached model, found one that is not; "
                "use: with kvpolicy.attach(model): ..."
            )

    @uncompiled
    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add keys and values `[batch, kv_heads, tokens, head_dim]`; returns all of them, decoded, in token order.

        What it returns is overwritten by the next layer's update. Gradients reach the new tokens alone; `backward`
        raises a `CacheError` where they would have to go elsewhere.
        """
        self.check_attached()
        linked, held = wants_gradients(key_states, value_states), self.tiers.seen
        with torch.no_grad(), precise(key_states.device):
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
            views = self.attached and self.readable
            keys, values = (self.tiers.look if views else self.tiers.update)(key_states, value_states)
        if linked and held and views:
            return barred(ATTACHED, keys, key_states), barred(ATTACHED, values, value_states)
        if linked and held:
            keys, values = (joined(*x, self.unlinked) for x in ((keys, key_states), (values, value_states)))
        self.unlinked = self.unlinked or linked
        return keys, values

    def get_seq_length(self, *args: Any) -> int:
        return self.tiers.seen

    @uncompiled
    def get_mask_sizes(self, query_length: int, *args: Any) -> tuple[int, int]:
        if self.attached:
            return self.tiers.seen + query_length, 0
        self.check_attached()
        if self.uneven is not None:
            raise CacheError(self.uneven)
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
        tokens = int(tokens)  # transformers 5.17 gives a tensor
        length = tokens if tokens > 0 else max(self.tiers.seen + tokens, 0)
        if length < self.tiers.seen:
            with torch.no_grad():
                self.tiers.crop(length)
            self.unlinked = self.unlinked and length > 0

    @torch.no_grad()
    def _select(self, rows: Tensor) -> None:
        if self.is_initialized:
            self.tiers.select(rows % self.batch_size)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._select(torch.arange(max(self.batch_size, 0)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        rows = torch.as_tensor(indices)
        self._select(rows.nonzero()[:, 0] if rows.dtype == torch.bool else rows)

    def reset(self) -> None:
        self.tiers.clear()
        self.is_initialized = self.unlinked = False

    def offload(self) -> None:
        self.tiers.to(torch.device("cpu"))

    def prefetch(self) -> None:
        if self.is_initialized:
            self.tiers.to(self.device)


class CompressedCache(PassAware, Cache):
    """A cache that keeps the full-attention layers of a model as its recipe says.

    Made by `make_cache`. Pass it to `generate(past_key_values=...)` or to a model's forward; it serves
    everything that transformers' `DynamicCache` does. With only `full` stores it gives the same logits.

    The cache carries no gradients.
    """

    def __init__(self, recipe: Recipe, layers: list[Any], scratch: Scratch | None, model_type: str = "") -> None:
        super().__init__(layers=layers)
        self.recipe, self.model_type = recipe, model_type
        self.scratch = scratch
        self.padding: Padding | None = None
        """Which tokens are padding, once an attached model was given any."""
        self.lease: Lease | None = None
        """Keeps the hooks of the model that the cache was made for, if it was made for a model."""
        self._blank = [None if isinstance(layer, TieredLayer) else copy.deepcopy(layer) for layer in layers]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """As `TieredLayer.update`, of one layer.

        Raises:
            CacheError: an attached model updates the cache outside a forward pass that was given it.
        """
        if not getattr(self.layers[layer_idx], "attached", True):
            check_announced(self)
        found: tuple[Tensor, Tensor] = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        return found

    @property
    def evicts(self) -> bool:
        """Whether tokens are dropped in any layer."""
        return any(x.tiers.placement.specs["keys"][-1] == "evict" for x in self.layers if isinstance(x, TieredLayer))

    @property
    def selects_together(self) -> bool:
        """Whether a policy selects the same tokens in several layers."""
        return any(x.tiers.placement.shared for x in self.layers if isinstance(x, TieredLayer))

    @property
    def pending(self) -> int:
        """Tokens of the latest update that no tier has yet."""
        return max((x.tiers.waiting for x in self.layers if isinstance(x, TieredLayer)), default=0)

    def note_padding(self, mask: Any, tokens: int) -> None:
        """Take note of which of the `tokens` coming in are padding, from a 2-D attention mask over all tokens."""
        seen = self.get_seq_length()
        real: Any = None
        if isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] > seen:
            real = mask[:, seen:] != 0
            if self.padding is None and self.evicts and not bool(mask[:, :seen].all()):
                raise CacheError(
                    f"recipe {self.recipe.name!r} drops tokens, and this cache took padding for tokens while its model "
                    "was not attached; attach the model before a padded batch's first tokens"
                )
        if self.padding is None and (real is None or bool(real.all())):
            return
        real = (
            np.ones((self.padding.batch if self.padding else 1, tokens), np.bool_)
            if real is None
            else real.cpu().numpy()
        )
        if self.padding is None:
            self.padding = Padding(len(real), seen)
            for layer in self.layers:
                if isinstance(layer, TieredLayer) and layer.readable:
                    layer.tiers.padding = self.padding
        self.padding.crop(seen)  # what an update that failed left behind
        self.padding.append(real)

    def __iter__(self) -> Iterator[tuple[Tensor | None, Tensor | None, Tensor | None]]:
        """Keys, values and window of each layer, as `DynamicCache` gives them; what is compressed is decoded."""
        for layer in self.layers:
            yield layer.keys, layer.values, getattr(layer, "_sliding_window_tensor", None)

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
        groups: dict[int, list[Tiers]] = {}
        for number, layer in enumerate(self.layers):
            if isinstance(layer, TieredLayer):
                placement = layer.tiers.placement
                groups.setdefault(id(placement) if placement.shared else -1 - number, []).append(layer.tiers)
        for group in groups.values():
            together([tiers.settling() for tiers in group])

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
        """Read what `save` wrote, for the model that made it, each layer onto the device of the model's layer.

        Raises:
            CacheError: the file is missing, damaged, foreign, or of another model.
        """
        from kvpolicy.persistence import load_cache

        return load_cache(Path(path), model_or_config)

    def crop(self, tokens_to_remove: int) -> None:
        """Keep the first n positions (n > 0), or remove the last -n (n <= 0), in every layer.

        Exact for pending tokens (the last update's, 64 at most); a longer crop keeps past descents.
        """
        seen, tokens_to_remove = self.get_seq_length(), int(tokens_to_remove)
        removed = tokens_to_remove if tokens_to_remove <= 0 else min(tokens_to_remove - seen, 0)
        for layer in self.layers:
            layer.crop(removed)
        if self.padding is not None:
            self.padding.crop(seen + removed)

    def _select(self, rows: Tensor) -> None:
        if self.padding is not None:
            self.padding.select(rows.cpu().numpy())

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self._select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        if self.padding is not None:
            self._select(torch.arange(self.padding.batch).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        rows = torch.as_tensor(indices)
        self._select(rows.nonzero()[:, 0] if rows.dtype == torch.bool else rows)

    def reset(self) -> None:
        """Forget everything, in every layer."""
        for i, layer in enumerate(self.layers):
            if isinstance(layer, TieredLayer):
                layer.reset()
            else:
                self.layers[i] = copy.deepcopy(self._blank[i])
        self.padding = None
        if self.scratch is not None:
            self.scratch.buffers = {}


def make_cache(recipe: Any, model_or_config: Any, *, strict: bool = False, **params: Any) -> CompressedCache:
    """Make an empty cache for a model.

    Args:
        recipe: what `load_recipe` takes: a bundled name, a path, a mapping or a `Recipe`.
        model_or_config: a transformers decoder model, or its config. A model tells its caches of each forward pass
            and of padding; the hooks for that are gone with the last of these caches.
        strict: raise an error where the recipe would compress nothing; by default a `UserWarning` says so.
        **params: parameters of the recipe.

    Returns:
        The cache, with the recipe's tiers for each full-attention layer and the library's own layers
        for sliding-window, chunked, linear and cross-attention.

    Raises:
        RecipeError: the recipe is not valid, or does not fit the model.
        CacheError: the model can't use the cache, or, with `strict`, nothing would be compressed.
        MissingDependencyError: the recipe needs a library that is not installed.
    """
    loaded = load_recipe(recipe, **params)
    config = config_of(model_or_config)
    text = config.get_text_config(decoder=True)
    layers = list(DynamicCache(config=config).layers)
    compressed = compressible(layers, config)
    check_selectors(loaded, layers, compressed)
    scratch = None if getattr(text, "num_kv_shared_layers", 0) else Scratch()
    chosen = {i: loaded.tiers_of(i, len(layers)) for i in compressed}
    check_effect(loaded, layers, chosen, strict)
    placements: list[tuple[Any, int | None, Placement]] = []  # no dict: options of a plugin may not be hashable
    for i, tiers in chosen.items():
        dim = head_dim_of(text, i)
        placement = next((p for known, _, p in placements if known == tiers), None)
        if not any(known == tiers and dim == checked for known, checked, _ in placements):
            try:
                check_stores(tiers, loaded.placement, dim, i)
            except RecipeError as error:
                raise RecipeError(f"recipe {loaded.name}: {error}") from None
            placement = placement or Placement(tiers, loaded.placement)
            placements.append((tiers, dim, placement))
        assert placement is not None
        layers[i] = TieredLayer(placement, scratch)
    uneven = uneven_layers(chosen)
    if not _is_attached(model_or_config):
        check_positions(loaded, model_or_config, config, chosen)
        if uneven is not None:
            raise CacheError(uneven)
    for i in compressed:
        layers[i].uneven = uneven
    cache = CompressedCache(loaded, layers, scratch, str(getattr(text, "model_type", "")))
    cache.lease = hold(model_or_config)
    return cache


def _is_attached(model: Any) -> bool:
    from kvpolicy.attention import is_attached

    return is_attached(model)
