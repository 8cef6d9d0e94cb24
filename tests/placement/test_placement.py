"""Placement: equal to stepping `keep` token by token, to the official LogQuant, and to QuantizedCache's rule."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pytest
from compiler import need_compiler
from hypothesis import given, settings
from hypothesis import strategies as st
from recipes import NAMED, named, recipes

from kvpolicy import Recipe, load_recipe
from kvpolicy.errors import PluginError
from kvpolicy.interfaces.policy import NEVER, Policy
from kvpolicy.placement.flows import AHEAD
from kvpolicy.placement.planner import Placement, State
from kvpolicy.placement.position_list import PositionList
from kvpolicy.placement.simulate import history, simulate
from kvpolicy.placement.step import Step
from kvpolicy.plugins import registry

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "logquant.json").read_text(encoding="utf-8"))
BY_TOKEN = [name for name in NAMED if name != "hf-quantized"]


def stepped(recipe: Recipe, tokens: int) -> list[list[list[int]]]:
    """The tokens of each tier after every step, by calling `keep` alone; the last tier's list is what reached it."""
    tiers: list[list[int]] = [[] for _ in recipe.tiers]
    steps = []
    for seen in range(1, tokens + 1):
        falling = [seen - 1]
        for i, tier in enumerate(recipe.tiers):
            tiers[i] = sorted(tiers[i] + falling)
            falling = []
            if tier.policy is not None and tiers[i]:
                keep = tier.policy.keep(np.array(tiers[i], dtype=np.int64), seen)
                falling = [p for p, stays in zip(tiers[i], keep, strict=True) if not stays]
                tiers[i] = [p for p, stays in zip(tiers[i], keep, strict=True) if stays]
        steps.append([list(t) for t in tiers])
    return steps


def feed(recipe: Recipe, chunks: list[int]) -> State:
    planner = Placement(recipe.tiers)
    state = planner.start()
    for n in chunks:
        state, _ = planner.advance(state, n)
    return state


def cut(tokens: int, sizes: list[int]) -> list[int]:
    chunks, left = [], tokens
    for size in sizes:
        chunks.append(min(size, left))
        left -= chunks[-1]
        if not left:
            return chunks
    return [*chunks, left]


@pytest.mark.parametrize("case", GOLDEN, ids=lambda c: f"{c['recipe']}-{c['window']}-{c['prompt']}")
def test_exact_tokens_are_those_of_the_official_logquant(case: dict[str, Any]) -> None:
    recipe = load_recipe(case["recipe"], window=case["window"])
    planner = Placement(recipe.tiers)
    state, _ = planner.advance(planner.start(), case["prompt"])
    sides = {"keys": case["full_precision_keys"], "values": case["full_precision_values"]}
    for t in range(len(sides["keys"])):
        for side, trace in sides.items():
            held: list[int] = []
            for i, tier in enumerate(recipe.tiers):
                at = [s for s in range(len(state.stores[side])) if i in planner.tiers_of_store(side, s)]
                if getattr(tier, side) == "full" and at[0] not in held:
                    held.append(at[0])
            exact = sorted(p for s in held for p in state.stores[side][s].array.tolist())
            assert [*exact, state.seen] == trace[t], (side, t)
        state, _ = planner.advance(state, 1)


def test_golden_cases_are_many() -> None:
    assert len(GOLDEN) >= 4
    assert {case["recipe"] for case in GOLDEN} >= {"logquant", "partial-logquant"}


@pytest.mark.parametrize("name", BY_TOKEN)
def test_simulate_equals_stepping_keep(name: str) -> None:
    recipe = named(name)
    steps = stepped(recipe, 230)
    for tokens in (1, 2, 17, 64, 65, 131, 230):
        expected = steps[tokens - 1]
        if recipe.tiers[-1].keys == "evict":
            expected = [*expected[:-1], []]
        assert [t.tolist() for t in simulate(recipe.tiers, tokens)] == expected


@pytest.mark.parametrize("name", ["logquant", "kivi", "streaming-llm", "fractions"])
def test_history_equals_stepping_keep(name: str) -> None:
    recipe = named(name)
    picture = history(recipe.tiers, 90)
    expected = np.full((90, 90), -1)
    for step, tiers in enumerate(stepped(recipe, 90)):
        for i, tier in enumerate(tiers):
            expected[step, tier] = i
    assert (picture == expected).all()
    assert (np.diff(picture, axis=0) >= 0).all(), "a token rose"


