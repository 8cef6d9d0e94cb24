"""Mergers: values of dropped tokens in those that stay, against the formula in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from layers import HEAD_DIM, Layer, random_tokens
from models import ids, tiny
from words import CACHE

from kvpolicy import CompressedCache, Merger, attach, load_recipe, make_cache
from kvpolicy.errors import CacheError, PluginError, RecipeError

Row = dict[int, list[Any]]
"""Of each position held its value and the attention received."""
OPTIONS = {"window": 6, "heavy": 8, "tokens": 4}


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield


def draw(seed: int, layer: int, head: int, position: int) -> float:
    """splitmix64's finalizer, over one number after the other, in Python's integers."""
    x, mask = seed, 2**64 - 1
    for part in (layer, head, position):
        x = ((x ^ part) + 0x9E3779B97F4A7C15) & mask
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
        x ^= x >> 31
    return (x >> 40) / 2**24


def merged(row: Row, stays: set[int], head: int, to: str, tokens: int) -> Row:
    """What is held once the others are dropped."""
    found = {p: [row[p][0].clone(), row[p][1]] for p in stays}
    for p in set(row) - stays:
        after = sorted(q for q in stays if q > p)[:tokens]
        if not after:
            continue
        other = max(row[q][1] for q in stays) if to == "max" else sum(row[q][1] for q in after) / len(after)
        if draw(0, 0, head, p) < min(1.0, row[p][1] / other):
            for q in after:
                found[q][0] += row[p][0] / tokens
    return found


def attended(row: Row, query: Any, keys: Any, first: int) -> None:
    """Add the attention of an update's queries `[groups, queries, head_dim]`; the new tokens are in `row` already."""
    at = sorted(row)
    for i in range(query.shape[1]):
        seen = [p for p in at if p <= first + i]
        weights = (query[:, i].double() @ keys[seen].double().T * HEAD_DIM**-0.5).softmax(-1).sum(0)
        for p, weight in zip(seen, weights.tolist(), strict=True):
            row[p][1] += weight


@pytest.mark.parametrize("to", ["mean", "max"])
def test_values_are_merged_as_the_formula_says(to: str) -> None:
    layer = Layer("cam", to=to, of="seen", **OPTIONS)
    tokens = random_tokens(75, 4, batch=2)
    query, keys, values = tokens
    rows: dict[tuple[int, int], Row] = {(b, h): {} for b in range(2) for h in range(2)}
    changed = 0
    for first, last in [(0, 40), *((t, t + 1) for t in range(40, 60)), (60, 75)]:
        layer(*(x[:, :, first:last] for x in tokens))
        held, dense = layer.held(), layer.cache.dense(0)[1]
        for (b, h), row in rows.items():
            row |= {t: [values[b, h, t].double(), 0.0] for t in range(first, last)}
            attended(row, query[b, 2 * h : 2 * h + 2, first:last], keys[b, h], first)
            stays = {p for tier in held[b][h] for p in tier}
            rows[b, h] = row = merged(row, stays, h, to, 4)
            expected = torch.stack([row[p][0] for p in sorted(row)])
            found = dense[b, h, -len(row) :].double()
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
            changed += int((found != values[b, h, sorted(row)].double()).any(1).sum())
    assert changed > 100


def test_padded_rows_merge_as_if_alone_and_selected_ones_go_on() -> None:
    tokens = random_tokens(80, 9, batch=2)
    real = torch.ones(2, 80, dtype=torch.long)
    real[0, :19] = 0
    layer, alone = Layer("cam", of="seen", **OPTIONS), [Layer("cam", of="seen", **OPTIONS) for _ in range(2)]
    for first, last in [(0, 50), *((t, t + 1) for t in range(50, 80))]:
        if first == 60:
            layer.cache.batch_select_indices(torch.tensor([1, 0]))
            tokens, real = tuple(x[[1, 0]] for x in tokens), real[[1, 0]]  # type: ignore[assignment]
            alone.reverse()
        out = layer(*(x[:, :, first:last] for x in tokens), real[:, first:last])
        for row, single in enumerate(alone):
            at = [t for t in range(first, last) if real[row, t]]
            own = single(*(x[row : row + 1, :, at] for x in tokens))
            torch.testing.assert_close(out[row, -1], own[0, -1], rtol=1e-4, atol=1e-5)


def test_a_model_goes_on_with_a_saved_or_cropped_cache_and_needs_to_be_attached(tmp_path: Path) -> None:
    model, tokens = tiny("llama"), ids(110, batch=2)
    with pytest.raises(CacheError, match=r"with kvpolicy.attach"):
        model(tokens, **{CACHE: make_cache("cam", model, **OPTIONS)})
    with attach(model):
        cache, plain = (make_cache(name, model, window=6, heavy=8) for name in ("cam", "h2o"))
        for one in (cache, plain):
            model(tokens[:, :70], **{CACHE: one})
            for t in range(70, 80):
                model(tokens[:, t : t + 1], **{CACHE: one})
        model(tokens[:, 80:85], **{CACHE: cache})
        cache.crop(-5)  # of pending tokens: exact
        cache.save(tmp_path / "cache")
        again = CompressedCache.load(tmp_path / "cache", model)
        for t in range(80, 110):
            a, b = (model(tokens[:, t : t + 1], **{CACHE: x}).logits for x in (cache, again))
            assert torch.equal(a, b)
    assert cache.memory().bytes == again.memory().bytes
    cache.crop(-40)
    assert cache.get_seq_length() == 70
    assert not torch.equal(cache.dense(0)[1], plain.dense(0)[1])
    assert "values merged by cam" in str(cache.summary())


class Wrong(Merger):
    """Gives one number too few."""

    kind: Literal["wrong"] = "wrong"

    def shares(self, gone: Any, kept: Any, site: Any) -> Any:
        return kept.attention.unsqueeze(2)[..., 1:]


INT = {"kind": "int", "nbits": 8}
HEAVY = {"kind": "attention", "budget": 8}
CAM = {"store": "evict", "merge": "cam"}
WRONG: dict[str, tuple[list[Any], str]] = {
    "coded": ([{"policy": HEAVY, "store": INT}, CAM], "exact tiers alone, found int"),
    "no attention": ([{"policy": {"kind": "sink", "tokens": 4}, "store": "full"}, CAM], "found 'sink'; use policy"),
    "shared": ([{"policy": {**HEAVY, "share": "layer"}, "store": "full"}, CAM], "for each head"),
    "kept": ([{"policy": HEAVY, "store": "full"}, {"store": INT, "merge": "cam"}], "with store: evict"),
    "option": (
        [{"policy": HEAVY, "store": "full"}, {"store": "evict", "merge": {"kind": "cam", "tokens": 0}}],
        "tokens",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_can_not_be_merged_is_refused(name: str) -> None:
    tiers, told = WRONG[name]
    with pytest.raises(RecipeError, match=told):
        load_recipe({"tiers": tiers})


def test_a_merger_that_misbehaves_is_named() -> None:
    layer = Layer({"tiers": [{"policy": HEAVY, "store": "full"}, {"store": "evict", "merge": Wrong()}]})
    with pytest.raises(PluginError, match="merger 'wrong': shares must return a float tensor"):
        layer(*random_tokens(40, 1))
