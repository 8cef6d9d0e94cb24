"""Recipes as caches of transformers. The only file that touches transformers' cache classes."""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from kvpolicy.errors import CacheError, RecipeError
from kvpolicy.hf.calibration import calibration_of
from kvpolicy.hf.calls import PassAware
from kvpolicy.hf.fingerprint import Origin
from kvpolicy.hf.layer import TieredLayer, rows_within
from kvpolicy.hf.model_config import check_selectors, check_stores, config_of, head_dim_of, tiers_at, uneven_layers
from kvpolicy.hf.modes import precise, uncompiled
from kvpolicy.hf.passes import Lease, check_announced, hold, is_attached
from kvpolicy.hf.rotary import rotaries
from kvpolicy.hf.saving import load_cache, save_cache
from kvpolicy.hf.suitability import check_effect, check_positions, compressible, set_apart
from kvpolicy.hf.transaction import BY_REFERENCE, Guard
from kvpolicy.interfaces.site import Site
from kvpolicy.layer.held import Positions, Reading
from kvpolicy.layer.layer import LayerCache
from kvpolicy.layer.report import LayerSummary, Memory, Summary, describe, measure
from kvpolicy.layer.view import Scratch
from kvpolicy.placement.padding import Padding
from kvpolicy.placement.planner import Placement
from kvpolicy.placement.step import Step
from kvpolicy.recipe.load import Recipe, load_recipe

GRAPHS = "torch._inductor.cudagraph_trees"
"""Where this is loaded, compiled code may write its results to the same memory again."""
UNTOLD = (
    "no model tells this cache of padding while it is not attached, so that padded rows can't be told apart; make it "
    "for the model that runs: make_cache(recipe, model)"
)


