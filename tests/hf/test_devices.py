"""Caches of models whose layers lie on several devices, or move between them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import ids, tiny
from words import CACHE

from kvpolicy import make_cache


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield


def test_layers_live_on_the_device_of_their_model_layer() -> None:
    """The meta device stands for a second one."""
    cache = make_cache("logquant", tiny("llama"))
    here = torch.randn(1, 2, 100, 32)
    cache.update(here, here, 0)
    keys, _ = cache.update(here.to("meta"), here.to("meta"), 1)
    assert keys.device.type == "meta"
    assert cache.dense(0)[0].device.type == "cpu"
    for i, device in enumerate(("cpu", "meta")):
        parts = [part for store in cache.layers[i].tiers.stores["keys"] for part in store.parts.values()]
        assert {page.device.type for part in parts for page in part.pages} == {device}
    cache.update(here, here, 0)
    assert cache.dense(0)[0].shape == (1, 2, 200, 32)


def test_offload_and_prefetch_change_nothing() -> None:
    model = tiny("llama")
    cache, plain = make_cache("logquant", model), make_cache("logquant", model)
    for t in range(3):
        cache.layers[0].offload()
        cache.layers[0].prefetch()
        a, b = (model(ids(60, seed=t), **{CACHE: c}).logits for c in (cache, plain))
        assert torch.equal(a, b)
