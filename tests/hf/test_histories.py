"""Random histories of a cache: batches of any size, padding anywhere, crops, resets, other rows, copies.

Each row is followed by a cache of its own that is given the row's real tokens alone, and attention by a reference in
float64 over what the cache says it holds.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import pytest
import recipes as drawn
import torch
from examples import examples
from hypothesis import assume, event, given, settings
from hypothesis import strategies as st
from layers import Layer, random_tokens
from per_head import check, reference
from per_head import recipes as per_head_recipes
from torch import Tensor

from kvpolicy import Recipe
from kvpolicy.interfaces.policy import RankPolicy

LONGEST = 400
PENDING = 64


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield


@dataclass
class Alone:
    """One row of a batch, in a cache of its own, and which of the row's slots it was given."""

    layer: Layer
    slots: list[int] = field(default_factory=list)

    def update(self, parts: list[Tensor], slots: list[int], real: Tensor) -> None:
        at = real.nonzero()[:, 0]
        if len(at):
            self.layer(*(x[:, :, at] for x in parts))
        self.slots += [slots[i] for i in at.tolist()]

    def crop(self, length: int) -> None:
        kept = [slot for slot in self.slots if slot < length]
        if len(kept) < len(self.slots):
            self.layer.cache.crop(len(kept) - len(self.slots))
        self.slots = kept

    def held(self) -> list[list[int]]:
        """The slots in each tier."""
        return [[self.slots[p] for p in tier] for tier in self.layer.held()[0][0]]


