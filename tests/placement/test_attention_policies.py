"""Policies that see attention: scores and kept sets against the papers' formulas, written here in float64."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from layers import HEAD_DIM, Layer, random_tokens
from torch import Tensor

from kvpolicy.placement.attention_scores import counted_queries

SCALE = HEAD_DIM**-0.5


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield


def weights(query: Tensor, keys: Tensor, first: int) -> Tensor:
    """Causal attention `[kv_heads, groups, queries, tokens]` of queries from position `first` on, in float64."""
    grouped = query[0].double().unflatten(0, (keys.shape[1], -1))
    scores = grouped @ keys[0].double().unsqueeze(1).transpose(2, 3) * SCALE
    later = torch.arange(keys.shape[2]) > torch.arange(first, first + query.shape[2])[:, None]
    return scores.masked_fill(later, -torch.inf).softmax(-1)


def top(scores: dict[int, float], n: int) -> set[int]:
    return set(sorted(scores, key=lambda i: -scores[i])[:n])


@pytest.mark.parametrize("recipe", ["h2o", "mas"])
def test_h2o_and_mas_keep_what_the_formulas_keep_at_every_step(recipe: str) -> None:
    prompt, steps = 130, 60
    query, keys, values = random_tokens(prompt + steps, 1)
    layer = Layer(recipe)
    layer(query[:, :, :prompt], keys[:, :, :prompt], values[:, :, :prompt])
    full = weights(query[:, :, :prompt], keys[:, :, :prompt], 0).sum(1)
    sums = [dict(enumerate(full[h].sum(0).tolist())) for h in range(2)]
    held: list[set[int]] = [set(range(prompt)) for _ in range(2)]
    window: list[set[int]] = [set(), set()]
    for seen in range(prompt, prompt + steps + 1):
        if seen > prompt:
            new = seen - 1
            layer(*(x[:, :, new : new + 1] for x in (query, keys, values)))
            for h in range(2):
                held[h].add(new)
                at = sorted(held[h])
                attended = weights(query[:, :, new : new + 1], keys[:, :, at], len(at) - 1)[h].sum(0)[0]
                for i, w in zip(at, attended.tolist(), strict=True):
                    sums[h][i] = sums[h].get(i, 0.0) + w
        for h in range(2):
            window[h] = set(range(seen - int(0.1 * seen), seen))
            scores = {i: sums[h][i] / (seen - i if recipe == "mas" else 1) for i in held[h] - window[h]}
            held[h] = top(scores, int(0.1 * prompt)) | (window[h] & held[h])
        found = layer.held()[0]
        assert [set(found[h][0]) | set(found[h][1]) for h in range(2)] == held
        assert [len(found[h][1]) for h in range(2)] == [13, 13]


def probes(kind: Any, n: int, seen: int) -> Tensor:
    """The probes among `n` queries after `seen` tokens."""
    mode = kind.decode if n == 1 and seen else kind.queries
    return torch.from_numpy(counted_queries(kind, mode, torch.ones(1, n, dtype=torch.bool).numpy(), [seen], True)[0])


def zipcache_prompt(name: str, attention: Tensor, chosen: Tensor) -> Tensor:
    """Saliency `[kv_heads, tokens]` of a prompt: paper, equation 8, or the official code."""
    probed = attention[:, :, chosen]
    n = attention.shape[3]
    if name == "zipcache-code":
        return probed.sum(1).sum(1) / torch.arange(n, 0, -1)
    seen = (torch.arange(n) <= torch.arange(n)[chosen][:, None]).sum(0)
    return probed.mean(1).sum(1) / seen.clamp(min=1)


@pytest.mark.parametrize(("name", "prompt"), [("zipcache", 200), ("zipcache", 1000), ("zipcache-code", 250)])
def test_zipcache_assigns_a_prompt_as_the_formulas_do(name: str, prompt: int) -> None:
    tokens = random_tokens(prompt + 1, 2)
    query, keys, values = (x[:, :, :prompt] for x in tokens)
    layer = Layer(name)
    layer(query, keys, values)
    if name == "zipcache-code":
        assert [len(tier) for tier in layer.held()[0][0]] == [prompt, 0, 0], "the prompt goes on"
        layer(*(x[:, :, prompt:] for x in tokens))
    kind = layer.tiers.placement.kinds[0]
    chosen = probes(kind, prompt, 0)
    assert chosen.sum() == 2 * int(0.05 * prompt)
    assert chosen[-int(0.05 * prompt) :].all()
    saliency = zipcache_prompt(name, weights(query, keys, 0), chosen)
    low = int(0.4 * prompt)
    for h, (exact, high, rest) in enumerate(layer.held()[0]):
        assert exact == ([prompt] if name == "zipcache-code" else [])
        assert len(rest) == low
        assert set(rest) == set(saliency[h].topk(low, largest=False).indices.tolist())
        assert len(high) == prompt - low


def test_zipcache_goes_on_as_the_formulas_restricted_to_descent(
    record_property: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    prompt, steps = 300, 300
    query, keys, values = random_tokens(prompt + steps, 3)
    layer = Layer("zipcache")
    layer(query[:, :, :prompt], keys[:, :, :prompt], values[:, :, :prompt])
    kind = layer.tiers.placement.kinds[0]
    attention, chosen = weights(query[:, :, :prompt], keys[:, :, :prompt], 0), probes(kind, prompt, 0)
    sums = torch.zeros(2, prompt + steps, dtype=torch.float64)
    counts = torch.zeros(prompt + steps, dtype=torch.float64)
    sums[:, :prompt] = attention[:, :, chosen].mean(1).sum(1)
    counts[:prompt] = (torch.arange(prompt) <= torch.arange(prompt)[chosen][:, None]).sum(0)
    high = [set(held[1]) for held in layer.held()[0]]
    risen = 0
    for seen in range(prompt + 1, prompt + steps + 1):
        new = seen - 1
        stored = torch.cat([layer.cache.dense(0)[0], keys[:, :, new : new + 1]], dim=2)
        order = [sorted([*itertools.chain(*held), new]) for held in layer.held()[0]]
        layer(*(x[:, :, new : new + 1] for x in (query, keys, values)))
        attended = weights(query[:, :, new : new + 1], stored, new)
        assert order[0] == list(range(seen))
        if probes(kind, 1, new)[0]:
            sums[:, :seen] += attended.mean(1)[:, 0]
            counts[:seen] += 1
        if seen % 100:
            continue
        saliency = sums[:, :seen] / counts[:seen].clamp(min=1)
        for h, held in enumerate(layer.held()[0]):
            allowed = high[h] | set(range(seen - 100, seen))
            best = top(dict(enumerate(saliency[h].tolist())), int(0.6 * seen))
            risen += len(best - allowed)
            high[h] = top({i: float(saliency[h, i]) for i in allowed}, int(0.6 * seen))
            assert set(held[1]) == high[h]
    record_property("would_have_risen", risen)
    with capsys.disabled():
        print(f"\nzipcache: {risen} tokens of {2 * (400 + 500 + 600)} would have risen from 2 to 4 bits")
    assert risen > 0


@pytest.mark.parametrize("chunked", [False, True])
def test_zipcache_code_selects_each_hundred_after_the_prompt_among_itself(chunked: bool) -> None:
    """The official code's `prompt_length` grows by 100 with each selection, and only what comes after it competes."""
    prompt, steps = 250, 230
    query, keys, values = random_tokens(prompt + steps, 3)
    layer = Layer("zipcache-code")
    for first, last in itertools.pairwise([0, *([90] if chunked else []), prompt]):
        layer(*(x[:, :, first:last] for x in (query, keys, values)))
    settled: list[tuple[set[int], set[int]]] = []
    for seen in range(prompt + 1, prompt + steps + 1):
        new = seen - 1
        stored = torch.cat([layer.cache.dense(0)[0], keys[:, :, new : new + 1]], dim=2)
        layer(*(x[:, :, new : new + 1] for x in (query, keys, values)))
        found = [(set(held[1]), set(held[2])) for held in layer.held()[0]]
        waiting = [held[0] for held in layer.held()[0]]
        assert waiting == [list(range(seen - (seen - prompt) % 100, seen))] * 2
        if seen == prompt + 1:
            settled = found
            assert all(len(low) == int(0.4 * prompt) for _, low in found)
        elif (seen - prompt) % 100 == 0:
            attended = weights(query[:, :, new : new + 1], stored, new).sum(1)[:, 0, prompt:seen]
            hundred = attended[:, -100:]
            for h, (high, low) in enumerate(settled):
                lowest = {seen - 100 + int(i) for i in hundred[h].topk(40, largest=False).indices}
                settled[h] = high | set(range(seen - 100, seen)) - lowest, low | lowest
        assert found == settled