@settings(deadline=None, derandomize=True, max_examples=60)
@given(recipe=recipes(), tokens=st.integers(1, 160), sizes=st.lists(st.integers(1, 70), max_size=12))
def test_any_chunking_gives_the_placement_of_single_tokens(recipe: Recipe, tokens: int, sizes: list[int]) -> None:
    one, many, whole = feed(recipe, [1] * tokens), feed(recipe, cut(tokens, sizes)), feed(recipe, [tokens])
    expected = stepped(recipe, tokens)[-1]
    for state in (one, many, whole):
        assert state.seen == tokens
        assert [t.tolist() for t in state.tiers] == expected[:-1]
        for side, stores in one.stores.items():
            for s, store in enumerate(stores):
                held = state.stores[side][s].array
                lossy_twice = s > 1 and len({getattr(t, side) for t in recipe.tiers} - {"full"}) > 1
                if lossy_twice:
                    assert sorted(held.tolist()) == sorted(store.array.tolist())
                else:
                    assert held.tolist() == store.array.tolist(), (side, s)


@settings(deadline=None, derandomize=True, max_examples=40)
@given(recipe=recipes(), chunks=st.lists(st.integers(1, 90), min_size=1, max_size=6))
def test_every_token_is_in_one_store_a_side_and_the_plan_moves_just_those(recipe: Recipe, chunks: list[int]) -> None:
    planner = Placement(recipe.tiers)
    state = planner.start()
    evicts = recipe.tiers[-1].keys == "evict"
    for n in chunks:
        before = state
        state, plan = planner.advance(state, n)
        for side, stores in state.stores.items():
            held = [store.array.tolist() for store in stores]
            flat = sorted(p for store in held for p in store)
            assert len(flat) == len(set(flat))
            if not evicts:
                assert flat == list(range(state.seen))
            for s, (store, moves) in enumerate(zip(held, plan[side], strict=True)):
                content = before.stores[side][s].array.tolist()
                for (source,), indices, *_ in moves.arrivals:
                    origin = range(before.seen, state.seen) if source < 0 else before.stores[side][source].array
                    content += [int(origin[i]) for i in indices]
                gone = set() if moves.leaving is None else set(moves.leaving.tolist())
                assert [p for i, p in enumerate(content) if i not in gone] == store


def every_policy() -> list[Policy]:
    classes = {kind: info.cls for kind, info in registry().policies.items()}
    return [
        classes["recent"](window=5),
        classes["recent"](window=0, flush=7),
        classes["recent"](window=9, flush=4),
        classes["recent"](window=0.3),
        classes["recent"](window=0.15, flush=5),
        classes["sink"](tokens=6),
        classes["log"](budget=1),
        classes["log"](budget=8),
        classes["log"](budget=0.2),
    ]


@pytest.mark.parametrize("policy", every_policy(), ids=str)
@settings(deadline=None, derandomize=True, max_examples=30)
@given(data=st.data())
def test_departures_equal_asking_keep_at_every_step(policy: Policy, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, 40))
    stop = start + data.draw(st.integers(1, 60))
    positions = np.array(sorted(data.draw(st.sets(st.integers(0, stop - 1), min_size=1))), dtype=np.int64)
    # A tier fed by a window gets its tokens in order; one below a log tier need not.
    lowest = np.maximum(positions + 1, start)
    late = np.array([data.draw(st.integers(int(low), stop)) for low in lowest], dtype=np.int64)
    arrivals = late if data.draw(st.booleans()) else np.maximum.accumulate(late)
    committed = np.flatnonzero(arrivals <= start)
    while len(committed) and not (keep := policy.keep(positions[committed], start)).all():
        stays = np.ones(len(positions), dtype=bool)
        stays[committed[~keep]] = False
        positions, arrivals = positions[stays], arrivals[stays]
        committed = np.flatnonzero(arrivals <= start)
    left = policy.departures(positions, arrivals, start, stop)
    expected = np.full(len(positions), NEVER, dtype=np.int64)
    for seen in range(start + 1, stop + 1):
        held = np.flatnonzero((arrivals <= seen) & (expected == NEVER))
        if len(held):
            expected[held[~policy.keep(positions[held], seen)]] = seen
    assert left.tolist() == expected.tolist()


class Counting(Policy):
    """Every second token of a full tier leaves; counts how often it is asked."""

    kind: Literal["counting"] = "counting"
    acts: ClassVar[Literal["arrival", "step"]] = "arrival"
    calls: ClassVar[int] = 0

    def capacity(self, seen: int) -> int:
        return 1024

    def keep(self, positions: Any, seen: int) -> Any:
        type(self).calls += 1
        return np.arange(len(positions)) % 2 == 0 if len(positions) > 1024 else np.ones(len(positions), dtype=bool)


