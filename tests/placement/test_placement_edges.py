"""Placement at its edges: one padded row, a cache used again, more tiers than a byte counts, no tokens at all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from layers import Layer, random_tokens
from models import bundled, ids, tiny
from torch import Tensor
from words import CACHE

from kvpolicy import attach, load_recipe, make_cache
from kvpolicy.placement.planner import Placement
from kvpolicy.tasks.load import load_task

RECENT = {"policy": {"kind": "recent", "window": 8}, "store": "full"}
STREAM: dict[str, Any] = {"name": "s", "tiers": [RECENT, {"store": "evict"}]}
QUANT: dict[str, Any] = {"name": "q", "tiers": [RECENT, {"store": {"kind": "int", "nbits": 4}}]}


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield


def positions(mask: Tensor) -> Tensor:
    return (mask.cumsum(1) - 1).clamp(min=0)


def run(cache: Any, tokens: Tensor, mask: Tensor) -> Tensor:
    """Logits of new tokens under a mask over all of them."""
    at = positions(mask)[:, -tokens.shape[1] :]
    logits: Tensor = tiny("llama")(tokens, attention_mask=mask, position_ids=at, **{CACHE: cache}).logits
    return logits


def held(cache: Any) -> list[int]:
    cache.commit()
    found: list[int] = sorted(cache.positions().positions.reshape(-1).tolist())
    return found


def test_one_padded_row_is_placed_by_its_slots() -> None:
    tokens, pad = ids(20), 6
    mask = torch.ones(1, 26, dtype=torch.long)
    mask[:, :pad] = 0
    with attach(tiny("llama")):
        alone, padded = (make_cache(STREAM, tiny("llama")) for _ in range(2))
        run(alone, tokens, torch.ones_like(tokens))
        run(padded, torch.cat([ids(pad), tokens], 1), mask)
        for step in range(12):
            assert held(padded) == [p + pad for p in held(alone)]
            more = ids(1, seed=step + 5)
            mask = torch.cat([mask, torch.ones(1, 1, dtype=torch.long)], 1)
            want = run(alone, more, torch.ones(1, 21 + step, dtype=torch.long))
            torch.testing.assert_close(run(padded, more, mask), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["streaming-llm:window=200", "logquant:nbits=2", "h2o", "full"])
def test_a_padded_prompt_keeps_its_text(name: str) -> None:
    model, tokenizer = bundled()
    for sample in load_task("lines", 2, 0, 500):
        prompt = tokenizer(sample.prompt, return_tensors="pt").input_ids
        padded = torch.cat([torch.zeros(1, 64, dtype=torch.long), prompt], 1)
        mask = torch.ones_like(padded)
        mask[:, :64] = 0
        texts = []
        with attach(model):
            for given, shown in ((prompt, torch.ones_like(prompt)), (padded, mask)):
                cache = make_cache(name, model)
                out = model.generate(given, attention_mask=shown, max_new_tokens=10, do_sample=False, **{CACHE: cache})
                texts.append(out[0, given.shape[1] :].tolist())
        assert texts[0] == texts[1]


def test_after_a_reset_nothing_is_known_of_the_padding_before() -> None:
    tokens = ids(40, batch=2)
    left, right = torch.ones(2, 40, dtype=torch.long), torch.ones(2, 40, dtype=torch.long)
    left[0, :20], right[0, 20:] = 0, 0  # as many real tokens in each row
    with attach(tiny("llama")):
        fresh, again = (make_cache(STREAM, tiny("llama")) for _ in range(2))
        run(fresh, tokens, right)
        run(again, tokens, left)
        assert held(again) != held(fresh)
        again.reset()
        run(again, tokens, right)
        assert held(again) == held(fresh)
        again.reset()
        wide = torch.ones(3, 30, dtype=torch.long)
        wide[1, :9] = 0
        run(again, ids(30, batch=3), wide)
        assert held(again) == sorted(list(range(22, 30)) * 3)


def test_cropping_more_than_there_is_leaves_nothing_of_the_padding() -> None:
    tokens, mask = ids(20, batch=2), torch.ones(2, 20, dtype=torch.long)
    mask[0, :5] = 0
    with attach(tiny("llama")):
        cache = make_cache(QUANT, tiny("llama"))
        want = run(cache, tokens, mask)
        cache.crop(-25)
        assert cache.get_seq_length() == 0
        assert torch.equal(run(cache, tokens, mask), want)
        assert cache.padding is not None
        assert torch.equal(torch.from_numpy(cache.padding.real), mask.bool())


def test_exact_stores_chosen_by_attention_hold_and_attend_everything() -> None:
    recipe = {
        "name": "r",
        "tiers": [RECENT, {"policy": {"kind": "attention", "budget": 8}, "store": "full"}, {"store": "full"}],
    }
    model, tokens = tiny("llama"), ids(40)
    want = model(tokens).logits[:, -5:]
    with attach(model):
        cache = make_cache(recipe, model)
        model(tokens[:, :35], **{CACHE: cache})
        got = [model(tokens[:, i : i + 1], **{CACHE: cache}).logits for i in range(35, 40)]
    torch.testing.assert_close(torch.cat(got, 1), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("count", [100, 127, 128, 130, 300])
def test_any_number_of_tiers(count: int) -> None:
    tiers = [{"policy": {"kind": "recent", "window": i + 1}, "store": "full"} for i in range(count - 1)]
    layer = Layer({"name": "n", "tiers": [*tiers, {"store": {"kind": "int", "nbits": 4}}]})
    real = torch.ones(2, count + 20, dtype=torch.bool)
    real[0, :5] = False
    layer(*random_tokens(count + 20, 0, 2), real)
    found = layer.held()
    for row in range(2):
        assert sorted(p for tier in found[row][0] for p in tier) == real[row].nonzero()[:, 0].tolist()
        assert found[row][0][0] == [count + 19]


TIERS: dict[str, list[Any]] = {
    "stream": STREAM["tiers"],
    "quant": QUANT["tiers"],
    "heads": [RECENT, {"policy": {"kind": "attention", "budget": 6}, "store": "full"}, {"store": "evict"}],
    "arrival": [
        {"policy": {"kind": "recent", "window": 0, "flush": 8}, "store": "full"},
        {"store": {"kind": "int", "nbits": 4, "per": "channel", "group_size": "arrival"}},
    ],
}


@pytest.mark.parametrize("first", [0, 30])
@pytest.mark.parametrize("name", TIERS)
def test_an_update_of_no_tokens_changes_nothing(name: str, first: int) -> None:
    found = []
    for empty in (False, True):
        layer = Layer({"name": "x", "tiers": TIERS[name]})
        if first:
            layer(*random_tokens(first, 0))
        if empty:
            assert layer(*random_tokens(0, 1)).shape == (1, 0, 4, 16)
            assert layer.cache.get_seq_length() == first
        found.append([layer(*random_tokens(n, 2 + n)) for n in (1, 3)] + [layer.held()])
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    assert found[0][2] == found[1][2]


@pytest.mark.parametrize("name", ["logquant", "kivi", "streaming-llm"])
def test_what_was_known_of_tokens_ahead_goes_once_they_have_come(name: str) -> None:
    placement = Placement(load_recipe(name).tiers)
    state, _ = placement.advance(placement.start(), 4096)
    assert state.ahead is None
    state, _ = placement.advance(state, 1)
    assert state.ahead is not None
    assert placement.crop(state, 4000)[0].ahead is None
    for _ in range(31):
        state, _ = placement.advance(state, 1)
    assert state.ahead is None
