"""One full-attention layer of a compressed cache, as transformers sees it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from kvpolicy.errors import CacheError
from kvpolicy.hf.modes import ATTACHED, HELD, barred, precise, uncompiled, wants_gradients
from kvpolicy.interfaces.site import Site
from kvpolicy.layer.held import Reading
from kvpolicy.layer.layer import LayerCache
from kvpolicy.layer.view import Scratch
from kvpolicy.placement.step import Step


class DenseAccess:
    """Gives a compressed layer the attributes `keys` and `values` of transformers' layers."""

    tiers: LayerCache
    is_initialized = False

    @property
    def keys(self) -> Tensor | None:
        """The keys held, `[batch, kv_heads, tokens, head_dim]`, decoded anew at each access; None before the first.

        A copy: writing to it changes nothing.

        Raises:
            CacheError: another tensor is set in its place.
        """
        return self._decoded("keys")

    @keys.setter
    def keys(self, given: Any) -> None:
        self._refuse(given)

    @property
    def values(self) -> Tensor | None:
        """The values held, as `keys`."""
        return self._decoded("values")

    @values.setter
    def values(self, given: Any) -> None:
        self._refuse(given)

    def _decoded(self, side: str) -> Tensor | None:
        if not self.is_initialized:
            return None
        with torch.no_grad():
            keys, values = self.tiers.dense()
        return keys if side == "keys" else values

    def _refuse(self, given: Any) -> None:
        if given is not None or self.is_initialized:
            raise CacheError(
                "keys and values of a compressed layer must come by update, found an assignment to layer.keys or "
                "layer.values; use transformers' DynamicCache where something else writes to the cache"
            )


class TieredLayer(DenseAccess, CacheLayerMixin):
    """One full-attention layer of a `CompressedCache`."""

    is_compileable = False
    is_croppable = True
    is_sliding = False

    def __init__(self, start: Step, scratch: Scratch | None, reading: Reading, site: Site) -> None:
        super().__init__()
        self.tiers = LayerCache(start, scratch, reading, site)
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
            CacheError: a policy must see attention, or rows or heads hold different numbers of tokens.
        """
        self.tiers.check_attached()

    @uncompiled
    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add keys and values `[batch, kv_heads, tokens, head_dim]`; returns all of them, decoded, in token order.

        What it returns is overwritten by the next layer's update. Gradients reach the new tokens alone; `backward`
        raises a `CacheError` where they would have to go elsewhere.
        """
        return self.take(key_states, value_states)

    def take(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """`update`, for callers that `torch.compile` does not look into."""
        tiers = self.tiers
        views = tiers.told_apart and tiers.reading.attached
        if views and self.is_initialized and not torch.is_grad_enabled() and not torch._C._is_any_autocast_enabled():
            return tiers.stage(key_states, value_states)
        tiers.check_attached()
        linked = wants_gradients(key_states, value_states)
        held = linked and tiers.seen > 0
        with precise(key_states.device):
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
            keys, values = (tiers.stage if views else tiers.update)(key_states, value_states)
        if not linked:
            return keys, values
        if held and views:
            return barred(ATTACHED, keys, key_states), barred(ATTACHED, values, value_states)
        if held:
            keys, values = (
                torch.cat([x[:, :, : x.shape[2] - new.shape[2]], new], dim=2)
                for x, new in ((keys, key_states), (values, value_states))
            )
            if self.unlinked:
                keys, values = barred(HELD, keys), barred(HELD, values)
        self.unlinked = True
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
        held = self.tiers.held_after_commit(query_length)
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