def test_a_policy_is_asked_only_where_it_can_act() -> None:
    Counting.calls = 0
    tiers = (
        load_recipe("logquant", window=512).tiers[0],
        load_recipe("logquant").tiers[1].model_copy(update={"policy": Counting()}),
        load_recipe("logquant").tiers[2],
    )
    placed = simulate(tiers, 131_072)
    assert sum(map(len, placed)) == 131_072
    assert 200 <= Counting.calls <= 131_072 // 512


class Failing(Policy):
    """Keeps all until it has seen 50 tokens."""

    kind: Literal["failing"] = "failing"

    def keep(self, positions: Any, seen: int) -> Any:
        if seen == 50:
            raise ValueError("enough")
        return np.ones(len(positions), dtype=bool)


@pytest.mark.parametrize("first", [1, 20, 47, 49])
def test_a_policy_that_fails_at_a_token_fails_as_that_comes(first: int) -> None:
    recipe = load_recipe("logquant")
    placement = Placement([recipe.tiers[0].model_copy(update={"policy": Failing()}), recipe.tiers[2]])
    state, _ = placement.advance(placement.start(), first)
    for _ in range(first, 49):
        state, _ = placement.advance(state, 1)
    assert state.tiers[0].tolist() == list(range(49))
    for n in (1, 2, 60):
        with pytest.raises(PluginError, match="enough"):
            placement.advance(state, n)


@pytest.mark.parametrize("name", ["logquant", "kivi", "streaming-llm", "best-3bit"])
def test_policies_are_asked_of_several_tokens_to_come_at_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    left = Policy._left
    monkeypatch.setattr(Policy, "_left", lambda self, *given: asked.append(given[2]) or left(self, *given))
    placement = Placement(load_recipe(name).tiers)
    state, _ = placement.advance(placement.start(), 4096)
    asked.clear()
    for _ in range(AHEAD):
        state, _ = placement.advance(state, 1)
    assert set(asked) == {4096}