class History:
    """A cache, what it was given, and each of its rows alone."""

    def __init__(self, recipe: Recipe, data: st.DataObject) -> None:
        self.recipe, self.data = recipe, data
        self.by_position = not any(isinstance(tier.policy, RankPolicy) for tier in recipe.tiers)
        self.by_channel = "per='channel'" in repr(recipe)
        self.layer = Layer(recipe)
        self.seed = 0
        self.begin()

    def begin(self) -> None:
        self.batch = self.data.draw(st.integers(1, 3), "batch")
        self.rows = [Alone(Layer(self.recipe)) for _ in range(self.batch)]
        self.keys = self.values = torch.empty(self.batch, 2, 0, 16)
        self.real = torch.empty(self.batch, 0, dtype=torch.bool)
        self.last = 0
        """Tokens of the latest update that may be taken back exactly."""

    @property
    def seen(self) -> int:
        return self.real.shape[1]

    def padding(self, n: int) -> Tensor:
        """Which of `n` new tokens are real: padding on the left, on the right, in between, or none."""
        real = torch.ones(self.batch, n, dtype=torch.bool)
        for row in range(self.batch):
            where = self.data.draw(st.sampled_from(["none", "none", "left", "right", "between"]), "padding")
            pad = self.data.draw(st.integers(0, n), "of") if where != "none" else 0
            start = {"none": 0, "left": 0, "right": n - pad, "between": (n - pad) // 2}[where]
            real[row, start : start + pad] = False
        return real

    def update(self) -> None:
        n = self.data.draw(st.one_of(st.integers(1, 3), st.integers(1, 100)), "tokens")
        n = min(n, LONGEST - self.seen)
        if n < 1:
            return
        real = self.padding(n) if n > 1 or self.data.draw(st.integers(0, 4)) == 0 else self.padding(0).new_ones(1)
        real = real.expand(self.batch, n)
        self.seed += 1
        parts = list(random_tokens(n, self.seed, self.batch))
        first, spread = self.seen, self.layer.tiers.step.by_head
        committed = copy.deepcopy(self.layer)  # what an update attends is what it commits
        committed.tiers.commit(n)
        expected = reference(committed, parts[0], (parts[1], parts[2]), real, first) if first else None
        found = self.layer(*parts, real)
        # What waits is committed row by row once padding comes: groups of channels then hold other tokens.
        grouped_anew = self.by_channel and not spread and self.layer.tiers.step.by_head
        if expected is not None and self.reads and not grouped_anew:
            shown = real[:, :, None, None].expand_as(found)
            torch.testing.assert_close(found.double()[shown], expected[shown], rtol=1e-4, atol=1e-4)
        self.keys, self.values = torch.cat([self.keys, parts[1]], 2), torch.cat([self.values, parts[2]], 2)
        self.real = torch.cat([self.real, real], 1)
        for row, alone in enumerate(self.rows):
            own = [x[row : row + 1] for x in parts]
            alone.update(own, list(range(first, first + n)), real[row])
        self.last = n if n <= (PENDING if self.by_position else 24) else 0

    @property
    def reads(self) -> bool:
        """Whether attention reads stores: else the first tier's attention is not ours."""
        return any(tier.keys != "full" or tier.values != "full" for tier in self.recipe.tiers) or not self.by_position

    def crop(self) -> None:
        n = self.data.draw(st.integers(0, max(self.last - 1, 0)), "crop")
        length = self.seen - n
        self.layer.cache.crop(self.data.draw(st.sampled_from([-n, length])) if length else -n)
        self.keys, self.values, self.real = self.keys[:, :, :length], self.values[:, :, :length], self.real[:, :length]
        for row in self.rows:
            row.crop(length)
        self.last -= n

    def reset(self) -> None:
        self.layer.cache.reset()
        self.layer.cache.layers[0].attached = True
        self.begin()

    def select(self) -> None:
        if not self.seen:
            return
        rows = self.data.draw(st.lists(st.integers(0, self.batch - 1), min_size=1, max_size=3), "rows")
        cache, index = self.layer.cache, torch.tensor(rows)
        kind = self.data.draw(st.sampled_from(["select", "negative", "mask", "reorder", "repeat"]))
        if kind == "mask":
            mask = torch.zeros(self.batch, dtype=torch.bool)
            mask[index] = True
            index = mask.nonzero()[:, 0]
            cache.batch_select_indices(mask)
        elif kind == "repeat":
            index = torch.arange(self.batch).repeat_interleave(2)
            cache.batch_repeat_interleave(2)
        elif kind == "reorder":
            cache.reorder_cache(index)
        else:
            cache.batch_select_indices(index - self.batch if kind == "negative" else index)
        if len(index) > 4:
            index = index[:4]
            cache.batch_select_indices(index.new_tensor(range(4)))
        self.rows = [Alone(copy.deepcopy(self.rows[r].layer), list(self.rows[r].slots)) for r in index.tolist()]
        self.keys, self.values, self.real = (x[index] for x in (self.keys, self.values, self.real))
        self.batch = len(index)

    def copy(self) -> None:
        self.layer.cache = copy.deepcopy(self.layer.cache)

    def commit(self) -> None:
        self.layer.cache.commit()
        for row in self.rows:
            row.layer.cache.commit()
        self.last = 0

    def stage(self) -> None:
        """What is held is real, and what each row alone holds."""
        if not self.seen:
            return
        held = self.layer.held()
        self.last = 0
        for row in self.rows:
            row.layer.cache.commit()
        check(self.layer, self.keys, self.values, self.real)
        if not self.by_position:
            return
        for row, alone in enumerate(self.rows):
            for head in held[row % len(held)]:
                assert head == alone.held()


@settings(max_examples=examples(60), deadline=None)
@given(st.data())
def test_random_histories(data: st.DataObject) -> None:
    by_position = data.draw(st.booleans())
    recipe = data.draw(drawn.recipes() if by_position else per_head_recipes())
    history = History(recipe, data)
    assume(history.layer.tiers.told_apart)  # what keeps all exactly tells no padding apart
    steps = ["update", "update", "update", "crop", "reset", "select", "copy", "commit", "stage"]
    for step in data.draw(st.lists(st.sampled_from(steps), min_size=2, max_size=12), "steps"):
        getattr(history, step)()
        event(step)
    history.update()
    history.stage()
