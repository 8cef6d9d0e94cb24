"""Bytes: equal to an independent count of the tensors held, nothing twice, nothing of the prompt kept alive."""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import exact, ids, llama, tiny
from recipes import NAMED, named
from words import CACHE

from kvpolicy import CompressedCache, attach, make_cache
from kvpolicy.hf.layer import TieredLayer
from kvpolicy.placement.planner import Placement
from kvpolicy.placement.simulate import simulate

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield


def reachable(root: Any, without: tuple[int, ...] = ()) -> Iterator[torch.Tensor]:
    """Every tensor that can be reached from `root` by attributes and containers, each object once."""
    seen, todo = set(without), [root]
    while todo:
        item = todo.pop()
        if id(item) in seen or isinstance(item, (str, int, float, type(None), np.ndarray, type)):
            continue
        seen.add(id(item))
        if isinstance(item, torch.Tensor):
            yield item
        elif isinstance(item, dict):
            todo += [*item.keys(), *item.values()]
        elif isinstance(item, (list, tuple, set)):
            todo += item
        elif hasattr(item, "__dict__"):
            todo += vars(item).values()


def storages(tensors: Any) -> dict[int, int]:
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.numel()}


def filled(recipe: Any, model: Any, tokens: int = 300, batch: int = 1) -> CompressedCache:
    cache = make_cache(recipe, model)
    model(ids(tokens, batch), **{CACHE: cache})
    for t in range(3):
        model(ids(1, batch, seed=t), **{CACHE: cache})
    return cache


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMED)
def test_bytes_are_those_of_the_tensors_held(name: str, dtype: torch.dtype) -> None:
    cache = filled(named(name), tiny("llama", dtype), batch=2)
    memory = cache.memory()
    scratch = storages(reachable(cache.scratch))
    held = storages(reachable(cache.layers))
    steps = {id(x.tiers.step) for x in cache.layers if isinstance(x, TieredLayer)}
    layouts = storages(t for x in cache.layers for t in reachable(x.tiers.step))
    assert len(steps) == len({id(x.tiers.placement) for x in cache.layers if isinstance(x, TieredLayer)})
    pages = sum(n for at, n in held.items() if at not in scratch and at not in layouts)
    assert pages == sum(s.reserved for s in memory.stores)
    assert sum(scratch.values()) + sum(layouts.values()) == memory.scratch
    index = memory.shared_indices + sum(s.indices for s in memory.stores)
    assert memory.reserved == pages + memory.scratch + index
    used = 0
    for layer in cache.layers:
        for stores in layer.tiers.stores.values():
            for store in stores:
                for part in store.parts.values() if store is not None else ():
                    used += sum(block.numel() * block.element_size() for _, block in part.blocks())
    assert used == memory.bytes - index
    assert memory.bytes == sum(memory.total(kind) for kind in ("codes", "scales", "zeros", "exact", "indices"))
    theirs = exact(tiny("llama", dtype))
    tiny("llama", dtype)(ids(303, 2), **{CACHE: theirs})
    assert memory.exact_bytes == sum(t.nbytes for layer in theirs.layers for t in (layer.keys, layer.values))
    assert memory.values == memory.exact_bytes // dtype.itemsize
    assert memory.ratio == memory.exact_bytes / memory.bytes
    assert memory.bits_per_value == 8 * memory.bytes / memory.values


@pytest.mark.parametrize("name", ["h2o", "zipcache", "mikv", "logquant", "kivi", "streaming-llm", "adakv"])
def test_bytes_of_tables_and_scores_are_those_of_the_tensors_held(name: str) -> None:
    model = tiny("llama")
    mask = torch.ones(2, 300, dtype=torch.long)
    mask[1, :90] = 0
    with attach(model):
        cache = make_cache(name, model, **{"kivi": {"group_size": 16}, "adakv": {"capacity": 100}}.get(name, {}))
        model(ids(300, 2), **{CACHE: cache}, attention_mask=mask)
        for t in range(40):
            model(ids(1, 2, seed=t), **{CACHE: cache})
    memory = cache.memory()
    held = storages(reachable(cache.layers))
    layouts = storages(t for x in cache.layers for t in reachable(x.tiers.step))
    tensors = sum(n for at, n in held.items() if at not in layouts)
    assert tensors == sum(s.reserved + s.indices for s in memory.stores)
    assert sum(layouts.values()) == memory.scratch
    assert (memory.total("scores") > 0) == (name in ("h2o", "zipcache", "mikv", "adakv"))
    assert memory.bytes <= memory.reserved <= 1.6 * memory.bytes