@pytest.mark.parametrize("queries", ["all", "probe"])
@pytest.mark.parametrize("heads", ["mean", "sum", "max"])
@pytest.mark.parametrize("score", ["accumulated", "normalised", "last"])
def test_every_score_of_a_prompt_and_a_chunk(queries: str, heads: str, score: str) -> None:
    options = {"queries": queries, "heads": heads, "score": score}
    tiers = [
        {"policy": {"kind": "recent", "window": 8}, "store": "full"},
        {"policy": {"kind": "attention", "budget": 1000, **options}, "store": "full"},
        {"store": "evict"},
    ]
    query, keys, values = random_tokens(150, 4)
    layer = Layer({"tiers": tiers})
    for first, last in itertools.pairwise([0, 90, 120, 149, 150]):
        layer(*(x[:, :, first:last] for x in (query, keys, values)))
    layer.cache.commit()
    kind = layer.tiers.placement.kinds[0]
    full = weights(query, keys, 0)
    reduced = {"mean": full.mean(1), "sum": full.sum(1), "max": full.amax(1)}[heads]
    chosen = torch.cat([probes(kind, b - a, a) for a, b in [(0, 90), (90, 120), (120, 149), (149, 150)]])
    probed = chosen.nonzero()[:, 0].tolist()
    if score == "last":
        newest = 149 if queries == "all" else max(probed)
        seen = (torch.arange(150) <= newest).double().expand(2, -1)
        expected = torch.stack([reduced[:, newest], seen], dim=2)
    else:
        assert chosen.all() == (queries == "all")
        causal = (torch.arange(150) <= torch.arange(150)[:, None])[chosen].sum(0).double()
        expected = torch.stack([reduced[:, chosen].sum(1), causal.expand(2, -1)], dim=2)
    table = layer.tiers.planner.live()[0]
    for h in range(2):
        at = table.positions[0, h].long()
        torch.testing.assert_close(table.scores[0, h].double(), expected[h, at], rtol=1e-4, atol=1e-6)