class CompressedCache(PassAware, Cache):
    """A cache that keeps the full-attention layers of a model as its recipe says.

    Made by `make_cache`. Pass it to `generate(cache=...)` or to a model's forward; it serves
    everything that transformers' `DynamicCache` does. With only `full` stores it gives the same logits.

    The cache carries no gradients.
    """

    def __init__(
        self, recipe: Recipe, layers: list[Any], scratch: Scratch | None, reading: Reading, origin: Origin
    ) -> None:
        super().__init__(layers=layers)
        self.recipe, self.origin = recipe, origin
        self.scratch, self.reading = scratch, reading
        self.lease: Lease | None = None
        """Keeps the hooks of the model that the cache was made for, if it was made for a model."""
        self.guard = Guard(recipe.name, self.layers, reading)
        self._blank = [None if isinstance(layer, TieredLayer) else copy.deepcopy(layer) for layer in layers]

    def __getstate__(self) -> dict[str, Any]:
        self.guard.ready()
        return self.__dict__

    @property
    def padding(self) -> Padding | None:
        """Which tokens are padding, once an attached model was given any."""
        return self.reading.padding

    def begin(self, tokens: int, mask: Any = None, attached: bool = False) -> None:
        """A forward pass with this cache begins; see `Guard.begin`. Called by the hooks of a model."""
        self.guard.begin(tokens, mask, attached)

    def announce(self, tokens: int, mask: Any, attached: bool) -> None:
        """Within that pass more was said of it; see `Guard.announce`."""
        self.guard.announce(tokens, mask, attached)

    def finish(self, failed: bool = False) -> None:
        """That pass has ended; see `Guard.finish`."""
        self.guard.finish(failed)

    @uncompiled
    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add keys and values `[batch, kv_heads, tokens, head_dim]` of a layer; see `TieredLayer.update`.

        Raises:
            CacheError: the cache is in use by another thread, or was interrupted.
        """
        layer = self.layers[layer_idx]
        self.reading.lasting = GRAPHS not in sys.modules
        if isinstance(layer, TieredLayer) and not self.offloading and self.guard.expects(layer_idx):
            return layer.take(key_states, value_states)
        with self.guard.updating:
            if not getattr(layer, "attached", True):
                check_announced(self)
            self.guard.expect(layer_idx, key_states)
            found: tuple[Tensor, Tensor] = super().update(key_states, value_states, layer_idx, *args, **kwargs)
            return found

    @uncompiled
    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen, dropped ones included."""
        self.guard.recover()
        return int(super().get_seq_length(layer_idx))

    def __iter__(self) -> Iterator[tuple[Tensor | None, Tensor | None, Tensor | None]]:
        """Keys, values and window of each layer, as `DynamicCache` gives them; what is compressed is decoded."""
        for layer in self.layers:
            yield layer.keys, layer.values, getattr(layer, "_sliding_window_tensor", None)

    def _tiers(self, layer: int) -> LayerCache:
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
        self.guard.ready(same_tokens=False)
        return self._tiers(layer).positions()

    def dense(self, layer: int = 0) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer, decoded, in token order: two tensors `[batch, kv_heads, tokens, head_dim]`."""
        self.guard.ready(same_tokens=False)
        tiers = self._tiers(layer)
        if not tiers.stores:
            raise CacheError(f"layer {layer} holds no tokens yet; run the model with this cache first")
        with torch.no_grad():
            return tiers.dense()

    @torch.no_grad()
    def commit(self) -> None:
        """Let the pending tokens into the tiers; `crop` of them is no exact rollback afterwards."""
        self.guard.ready()
        self.guard.commit()

    def settle(self) -> None:
        """`commit`, as version 0.1 called it."""
        warnings.warn("CompressedCache.settle is called commit now", FutureWarning, stacklevel=2)
        self.commit()

    def memory(self) -> Memory:
        """Bytes by layer, side and store, counted from the tensors held. Commits pending tokens first."""
        self.commit()
        layers = [x.tiers if isinstance(x, TieredLayer) else _held(x) for x in self.layers]
        padding = 0 if self.padding is None else self.padding.real.size
        return measure(layers, padding, 0 if self.scratch is None else self.scratch.bytes)

    def summary(self) -> Summary:
        """Which layer is kept how, and what it holds. Commits pending tokens first."""
        self.commit()
        count = len(self.layers)
        rows = [
            describe(i, x.tiers, tiers_at(self.recipe.tiers_of(i, count), x.tiers.site))
            if isinstance(x, TieredLayer)
            else LayerSummary(i, f"transformers' {type(x).__name__}", (), 0)
            for i, x in enumerate(self.layers)
        ]
        untold = self.guard.evicts and (self.lease is None or self.guard.untold)
        return Summary(self.recipe.name, tuple(rows), (UNTOLD,) if untold else ())

    def save(self, path: str | Path) -> None:
        """Write the cache as safetensors. Commits pending tokens first.

        The header holds the recipe, versions, and a fingerprint of the model that the cache was made for: the entries
        of its config on which keys and values depend, and hashes of samples of its weights. The weights are unknown if
        the cache was made from a config, or its model is gone.

        The file is written under another name and then renamed: an interrupted save leaves the old file, or none.

        Raises:
            CacheError: nothing is cached, layers have seen different numbers of tokens, a layer can't be saved, or the
                file can't be written.
        """
        self.commit()
        save_cache(self, path)

    @classmethod
    def load(cls, path: str | Path, model: Any, *, any_model: bool = False) -> CompressedCache:
        """Read what `save` wrote, each layer onto the device of the model's layer.

        Args:
            path: the file.
            model: the model that made the cache, or its config. A config has no weights to compare, so another model
                with the same config is not noticed.
            any_model: accept a cache of another model whose layers and heads have the same shapes and dtype. Whether
                its keys and values mean the same to this model is not checked.

        Weights are compared as numbers, so a copy of the model in a wider float type is the same model; but it must
        compute in the dtype of the cache. A file without hashes of weights (written by kvpolicy 0.1, or of a cache made
        from a config) is read with a warning.

        Raises:
            CacheError: the file is missing, damaged, foreign, or of another model.
            MissingDependencyError: its recipe needs a library that is not installed.
        """
        return load_cache(path, model, any_model, _restored)

    def crop(self, tokens_to_remove: int) -> None:
        """Keep the first n positions (n > 0), or remove the last -n (n <= 0), in every layer.

        Exact for pending tokens (those of the last update, 64 at most). After a longer crop, tokens stay in the tiers
        to which they have descended.
        """
        known = int(super().get_seq_length()) if self.layers else 0
        length = self.guard.cropped(int(tokens_to_remove), known)
        removed = min(length - max(known, self.guard.seen), 0)
        with self.guard.tearing("crop"):
            for number, layer in enumerate(self.layers):  # these first: they may raise
                # A layer that records its past drops what lies behind its window even if no token is removed.
                if not isinstance(layer, TieredLayer) and (removed or getattr(layer, "record_past", False)):
                    self._crop_own(number, layer, length, removed)
            for layer in self.layers:
                if isinstance(layer, TieredLayer):
                    layer.crop(length or -layer.tiers.seen)
            if self.reading.padding is not None:
                self.reading.padding = self.reading.padding.crop(length)

    def _crop_own(self, number: int, layer: Any, length: int, removed: int) -> None:
        known = type(layer).__name__ in BY_REFERENCE
        try:
            layer.crop(min(length - layer.get_seq_length(), 0) if known else removed)
        except (AttributeError, NotImplementedError, RuntimeError, ValueError) as error:
            raise CacheError(
                f"layer {number}, a {type(layer).__name__} of transformers, can't be cropped by {-removed} tokens: "
                f"{error}; reset() the cache and fill it anew"
            ) from error

    def _existing(self, rows: Tensor) -> Tensor:
        """Row numbers counted from 0, checked against the rows held, if any."""
        held = next((x.batch_size for x in self.layers if isinstance(x, TieredLayer) and x.is_initialized), None)
        return rows if held is None else rows_within(rows, held)

    def _select(self, rows: Tensor) -> None:
        if self.reading.padding is not None:
            padding = self.reading.padding
            self.reading.padding = padding.select(rows_within(rows, padding.batch).cpu().numpy())

    def reorder_cache(self, beam_idx: Tensor) -> None:
        rows = self._existing(beam_idx)
        with self.guard.rows_of_all("reorder_cache"):
            super().reorder_cache(rows)
            self._select(rows)

    def batch_repeat_interleave(self, repeats: int) -> None:
        with self.guard.rows_of_all("batch_repeat_interleave"):
            super().batch_repeat_interleave(repeats)
            if self.reading.padding is not None:
                self._select(torch.arange(self.reading.padding.batch).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        rows = self._existing(torch.as_tensor(indices))
        with self.guard.rows_of_all("batch_select_indices"):
            super().batch_select_indices(rows)
            self._select(rows)

    def reset(self) -> None:
        """Forget everything, in every layer."""
        with self.guard.emptying():
            for i, layer in enumerate(self.layers):
                if isinstance(layer, TieredLayer):
                    layer.reset()
                else:
                    self.layers[i] = copy.deepcopy(self._blank[i])
            self.origin.loaded = None
            if self.scratch is not None:
                self.scratch.buffers = {}


def make_cache(recipe: Any, model_or_config: Any, *, strict: bool = False, **params: Any) -> CompressedCache:
    """Make an empty cache for a model.

    Args:
        recipe: what `load_recipe` takes: a bundled name, a path, a mapping or a `Recipe`.
        model_or_config: a transformers decoder model, or its config. A model tells its caches of each forward pass
            and of padding; the hooks for that are gone with the last of these caches.
        strict: raise an error where the recipe would compress nothing of this model; by default a `UserWarning`
            says so.
        **params: parameters of the recipe.

    Returns:
        The cache, with the recipe's tiers for each full-attention layer and the library's own layers
        for sliding-window, chunked, linear and cross-attention.

    Raises:
        RecipeError: the recipe is not valid, or does not fit the model.
        CacheError: the model can't use the cache, or, with `strict`, nothing would be compressed.
        CalibrationError: the recipe names a calibration whose file is missing, damaged or of another model.
        MissingDependencyError: the recipe needs a library that is not installed.
    """
    loaded = load_recipe(recipe, **params)
    with precise(torch.device("cpu")):  # where what a recipe asks for is tried
        return _made(loaded, model_or_config, strict, None)


def _restored(recipe: Recipe, model_or_config: Any, fitted: dict[int, dict[str, Tensor]]) -> CompressedCache:
    """An empty cache with a calibration that was saved in one."""
    return _made(recipe, model_or_config, False, fitted)


def _made(
    loaded: Recipe, model_or_config: Any, strict: bool, fitted: dict[int, dict[str, Tensor]] | None
) -> CompressedCache:
    """`make_cache`, with the tensors of a calibration by layer if its file is not to be read."""
    config = config_of(model_or_config)
    text = config.get_text_config(decoder=True)
    layers = list(DynamicCache(config=config).layers)
    if not layers:
        raise CacheError(f"the config must say how many layers the model has; {type(config).__name__} gives none")
    set_apart(layers, text)
    compressed = compressible(layers)
    check_selectors(loaded, layers, compressed)
    scratch, reading = None if getattr(text, "num_kv_shared_layers", 0) else Scratch(), Reading()
    chosen = {i: loaded.tiers_of(i, len(layers)) for i in compressed}
    check_effect(loaded, layers, chosen, strict)
    starts: list[tuple[Any, Step]] = []  # no dict: options of a plugin may not be hashable
    checked: list[tuple[Any, ...]] = []
    rotary = rotaries(model_or_config, len(layers))
    fitted = calibration_of(loaded, model_or_config) if fitted is None else fitted
    for i in compressed:
        tiers = chosen[i]
        dim, own, found = head_dim_of(text, i), rotary[i], fitted.get(i, {})
        heads = next((t.shape[0] for t in found.values() if t.ndim == 2), 1)
        turned = own is not None and own.interleaved
        site = Site(i, len(layers), kv_heads=heads, rotary=own, interleaved=turned, fitted=found)
        tried = (tiers, dim, own is None) in checked
        try:
            chosen[i] = tiers_at(tiers, site)
            if found or not tried:
                check_stores(tiers, dim, site, tried)
                checked.append((tiers, dim, own is None))
        except RecipeError as error:
            raise RecipeError(f"recipe {loaded.name}: {error}") from None
        start = next((step for known, step in starts if known == chosen[i]), None)
        if start is None:
            start = Step.first(Placement(chosen[i]))
            starts.append((chosen[i], start))
        layers[i] = TieredLayer(start, scratch, reading, site)
    uneven = uneven_layers(chosen)
    if not is_attached(model_or_config):
        check_positions(loaded, model_or_config, config, chosen)
        waits = any(start.placement.attends for _, start in starts)  # to be attached
        if uneven is not None and not waits:
            raise CacheError(uneven)
    for i in compressed:
        layers[i].uneven = uneven
    cache = CompressedCache(loaded, layers, scratch, reading, Origin(model_or_config))
    cache.lease = hold(model_or_config)
    return cache


def _held(layer: Any) -> list[Tensor]:
    """The keys and values that a layer of transformers' own holds."""
    return [x for x in (getattr(layer, "keys", None), getattr(layer, "values", None)) if x is not None]
