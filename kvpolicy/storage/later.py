"""Tokens of several layers that are coded in one go: each call costs a launch, whatever the number of tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from kvpolicy.storage.fused import Coded, Fused, copied, copiers, fusing, run_fused, shifted
from kvpolicy.storage.pages import Leaving, Pages, spots

TOGETHER = 1 << 25
"""Bytes of tokens that are coded in one go at most: they are copied side by side first."""


Arriving = tuple[Sequence[Pages], Sequence[Tensor]]
"""Pages, and the tokens that each of them gets."""


class Coding(Coded, Protocol):
    """A store of codes."""

    def encode(self, x: Tensor, size: int) -> tuple[Tensor, Tensor]: ...
    def keep(self, packed: Tensor, params: Tensor) -> None: ...


class Later:
    """Tokens that have arrived in stores and are coded, or copied, by `run`, those of like stores together."""

    def __init__(self, soon: bool = False) -> None:
        self.soon = soon
        """Whether it is run before anything else happens to the stores, each of which gets one arrival."""
        self._asked: list[tuple[Coding, Tensor, int]] = []
        self._stores: set[int] = set()
        self._exact: list[Arriving] = []

    def append(self, pages: Sequence[Pages], tokens: Sequence[Tensor]) -> None:
        """Note tokens that pages get, and of which none leaves before `run`; see `append_all`."""
        self._exact.append((pages, tokens))

    def add(self, store: Coding, x: Tensor, size: int) -> None:
        """Note tokens `[batch, kv_heads, tokens, head_dim]` of a store; per channel, `size` at a time are a group."""
        if id(store) in self._stores:  # a store's tokens are given their places once in a run
            self.run()
        self._stores.add(id(store))
        self._asked.append((store, x, size))

    def run(self) -> None:
        """Copy what was noted, or code it, and let the stores keep it, in the order in which it came."""
        exact, self._exact = self._exact, []
        _append_each(exact)
        if not self._asked:
            return
        asked, self._asked = self._asked, []
        self._stores.clear()
        like: dict[Any, list[int]] = {}
        for i, (store, x, size) in enumerate(asked):
            # Layers of a recipe share their quantizers. A store with transforms may stand alone.
            alone = 0 if store.chain is None else id(store)
            even = store.scales.uneven is None
            key = (id(store.quantizer), store.head_dim, even, alone, size, x.shape, x.dtype, x.get_device())
            like.setdefault(key, []).append(i)
        found: dict[int, tuple[Tensor, Tensor]] = {}
        fused: dict[int, Fused] = {}
        apart: dict[Any, list[int]] = {}
        for key, numbers in like.items():
            coder = fusing(*asked[numbers[0]])
            if coder is None:
                apart.setdefault((*key[:3], *key[4:]), []).extend(numbers)
            else:
                fused.update(dict.fromkeys(numbers, coder))
        for numbers in apart.values():
            most = max(1, TOGETHER // max(1, asked[numbers[0]][1].nbytes))
            for first in range(0, len(numbers), most):
                some = numbers[first : first + most]
                found.update(zip(some, _coded([asked[i] for i in some]), strict=True))
        for i, own in found.items():
            asked[i][0].keep(*own)
        run_fused([(*asked[i][:2], fused[i]) for i in sorted(fused)])


def _coded(asked: list[tuple[Coding, Tensor, int]]) -> Iterable[tuple[Tensor, Tensor]]:
    """Codes and parameters of tokens of one shape."""
    store, x, size = asked[0]
    if len(asked) == 1:
        return [store.encode(x, size)]
    codes, params = store.encode(torch.cat([x for _, x, _ in asked]), size)
    return zip(codes.split(len(x)), params.split(len(x)), strict=True)


def append_all(pages: Sequence[Pages], tokens: Sequence[Tensor]) -> None:
    """Let tokens into pages, `[batch, kv_heads, tokens, width]` of each tensor into its own."""
    _append_each([(pages, tokens)])


def _append_each(asked: Iterable[Arriving]) -> None:
    """`append_all` of each; those that fit where they lie are written in one go, if they are alike."""
    like: dict[Any, tuple[list[Pages], list[Tensor], list[int]]] = {}
    for pages, tokens in asked:
        x, done = tokens[0], 0
        if copiers(x.device.type) and pages[0].pages and pages[0].pages[-1].dtype == x.dtype:
            n, width = x.shape[2], x.shape[3] * x.element_size()
            size, addresses = spots(pages, n, width)
            done = len(addresses)
            steps = x.shape[1] * size * width, size * width, width
            lie = tuple([step for step, count in zip(x.stride(), x.shape, strict=True) if count > 1])
            own = like.setdefault((steps, x.shape, lie, x.dtype, x.get_device()), ([], [], []))
            for kept, some in zip(own, (pages[:done], tokens[:done], addresses), strict=True):
                kept.extend(some)  # type: ignore[attr-defined]
        for one, new in zip(pages[done:], tokens[done:], strict=True):
            one.append(new)
    for (steps, *_), (held, arrived, to) in like.items():
        if to and not copied(arrived, to, steps):
            for one, new in zip(held, arrived, strict=True):
                one.slice(one.length - new.shape[2], one.length).copy_(new)


def remove_all(pages: Sequence[Pages], leaving: Sequence[Leaving]) -> None:
    """Remove tokens from `whole` pages; see `Pages.remove`."""
    for own in pages:
        own.lift()
    kept = pages[0].length - leaving[0].places.shape[2]
    if kept and shifted(
        [own.pages[0] for own in pages], [moves.last for moves in leaving], [moves.places for moves in leaving]
    ):
        for own, moves in zip(pages, leaving, strict=True):
            own.shorten(own.length - moves.places.shape[2])
        return
    for own, moves in zip(pages, leaving, strict=True):
        own.remove(moves)
