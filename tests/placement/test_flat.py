"""Heads of different length take no more room than each needs, and nothing else changes."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from layers import HEAD_DIM, Layer, random_tokens
from models import ids, tiny
from safetensors.torch import load_file
from saved import rewritten
from torch import Tensor
from words import CACHE

from kvpolicy import CompressedCache, attach, load_recipe, make_cache
from kvpolicy.errors import CacheError
from kvpolicy.placement import per_head
from kvpolicy.storage import front
from kvpolicy.storage.make import make_store, may_be_flat

PROMPT = 120
ADAKV = "adakv:capacity=40,window=8,floor=0.1"


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield


def shared_out(rest: Any, **policy: Any) -> Any:
    """A recipe whose heads share a budget out; the others go to `rest`."""
    # Not by the length of keys: those of equal tokens are equal in the first layer, and which stays is not said.
    scorer = {"kind": "window_attention", "window": 4, "pool": "none"}
    own = {"kind": "rank", "scorer": scorer, "heads": "scores", "budget": 30, "when": "prompt", **policy}
    return load_recipe({"tiers": [{"policy": own, "store": "full"}, {"store": rest}]})


FOUR = {"kind": "int", "nbits": 4, "per": "token", "group_size": "head"}
RECIPES = {
    "adakv": ADAKV,
    "int": shared_out(FOUR),
    "nf4": shared_out({"kind": "nf4"}),
    "scaled": shared_out({**FOUR, "transforms": ["scale"]}),
    "threshold": shared_out(FOUR, heads="even", budget=0.1, threshold=0.034),
    "again": shared_out("evict", when="every", every=16),
}


class Run:
    """A history of an attached model, drawn from a seed: what the model gives, and the cache."""

    def __init__(self, recipe: Any, seed: int, path: Path) -> None:
        self.model, self.draw, self.path = tiny("llama"), random.Random(seed), path
        self.cache = make_cache(recipe, self.model)
        self.rows, self.seen, self.out = 2, 0, []
        self.mask = torch.ones(2, 0, dtype=torch.long)
        pads = self.draw.choice([slice(0, 0), slice(0, 30), slice(PROMPT - 30, PROMPT)])
        real = torch.ones(2, PROMPT, dtype=torch.long)
        real[1, pads] = 0
        cuts = self.draw.choice([[PROMPT], [70, PROMPT]])
        for first, last in zip([0, *cuts], cuts, strict=False):
            self.feed(last - first, real[:, first:last])

    def feed(self, n: int, real: Tensor | None = None) -> None:
        self.mask = torch.cat([self.mask, torch.ones(self.rows, n, dtype=torch.long) if real is None else real], 1)
        self.seen += n
        tokens = ids(n, batch=2, seed=self.seen)[[row % 2 for row in range(self.rows)]]
        places = (self.mask.cumsum(1) - 1).clamp(min=0)[:, -n:]
        given = {CACHE: self.cache, "attention_mask": self.mask, "position_ids": places}
        self.out.append(self.model(tokens, **given).logits[self.mask[:, -n:] > 0])

    def steps(self) -> None:
        for _ in range(self.draw.randint(2, 5)):
            self.feed(1)

    def turn(self) -> None:
        self.feed(self.draw.choice([9, 40]))

    def select(self) -> None:
        rows = self.draw.choice([[1, 0], [1], [0, 0, 1], [1, 1]])
        rows = [row % self.rows for row in rows]
        self.cache.batch_select_indices(torch.tensor(rows))
        self.mask, self.rows = self.mask[rows], len(rows)

    def repeat(self) -> None:
        self.cache.batch_repeat_interleave(2)
        self.mask, self.rows = self.mask.repeat_interleave(2, 0), 2 * self.rows

    def crop(self) -> None:
        self.seen = self.draw.choice([self.seen - 1, PROMPT + 1, PROMPT - 20])
        self.cache.crop(self.seen)
        self.mask = self.mask[:, : self.seen]

    def save(self) -> None:
        self.cache.save(self.path)
        before, positions = self.cache.memory(), [self.cache.positions(i) for i in range(2)]
        self.cache = CompressedCache.load(self.path, self.model)
        after = self.cache.memory()
        assert (after.total("exact"), after.total("codes")) <= (before.total("exact"), before.total("codes"))
        for i, own in enumerate(positions):
            assert all((a == b).all() for a, b in zip(self.cache.positions(i), own, strict=True))

    def copy(self) -> None:
        self.cache = copy.deepcopy(self.cache)

    def whole(self) -> Tensor:
        """All logits, after a history."""
        with attach(self.model):
            self.steps()
            for name in self.draw.sample(["turn", "select", "repeat", "crop", "save", "copy"], 4):
                getattr(self, name)()
                self.steps()
            self.cache.commit()
        return torch.cat(self.out)


def run(recipe: Any, seed: int, path: Path) -> tuple[Tensor, CompressedCache]:
    model = tiny("llama")
    with attach(model):
        history = Run(recipe, seed, path)
    return history.whole(), history.cache


def tokens_of(cache: CompressedCache, layer: int, tiers: range) -> int:
    """Tokens that a layer holds in some tiers, over all rows and heads."""
    found = cache.positions(layer)
    return int(((found.positions >= 0) & (found.tiers >= tiers[0]) & (found.tiers <= tiers[-1])).sum())


@pytest.mark.parametrize("name", RECIPES)
def test_room_is_that_of_the_tokens_held_and_the_model_gives_the_same(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(front, "AT_ONCE", 256)  # several blocks
    seed = list(RECIPES).index(name)
    found, cache = run(RECIPES[name], seed, tmp_path / "flat")
    monkeypatch.setattr(per_head, "may_be_flat", lambda spec: False)
    expected, padded = run(RECIPES[name], seed, tmp_path / "padded")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    own, others = cache.memory(), padded.memory()
    assert own.bytes < others.bytes
    assert own.exact_bytes == others.exact_bytes
    for a, b in zip(own.stores, others.stores, strict=True):
        assert a.tokens <= b.tokens
        assert a.exact + a.codes <= b.exact + b.codes
        if a.tiers == (0,):
            assert a.exact == 4 * 32 * tokens_of(cache, a.layer, range(1))
