"""Tokens of several layers that are coded in one go: each call costs a launch, whatever the number of tokens."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor

from kvpolicy.storage.fused import Coded, fusing, run_fused

TOGETHER = 1 << 25
"""Bytes of tokens that are coded in one go at most: they are copied side by side first."""


class Coding(Coded, Protocol):
    """A store of codes."""

    def encode(self, x: Tensor, size: int) -> tuple[Tensor, Tensor]: ...
    def keep(self, packed: Tensor, params: Tensor) -> None: ...


class Later:
    """Tokens that have arrived in stores of codes and are coded by `run`, those of like stores together."""

    def __init__(self) -> None:
        self._asked: list[tuple[Coding, Tensor, int]] = []
        self._stores: set[int] = set()

    def add(self, store: Coding, x: Tensor, size: int) -> None:
        """Note tokens `[batch, kv_heads, tokens, head_dim]` of a store; per channel, `size` at a time are a group."""
        if id(store) in self._stores:  # a store's tokens are given their places once in a run
            self.run()
        self._stores.add(id(store))
        self._asked.append((store, x, size))

    def run(self) -> None:
        """Code what was noted, and let the stores keep it, in the order in which it came."""
        asked, self._asked = self._asked, []
        self._stores.clear()
        like: dict[Any, list[int]] = {}
        fused = [fusing(store, x, size) for store, x, size in asked]
        for i, (store, x, size) in enumerate(asked):
            if fused[i] is not None:
                continue
            # Layers of a recipe share their quantizers.
            like.setdefault((id(store.quantizer), size, x.shape, x.dtype, x.device), []).append(i)
        found: dict[int, tuple[Tensor, Tensor]] = {}
        for numbers in like.values():
            most = max(1, TOGETHER // max(1, asked[numbers[0]][1].nbytes))
            for first in range(0, len(numbers), most):
                some = numbers[first : first + most]
                found.update(zip(some, _coded([asked[i] for i in some]), strict=True))
        apart = []
        for i, (store, x, _) in enumerate(asked):
            own = fused[i]
            if own is None:
                store.keep(*found[i])
            else:
                apart.append((store, x, own))
        run_fused(apart)


def _coded(asked: list[tuple[Coding, Tensor, int]]) -> Iterable[tuple[Tensor, Tensor]]:
    """Codes and parameters of tokens of one shape."""
    store, x, size = asked[0]
    if len(asked) == 1:
        return [store.encode(x, size)]
    codes, params = store.encode(torch.cat([x for _, x, _ in asked]), size)
    return zip(codes.split(len(x)), params.split(len(x)), strict=True)
