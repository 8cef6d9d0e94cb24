"""Tensors that stand for a layer's keys or values: decoded into scratch space, or read by attention where they lie."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from kvpolicy.errors import CacheError

if TYPE_CHECKING:
    from kvpolicy.layer.layer import LayerCache

__all__ = ["DenseAccess", "Scratch", "View"]


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


class Scratch:
    """Dense buffers into which one layer after the other is decoded. Not part of the cache's content."""

    def __init__(self) -> None:
        self.buffers: dict[tuple[str, torch.device, torch.dtype], Tensor] = {}

    def get(self, side: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """A contiguous tensor of `shape`, overwritten by the next layer."""
        key, size = (side, like.device, like.dtype), int(np.prod(shape))
        buffer = self.buffers.get(key)
        if buffer is None or not size <= buffer.numel() <= 4 * max(size, 1 << 16):
            with torch.inference_mode(False):
                buffer = torch.empty(size + size // 8, dtype=like.dtype, device=like.device)
            self.buffers[key] = buffer
        return buffer[:size].view(shape)

    @property
    def bytes(self) -> int:
        return sum(b.numel() * b.element_size() for b in self.buffers.values())

    def __deepcopy__(self, memo: dict[int, Any]) -> Scratch:
        return Scratch()


class View(Tensor):
    """Keys or values of a layer with the tokens just coming in, not decoded.

    Attention reads the stores behind it. Whatever else computes on it gets the dense tensor.
    """

    tiers: LayerCache
    side: str
    arriving: Tensor

    @staticmethod
    def __new__(cls, tiers: LayerCache, side: str, new: Tensor, held: int) -> View:
        shape = (*new.shape[:2], held + new.shape[2], new.shape[3])
        view: View = Tensor._make_wrapper_subclass(cls, shape, dtype=new.dtype, device=new.device)
        view.tiers, view.side, view.arriving = tiers, side, new
        return view

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        args, kwargs = tree_map_only(View, View.dense, (args, kwargs or {}))
        return func(*args, **kwargs)

    def dense(self) -> Tensor:
        """The decoded tensor `[batch, kv_heads, tokens, head_dim]`, in token order."""
        return self.tiers.densified()[self.side]