@pytest.mark.parametrize("name", NAMED)
def test_nothing_is_stored_twice_or_kept_alive_by_a_view(name: str) -> None:
    model = tiny("llama")
    cache = make_cache(named(name), model)
    for tokens in (700, 1, 90, 1):
        model(ids(tokens, 2), **{CACHE: cache})
        own = [x for x in vars(cache).values() if x is not cache.scratch]
        steps = tuple(id(x.tiers.step) for x in cache.layers)
        tensors = [t for t in reachable(own, (id(cache.scratch), *steps)) if t.numel()]
        assert len(tensors) == len(storages(tensors)), "two tensors share a storage"
        for t in tensors:
            assert t.untyped_storage().nbytes() == t.numel() * t.element_size(), "a view keeps more alive"
    memory = cache.memory()
    evicts = cache.recipe.tiers[-1].keys == "evict"
    expected = sum(map(len, simulate(cache.recipe.tiers, 792))) if evicts else 792
    for layer in range(2):
        for side in ("keys", "values"):
            assert sum(s.tokens for s in memory.stores if (s.layer, s.side) == (layer, side)) == expected


def test_free_pages_are_few() -> None:
    memory = filled("logquant", tiny("llama"), tokens=3000).memory()
    pages = memory.reserved - memory.scratch
    assert memory.bytes <= pages < 1.5 * memory.bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_effective_bits_of_logquant_by_hand(dtype: torch.dtype) -> None:
    n, bits = 3000, dtype.itemsize * 8
    cache = filled("logquant", llama(64, 4, 2, dtype), tokens=n - 3)
    memory = cache.memory()
    window, log, rest = (len(x) for x in simulate(cache.recipe.tiers, n))
    assert 42 <= window < 84
    assert log <= 42
    # 2 bits, and a scale and an offset for each group of 64 channels.
    coded = 2 + 2 * bits / 64
    by_hand = ((window + log) * bits + rest * coded) / n
    assert 8 * (memory.bytes - memory.total("indices")) / memory.values == pytest.approx(by_hand, rel=1e-12)
    assert memory.bits_per_value == pytest.approx(by_hand, abs=0.1)
    assert memory.ratio == pytest.approx(bits / by_hand, rel=0.03)
    assert memory.total("codes") == 2 * 2 * 2 * rest * 16
    assert memory.total("scales") == memory.total("zeros") == 2 * 2 * 2 * rest * dtype.itemsize
    assert memory.total("exact") == 2 * 2 * 2 * (window + log) * 64 * dtype.itemsize


def test_effective_bits_of_kivi_by_hand() -> None:
    n, model = 1200, llama(64, 4, 2, torch.float32)
    memory = filled("kivi", model, tokens=n - 3).memory()
    whole = n // 128 * 128
    keys = whole * (2 + 2 * 32 / 32) + (n - whole) * 32
    values = (n - 128) * (2 + 2 * 32 / 32) + 128 * 32
    by_hand = (keys + values) / 2 / n
    assert 8 * (memory.bytes - memory.total("indices")) / memory.values == pytest.approx(by_hand, rel=1e-12)


def test_the_exact_recipe_costs_its_exact_bytes_and_the_positions() -> None:
    memory = filled("full", tiny("llama"), tokens=500).memory()
    assert memory.total("exact") == memory.exact_bytes
    assert memory.bytes - memory.exact_bytes == memory.shared_indices == 503 * 4


def test_evicted_tokens_cost_nothing() -> None:
    model = tiny("llama")
    small, large = (filled("logquant-evict", model, tokens=n).memory() for n in (400, 1200))
    held = len(simulate(named("logquant-evict").tiers, 403)[0])
    assert held < 100
    assert large.bytes < 1.5 * small.bytes
    assert large.reserved - large.scratch < 1.5 * (small.reserved - small.scratch)


def test_positions_are_kept_and_planned_once_for_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    advance = Placement.advance

    def counted(self: Placement, *args: Any) -> Any:
        calls.append(self)
        return advance(self, *args)

    monkeypatch.setattr(Placement, "advance", counted)
    found = {}
    for family in ("llama", "gemma3_text", "deepseek_v3"):
        model, cache = tiny(family), make_cache("logquant", tiny(family))
        calls.clear()
        for tokens in (200, 1, 1, 150, 5, 90, 1):
            model(ids(tokens), **{CACHE: cache})
        if family != "gemma3_text":
            cache.crop(-20)
            cache.crop(300)
        model(ids(100), **{CACHE: cache})
        copied = copy.deepcopy(cache)
        for each in (cache, copied):
            model(ids(70), **{CACHE: each})
            memory = each.memory()
            tiered = [layer.tiers for layer in each.layers if isinstance(layer, TieredLayer)]
            assert len(tiered) == 2
            assert len({id(tiers.step) for tiers in tiered}) == 1
            assert memory.shared_indices <= 4 * 470 * 2 + 8 * 200
        found[family] = len(calls)
    # 9 updates and their committing, whatever the number of layers.
    assert max(found.values()) <= 30


