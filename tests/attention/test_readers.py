"""Readers: what a query reads of the last tier, against formulas in float64; and what it costs."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from layers import HEAD_DIM, Layer, random_tokens
from models import ids, tiny
from torch import Tensor
from words import CACHE

from kvpolicy import CompressedCache, Reader, attach, load_recipe, make_cache
from kvpolicy.errors import CacheError, PluginError, RecipeError

PAGE = 16


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield


def recipe(store: Any = "full", window: int = 0, read: Any = None, **options: Any) -> Any:
    quest = read or {"kind": "quest", "budget": 64, **options}
    above = [{"policy": {"kind": "recent", "window": window}, "store": "full"}] if window else []
    return load_recipe({"tiers": [*above, {"store": store, "read": quest}]})


def bounded(query: Tensor, keys: Tensor, pages: int) -> set[int]:
    """The tokens that Quest reads of those of one head: channel by channel, page by page, in float64."""
    starts = range(0, len(keys), PAGE)
    q, k = query.double(), keys.double()
    bounds = [
        sum(max(float(q[c] * part[:, c].min()), float(q[c] * part[:, c].max())) for c in range(len(q)))
        for part in (k[first : first + PAGE] for first in starts)
    ]
    best = sorted(range(len(bounds)), key=lambda i: -bounds[i])[:pages]
    return {t for i in best for t in range(i * PAGE, min((i + 1) * PAGE, len(keys)))}


def quest(query: Tensor, keys: Tensor, values: Tensor, window: int, pages: int) -> Tensor:
    """Attention `[batch, heads, head_dim]` of the newest token, by softmax over what it reads."""
    batch, heads, _, _ = query.shape
    out = torch.zeros(batch, heads, HEAD_DIM, dtype=torch.float64)
    n, groups = keys.shape[2] - 1, heads // keys.shape[1]
    for b in range(batch):
        for h in range(heads):
            q, k, v = query[b, h, -1].double(), keys[b, h // groups].double(), values[b, h // groups].double()
            read = bounded(query[b, h, -1], k[: n - window], pages)
            at = torch.tensor(sorted(read | set(range(n - window, n + 1))))
            out[b, h] = (k[at] @ q * HEAD_DIM**-0.5).softmax(0) @ v[at]
    return out


STORES: dict[str, Any] = {
    "full": "full",
    "token": {"kind": "int", "nbits": 8, "group_size": 8},
    "channel": {"kind": "int", "nbits": 4, "per": "channel", "group_size": 32},
    "table": {"kind": "nf4", "group_size": 8},
    "turned": {"kind": "int", "nbits": 4, "group_size": 8, "transforms": ["hadamard"]},
    "outliers": {"kind": "int", "nbits": 4, "group_size": 8, "extras": [{"kind": "sparse", "share": 0.1}]},
}


@pytest.mark.parametrize("name", STORES)
def test_a_step_attends_what_the_formula_says_whatever_the_store(name: str) -> None:
    window = 0 if name == "full" else 10
    layer = Layer(recipe(STORES[name], window, budget=64))
    query, keys, values = random_tokens(180, 5, batch=2)
    layer(*(x[:, :, :40] for x in (query, keys, values)))  # in chunks, the second after a step
    for first, last in [(40, 41), (41, 140), *((t, t + 1) for t in range(140, 180))]:
        layer.cache.commit()
        k, v = (
            torch.cat([a, b[:, :, first:last]], dim=2)
            for a, b in zip(layer.cache.dense(0), (keys, values), strict=True)
        )
        out = layer(query[:, :, first:last], keys[:, :, first:last], values[:, :, first:last])
        if last == first + 1 and first % 6 == 2:
            expected = quest(query[:, :, : first + 1], k, v, window, 4)
            torch.testing.assert_close(out[:, 0].double(), expected, rtol=1e-3, atol=1e-4)
    assert "read" in str(layer.cache.summary())


def test_padded_rows_read_as_if_alone_and_changes_keep_the_bounds_right() -> None:
    """Padding on the left, in the middle and none; then rows are chosen, a crop, a copy, and further steps."""
    tokens = random_tokens(150, 7, batch=3)
    real = torch.ones(3, 150, dtype=torch.long)
    real[0, :37] = 0
    real[1, 60:73] = 0
    layer, alone = Layer(recipe()), [Layer(recipe()) for _ in range(3)]

    def feed(first: int, last: int, check: bool) -> None:
        out = layer(*(x[:, :, first:last] for x in tokens), real[:, first:last])
        for row, single in enumerate(alone):
            at = [t for t in range(first, last) if real[row, t]]
            if at:
                own = single(*(x[row : row + 1, :, at] for x in tokens))
                if check:
                    torch.testing.assert_close(out[row], own[0], rtol=1e-5, atol=1e-6)

    feed(0, 100, False)
    for t in range(100, 130):
        feed(t, t + 1, True)
    for cache in (layer.cache, *(x.cache for x in alone)):
        cache.commit()
        cache.crop(-17)
    feed(113, 114, True)
    layer.cache.batch_select_indices(torch.tensor([2, 0, 1]))
    tokens, real = tuple(x[[2, 0, 1]] for x in tokens), real[[2, 0, 1]]  # type: ignore[assignment]
    alone = [alone[2], alone[0], alone[1]]
    layer.cache = copy.deepcopy(layer.cache)
    for t in range(114, 140):
        feed(t, t + 1, True)


def test_a_model_goes_on_with_a_saved_cache_and_needs_to_be_attached(tmp_path: Path) -> None:
    model, tokens = tiny("llama"), ids(150, batch=2)
    quest = recipe({"kind": "int", "nbits": 8}, 8)
    plain = make_cache(quest, model)
    with pytest.raises(CacheError, match=r"reader 'quest' chooses by each query .* with kvpolicy.attach"):
        model(tokens, **{CACHE: plain})
    with attach(model):
        cache = make_cache(quest, model)
        model(tokens[:, :120], **{CACHE: cache})
        for t in range(120, 130):
            model(tokens[:, t : t + 1], **{CACHE: cache})
        cache.save(tmp_path / "cache")
        again = CompressedCache.load(tmp_path / "cache", model)
        for t in range(130, 150):
            a, b = (model(tokens[:, t : t + 1], **{CACHE: x}).logits for x in (cache, again))
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        assert cache.memory().bytes == again.memory().bytes
    reads = [row.read for row in cache.summary().layers]
    held = [row.tokens for row in cache.summary().layers]
    assert held == [150, 150]
    assert reads == [72, 72]  # 64 in pages, and the window
    pages = -(-150 // PAGE)
    keys = [s for s in cache.memory().stores if s.side == "keys" and 1 in s.tiers]
    expected = 2 * 2 * pages * 2 * 32 * 4  # rows, heads, bounds of channels in float32
    assert all(abs(s.extras - expected) < expected / pages for s in keys)


def test_a_budget_that_covers_all_changes_nothing() -> None:
    model, tokens = tiny("llama"), ids(90, batch=2)
    with attach(model):
        found = []
        for name in ({"tiers": [{"store": "full"}]}, recipe(budget=4096)):
            cache = make_cache(name, model)
            model(tokens[:, :80], **{CACHE: cache})
            found.append(torch.cat([model(tokens[:, t : t + 1], **{CACHE: cache}).logits for t in range(80, 90)], 1))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


class Nearest(Reader):
    """Reads pages whose mean key is nearest, the same for all query heads of a KV head."""

    kind: Literal["nearest"] = "nearest"

    def summarize(self, keys: Tensor, real: Tensor, site: Any) -> Any:
        return {"mean": keys.float().sum(3) / real.sum(3).clamp(min=1).unsqueeze(3)}

    def score(self, query: Tensor, summary: Mapping[str, Tensor], site: Any) -> Any:
        return query.mean(2, keepdim=True) @ summary["mean"].transpose(2, 3)


def test_a_reader_of_ten_lines_reads_the_pages_that_it_scores_highest() -> None:
    layer = Layer(recipe(read=Nearest(page=8, budget=20)))
    query, keys, values = random_tokens(90, 3, batch=2)
    layer(*(x[:, :, :89] for x in (query, keys, values)))
    out = layer(*(x[:, :, 89:] for x in (query, keys, values)))[:, 0].double()
    for b in range(2):
        for h in range(4):
            k, v = keys[b, h // 2].double(), values[b, h // 2].double()
            mean = torch.stack([part.mean(0) for part in k[:89].split(8)])
            best = (mean @ query[b, h // 2 * 2 : h // 2 * 2 + 2, 89].double().mean(0)).topk(2).indices.tolist()
            at = torch.tensor([t for p in best for t in range(8 * p, min(8 * p + 8, 89))] + [89])
            expected = (k[at] @ query[b, h, 89].double() * HEAD_DIM**-0.5).softmax(0) @ v[at]
            torch.testing.assert_close(out[b, h], expected, rtol=1e-4, atol=1e-5)


LIES: dict[str, tuple[str, Any]] = {
    "summarize": ("summarize must return named float tensors", lambda self, k, r, s: {"x": k[:, :, :1]}),
    "score": ("score must return a float tensor", lambda self, q, s, site: q),
    "count": ("count must return an integer", lambda self: 0),
}


@pytest.mark.parametrize("method", LIES)
def test_a_reader_that_misbehaves_is_named(method: str) -> None:
    told, lie = LIES[method]
    liar = type("Liar", (Nearest,), {method: lie})
    layer, tokens = Layer(recipe(read=liar(page=8, budget=8))), random_tokens(50, 3)
    layer(*(x[:, :, :49] for x in tokens))
    with pytest.raises(PluginError, match=rf"reader 'nearest': {told}"):
        layer(*(x[:, :, 49:] for x in tokens))


INT = {"kind": "int", "nbits": 4}
QUEST = {"kind": "quest"}
RECENT = {"kind": "recent", "window": 4}
WRONG: dict[str, tuple[list[Any], str]] = {
    "above the last": ([{"policy": RECENT, "store": "full", "read": QUEST}, {"store": INT}], "must stand in the last"),
    "evict": ([{"policy": RECENT, "store": "full"}, {"store": "evict", "read": QUEST}], "a tier that holds tokens"),
    "attention": (
        [{"policy": {"kind": "attention", "budget": 4}, "store": "full"}, {"store": INT, "read": QUEST}],
        "need no attention, since what is not read receives none, found 'attention'",
    ),
    "stores": ([{"policy": RECENT, "store": INT}, {"store": INT, "read": QUEST}], "stores in the same tiers"),
    "kind": ([{"store": "full", "read": "quset"}], "did you mean 'quest'"),
    "option": ([{"store": "full", "read": {"kind": "quest", "page": 0}}], "page"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_can_not_be_read_is_refused(name: str) -> None:
    tiers, told = WRONG[name]
    with pytest.raises(RecipeError, match=told):
        load_recipe({"tiers": tiers})


def test_a_recipe_with_a_reader_is_written_and_read() -> None:
    found = load_recipe("quest", budget=128)
    for resolved in (False, True):
        assert load_recipe({**_plain(found, resolved)}).tiers == found.tiers
    assert (
        load_recipe({"tiers": [{"store": "full", "read": "quest"}]}).tiers[0].read == load_recipe("quest").tiers[0].read
    )


def _plain(found: Any, resolved: bool) -> Any:
    import yaml

    return yaml.safe_load(found.to_yaml(resolved))
