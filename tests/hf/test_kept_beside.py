"""What stores keep beside codes, through selection of rows, files and crops."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import ids, tiny
from words import CACHE

from kvpolicy import CompressedCache, attach, make_cache
from kvpolicy.errors import CacheError


def recipe(store: Any, window: int = 3) -> dict[str, Any]:
    return {
        "name": "beside",
        "tiers": [{"policy": {"kind": "recent", "window": window}, "store": "full"}, {"store": store}],
    }


def packed(**options: Any) -> dict[str, Any]:
    return {"kind": "int", "nbits": 4, "per": "channel", **options}


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield


def test_rows_are_selected_before_anything_is_coded() -> None:
    model = tiny("llama")
    mask = torch.ones(2, 24, dtype=torch.long)
    mask[1, :9] = 0
    with attach(model):
        cache, straight = (make_cache(recipe(packed(group_size=8, extras=["sparse"]), 30), model) for _ in range(2))
        model(ids(24, 2), attention_mask=mask, **{CACHE: cache})
        cache.batch_select_indices(torch.tensor([0, 1, 1]))
        model(ids(24, 2)[[0, 1, 1]], attention_mask=mask[[0, 1, 1]], **{CACHE: straight})
        for t in range(30):
            token = ids(1, 2, seed=t)[[0, 1, 1]]
            found = model(token, **{CACHE: cache}).logits
            torch.testing.assert_close(found, model(token, **{CACHE: straight}).logits)


STORES = [
    packed(group_size=32, transforms=["scale"]),
    packed(group_size="arrival", extras=["sparse"]),
    packed(group_size=300, extras=["sparse"]),
    packed(group_size=200, extras=[{"kind": "sparse", "share": 0.1}]),
]


@pytest.mark.parametrize("tokens", [20, 420])
@pytest.mark.parametrize("store", STORES, ids=["scale", "arrival", "long", "share"])
def test_a_saved_cache_goes_on(store: Any, tokens: int, tmp_path: Path) -> None:
    model = tiny("llama")
    with attach(model):
        cache = make_cache(recipe(store), model)
        model(ids(tokens), **{CACHE: cache})
        cache.save(tmp_path / "cache")
        loaded = CompressedCache.load(tmp_path / "cache", model)
        for t in range(40):
            found = [model(ids(1, seed=t), **{CACHE: x}).logits for x in (cache, loaded)]
            assert torch.equal(*found)


def test_a_cache_that_holds_no_token_any_more_is_saved(tmp_path: Path) -> None:
    model = tiny("llama")
    cache = make_cache(recipe("evict"), model)
    model(ids(30), **{CACHE: cache})
    model(ids(2), **{CACHE: cache})
    cache.crop(-15)
    cache.save(tmp_path / "cache")
    assert CompressedCache.load(tmp_path / "cache", model).get_seq_length() == 17


@pytest.mark.parametrize("share", ["head", "layer", "model"])
def test_layers_that_a_crop_left_uneven_need_an_attached_model(share: str) -> None:
    model = tiny("llama")
    tiers = recipe("evict")["tiers"]
    policy = {"kind": "rank", "scorer": "key_norm", "budget": 8, "share": share}
    given = {"name": "ranked", "tiers": [tiers[0], {"policy": policy, "store": "full"}, tiers[1]]}
    cache = make_cache(given, model)
    model(ids(40), **{CACHE: cache})
    model(ids(1), **{CACHE: cache})
    cache.crop(-15)
    if share != "model":  # all layers lose the same tokens
        with pytest.raises(CacheError, match=r"same number|different numbers of tokens"):
            model(ids(1), **{CACHE: cache})
    with attach(model):
        model(ids(1), **{CACHE: cache})
    assert cache.get_seq_length() == 27
