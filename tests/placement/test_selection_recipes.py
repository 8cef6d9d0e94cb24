"""Recipes that select tokens of a prompt: what stays against the papers' and codes' formulas, written in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from layers import HEAD_DIM, Layer, random_tokens
from models import ids, tiny
from torch import Tensor
from words import CACHE

from kvpolicy import attach, load_recipe, make_cache
from kvpolicy.errors import RecipeError

PROMPT = 150


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield


def attention(query: Tensor, keys: Tensor) -> Tensor:
    """Causal attention `[batch, kv_heads, groups, queries, tokens]` of the newest queries, in float64."""
    grouped = query.double().unflatten(1, (keys.shape[1], -1))
    scores = grouped @ keys.double().unsqueeze(2).transpose(3, 4) * HEAD_DIM**-0.5
    n, of = query.shape[2], keys.shape[2]
    later = torch.arange(of) > torch.arange(of - n, of)[:, None]
    return scores.masked_fill(later, -torch.inf).softmax(-1)


def pooled(x: list[float], pool: str, size: int) -> list[float]:
    """Over neighbours, one by one: the mean counts zeros beyond the ends, as the official code does."""
    half, found = size // 2, []
    for i in range(len(x)):
        near = x[max(0, i - half) : i + half + 1]
        found.append(sum(near) / size if pool == "mean" else max(near) if pool == "max" else x[i])
    return found


def snapkv(query: Tensor, keys: Tensor, window: int, pool: str, size: int) -> list[list[list[float]]]:
    """What tokens of one prompt before its window are ranked by, by row and KV head."""
    n = keys.shape[2]
    summed = attention(query[:, :, -window:], keys).mean(2).sum(2)[..., : n - window]
    return [[pooled(head, pool, size) for head in row] for row in summed.tolist()]


def check_snapkv(found: set[int], ranks: list[float], capacity: int, window: int) -> None:
    """Neighbours share a maximum, so which of equal ones stay is not said."""
    n = len(ranks) + window
    before = {i for i in found if i < n - window}
    assert {i for i in found if i < n} - before == set(range(n - window, n))
    assert len(before) == capacity - window
    expected = sorted(ranks, reverse=True)[: capacity - window]
    torch.testing.assert_close(
        torch.tensor(sorted((ranks[i] for i in before), reverse=True)), torch.tensor(expected), rtol=1e-5, atol=1e-8
    )


def held(layer: Layer) -> list[list[set[int]]]:
    return [[set(tiers[0]) for tiers in row] for row in layer.held()]


def feed(layer: Layer, tokens: tuple[Tensor, ...], *cuts: int, real: Tensor | None = None) -> None:
    for first, last in zip([0, *cuts], [*cuts, tokens[0].shape[2]], strict=True):
        part = None if real is None else real[:, first:last]
        layer(*(x[:, :, first:last] for x in tokens), part)


@pytest.mark.parametrize(("pool", "size"), [("max", 7), ("mean", 5), ("none", 7)])
@pytest.mark.parametrize("cuts", [(), (60,), (100, 118)])
def test_snapkv_keeps_what_the_formula_keeps_of_a_prompt_in_any_chunks(
    pool: str, size: int, cuts: tuple[int, ...]
) -> None:
    tokens = random_tokens(PROMPT + 3, 1, batch=2)
    layer = Layer("snapkv", capacity=48, window=16, pool=pool, size=size)
    feed(layer, tokens, *cuts, PROMPT, PROMPT + 1, PROMPT + 2)
    query, keys = (x[:, :, :PROMPT] for x in tokens[:2])
    for row, heads in zip(held(layer), snapkv(query, keys, 16, pool, size), strict=True):
        assert row[0] != row[1]
        for found, ranks in zip(row, heads, strict=True):
            assert found >= {PROMPT, PROMPT + 1, PROMPT + 2}
            check_snapkv(found, ranks, 48, 16)


def test_a_chunk_of_fewer_queries_than_the_window_takes_the_place_of_as_many() -> None:
    query, keys, values = random_tokens(PROMPT, 1)
    layer = Layer("snapkv", capacity=48, window=16, pool="none")
    feed(layer, (query, keys, values), PROMPT - 4)
    layer.cache.commit()
    weights = attention(query[:, :, -20:], keys).mean(2)[0]
    sums = weights[:, :16].sum(1) * 12 / 16 + weights[:, 16:].sum(1)
    table = layer.tiers.planner.live()[0]
    found = table.scores[0, :, :, 0].double()
    torch.testing.assert_close(found, sums.gather(1, table.positions[0].long()), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("side", ["left", "right"])
def test_snapkv_selects_in_padded_rows_as_it_does_in_each_alone(side: str) -> None:
    query, keys, values = random_tokens(PROMPT + 1, 2, batch=2)
    real = torch.ones(2, PROMPT + 1, dtype=torch.bool)
    pads = slice(0, 30) if side == "left" else slice(PROMPT - 30, PROMPT)
    real[1, pads] = False
    layer = Layer("snapkv", capacity=48, window=16)
    feed(layer, (query, keys, values), PROMPT, real=real)
    own = real[:, :PROMPT]
    for r, row in enumerate(held(layer)):
        at = own[r].nonzero()[:, 0].tolist()
        (alone,) = snapkv(query[r : r + 1, :, at], keys[r : r + 1, :, at], 16, "max", 7)
        for found, ranks in zip(row, alone, strict=True):
            check_snapkv({at.index(i) for i in found if i < PROMPT}, ranks, 48, 16)


def test_a_prompt_within_the_capacity_stays_whole() -> None:
    layer = Layer("snapkv", capacity=200, window=16)
    feed(layer, random_tokens(PROMPT + 1, 3), PROMPT)
    assert held(layer) == [[set(range(PROMPT + 1))] * 2]


@pytest.mark.parametrize("floor", [0.0, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("padded", [False, True])
def test_adakv_shares_a_layers_budget_out_as_the_formula_does(floor: float, padded: bool) -> None:
    capacity, window = 60, 16
    query, keys, values = random_tokens(PROMPT + 1, 9, batch=2)
    keys[:, 0] *= 3.0  # so that the heads differ in how much their attention is spread
    real = torch.ones(2, PROMPT + 1, dtype=torch.bool)
    real[1, : 20 if padded else 0] = False
    layer = Layer("adakv", capacity=capacity, window=window, floor=floor, pool="mean", size=5)
    feed(layer, (query, keys, values), PROMPT, real=real)
    for r, row in enumerate(held(layer)):
        at = real[r, :PROMPT].nonzero()[:, 0].tolist()
        ((first, second),) = snapkv(query[r : r + 1, :, at], keys[r : r + 1, :, at], window, "mean", 5)
        mean = capacity - window
        best = sorted([*((x, 0) for x in first), *((x, 1) for x in second)], reverse=True)[: 2 * mean]
        counts = [sum(h == head for _, h in best) for head in range(2)]
        assert counts[0] != counts[1]
        for h, (found, ranks) in enumerate(zip(row, (first, second), strict=True)):
            own = round((1 - floor) * counts[h] + floor * mean)
            check_snapkv({at.index(i) for i in found if i < PROMPT}, ranks, own + window, window)


def pyramid(prompt: int, capacity: int, window: int, beta: int, layers: int) -> list[int]:
    """Tokens that stay in each layer: `PyramidKVCluster.update_kv` of KVCache-Factory c97f9d7, in words of our own."""
    mean = capacity - window
    if prompt < capacity:
        return [prompt] * layers
    if prompt < 2 * mean:
        return [capacity] * layers
    low, high = mean // beta, 2 * mean - mean // beta
    if high >= prompt - window:
        high, low = prompt - window, 2 * mean - prompt + window
    return [high - i * ((high - low) // (layers - 1)) + window for i in range(layers)]


@pytest.mark.parametrize("prompt", [40, 100, 130, 175, 600, 5000])
@pytest.mark.parametrize("layers", [2, 5, 32])
def test_pyramidkv_has_the_budgets_of_the_official_code(prompt: int, layers: int) -> None:
    policy: Any = load_recipe("pyramidkv", capacity=96, window=8).tiers[0].policy
    own = [min(prompt, policy.of_layer(i, layers).budget_tokens(prompt + 9, prompt)) for i in range(layers)]
    assert own == pyramid(prompt, 96, 8, 20, layers)
    assert prompt < 176 or own[0] > own[-1]


def test_the_published_pyramids() -> None:
    for capacity, window, first, last in ((128, 8, 234, 17), (2048, 32, 3932, 119)):
        policy: Any = load_recipe("pyramidkv", capacity=capacity, window=window).tiers[0].policy
        own = [policy.of_layer(i, 32).budget_tokens(9000, 9000) - window for i in range(32)]
        assert (own[0], own[-1]) == (first, last)
    assert policy.of_layer(0, 1).budget_tokens(9000, 9000) == 2048


def test_layers_of_a_model_hold_a_pyramid() -> None:
    model, tokens = tiny("llama"), ids(121, batch=2)
    layers = model.config.num_hidden_layers
    with attach(model):
        cache = make_cache("pyramidkv:capacity=40,window=8", model)
        model(tokens[:, :120], **{CACHE: cache})
        model(tokens[:, 120:], **{CACHE: cache})
    cache.commit()
    found = [(cache.positions(i).positions >= 0).sum(-1) for i in range(layers)]
    for count, expected in zip(found, pyramid(120, 40, 8, 20, layers), strict=True):
        assert (count == expected + 1).all()


def test_tova_keeps_what_the_newest_query_attends_to_at_every_step() -> None:
    query, keys, values = random_tokens(PROMPT + 40, 4)
    layer = Layer("tova", budget=30)
    stays = list(range(PROMPT))
    layer(*(x[:, :, :PROMPT] for x in (query, keys, values)))
    for seen in range(PROMPT, PROMPT + 41):
        if seen > PROMPT:
            layer(*(x[:, :, seen - 1 : seen] for x in (query, keys, values)))
            stays.append(seen - 1)
        newest = attention(query[:, :, seen - 1 : seen], keys[:, :, stays]).mean((1, 2))[0, 0].tolist()
        best = sorted(range(len(stays)), key=lambda i: -newest[i])[:30]
        stays = sorted(stays[i] for i in best)
        assert held(layer) == [[set(stays)]]


@pytest.mark.parametrize("attached", [True, False])
def test_key_norm_keeps_the_shortest_keys_of_each_head(attached: bool) -> None:
    query, keys, values = random_tokens(PROMPT + 2, 5, batch=2)
    layer = Layer("key-norm", keep=0.3)
    if attached:
        feed(layer, (query, keys, values), 70, PROMPT, PROMPT + 1)
    else:
        layer.cache.layers[0].attached = False
        for first, last in ((0, 70), (70, PROMPT), (PROMPT, PROMPT + 1), (PROMPT + 1, PROMPT + 2)):
            found = layer.cache.update(keys[:, :, first:last], values[:, :, first:last], 0)
    lengths = keys[:, :, :PROMPT].double().pow(2).sum(-1)
    best = lengths.topk(45, largest=False).indices
    expected = [[{*head, PROMPT, PROMPT + 1} for head in row] for row in best.tolist()]
    assert held(layer) == expected
    if not attached:
        order = [[sorted(head) for head in row] for row in expected]
        index = torch.tensor(order).unsqueeze(3).expand(-1, -1, -1, HEAD_DIM)
        assert torch.equal(found[0], keys.gather(2, index))


def test_key_norm_selects_in_padded_rows_as_in_each_alone() -> None:
    query, keys, values = random_tokens(PROMPT + 1, 7, batch=2)
    real = torch.ones(2, PROMPT + 1, dtype=torch.bool)
    real[1, :50] = False
    layer = Layer("key-norm", keep=0.3)
    feed(layer, (query, keys, values), 80, PROMPT, real=real)
    lengths = keys[:, :, :PROMPT].double().norm(dim=-1)
    rows = [lengths[0].topk(45, largest=False).indices, 50 + lengths[1, :, 50:].topk(30, largest=False).indices]
    assert held(layer) == [[{*head, PROMPT} for head in row.tolist()] for row in rows]


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({"kind": "pyramids", "tokens": 9}, r"budget\.kind: .* must be of kind pyramid, found 'pyramids'"),
        ({"kind": "pyramid"}, "must have tokens"),
        ({"kind": "pyramid", "tokens": 9, "layers": 2}, "may have window and beta, found kind, tokens, layers"),
        ({"kind": "pyramid", "tokens": 0}, r"budget\.tokens: tokens of a pyramid must be an integer from 1 to"),
        ({"kind": "pyramid", "tokens": 9, "beta": 0.5}, "beta of a pyramid must be an integer"),
        ({"kind": "pyramid", "tokens": 9, "window": 9}, "window of a pyramid must be smaller than its tokens"),
    ],
)
def test_pyramids_that_can_not_be_are_refused(budget: dict[str, Any], message: str) -> None:
    policy = {"kind": "rank", "scorer": "key_norm", "budget": budget, "of": "prompt"}
    with pytest.raises(RecipeError, match=message):
        load_recipe({"tiers": [{"policy": policy, "store": "full"}, {"store": "evict"}]})


@pytest.mark.parametrize("kind", [{"kind": "rank", "scorer": "key_norm"}, {"kind": "attention"}])
def test_a_pyramid_is_of_the_prompt(kind: dict[str, Any]) -> None:
    policy = {**kind, "budget": {"kind": "pyramid", "tokens": 9}}
    tiers = [{"policy": policy, "store": "full"}, {"store": "evict"}]
    with pytest.raises(RecipeError, match="a budget of kind pyramid must go with of: prompt, found of: seen"):
        load_recipe({"tiers": tiers})
    policy["of"] = "prompt"
    recipe = load_recipe({"tiers": tiers})
    assert load_recipe({"tiers": [tier.plain() for tier in recipe.tiers]}).tiers == recipe.tiers


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 4}, "option 'size' must be odd"),
        ({"pool": "none", "size": 5}, "option 'size' must go with pool: max or mean"),
        ({"window": 0}, "window"),
        ({"pool": "avg"}, "pool"),
    ],
)
def test_windows_that_can_not_be_are_refused(options: dict[str, Any], message: str) -> None:
    policy = {"kind": "rank", "scorer": {"kind": "window_attention", **options}}
    with pytest.raises(RecipeError, match=message):
        load_recipe({"tiers": [{"policy": policy, "store": "full"}, {"store": "evict"}]})


def test_no_attention_is_computed_for_a_selection_that_is_over() -> None:
    layer = Layer("snapkv", capacity=48, window=16)
    feed(layer, random_tokens(PROMPT + 30, 6), PROMPT, PROMPT + 1)
    assert not layer.tiers.counted(1).queries
    layer.cache.crop(PROMPT - 10)
    assert layer.tiers.step.prompt is None, "the prompt goes on"
