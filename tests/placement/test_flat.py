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
from kvpolicy.storage.make import make_store

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


def attended(query: Tensor, keys: Tensor, values: Tensor, held: list[list[set[int]]]) -> Tensor:
    """What one query attends to, `[batch, heads, head_dim]`, of the tokens that each row and KV head holds."""
    out = torch.empty(*query.shape[:2], HEAD_DIM, dtype=torch.float64)
    for r, row in enumerate(held):
        for h, own in enumerate(row):
            at = sorted(own)
            k, v = (x[r, h, at].double() for x in (keys, values))
            for g in range(2):
                out[r, 2 * h + g] = (k @ query[r, 2 * h + g].double() / HEAD_DIM**0.5).softmax(0) @ v
    return out


def test_attention_is_that_of_the_tokens_each_head_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    query, keys, values = random_tokens(PROMPT + 6, 3, batch=2)
    keys[:, 0] *= 3.0  # so that the heads differ in how much their attention is spread
    layer = Layer("adakv", capacity=60, window=16, floor=0.0)
    wide, old = [0], front.Front.slice

    def slice_(own: front.Front, first: int, last: int) -> Tensor:
        wide.append(last - first if own.flat.shape[1] == HEAD_DIM else 0)  # keys and values
        return old(own, first, last)

    monkeypatch.setattr(front.Front, "slice", slice_)
    monkeypatch.setattr(front, "AT_ONCE", 1)
    for first, last in [(0, PROMPT), *((i, i + 1) for i in range(PROMPT, PROMPT + 6))]:
        found = layer(*(x[:, :, first:last] for x in (query, keys, values)))
        held = [[set(tiers[0]) for tiers in row] for row in layer.held()]
        if first:
            expected = attended(query[:, :, first], keys, values, held)
            torch.testing.assert_close(found[:, 0].double(), expected, rtol=1e-4, atol=1e-5)
    store = layer.tiers.stores["keys"][0]
    assert store.front.length > 64
    assert max(wide) <= 64, "as many tokens at once as a block has"
    assert len(store.front.flat) == 2 * 2 * 60


@pytest.mark.parametrize(
    "spec", [{"kind": "fp8"}, {"kind": "lloyd_max", "nbits": 3}, {**FOUR, "transforms": ["hadamard"]}]
)
def test_stores_decode_what_stays(spec: dict[str, Any]) -> None:
    store = make_store(load_recipe({"tiers": [{"store": spec}]}).tiers[0].keys, 64)
    assert store is not None
    store.differ_by_head((2, 3))
    x, more = torch.randn(2, 3, 50, 64), torch.randn(2, 3, 5, 64)
    store.append(x)
    counts = torch.tensor([[20, 0, 7], [1, 50, 30]])
    places = torch.stack([torch.randperm(50) for _ in range(6)]).view(2, 3, 50)
    before = torch.cat([block for _, block in store.decoded(1 << 20, x.dtype)], 2)
    store.flatten(places, counts.numpy())
    store.append(more)
    assert store.format.endswith("+flat")
    assert store.length == 55
    assert store.tokens == 18 + 5
    for own in (store, copy.deepcopy(store)):
        after = torch.cat([block for _, block in own.decoded(16, x.dtype)], 2)
        taken = own.gather(torch.arange(55).expand(2, 3, -1), x.dtype)
        for r in range(2):
            for h in range(3):
                n = int(counts[r, h])
                assert torch.equal(after[r, h, :n], before[r, h, places[r, h, :n]])
                assert torch.equal(taken[r, h, :n], after[r, h, :n])
                assert torch.equal(taken[r, h, 50:], after[r, h, 50:])


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("0.table.keys.0.flat", lambda x: x + 1),
        ("0.table.keys.0.flat", lambda x: x.flip(1)),
        ("0.table.keys.0.flat", lambda x: x.long()),
        ("0.keys.0.exact.flat", lambda x: x[1:]),
        ("0.keys.0.exact.flat", lambda x: x[:, 1:]),
        ("0.table.keys.0.positions.flat", lambda x: x * 0),
        ("0.keys.0.exact.flat", None),
    ],
)
def test_damaged_files_are_found(name: str, changed: Callable[[Tensor], Tensor] | None, tmp_path: Path) -> None:
    model = tiny("llama")
    with attach(model):
        cache = make_cache(ADAKV, model)
        model(ids(PROMPT), **{CACHE: cache})
        model(ids(1), **{CACHE: cache})
    cache.save(tmp_path / "cache")
    assert name in load_file(tmp_path / "cache")

    def damaged(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        x = tensors.pop(name)
        return tensors if changed is None else {**tensors, name: changed(x).contiguous()}

    with pytest.raises(CacheError, match="damaged"):
        CompressedCache.load(rewritten(tmp_path / "cache", damaged), model)