@pytest.mark.parametrize(
    "name", ["logquant", "partial-logquant", "kivi", "kivi-sink", "streaming-llm", "streaming-quant", "logquant-evict"]
)
def test_131072_tokens_are_placed_without_asking_at_every_token(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0
    for info in registry().policies.values():
        original = info.cls.keep

        def counted(self: Any, positions: Any, seen: int, original: Any = original) -> Any:
            nonlocal calls
            calls += 1
            return original(self, positions, seen)

        monkeypatch.setattr(info.cls, "keep", counted)
    recipe = load_recipe(name)
    placed = simulate(recipe.tiers, 131_072)
    assert calls <= 131_072 // 30
    evicts = recipe.tiers[-1].keys == "evict"
    assert evicts or sum(map(len, placed)) == 131_072


def test_fractions_follow_the_tokens_seen() -> None:
    recipe = load_recipe(
        {"tiers": [{"policy": {"kind": "recent", "window": 0.25}, "store": "full"}, {"store": "evict"}]}
    )
    for tokens in (1, 3, 4, 10, 100, 1000):
        window, _ = simulate(recipe.tiers, tokens)
        # A token once gone never comes back, so the window may only lag while it grows by less than one a step.
        assert max(1, tokens // 4) - 1 <= len(window) <= max(1, tokens // 4)
        assert window.tolist() == list(range(tokens - len(window), tokens))


def test_layers_with_the_same_tiers_share_one_plan() -> None:
    start = Step.first(Placement(named("logquant").tiers))
    assert start.advance(50, None) is start.advance(50, None)
    assert start.advance(50, None) is not start.advance(51, None)


def quantized_cache(updates: list[int], residual: int) -> list[tuple[int, int]]:
    """Tokens quantized and in the residual after each update, by the rule of transformers' QuantizedLayer."""
    quantized = rest = 0
    trace = []
    for i, n in enumerate(updates):
        if i == 0:
            quantized = n
        elif rest + n >= residual:
            quantized, rest = quantized + rest + n, 0
        else:
            rest += n
        trace.append((quantized, rest))
    return trace


@settings(deadline=None, derandomize=True, max_examples=60)
@given(prompt=st.lists(st.integers(1, 40), min_size=1, max_size=4), n=st.integers(0, 120), residual=st.integers(1, 50))
def test_a_residual_is_that_of_quantized_cache(prompt: list[int], n: int, residual: int) -> None:
    """A prompt in any chunks, then token by token."""
    recipe = load_recipe("hf-quantized", residual=residual)
    planner = Placement(recipe.tiers)
    state = planner.start()
    for chunk in prompt:
        state, _ = planner.advance(state, chunk)
        assert state.tiers[0].tolist() == list(range(state.seen)), "while the prompt goes on all of it stays"
    state, _ = planner.end_prompt(state)
    whole = sum(prompt)
    updates = [whole, *[1] * n]
    for i, (quantized, rest) in enumerate(quantized_cache(updates, residual)):
        if i:
            state, _ = planner.advance(state, 1, whole)
        assert state.tiers[0].tolist() == list(range(quantized, quantized + rest))
        assert sorted(state.stores["keys"][1].array.tolist()) == list(range(quantized))


@pytest.mark.parametrize("turn", [1, 5, 15, 16, 40])
def test_a_second_turn_flushes_a_residual_as_if_typed_token_by_token(turn: int) -> None:
    """QuantizedCache lets an update exceed its residual, which then leaves as a whole."""
    planner = Placement(load_recipe("hf-quantized", residual=16).tiers)
    state, _ = planner.end_prompt(planner.advance(planner.start(), 50)[0])
    state, _ = planner.advance(state, 10, 50)
    state, _ = planner.advance(state, turn, 50)
    left = 50 + (10 + turn) // 16 * 16
    assert state.tiers[0].tolist() == list(range(left, 60 + turn))


def test_a_residual_equals_that_of_the_quantized_cache_of_transformers() -> None:
    import torch
    from transformers import LlamaConfig, QuantizedCache

    need_compiler()
    config = LlamaConfig(num_hidden_layers=1, hidden_size=64, num_attention_heads=1, num_key_value_heads=1)
    theirs = QuantizedCache("quanto", config, nbits=4, q_group_size=32, residual_length=16)
    planner = Placement(load_recipe("hf-quantized", residual=16).tiers)
    state = planner.start()
    torch.manual_seed(0)
    for n in [10, *[1] * 50]:
        x = torch.randn(1, 1, n, 64)
        theirs.update(x, x, 0)
        state, _ = planner.advance(state, n, 10 if n == 1 else None)
        if n > 1:
            state, _ = planner.end_prompt(state)
        kept = theirs.layers[0].keys
        assert len(state.tiers[0]) == (kept.shape[-2] if kept.ndim == 4 else 0)


@settings(deadline=None, derandomize=True, max_examples=40)
@given(recipe=recipes(), tokens=st.integers(1, 120), length=st.integers(0, 119), more=st.integers(1, 60))
def test_crop_removes_positions_and_keeps_past_descents(recipe: Recipe, tokens: int, length: int, more: int) -> None:
    length = min(length, tokens)
    planner = Placement(recipe.tiers)
    state, _ = planner.advance(planner.start(), tokens)
    cropped, drops = planner.crop(state, length)
    assert cropped.seen == length
    for before, after in zip(state.tiers, cropped.tiers, strict=True):
        assert after.tolist() == [p for p in before.tolist() if p < length]
    for side, stores in cropped.stores.items():
        for before, after, gone in zip(state.stores[side], stores, drops[side], strict=True):
            assert after.array.tolist() == [p for p in before.array.tolist() if p < length]
            dropped = [] if gone.leaving is None else before.array[gone.leaving].tolist()
            assert dropped == [p for p in before.array.tolist() if p >= length]
    later, _ = planner.advance(cropped, more)
    assert later.seen == length + more
    assert (state.tiers[0] < tokens).all(), "the state before is untouched"


@pytest.mark.parametrize("held", [np.arange(5, 12), np.array([1, 2, 7, 9]), np.arange(0)])
@pytest.mark.parametrize("items", [[4], [5], [7], [11], [12], [9, 2], []])
def test_places_are_those_that_a_search_finds(held: Any, items: list[int]) -> None:
    positions = PositionList().append(held)
    asked = np.array(items, dtype=np.int64)
    assert positions.places(asked).tolist() == [i for i, x in enumerate(held.tolist()) if x in items]


def test_growing_arrays_share_a_buffer_and_never_disturb_their_ancestors() -> None:
    first = PositionList().append(np.arange(10))
    second, other = first.append(np.array([10])), first.append(np.array([99, 98]))
    assert first.array.tolist() == list(range(10))
    assert second.array.tolist() == list(range(11))
    assert other.array.tolist() == [*range(10), 99, 98]
    assert np.shares_memory(first.array, second.array)
    assert not np.shares_memory(second.array, other.array)
    third = second.keep(second.array % 2 == 0).append(np.arange(100, 300))
    assert third.array.tolist() == [*range(0, 11, 2), *range(100, 300)]
    assert second.array.tolist() == list(range(11))
