"""Random walks over random recipes, against a slow reference that quantizes every token once.

The reference keeps each exact token in a list, decides its tier by asking `keep` token by token, and quantizes a
token or a group with the plugin's `calibrate` when it reaches a store. It knows nothing of chunks, plans or pages.
"""

from __future__ import annotations

import copy
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from recipes import NAMED, named, one_lossy_store, recipes
from transformers import LlamaConfig

from kvpolicy import CompressedCache, Recipe, load_recipe, make_cache
from kvpolicy.quantizer import AffineQuantizer
from kvpolicy.stores import group_size_of

LAYERS, HEADS, DIM, PENDING = 3, 2, 16, 64
CONFIG = LlamaConfig(
    num_hidden_layers=LAYERS, hidden_size=64, num_attention_heads=4, num_key_value_heads=HEADS, head_dim=DIM
)


def once(q: AffineQuantizer, groups: torch.Tensor) -> torch.Tensor:
    codes, scale, offset = q.calibrate(groups)
    kept = torch.float32 if q.scale_dtype == "float32" else groups.dtype
    return (scale.to(kept).float() * codes.float() + offset.to(kept).float()).to(groups.dtype)


@dataclass
class Bin:
    """A store: decoded tokens `[batch, heads, dim]` by position, and those that wait for their group."""

    spec: Any
    held: dict[int, torch.Tensor] = field(default_factory=dict)
    waiting: list[tuple[int, torch.Tensor]] = field(default_factory=list)

    def add(self, tokens: list[tuple[int, torch.Tensor]]) -> None:
        if self.spec == "full" or not tokens:
            self.held.update(tokens)
        elif self.spec.per == "token":
            size = group_size_of(self.spec, DIM)
            self.held.update({p: once(self.spec, x.reshape(-1, size)).view(x.shape) for p, x in tokens})
        else:
            self.waiting += tokens
            size = group_size_of(self.spec, DIM) or len(self.waiting)
            while len(self.waiting) >= size:
                group, self.waiting = self.waiting[:size], self.waiting[size:]
                block = torch.stack([x for _, x in group], dim=-1)
                decoded = once(self.spec, block.reshape(-1, size)).view(block.shape)
                self.held.update(zip([p for p, _ in group], decoded.unbind(-1), strict=True))
                if not self.waiting:
                    break

    def get(self, position: int) -> torch.Tensor | None:
        return self.held.get(position, dict(self.waiting).get(position))

    def remove(self, gone: set[int]) -> None:
        self.held = {p: x for p, x in self.held.items() if p not in gone}
        self.waiting = [(p, x) for p, x in self.waiting if p not in gone]

    def everything(self) -> dict[int, torch.Tensor]:
        return {**self.held, **dict(self.waiting)}


class Layer:
    """One layer of the reference."""

    def __init__(self, tiers: tuple[Any, ...], update_mode: bool) -> None:
        self.tiers, self.update_mode = tiers, update_mode
        self.members: list[list[int]] = [[] for _ in tiers]
        self.seen = self.through = 0
        self.pending: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.bin_of = {"keys": [0], "values": [0]}
        self.bins: dict[str, list[Bin]] = {}
        for side in ("keys", "values"):
            self.bins[side] = [Bin(getattr(tiers[0], side))]
            for before, tier in zip(tiers[:-1], tiers[1:], strict=True):
                if getattr(before, side) != getattr(tier, side):
                    self.bins[side].append(Bin(getattr(tier, side)))
                self.bin_of[side].append(len(self.bins[side]) - 1)

    def update(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        self.settle()
        tokens = list(zip(keys.unbind(2), values.unbind(2), strict=True))
        early = max(len(tokens) - PENDING, 0)
        self.flow(tokens[:early], len(tokens))
        self.pending = tokens[early:]

    def settle(self) -> None:
        tokens, self.pending = self.pending, []
        self.flow(tokens, len(tokens))

    def falls(self, new: int, of: int) -> list[tuple[int, int]]:
        """Place `new` tokens one by one; every descent as (position, tier), in order."""
        events: list[tuple[int, int]] = []
        if self.update_mode and new:
            held = [*self.members[0], *range(self.seen, self.seen + of)]
            policy, stop = self.tiers[0].policy, self.seen + of
            if self.seen == 0 or (
                self.seen >= self.through and not policy.keep(np.array(held, dtype=np.int64), stop).all()
            ):
                self.through = stop
        for _ in range(new):
            falling, self.seen = [self.seen], self.seen + 1
            for i, tier in enumerate(self.tiers):
                events += [(p, i) for p in falling]
                arrived = bool(falling)
                self.members[i] = members = sorted(self.members[i] + falling)
                if tier.policy is None or not members:
                    falling = []
                elif self.update_mode:
                    falling = [p for p in members if p < self.through]
                elif arrived or tier.policy.acts == "step":
                    keep = tier.policy.keep(np.array(members, dtype=np.int64), self.seen)
                    falling = [p for p, stays in zip(members, keep, strict=True) if not stays]
                else:
                    falling = []
                self.members[i] = [p for p in members if p not in set(falling)]
        return events

    def flow(self, tokens: list[tuple[torch.Tensor, torch.Tensor]], of: int) -> None:
        start = self.seen
        events = self.falls(len(tokens), of)
        for s, side in enumerate(("keys", "values")):
            bins, value = self.bins[side], {start + i: x[s] for i, x in enumerate(tokens)}
            for b in bins:
                value.update(b.everything())
            path: dict[int, list[int]] = {}
            for p, tier in events:
                here = self.bin_of[side][tier]
                if p in path or p >= start or b_of(bins, p) != here:
                    path.setdefault(p, [])
                    if here not in path[p]:
                        path[p].append(here)
            self.rebin(bins, path, value, start)

    def rebin(self, bins: list[Bin], path: dict[int, list[int]], value: dict[int, torch.Tensor], start: int) -> None:
        """A token joins the last store on its path alone, or also the one before if it is dropped after that."""
        arrivals: list[list[tuple[int, torch.Tensor]]] = [[] for _ in bins]
        order = {here: [p for p, stops in path.items() if here in stops] for here in range(len(bins))}
        order = {here: sorted(ps, key=lambda p, here=here: self.when[p, here]) for here, ps in order.items()} if hasattr(
            self, "when"
        ) else order
        for here, positions in order.items():
            for p in positions:
                stops = path[p]
                evicted = bins[stops[-1]].spec == "evict"
                if here == stops[-1] or (evicted and len(stops) > 1 and here == stops[-2]):
                    arrivals[here].append((p, value[p]))
        leaving = {p for p in path if p < start}
        for here, b in enumerate(bins):
            if b.spec == "evict":
                continue
            mine = set(b.everything())
            b.add(arrivals[here])
            b.remove((leaving & mine) | {p for p, _ in arrivals[here] if path[p][-1] != here})


def b_of(bins: list[Bin], position: int) -> int:
    return next((i for i, b in enumerate(bins) if b.get(position) is not None), -1)
