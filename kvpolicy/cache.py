"""Recipes as caches of transformers. The only file that touches transformers' cache classes."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import get_ident
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache

from kvpolicy.calls import PassAware
from kvpolicy.errors import CacheError, RecipeError
from kvpolicy.fingerprint import Origin
from kvpolicy.fitting import check_selectors, check_stores, config_of, head_dim_of, uneven_layers
from kvpolicy.layer import MAX_APART, Positions, Reading, Tiers
from kvpolicy.modes import ATTACHED, HELD, barred, precise, uncompiled, wants_gradients
from kvpolicy.padding import Padding
from kvpolicy.passes import Lease, check_announced, hold
from kvpolicy.placement import Placement
from kvpolicy.policy import RankPolicy
from kvpolicy.ranking import together
from kvpolicy.recipe import Recipe, load_recipe
from kvpolicy.report import Memory, Summary, measure, summarize
from kvpolicy.step import Step
from kvpolicy.suitability import check_effect, check_positions, compressible, set_apart
from kvpolicy.transaction import Transaction, caller
from kvpolicy.views import DenseAccess, Scratch

__all__ = ["CompressedCache", "TieredLayer", "make_cache"]


BY_REFERENCE = ("DynamicLayer", "DynamicSlidingWindowLayer")
"""Layers of transformers that replace their tensors instead of writing to them."""


class TieredLayer(DenseAccess, CacheLayerMixin):
    """One full-attention layer of a `CompressedCache`."""

    is_compileable = False
    is_croppable = True
    is_sliding = False

    def __init__(self, start: Step, scratch: Scratch | None, reading: Reading) -> None:
        super().__init__()
        self.tiers = Tiers(start, scratch, reading)
        self.uneven: str | None = None
        self.unlinked = False
        """Whether tokens came with gradients, which end here."""

    @property
    def attached(self) -> bool:
        """While an attached model runs: `update` returns views, and masks cover all tokens seen."""
        return self.tiers.reading.attached

    @attached.setter
    def attached(self, attached: bool) -> None:
        self.tiers.reading.attached = attached

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
            views = self.attached and self.tiers.told_apart
            keys, values = (self.tiers.look if views else self.tiers.update)(key_states, value_states)
        if linked and held and views:
            return barred(ATTACHED, keys, key_states), barred(ATTACHED, values, value_states)
        if linked and held:
            keys, values = (
                torch.cat([x[:, :, : x.shape[2] - new.shape[2]], new], dim=2)
                for x, new in ((keys, key_states), (values, value_states))
            )
            if self.unlinked:
                keys, values = barred(HELD, keys), barred(HELD, values)
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
            self.tiers.select(rows_within(rows, self.batch_size))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._select(torch.arange(max(self.batch_size, 0)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._select(torch.as_tensor(indices))

    def reset(self) -> None:
        self.tiers.clear()
        self.is_initialized = self.unlinked = False

    def offload(self) -> None:
        self.tiers.to(torch.device("cpu"))

    def prefetch(self) -> None:
        if self.is_initialized:
            self.tiers.to(self.device)


def rows_within(rows: Tensor, batch: int) -> Tensor:
    """Batch rows to keep, counted from 0; a mask and negative numbers are understood as for tensors.

    Raises:
        CacheError: there is no such row.
    """
    if rows.dtype == torch.bool:
        if rows.shape != (batch,):
            raise CacheError(f"a mask of rows must have one entry for each of {batch} rows, found {tuple(rows.shape)}")
        rows = rows.nonzero()[:, 0]
    if rows.device.type == "cpu":  # elsewhere a look would stall the device, which checks by itself
        if rows.ndim != 1 or ((rows < -batch) | (rows >= batch)).any():
            raise CacheError(f"rows must be in [0, {batch}), found {rows.tolist()}; the cache has {batch} rows")
        rows = torch.where(rows < 0, rows + batch, rows)
    return rows


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
        self._pass: Transaction | None = None
        """The forward pass under way, or one that was interrupted."""
        self._torn: str | None = None
        """What was done to the rows of some layers only."""
        self._user: dict[str, int] = {}
        """The thread that is updating a layer right now."""
        self._blank = [None if isinstance(layer, TieredLayer) else copy.deepcopy(layer) for layer in layers]

    def __getstate__(self) -> dict[str, Any]:
        self.ready()
        return {**self.__dict__, "_pass": None, "_user": {}}

    @property
    def tiered(self) -> list[TieredLayer]:
        """The layers that the recipe keeps."""
        return [layer for layer in self.layers if isinstance(layer, TieredLayer)]

    @property
    def padding(self) -> Padding | None:
        """Which tokens are padding, once an attached model was given any."""
        return self.reading.padding

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

    def begin(self, tokens: int, mask: Any = None, attached: bool = False) -> None:
        """A forward pass with this cache begins, which brings `tokens` tokens to every layer.

        Called by the hooks of a model. If the pass is interrupted, the cache goes back to where it is now.

        Args:
            tokens: how many.
            mask: the pass's 2-D attention mask over all tokens, if it has one, which tells padding.
            attached: whether the model reads the stores itself.

        Raises:
            CacheError: the cache is not whole or in use, or the pass can't be served.
        """
        self.whole()
        before, padding = self.get_seq_length(), self.reading.padding
        coming = self._padding_with(mask, tokens, before, attached)
        own = {i: dict(x.__dict__) for i, x in enumerate(self.layers) if type(x).__name__ in BY_REFERENCE}
        if attached and self.selects_together:
            self._settle()
        self._pass = Transaction(before, padding, own, caller())
        self.reading.padding, self.reading.attached = coming, attached

    def finish(self, failed: bool = False) -> None:
        """The forward pass has ended; if it `failed`, what it did is taken back, as far as that can be done."""
        if self._pass is None:
            return
        if failed:
            with suppress(CacheError):  # said by whatever uses the cache next
                self._take_back()
            return
        for layer in self.tiered:
            layer.tiers.commit()
        if self.selects_together and self.pending > MAX_APART:
            self._settle()
        self.reading.attached = False
        self._pass = None  # last: until here an interruption takes the pass back

    def note_padding(self, mask: Any, tokens: int) -> None:
        """Take note of which of the `tokens` coming in are padding, from a 2-D attention mask over all tokens."""
        self.reading.padding = self._padding_with(mask, tokens, self.get_seq_length(), True)

    def _padding_with(self, mask: Any, tokens: int, seen: int, attached: bool) -> Padding | None:
        """What is known of padding once a pass has brought `tokens` more."""
        padding = self.reading.padding
        real: Any = None
        if isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] > seen:
            real = mask[:, seen : seen + tokens] != 0
            whole = bool(mask[:, :seen].all()) if padding is None and self.evicts else True
            if not whole or (not attached and self.evicts and not bool(real.all())):
                raise CacheError(
                    f"recipe {self.recipe.name!r} drops tokens, and takes padding for tokens while its model is not "
                    "attached; found a padded batch. Attach the model before its first tokens: "
                    "with kvpolicy.attach(model): ..."
                )
        if padding is None and (not attached or real is None or bool(real.all())):
            return None
        batch = padding.batch if padding is not None else len(real)
        if real is None or real.shape != (batch, tokens):
            real = np.ones((batch, tokens), np.bool_)
        else:
            real = real.cpu().numpy()
        return (padding or Padding.none(batch, seen)).crop(seen).append(real)

    def whole(self) -> None:
        """Take an interrupted pass back, and see that all layers hold the same tokens.

        Raises:
            CacheError: they don't, or the cache is in use.
        """
        if self._pass is not None:
            if self._pass.alive():
                where = "by another thread" if self._pass.elsewhere else "by the forward pass that is running"
                raise CacheError(
                    f"a cache serves one forward pass at a time, and this one is in use {where}; use another"
                )
            self._take_back()
        if self._torn is not None:
            raise CacheError(
                f"the layers of a cache must have the same rows, and {self._torn} was interrupted; reset() the cache, "
                "or make a new one"
            )
        lengths = [layer.tiers.seen for layer in self.tiered]
        for layer in self.tiered:
            layer.tiers.check_whole()
        if len(set(lengths)) > 1:
            raise CacheError(
                f"the layers of a cache must hold the same tokens, and an update was interrupted: they have seen "
                f"{lengths}; crop({min(lengths)}) takes it back, or reset() the cache"
            )

    def ready(self) -> None:
        """`whole`, unless the forward pass that is running asks itself."""
        if self._pass is None or self._pass.elsewhere or not self._pass.alive():
            self.whole()

    def _take_back(self) -> None:
        """Undo what an interrupted pass did.

        Raises:
            CacheError: tokens have left places that they can't return to.
        """
        p = self._pass
        assert p is not None
        done = [layer.tiers.revert(p.before) for layer in self.tiered]
        for i, layer in enumerate(self.layers):
            if i in p.own:
                layer.__dict__.clear()
                layer.__dict__.update(p.own[i])
            elif not isinstance(layer, TieredLayer) and type(layer).__name__ != "DummyLayer":
                done.append(i not in p.given)
        self.reading.attached, self.reading.padding = False, p.padding
        if not all(done):
            raise CacheError(
                "a forward pass with this cache was interrupted after tokens had left their places for good; reset() "
                "the cache, or make a new one"
            )
        if len({layer.tiers.settled for layer in self.tiered}) > 1:
            self._settle()
        self._pass = None

    @uncompiled
    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add keys and values `[batch, kv_heads, tokens, head_dim]` of a layer; see `TieredLayer.update`.

        Raises:
            CacheError: the cache is in use by another thread, or was interrupted.
        """
        me = get_ident()
        if self._user.setdefault("thread", me) != me:
            raise CacheError("a cache serves one thread at a time, and another is updating this one; use another cache")
        try:
            self._expect(layer_idx, key_states)
            found: tuple[Tensor, Tensor] = super().update(key_states, value_states, layer_idx, *args, **kwargs)
            return found
        finally:
            self._user.pop("thread", None)

    def _expect(self, layer: int, keys: Tensor) -> None:
        """Refuse tokens for a layer that is not where it should be."""
        p = self._pass
        if p is not None and (p.elsewhere or layer in p.given) and not p.alive():
            self._take_back()
            p = None
        if p is not None and p.elsewhere:
            self.whole()
        if p is not None:
            p.given.add(layer)
            return
        tiered = self.layers[layer]
        if not isinstance(tiered, TieredLayer):
            return
        if not tiered.attached:
            check_announced(self)
        seen = tiered.tiers.seen
        if seen > min(x.tiers.seen for x in self.tiered):
            self.whole()
        padding = self.reading.padding
        if padding is not None and padding.length < seen + keys.shape[2]:
            self.reading.padding = padding.append(
                np.ones((padding.batch, seen + keys.shape[2] - padding.length), np.bool_)
            )

    @uncompiled
    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen, dropped ones included."""
        if self._pass is not None and not self._pass.alive():
            self._take_back()
        return int(super().get_seq_length(layer_idx))

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
        self.ready()
        return self._tiers(layer).positions()

    def dense(self, layer: int = 0) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer, decoded, in token order: two tensors `[batch, kv_heads, tokens, head_dim]`."""
        self.ready()
        tiers = self._tiers(layer)
        if not tiers.stores:
            raise CacheError(f"layer {layer} holds no tokens yet; run the model with this cache first")
        with torch.no_grad():
            return tiers.dense()

    @torch.no_grad()
    def settle(self) -> None:
        """Let the pending tokens into the tiers; `crop` of them is no exact rollback afterwards."""
        self.ready()
        self._settle()

    def _settle(self) -> None:
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
        """Write the cache as safetensors. Settles pending tokens first.

        The header holds the recipe, versions, and a fingerprint of the model that the cache was made for: what of its
        config decides what keys and values mean, and a hash of a few numbers of its weights. Of a cache made from a
        config, or whose model is gone, the weights are unknown.

        The file is written beside its place and then moved there: what interrupts that leaves the old file, or none.

        Raises:
            CacheError: nothing is cached, layers have seen different numbers of tokens, a layer can't be saved, or the
                file can't be written.
        """
        from kvpolicy.persistence import save_cache

        self.settle()
        save_cache(self, path)

    @classmethod
    def load(cls, path: str | Path, model: Any, *, any_model: bool = False) -> CompressedCache:
        """Read what `save` wrote, each layer onto the device of the model's layer.

        Args:
            path: the file.
            model: the model that made the cache, or its config. A config has no weights to be compared: then another
                model of the same config goes unnoticed.
            any_model: take a cache of another model, too, whose layers and heads have the same shapes and whose type
                is the same. What its keys and values mean to this model is up to you.

        Weights are compared as numbers: a model in another float type that holds them exactly is the same one, but
        must compute in the type of the cache. A file that says nothing of weights (one of kvpolicy 0.1, or of a cache
        made from a config) is read with a warning.

        Raises:
            CacheError: the file is missing, damaged, foreign, or of another model.
            MissingDependencyError: its recipe needs a library that is not installed.
        """
        from kvpolicy.persistence import load_cache

        return load_cache(path, model, any_model)

    def crop(self, tokens_to_remove: int) -> None:
        """Keep the first n positions (n > 0), or remove the last -n (n <= 0), in every layer.

        Exact for pending tokens (the last update's, 64 at most); a longer crop keeps past descents.
        """
        if self._pass is not None:
            if self._pass.alive():
                self.whole()
            self._take_back()
        n, seen = int(tokens_to_remove), [layer.tiers.seen for layer in self.tiered]
        if n <= 0 or not seen:
            self.whole()
        length = n if n > 0 else max(self.get_seq_length() + n, 0)
        if len(set(seen)) > 1:
            self._level(length, seen)
        removed = length - max([self.get_seq_length(), *seen])
        for layer in self.layers:
            if isinstance(layer, TieredLayer) and length:
                layer.crop(length)
            else:
                known = isinstance(layer, TieredLayer) or type(layer).__name__ in BY_REFERENCE
                layer.crop(min(length - layer.get_seq_length(), 0) if known else min(removed, 0))
        if self.reading.padding is not None:
            self.reading.padding = self.reading.padding.crop(length)

    @torch.no_grad()
    def _level(self, length: int, seen: list[int]) -> None:
        """Let all layers have let in the same tokens, where one has seen more, so that a crop leaves them alike."""
        most = max(layer.tiers.settled for layer in self.tiered)
        behind = [layer.tiers for layer in self.tiered if layer.tiers.settled < most]
        if min(seen) < length or self.selects_together or any(t.settled + t.waiting != most for t in behind):
            raise CacheError(
                "crop must lead to a length that all layers had, and an update was interrupted: they have seen "
                f"{seen}, found {length}; reset() the cache, or make a new one"
            )
        for tiers in behind:
            tiers.settle()

    @contextmanager
    def _rows_of_all(self, what: str) -> Iterator[None]:
        """All layers get other rows, or the cache is torn."""
        self.whole()
        self._torn = what
        yield
        self._torn = None

    def _existing(self, rows: Tensor) -> Tensor:
        """`rows_within` the rows held, if any."""
        held = next((layer.batch_size for layer in self.tiered if layer.is_initialized), None)
        return rows if held is None else rows_within(rows, held)

    def _select(self, rows: Tensor) -> None:
        if self.reading.padding is not None:
            padding = self.reading.padding
            self.reading.padding = padding.select(rows_within(rows, padding.batch).cpu().numpy())

    def reorder_cache(self, beam_idx: Tensor) -> None:
        rows = self._existing(beam_idx)
        with self._rows_of_all("reorder_cache"):
            super().reorder_cache(rows)
            self._select(rows)

    def batch_repeat_interleave(self, repeats: int) -> None:
        with self._rows_of_all("batch_repeat_interleave"):
            super().batch_repeat_interleave(repeats)
            if self.reading.padding is not None:
                self._select(torch.arange(self.reading.padding.batch).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        rows = self._existing(torch.as_tensor(indices))
        with self._rows_of_all("batch_select_indices"):
            super().batch_select_indices(rows)
            self._select(rows)

    def reset(self) -> None:
        """Forget everything, in every layer."""
        if self._pass is not None and self._pass.elsewhere and self._pass.alive():
            self.whole()
        self._torn = "reset"
        for i, layer in enumerate(self.layers):
            if isinstance(layer, TieredLayer):
                layer.reset()
            else:
                self.layers[i] = copy.deepcopy(self._blank[i])
        self.reading.padding, self.reading.attached = None, False
        self.origin.loaded = None
        if self.scratch is not None:
            self.scratch.buffers = {}
        self._pass = self._torn = None


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
        MissingDependencyError: the recipe needs a library that is not installed.
    """
    loaded = load_recipe(recipe, **params)
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
    starts: list[tuple[Any, int | None, Step]] = []  # no dict: options of a plugin may not be hashable
    for i, tiers in chosen.items():
        dim = head_dim_of(text, i)
        start = next((step for known, _, step in starts if known == tiers), None)
        if not any(known == tiers and dim == checked for known, checked, _ in starts):
            try:
                check_stores(tiers, loaded.placement, dim, i)
            except RecipeError as error:
                raise RecipeError(f"recipe {loaded.name}: {error}") from None
            start = start or Step.first(Placement(tiers, loaded.placement))
            starts.append((tiers, dim, start))
        assert start is not None
        layers[i] = TieredLayer(start, scratch, reading)
    uneven = uneven_layers(chosen)
    if not _is_attached(model_or_config):
        check_positions(loaded, model_or_config, config, chosen)
        if uneven is not None:
            raise CacheError(uneven)
    for i in compressed:
        layers[i].uneven = uneven
    cache = CompressedCache(loaded, layers, scratch, reading, Origin(model_or_config))
    cache.lease = hold(model_or_config)
    return cache


def _is_attached(model: Any) -> bool:
    from kvpolicy.attention import is_attached

    return is_attached(model)
