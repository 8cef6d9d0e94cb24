"""Layers that saw different tokens, rows of some layers only, two threads: the cache refuses, and says how to go on."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from models import build, ids, tiny
from transformers import LlamaConfig
from words import CACHE

from kvpolicy import CompressedCache, make_cache
from kvpolicy.errors import CacheError

QUANT: list[Any] = [
    {"policy": {"kind": "recent", "window": 8}, "store": "full"},
    {"store": {"kind": "int", "nbits": 4}},
]


class Stop(Exception):
    """What interrupts."""


def lengths(cache: CompressedCache) -> list[int]:
    return [layer.get_seq_length() for layer in cache.layers]


def fail(*args: Any) -> None:
    raise Stop


def random_update(cache: CompressedCache, layer: int, n: int) -> None:
    cache.update(*torch.randn(2, 1, 2, n, 16), layer)


def config_cache(layers: int = 3) -> CompressedCache:
    config = LlamaConfig(
        num_hidden_layers=layers, hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=16
    )
    return make_cache({"name": "q", "tiers": QUANT}, config)


def test_layers_of_unequal_length_are_refused_until_cropped() -> None:
    cache = config_cache()
    for n in (20, 1):
        for layer in range(3):
            random_update(cache, layer, n)
    random_update(cache, 0, 1)
    assert lengths(cache) == [22, 21, 21]
    for use in (cache.memory, cache.summary, cache.commit, lambda: cache.crop(-1), lambda: random_update(cache, 0, 1)):
        with pytest.raises(CacheError, match=r"crop\(21\)"):
            use()
    with pytest.raises(CacheError, match="length that all layers had"):
        cache.crop(22)
    cache.crop(21)
    assert lengths(cache) == [21, 21, 21]
    for layer in range(3):
        random_update(cache, layer, 1)
    placed = {tuple(cache.positions(i).positions) for i in range(3)}
    assert len(placed) == 1
    assert cache.memory().bytes


def test_crop_to_a_positive_length_crops_every_layer_to_it() -> None:
    cache = config_cache()
    for layer in range(3):
        random_update(cache, layer, 30)
    random_update(cache, 0, 1)
    cache.crop(12)
    assert lengths(cache) == [12, 12, 12]


def test_tokens_that_left_their_places_for_good_are_not_cropped_back() -> None:
    cache = config_cache()
    for layer in range(3):
        random_update(cache, layer, 20)
    random_update(cache, 0, 100)  # 36 of them are let in at once
    with pytest.raises(CacheError, match="reset"):
        cache.crop(20)
    cache.reset()
    assert lengths(cache) == [0, 0, 0]


def test_two_threads_with_one_cache_are_refused() -> None:
    model = tiny("llama")
    cache = make_cache("logquant", model)
    inside, go = threading.Event(), threading.Event()

    def wait(*args: Any) -> None:
        inside.set()
        go.wait(30)

    hook = model.model.layers[1].register_forward_pre_hook(wait)
    failures: list[BaseException] = []

    def run() -> None:
        try:
            with torch.no_grad():
                model(ids(20), **{CACHE: cache})
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    inside.wait(30)
    hook.remove()
    with torch.no_grad(), pytest.raises(CacheError, match="another thread"):
        model(ids(5), **{CACHE: cache})
    with pytest.raises(CacheError, match="another thread"):
        cache.memory()
    go.set()
    thread.join()
    assert not failures
    assert lengths(cache) == [20, 20]
    with torch.no_grad():
        model(ids(5), **{CACHE: cache})
    assert lengths(cache) == [25, 25]


def test_rows_of_some_layers_only_are_refused() -> None:
    cache = config_cache()
    for layer in range(3):
        cache.update(*torch.randn(2, 4, 2, 20, 16), layer)
    cache.layers[1].tiers.stores["keys"][0].select = fail
    with pytest.raises(Stop):
        cache.reorder_cache(torch.tensor([1, 0, 2, 2]))
    with pytest.raises(CacheError, match="reorder_cache was interrupted"):
        cache.positions()
    cache.reset()
    random_update(cache, 0, 3)


@pytest.mark.parametrize(("rows", "found"), [([5], "5"), ([-3], "-3"), ([[0]], "0")])
def test_rows_out_of_range_are_refused(rows: Any, found: str) -> None:
    cache = config_cache()
    for layer in range(3):
        cache.update(*torch.randn(2, 2, 2, 20, 16), layer)
    for use in (cache.batch_select_indices, cache.reorder_cache):
        with pytest.raises(CacheError, match=f"rows must be in .*{found}"):
            use(torch.tensor(rows))
    cache.batch_select_indices(torch.tensor([-1]))
    assert cache.layers[2].batch_size == 1


def test_crop_where_nothing_is_compressed() -> None:
    model = build("mistral", torch.float32, sliding_window=64)
    tokens, greedy = torch.cat([ids(30)] * 2, dim=1), {"max_new_tokens": 12, "do_sample": False}
    cache = make_cache("full", model)
    with torch.no_grad():
        model(ids(20), **{CACHE: cache})
        cache.crop(-2)
        assert lengths(cache) == [18, 18]
        cache.reset()
        found = model.generate(tokens, prompt_lookup_num_tokens=3, **greedy, **{CACHE: cache})
        assert torch.equal(found, model.generate(tokens, prompt_lookup_num_tokens=3, **greedy))


@pytest.mark.parametrize("done", [1, 2, 3])
def test_the_prompt_ends_in_all_layers_or_in_none(done: int) -> None:
    """A single token that reached some layers alone, and was cropped again, ended the prompt in all of them."""
    config = LlamaConfig(num_hidden_layers=3, hidden_size=64, num_attention_heads=2, head_dim=32)
    cache = make_cache({"tiers": [{"policy": {"kind": "residual", "length": 8}, "store": "full"}, *QUANT[1:]]}, config)
    x = torch.randn(1, 2, 31, 32)

    def update(first: int, last: int, layers: int = 3) -> None:
        for layer in range(layers):
            cache.update(x[:, :, first:last], x[:, :, first:last], layer)

    update(0, 20)
    update(20, 21, done)
    cache.crop(20)
    update(20, 31)
    cache.commit()
    for layer in range(3):
        assert cache.positions(layer).tiers.tolist() == [1] * 28 + [0] * 3
