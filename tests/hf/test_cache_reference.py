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
from recipes import NAMED, named, recipes
from transformers import LlamaConfig

from kvpolicy import CompressedCache, Recipe, make_cache
from kvpolicy.interfaces.quantizer import AffineQuantizer
from kvpolicy.storage.group_size import group_size_of

HEADS, DIM, PENDING = 2, 16, 64
CONFIGS = {
    layers: LlamaConfig(
        num_hidden_layers=layers, hidden_size=64, num_attention_heads=4, num_key_value_heads=HEADS, head_dim=DIM
    )
    for layers in (2, 3)
}


def once(q: AffineQuantizer, groups: torch.Tensor) -> torch.Tensor:
    codes, scale, offset = q.calibrate(groups)
    small = groups.dtype == torch.float16 and q.nbits > 2  # float16 would lose small scales
    kept = torch.float32 if q.scale_dtype == "float32" or small else groups.dtype
    return (scale.to(kept).float() * codes.float() + offset.to(kept).float()).to(groups.dtype)


Value = tuple[int, int, torch.Tensor]
"""A token that enters a bin: the step at which it does, its position, and what it is there."""


@dataclass
class Bin:
    """A store: decoded tokens `[batch, heads, dim]` by position, and those that wait for their group."""

    spec: Any
    held: dict[int, torch.Tensor] = field(default_factory=dict)
    waiting: dict[int, torch.Tensor] = field(default_factory=dict)

    def add(self, arrivals: list[Value]) -> None:
        if isinstance(self.spec, str):
            self.held.update({p: x for _, p, x in arrivals})
        elif self.spec.per == "token":
            size = group_size_of(self.spec, DIM)
            self.held.update({p: once(self.spec, x.reshape(-1, size)).view(x.shape) for _, p, x in arrivals})
        elif self.spec.group_size == "arrival":
            for step in sorted({step for step, _, _ in arrivals}):
                self.close({p: x for when, p, x in arrivals if when == step})
        else:
            for _, p, x in arrivals:
                self.waiting[p] = x
                if len(self.waiting) == self.spec.group_size:
                    self.close(self.waiting)
                    self.waiting = {}

    def close(self, group: dict[int, torch.Tensor]) -> None:
        block = torch.stack(list(group.values()), dim=-1)
        decoded = once(self.spec, block.reshape(-1, len(group))).view(block.shape)
        self.held.update(zip(group, decoded.unbind(-1), strict=True))

    @property
    def tokens(self) -> dict[int, torch.Tensor]:
        return {**self.held, **self.waiting}

    def each(self, change: Any) -> None:
        self.held, self.waiting = change(self.held), change(self.waiting)


