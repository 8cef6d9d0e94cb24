"""Tensors that stand for a layer's keys or values: decoded into scratch space, or read by attention where they lie."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only


class Staged(Protocol):
    """A layer whose staged tokens a `View` shows."""

    def densified(self) -> dict[str, Tensor]:
        """Its keys and values, held and staged, decoded."""
        ...


class Scratch:
    """Dense buffers into which one layer after the other is decoded. Not part of the cache's content."""

    def __init__(self) -> None:
        self.buffers: dict[tuple[str, torch.device, torch.dtype], Tensor] = {}

    def get(self, side: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """A contiguous tensor of `shape`, overwritten by the next layer."""
        key, size = (side, like.device, like.dtype), int(np.prod(shape))
        buffer = self.buffers.get(key)
        room = self.room(0 if buffer is None else buffer.numel(), size)
        if buffer is None or room != buffer.numel():
            with torch.inference_mode(False):
                buffer = torch.empty(room, dtype=like.dtype, device=like.device)
            self.buffers[key] = buffer
        return buffer[:size].view(shape)

    @staticmethod
    def room(held: int, size: int) -> int:
        """Numbers that a buffer of `held` is to have so that `size` find room, and not too much is unused."""
        return held if held and size <= held <= 4 * max(size, 1 << 16) else size + size // 8

    @property
    def bytes(self) -> int:
        return sum(b.numel() * b.element_size() for b in self.buffers.values())

    def __deepcopy__(self, memo: dict[int, Any]) -> Scratch:
        return Scratch()


class View(Tensor):
    """Keys or values of a layer with the tokens just coming in, not decoded.

    Attention reads the stores behind it. Whatever else computes on it gets the dense tensor.
    """

    tiers: Staged
    side: str
    arriving: Tensor

    @staticmethod
    def __new__(cls, tiers: Staged, side: str, new: Tensor, held: int) -> View:
        batch, heads, tokens, dim = new.shape
        shape = (batch, heads, held + tokens, dim)
        view: View = Tensor._make_wrapper_subclass(cls, shape, dtype=new.dtype, device=new.device)
        view.tiers, view.side, view.arriving = tiers, side, new
        return view

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        args, kwargs = tree_map_only(View, View.dense, (args, kwargs or {}))
        return func(*args, **kwargs)

    @classmethod
    def of_both(cls, tiers: Staged, keys: Tensor, values: Tensor, held: int) -> tuple[View, View]:
        """Views of the keys and of the values of a layer, with those just coming in."""
        return cls(tiers, "keys", keys, held), cls(tiers, "values", values, held)

    def anew(self) -> View:
        """Another tensor that stands for the same."""
        return View(self.tiers, self.side, self.arriving, self.shape[2] - self.arriving.shape[2])

    def dense(self) -> Tensor:
        """The decoded tensor `[batch, kv_heads, tokens, head_dim]`, in token order."""
        return self.tiers.densified()[self.side]


class Views:
    """The views of all layers in a pass, one after the other: to make tensors takes as long as the rest of a layer."""

    def __init__(self) -> None:
        self.shown: tuple[Any, ...] | None = None
        self.pair: tuple[View, View] | None = None

    def of(self, tiers: Staged, keys: Tensor, values: Tensor, held: int) -> tuple[View, View]:
        """As `View.of_both`; they show the next layer once this is called for it."""
        shown = held, keys.shape, values.shape, keys.dtype, values.dtype, keys.device
        if self.pair is None or shown != self.shown:
            self.shown, self.pair = shown, View.of_both(tiers, keys, values, held)
        else:
            first, second = self.pair
            first.tiers = second.tiers = tiers
            first.arriving, second.arriving = keys, values
        return self.pair

    def forget(self) -> None:
        self.shown = self.pair = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Views:
        return Views()

    def __reduce__(self) -> tuple[Any, ...]:
        return Views, ()
