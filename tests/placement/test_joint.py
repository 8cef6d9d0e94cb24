"""Layers that plan as one hold and give what they would if each planned alone, whatever happens to the cache."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from examples import examples
from hypothesis import example, given, settings
from hypothesis import strategies as st
from models import build, ids, tiny
from torch import Tensor
from words import CACHE

import kvpolicy
from kvpolicy import CompressedCache
from kvpolicy.layer import commit
from kvpolicy.placement import joint, ranking
from kvpolicy.placement.selection import highest, lowest, shared

OPS = ["token", "token", "token", "tokens", "crop", "rows", "copy", "read"]
RECIPES: list[Any] = [
    {"extends": "h2o", "params": {"window": 7, "heavy": 9}},
    {"extends": "mas", "params": {"window": 5, "heavy": 12}},
    {"extends": "mikv", "params": {"window": 6, "heavy": 8}},
    {"extends": "zipcache", "params": {"period": 9}},
    {"extends": "zipcache-code", "params": {"period": 9}},
    {
        "tiers": [
            {"policy": {"kind": "recent", "window": 6}, "store": "full"},
            {
                "policy": {
                    "kind": "rank",
                    "scorer": {"kind": "key_norm"},
                    "budget": 9,
                    "among": "pairs",
                    "share": "layer",
                },
                "store": "full",
            },
            {"policy": {"kind": "attention", "budget": 12, "heads": "max"}, "store": "full"},
            {"store": "evict"},
        ]
    },
]


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield


def planners(cache: CompressedCache) -> list[Any]:
    return [layer.tiers.planner for layer in cache.layers]


def alike(cache: CompressedCache) -> bool:
    """Whether all layers hold as many tokens in each tier, of each row and head; not so after some crops."""
    first, *others = [planner.counts for planner in planners(cache)]
    return all(np.array_equal(first, counts) for counts in others)


def ran(model: Any, recipe: Any, ops: list[tuple[str, int]], batch: int, padded: bool) -> tuple[list[Tensor], int]:
    """What the model gives in a history, what the layers hold at its end, and at how many steps they planned as one.

    -1: at none, as they came to hold other numbers of tokens.
    """
    cache = kvpolicy.make_cache(recipe, model)
    mask = torch.ones((batch, 40), dtype=torch.int64)
    if padded:
        mask[0, :7] = 0
    found = [model(ids(40, batch), attention_mask=mask, **{CACHE: cache}).logits]
    together, unlike = 0, False
    for seed, (op, n) in enumerate(ops):
        batch = len(mask)
        if op in ("token", "tokens"):
            new = ids(1 if op == "token" else n, batch, seed=seed)
            mask = torch.cat([mask, mask.new_ones(new.shape)], dim=1)
            found.append(model(new, attention_mask=mask, **{CACHE: cache}).logits)
            together += planners(cache)[0].joint is not None
            unlike = unlike or not alike(cache)
        elif op == "crop":
            cache.crop(-n)
            mask = mask[:, : mask.shape[1] - n]
        elif op == "rows":
            rows = torch.tensor([(i * n + 1) % batch for i in range(batch)])
            cache.reorder_cache(rows)
            mask = mask[rows]
        elif op == "copy":
            cache = copy.deepcopy(cache)
        elif op == "read":
            found += [x for layer in cache.layers for x in layer.tiers.dense()]
    for layer in cache.layers:
        held = layer.tiers.positions()
        found += [torch.from_numpy(held.positions), torch.from_numpy(held.tiers), *layer.tiers.dense()]
    return found, together or -unlike


@settings(max_examples=examples(25), deadline=None)
@given(
    recipe=st.sampled_from(range(len(RECIPES))),
    ops=st.lists(st.tuples(st.sampled_from(OPS), st.integers(1, 5)), min_size=6, max_size=24),
    batch=st.sampled_from([1, 3]),
    padded=st.booleans(),
)
@example(recipe=3, ops=[("crop", 1), ("crop", 4), *[("token", 1)] * 4], batch=1, padded=False)
def test_planning_as_one_changes_nothing(recipe: int, ops: Any, batch: int, padded: bool) -> None:
    model = tiny("llama")
    with kvpolicy.attach(model):
        found, together = ran(model, RECIPES[recipe], ops, batch, padded)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(joint, "key_of", lambda planner, observer: None)
            expected, never = ran(model, RECIPES[recipe], ops, batch, padded)
    assert never <= 0
    decodes = "".join("t" if op == "token" else "-" for op, _ in ops)
    # Else there is a step at which both layers have tokens to let in.
    assert together or "tttt" not in decodes
    for x, y in zip(found, expected, strict=True):
        assert x.shape == y.shape
        assert torch.equal(x, y)


@pytest.mark.parametrize("recipe", RECIPES[:5], ids=lambda recipe: recipe["extends"])
def test_layers_plan_as_one_while_a_model_decodes(recipe: Any) -> None:
    model = tiny("llama")
    cache = kvpolicy.make_cache(recipe, model)
    with kvpolicy.attach(model):
        model(ids(40), **{CACHE: cache})
        for seed in range(4):
            model(ids(1, seed=seed), **{CACHE: cache})
    first, second = planners(cache)
    assert first.joint is second.joint is not None
    together = cache.memory()
    first.part()
    assert first.joint is second.joint is None
    assert cache.memory() == together


@pytest.mark.parametrize("recipe", range(len(RECIPES)))
@pytest.mark.parametrize("batch", [1, 3])
def test_of_many_tokens_some_layers_at_a_time_plan_as_one(
    recipe: int, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build("llama", torch.float32, num_hidden_layers=5)
    ops = [*[("token", 1)] * 12, ("rows", 2), ("tokens", 3), *[("token", 1)] * 9, ("crop", 1), *[("token", 1)] * 3]
    with kvpolicy.attach(model):
        expected, _ = ran(model, RECIPES[recipe], ops, batch, batch > 1)
        heads = model.config.num_key_value_heads
        each = joint.PAIRS if "pairs" in str(RECIPES[recipe]) else 1
        monkeypatch.setattr(joint, "AT_ONCE", 2 * batch * heads * 64 * each)
        together: list[list[int]] = []
        before = joint.joined
        monkeypatch.setattr(joint, "joined", lambda members: together.append(members) or before(members))
        found, _ = ran(model, RECIPES[recipe], ops, batch, batch > 1)
    assert {len(members) for members in together} <= {2, 3, 5}
    assert min(len(members) for members in together) == 2
    for x, y in zip(found, expected, strict=True):
        assert torch.equal(x, y)


TIES: list[Any] = [
    {"extends": "h2o", "params": {"window": 7, "heavy": 9}},
    {
        "tiers": [
            {"policy": {"kind": "recent", "window": 6}, "store": "full"},
            {
                "policy": {"kind": "rank", "scorer": {"kind": "key_norm"}, "budget": 9},
                "store": {"kind": "int", "nbits": 4},
            },
            {"policy": {"kind": "attention", "budget": 12, "among": "arrival"}, "store": {"kind": "int", "nbits": 2}},
            {"store": "evict"},
        ]
    },
]


@pytest.mark.parametrize("recipe", range(len(TIES)))
@pytest.mark.parametrize("batch", [1, 3])
def test_of_equal_ranks_the_same_tokens_stay(recipe: int, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that descends is found without putting the others in order, as devices do whose topk takes the first."""
    model = build("llama", torch.float32, num_hidden_layers=3)
    ops = [*[("token", 1)] * 9, ("tokens", 3), *[("token", 1)] * 5, ("crop", 2), ("rows", 2), *[("token", 1)] * 12]
    monkeypatch.setattr(ranking, "shared", lambda policy, rank: shared(policy, rank).mul(8).round().div(8))  # many ties
    monkeypatch.setattr(ranking, "highest", lambda rank, budgets, stable: highest(rank, budgets, stable=True))
    with kvpolicy.attach(model):
        expected, _ = ran(model, TIES[recipe], ops, batch, batch > 1)
        chosen: list[Tensor] = []
        monkeypatch.setattr(ranking, "UNORDERED", set())
        monkeypatch.setattr(ranking, "lowest", lambda *shown: chosen.append(lowest(*shown)) or chosen[-1])
        monkeypatch.setattr(ranking, "AT_ONCE", batch * 40)  # the attention of some layers at a time
        found, together = ran(model, TIES[recipe], ops, batch, batch > 1)
        monkeypatch.setattr(joint, "key_of", lambda planner, observer: None)
        alone, never = ran(model, TIES[recipe], ops, batch, batch > 1)
    assert len(chosen) > 20
    assert together > never == 0
    for x, y, z in zip(expected, found, alone, strict=True):
        assert torch.equal(x, y)
        assert torch.equal(x, z)