def test_during_prefill_one_layer_is_exact_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted over every tensor alive in Python: what a layer keeps exactly would add up."""
    from models import build

    tokens, layers = 777, 6
    model = build("llama", torch.float32, num_hidden_layers=layers, head_dim=32)
    alive: list[int] = []
    held: list[int] = []
    update = TieredLayer.update

    def counted(self: TieredLayer, *args: Any, **kwargs: Any) -> Any:
        result = update(self, *args, **kwargs)
        tensors = [t for t in gc.get_objects() if issubclass(type(t), torch.Tensor)]  # no dead proxy
        large = [t for t in tensors if t.ndim == 4 and t.numel() > 0]
        alive.append(sum(storages(t for t in large if tokens in t.shape).values()))
        held.append(sum(storages(reachable(cache.layers, (id(self.tiers.scratch),))).values()))
        return result

    monkeypatch.setattr(TieredLayer, "update", counted)
    for options in ({"recipe": "logquant"}, {"recipe": "balanced"}):
        cache = make_cache(options["recipe"], model)
        alive.clear()
        held.clear()
        model(ids(tokens), **{CACHE: cache})
        assert len(alive) == layers
        assert max(alive) <= alive[0] * 1.01, "exact tensors of earlier layers are still alive"
        steps = np.diff(held)
        exact_layer = 2 * 2 * tokens * 32 * 4
        assert (steps < 0.6 * exact_layer).all()
        assert (steps == steps[0]).all()


def test_returned_tensors_do_not_count_and_do_not_change_the_cache() -> None:
    cache = make_cache(named("logquant"), tiny("llama"))
    x = torch.randn(1, 2, 100, 32)
    cache.update(x, x, 0)
    keys, values = cache.update(x, x, 0)
    before = [t.clone() for t in cache.dense(0)]
    keys.zero_()
    values.zero_()
    x.zero_()
    assert all(torch.equal(a, b) for a, b in zip(cache.dense(0), before, strict=True))


def test_the_table_and_the_summary_name_every_store() -> None:
    cache = filled(named("partial-logquant"), tiny("gemma3_text"))
    memory = cache.memory()
    table = memory.table()
    assert "bits per value" in table
    for s in memory.stores:
        assert str(s.bytes) in table
    assert {s.side for s in memory.stores} == {"keys", "values", "both"}
    text = str(cache.summary())
    assert "DynamicSlidingWindowLayer" in text
    assert "recent(window 16, flush 16)" in text


def test_an_empty_cache() -> None:
    memory = make_cache("logquant", tiny("llama")).memory()
    assert (memory.bytes, memory.exact_bytes, memory.bits_per_value, memory.ratio) == (0, 0, 0.0, 1.0)
    assert memory.table()


@pytest.mark.parametrize("name", ["logquant", "kivi", "h2o"])
@pytest.mark.parametrize("more", [0, 5])
def test_a_loaded_cache_takes_no_more_room_where_rows_are_repeated(name: str, more: int, tmp_path: Path) -> None:
    """Rows that are alike share what says where their tokens are, also after further updates, and in a file."""
    model = tiny("llama")
    mask = torch.ones(2, 80, dtype=torch.long)
    mask[1, :9] = 0
    with attach(model):
        cache = make_cache(name, model)
        model(ids(80, 2), attention_mask=mask, **{CACHE: cache})
        once = cache.memory().shared_indices - mask.numel()
        cache.batch_repeat_interleave(3)
        mask = mask.repeat_interleave(3, 0)
        for step in range(more):
            mask = torch.cat([mask, torch.ones(6, 1, dtype=torch.long)], dim=1)
            model(ids(1, 6, seed=step), attention_mask=mask, **{CACHE: cache})
        cache.save(tmp_path / "cache")
        found = cache.memory().shared_indices
        assert found - mask.numel() <= once + 3 * 8 * more
        assert CompressedCache.load(tmp_path / "cache", model).memory().shared_indices == found
