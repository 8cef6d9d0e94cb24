"""Tokens of several layers that are coded in one go: each call costs a launch, whatever the number of tokens."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

TOGETHER = 1 << 25
"""Bytes of tokens that are coded in one go at most: they are copied side by side first."""


class Coding(Protocol):
    """A store of codes."""

    quantizer: Any

    def encode(self, x: Tensor, size: int) -> tuple[Tensor, Tensor]: ...
    def keep(self, packed: Tensor, params: Tensor) -> None: ...


class Later:
    """Tokens that have arrived in stores of codes and are coded by `run`, those of like stores together."""

    def __init__(self) -> None:
        self._asked: dict[Any, list[tuple[Coding, Tensor]]] = {}

    def add(self, store: Coding, x: Tensor, size: int) -> None:
        """Note tokens `[batch, kv_heads, tokens, head_dim]` of a store; per channel, `size` at a time are a group."""
        # Layers of a recipe share their quantizers.
        key = id(store.quantizer), size, x.shape, x.dtype, x.device
        self._asked.setdefault(key, []).append((store, x))

    def run(self) -> None:
        """Code what was noted, and let the stores keep it."""
        asked, self._asked = self._asked, {}
        for (_, size, *_), found in asked.items():
            most = max(1, TOGETHER // max(1, found[0][1].nbytes))
            for first in range(0, len(found), most):
                self._code(found[first : first + most], size)

    def _code(self, found: list[tuple[Coding, Tensor]], size: int) -> None:
        if len(found) == 1:
            ((store, x),) = found
            store.keep(*store.encode(x, size))
            return
        rows = len(found[0][1])
        codes, params = found[0][0].encode(torch.cat([x for _, x in found]), size)
        for (store, _), c, p in zip(found, codes.split(rows), params.split(rows), strict=True):
            store.keep(c, p)