SEVERAL: list[Any] = [
    *RECIPES,
    {
        "tiers": [
            {"policy": {"kind": "attention", "budget": 14, "every": 5, "queries": "probe"}, "store": "full"},
            {"keys": {"kind": "int", "nbits": 2}, "values": {"kind": "int", "nbits": 4}},
        ]
    },
    {
        "tiers": [
            {"policy": {"kind": "recent", "window": 0, "flush": 6}, "store": "full"},
            {"policy": {"kind": "attention", "budget": 9, "among": "arrival", "queries": "probe"}, "store": "full"},
            {"store": {"kind": "int", "nbits": 2}},
        ]
    },
]


@settings(max_examples=examples(25), deadline=None)
@given(
    recipe=st.sampled_from(range(len(SEVERAL))),
    ops=st.lists(st.tuples(st.sampled_from(OPS), st.integers(1, 5)), min_size=6, max_size=24),
    batch=st.sampled_from([1, 3]),
    padded=st.booleans(),
)
def test_tokens_that_only_come_are_where_planning_puts_them(recipe: int, ops: Any, batch: int, padded: bool) -> None:
    model = tiny("llama")
    with kvpolicy.attach(model):
        found, _ = ran(model, SEVERAL[recipe], ops, batch, padded)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(commit, "enters", lambda *_: False)
            patch.setattr(commit, "enter", lambda *_: None)
            expected, _ = ran(model, SEVERAL[recipe], ops, batch, padded)
    for x, y in zip(found, expected, strict=True):
        assert torch.equal(x, y)


def test_most_steps_of_zipcache_plan_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    entered: list[bool] = []
    before = commit.enter

    def enter(*given: Any) -> Any:
        moves = before(*given)
        entered.append(moves is not None)
        return moves

    monkeypatch.setattr(commit, "enter", enter)
    model = tiny("llama")
    with kvpolicy.attach(model):
        ran(model, {"extends": "zipcache", "params": {"period": 20}}, [("token", 1)] * 40, 2, False)
    assert sum(entered) > 25


def test_tokens_come_to_the_layers_that_get_them_whoever_planned_with_them() -> None:
    model = build("llama", torch.float32, head_dim=32, num_hidden_layers=3)
    cache = kvpolicy.make_cache("snapkv", model)
    with kvpolicy.attach(model):
        for seed, tokens in enumerate((40, 1, 1)):
            model(ids(tokens, seed=seed), **{CACHE: cache})
    cache.guard.commit()
    one, other, last = planners(cache)
    one.part()
    joint.joined([one, other])
    assert commit.enter([one, last], 1, None, None) is not None
    assert [planner.length("keys", 0) for planner in (one, other, last)] == [43, 42, 43]
    assert [planner.step.seen for planner in (one, other, last)] == [43, 42, 43]