class Layer:
    """One layer of the reference."""

    def __init__(self, tiers: tuple[Any, ...]) -> None:
        self.tiers = tiers
        self.members: list[list[int]] = [[] for _ in tiers]
        self.seen = 0
        self.prompt: int | None = None
        self.pending: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.bins: dict[str, list[Bin]] = {}
        self.bin_of: dict[str, list[int]] = {}
        for side in ("keys", "values"):
            specs = [getattr(tier, side) for tier in tiers]
            new = [i == 0 or spec != specs[i - 1] for i, spec in enumerate(specs)]
            self.bins[side] = [Bin(spec) for spec, first in zip(specs, new, strict=True) if first]
            self.bin_of[side] = (np.cumsum(new) - 1).tolist()

    @property
    def length(self) -> int:
        return self.seen + len(self.pending)

    def update(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        self.commit()
        self.nothing = keys[:, :, :0]
        if keys.shape[2] == 1 and self.seen and self.prompt is None:
            self.end_prompt()
        tokens = list(zip(keys.unbind(2), values.unbind(2), strict=True))
        early = max(len(tokens) - PENDING, 0)
        self.flow(tokens[:early])
        self.pending = tokens[early:]

    def commit(self) -> None:
        tokens, self.pending = self.pending, []
        self.flow(tokens)

    def end_prompt(self) -> None:
        self.prompt = self.seen
        self.flow([], ends=True)

    def falls(self, new: int, ends: bool = False) -> list[tuple[int, int, int]]:
        """Place `new` tokens one by one; every entry into a tier as (step, position, tier), in order."""
        entries: list[tuple[int, int, int]] = []
        for _ in range(new + ends):
            falling, self.seen = ([], self.seen) if ends else ([self.seen], self.seen + 1)
            for i, tier in enumerate(self.tiers):
                entries += [(self.seen, p, i) for p in falling]
                members = sorted(self.members[i] + falling)
                asked = members and tier.policy is not None and (falling or ends or tier.policy.acts == "step")
                falling = []
                if asked:
                    told = (self.prompt,) if tier.policy.needs else ()
                    keep = tier.policy.keep(np.array(members, dtype=np.int64), self.seen, *told)
                    falling = [p for p, stays in zip(members, keep, strict=True) if not stays]
                self.members[i] = [p for p in members if p not in falling]
        return entries

    def flow(self, tokens: list[tuple[torch.Tensor, torch.Tensor]], ends: bool = False) -> None:
        start = self.seen
        entries = self.falls(len(tokens), ends)
        for s, side in enumerate(("keys", "values")):
            bins, bin_of = self.bins[side], self.bin_of[side]
            value = {start + i: x[s] for i, x in enumerate(tokens)}
            path: dict[int, list[int]] = {}
            for number, b in enumerate(bins):
                value.update(b.tokens)
                path.update({p: [number] for p in b.tokens})
            entered: dict[int, list[Value]] = {number: [] for number in range(len(bins))}
            for step, p, tier in entries:
                stops = path.setdefault(p, [])
                if bin_of[tier] not in stops:
                    stops.append(bin_of[tier])
                    entered[bin_of[tier]].append((step, p, value[p]))
            # A token is encoded in the last store that it reaches; before eviction, where groups count, in that too.
            for number, b in enumerate(bins):
                grouped = number + 1 < len(bins) and bins[number + 1].spec == "evict"
                b.add([(t, p, x) for t, p, x in entered[number] if grouped or path[p][-1] == number])
                b.each(lambda d, number=number, path=path: {p: x for p, x in d.items() if path[p][-1] == number})

    def crop(self, length: int) -> None:
        self.pending = self.pending[: max(length - self.seen, 0)]
        self.seen = min(self.seen, length)
        self.prompt = None if self.prompt is None or length < self.prompt else self.prompt
        self.members = [[p for p in members if p < length] for members in self.members]
        for b in [*self.bins["keys"], *self.bins["values"]]:
            b.each(lambda d: {p: x for p, x in d.items() if p < length})

    def select(self, rows: torch.Tensor) -> None:
        self.pending = [(k[rows], v[rows]) for k, v in self.pending]
        self.nothing = self.nothing[rows]
        for b in [*self.bins["keys"], *self.bins["values"]]:
            b.each(lambda d: {p: x[rows] for p, x in d.items()})

    def positions(self) -> dict[int, int]:
        evicts = self.tiers[-1].keys == "evict"
        kept = self.members[:-1] if evicts else self.members
        held = {p: i for i, members in enumerate(kept) for p in members}
        return {**held, **{self.seen + i: -1 for i in range(len(self.pending))}}

    def dense(self, side: str) -> torch.Tensor:
        tokens = {p: x for b in self.bins[side] if b.spec != "evict" for p, x in b.tokens.items()}
        tokens.update({self.seen + i: x[side == "values"] for i, x in enumerate(self.pending)})
        return torch.stack([tokens[p] for p in sorted(tokens)], dim=2) if tokens else self.nothing


class Walk:
    """A cache and its reference, led through the same operations."""

    def __init__(self, recipe: Recipe, dtype: torch.dtype) -> None:
        self.recipe, self.dtype, self.batch = recipe, dtype, 2
        self.generator = torch.Generator().manual_seed(0)
        self.config = CONFIGS[3 if recipe.model_layers is not None or recipe.layers else 2]  # first, last and another
        self.cache = make_cache(recipe, self.config)
        self.forget()

    def forget(self) -> None:
        count = self.config.num_hidden_layers
        self.layers = [Layer(self.recipe.tiers_of(i, count)) for i in range(count)]

    @property
    def length(self) -> int:
        return self.layers[0].length

    def update(self, n: int) -> None:
        for i, layer in enumerate(self.layers):
            x = torch.randn(2, self.batch, HEADS, n, DIM, generator=self.generator).to(self.dtype)
            keys, values = self.cache.update(x[0], x[1], i)
            keys, values = keys.clone(), values.clone()
            layer.commit()
            if n == 1 and layer.seen and layer.prompt is None:
                layer.end_prompt()
            before = [layer.dense(side) for side in ("keys", "values")] if layer.length else [x[0, :, :, :0]] * 2
            assert torch.equal(keys, torch.cat([before[0], x[0]], dim=2))
            assert torch.equal(values, torch.cat([before[1], x[1]], dim=2))
            layer.update(x[0], x[1])

    def crop(self, n: int) -> None:
        length = max(self.length - n, 0)
        # Both ways in which transformers says it.
        self.cache.crop(length if n % 2 and length else -min(n, self.length))
        for layer in self.layers:
            layer.crop(length)

    def rows(self, name: str, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        if name == "repeat":
            if self.batch > 2 or not self.length:
                return
            rows = torch.arange(self.batch).repeat_interleave(2)
            self.cache.batch_repeat_interleave(2)
        elif name == "reorder":
            rows = torch.randint(0, self.batch, (self.batch,), generator=generator)
            self.cache.reorder_cache(rows)
        else:
            rows = torch.randperm(self.batch, generator=generator)[: max(1, self.batch // 2)]
            self.cache.batch_select_indices(rows)
        self.batch = len(rows)
        for layer in self.layers:
            layer.select(rows)

    def commit(self) -> None:
        for layer in self.layers:
            layer.commit()

    def do(self, name: str, n: int) -> None:
        if name == "update":
            self.update(n)
        elif name == "decode":
            for _ in range(n % 30 + 1):
                self.update(1)
        elif name == "crop-pending":
            self.crop(n % (len(self.layers[0].pending) + 1))
        elif name == "crop":
            self.crop(n % max(self.length, 1))
        elif name in ("reorder", "repeat", "select") and self.length:
            self.rows(name, n)
        elif name == "reset":
            self.cache.reset()
            self.forget()
            self.batch = 1 + n % 2
        elif name == "save":
            if self.length:
                with tempfile.TemporaryDirectory() as folder:
                    self.cache.save(Path(folder) / "cache")
                    self.cache = CompressedCache.load(Path(folder) / "cache", self.config)
                self.commit()
        elif name == "deepcopy":
            before, self.cache = self.cache, copy.deepcopy(self.cache)
            before.reset()
        else:
            self.cache.memory()
            self.commit()

    def check(self) -> None:
        assert self.cache.get_seq_length() == self.length
        if not self.length:
            return
        for i, layer in enumerate(self.layers):
            held = self.cache.positions(i)
            assert dict(zip(held.positions.tolist(), held.tiers.tolist(), strict=True)) == layer.positions()
            keys, values = self.cache.dense(i)
            assert keys.dtype == self.dtype
            assert torch.equal(keys, layer.dense("keys")), f"keys of layer {i}"
            assert torch.equal(values, layer.dense("values")), f"values of layer {i}"
            assert self.cache.layers[i].get_mask_sizes(3)[0] == 3 + self.after_settling(layer, 3)
            assert self.cache.layers[i].get_mask_sizes(1)[0] == 1 + self.after_settling(layer, 1)

    def after_settling(self, layer: Layer, coming: int) -> int:
        ahead = copy.copy(layer)
        ahead.members, ahead.pending = [list(members) for members in layer.members], []
        ahead.falls(len(layer.pending))
        if coming == 1 and ahead.prompt is None:
            ahead.prompt = ahead.seen
            ahead.falls(0, ends=True)
        return len(ahead.positions())


NAMES = [
    "update",
    "update",
    "decode",
    "decode",
    "crop-pending",
    "crop",
    "reorder",
    "repeat",
    "select",
    "reset",
    "save",
    "deepcopy",
    "memory",
]
sizes = st.one_of(st.integers(1, 12), st.integers(60, 70), st.integers(1, 150))
operations = st.lists(st.tuples(st.sampled_from(NAMES), sizes), min_size=2, max_size=8)
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


def walk(recipe: Recipe, dtype: torch.dtype, first: int, steps: list[tuple[str, int]]) -> None:
    w = Walk(recipe, dtype)
    for name, n in [("update", first), *steps, ("update", 70), ("decode", 14)]:
        w.do(name, n)
        w.check()
    w.do("memory", 0)
    w.check()
    for layer in w.layers:
        assert len(layer.tiers) == 1 or len(layer.members[0]) < layer.seen, "no flush boundary was crossed"


@settings(deadline=None, derandomize=True, max_examples=60)
@given(recipe=recipes(DIM), dtype=dtypes, first=sizes, steps=operations)
def test_random_recipes(recipe: Recipe, dtype: torch.dtype, first: int, steps: list[tuple[str, int]]) -> None:
    walk(recipe, dtype, first, steps)


@pytest.mark.parametrize("name", NAMED)
@settings(deadline=None, derandomize=True, max_examples=8)
@given(dtype=dtypes, first=sizes, steps=operations)
def test_recipes_of_every_mechanism(name: str, dtype: torch.dtype, first: int, steps: list[tuple[str, int]]) -> None:
    walk(named(name), dtype, first, steps)
