"""Transforms that are fitted to queries: MiKV's channel balancer, against its formula in float64."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from layers import HEAD_DIM, Layer, random_tokens
from models import ids, tiny
from torch import Tensor
from words import CACHE

from kvpolicy import CompressedCache, attach, load_recipe, make_cache
from kvpolicy.errors import CacheError, RecipeError

BALANCED: dict[str, Any] = {
    "kind": "int",
    "nbits": 2,
    "group_size": "half",
    "transforms": [{"kind": "scale", "by": "queries"}],
}
PLAIN: dict[str, Any] = {"kind": "int", "nbits": 2, "group_size": "half"}


def recipe(keys: Any = BALANCED, window: int = 8) -> dict[str, Any]:
    return {
        "name": "balanced",
        "tiers": [
            {"policy": {"kind": "recent", "window": window}, "store": "full"},
            {"keys": keys, "values": PLAIN},
        ],
    }


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield


def rounded(x: Tensor, nbits: int, size: int) -> Tensor:
    groups = x.unflatten(-1, (-1, size))
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scale = (high - low) / (2**nbits - 1)
    return (((groups - low) / scale).round() * scale + low).flatten(-2)


def channels(n: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Queries of two heads for each KV head, keys and values, some of whose channels are larger."""
    query, keys, values = random_tokens(n, seed)
    spread = torch.logspace(-0.4, 0.4, HEAD_DIM)
    return query * spread[torch.arange(HEAD_DIM) * 5 % HEAD_DIM], keys * spread, values


def test_keys_are_balanced_as_the_paper_says() -> None:
    query, keys, values = channels(200)
    layer = Layer(recipe(window=40))
    layer(query, keys, values)
    layer.cache.commit()
    store = layer.tiers.stores["keys"][1]
    coded = 160 - 64  # 64 wait in case they are taken back
    factor = (query.unflatten(1, (2, 2)).abs().amax((2, 3)) / keys[:, :, :coded].abs().amax(2)).double().sqrt()
    torch.testing.assert_close(store.chain.state[0]["divisors"][:, :, 0].double(), 1 / factor, rtol=1e-5, atol=0)
    # Queries over the factor and keys times the factor are equally large in each channel.
    largest = (keys[:, :, :coded].double() * factor[:, :, None]).abs().amax(2)
    torch.testing.assert_close(largest, (query.unflatten(1, (2, 2)).abs().amax((2, 3)).double() / factor))
    expected = rounded(keys[:, :, :160].double() * factor[:, :, None], 2, HEAD_DIM // 2) / factor[:, :, None]
    found = torch.cat([x for _, x in store.decoded(64, torch.float32)], dim=2).double()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    plain = rounded(keys[:, :, :160].double(), 2, HEAD_DIM // 2)
    scores, exact = (
        query.unflatten(1, (2, 2)).double() @ x.double()[:, :, None].transpose(3, 4) for x in (found, keys[:, :, :160])
    )
    bare = query.unflatten(1, (2, 2)).double() @ plain[:, :, None].transpose(3, 4)
    assert (scores - exact).square().mean() < 0.7 * (bare - exact).square().mean()


def test_attention_is_that_over_the_decoded_keys_as_a_text_goes_on() -> None:
    query, keys, values = channels(150, seed=4)
    layer = Layer(recipe())
    for first, last in [(0, 30), (30, 110), *((t, t + 1) for t in range(110, 150))]:
        layer.cache.guard.commit(last - first)
        held = layer.cache.dense(0) if first else (keys[:, :, :0], values[:, :, :0])
        found = layer(*(x[:, :, first:last] for x in (query, keys, values)))
        k, v = (torch.cat([h, x[:, :, first:last]], dim=2).double() for h, x in zip(held, (keys, values), strict=True))
        causal = torch.arange(last) <= torch.arange(first, last)[:, None]
        scores = query[:, :, first:last].double() @ k.repeat_interleave(2, 1).transpose(2, 3) * HEAD_DIM**-0.5
        expected = scores.masked_fill(~causal, -torch.inf).softmax(-1) @ v.repeat_interleave(2, 1)
        torch.testing.assert_close(found.transpose(1, 2).double(), expected, rtol=1e-4, atol=1e-5)


def test_queries_of_all_updates_count_until_something_is_coded() -> None:
    query, keys, values = channels(60)
    whole, parts = Layer(recipe(window=100)), Layer(recipe(window=100))
    whole(query, keys, values)
    for t in range(0, 60, 12):
        parts(*(x[:, :, t : t + 12] for x in (query, keys, values)))
    asked = [layer.tiers.stores["keys"][1].chain.asked for layer in (whole, parts)]
    torch.testing.assert_close(*asked)
    grouped = query.unflatten(1, (2, 2)).flatten(2, 3)
    torch.testing.assert_close(asked[0][:, :, 0], grouped.amin(2))
    torch.testing.assert_close(asked[0][:, :, 1], grouped.amax(2))
    assert whole.cache.memory().total("state") == asked[0].numel() * 4


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_asks_nothing(side: str) -> None:
    query, keys, values = (torch.cat([x, x]) for x in channels(50))
    real = torch.ones(2, 50, dtype=torch.long)
    own = slice(20, 50) if side == "left" else slice(0, 30)
    real[1] = 0
    real[1, own] = 1
    spoilt = query.clone()
    spoilt[1, :, real[1] == 0] = 1e4
    layer, alone = Layer(recipe(window=60)), Layer(recipe(window=60))
    layer(spoilt, keys, values, real)
    alone(query[1:, :, own], keys[1:, :, own], values[1:, :, own])
    found, expected = (x.tiers.stores["keys"][1].chain.asked for x in (layer, alone))
    torch.testing.assert_close(found[1:], expected)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_rows_files_crops_and_resets(family: str, tmp_path: Path) -> None:
    model = tiny(family)
    for window, tokens in ((60, 50), (8, 50)):  # nothing coded yet, and most
        with attach(model):
            cache = make_cache(recipe(window=window), model)
            first = model(ids(tokens, 2), **{CACHE: cache}).logits
            cache.save(tmp_path / f"{window}")
            loaded, copied = CompressedCache.load(tmp_path / f"{window}", model), copy.deepcopy(cache)
            for one in (cache, loaded, copied):
                one.batch_select_indices(torch.tensor([1, 0, 1]))
            found = []
            for one in (cache, loaded, copied):
                steps = [model(ids(1, 2, seed=t)[[1, 0, 1]], **{CACHE: one}).logits for t in range(80)]
                found.append(torch.cat(steps))
            assert torch.equal(found[0], found[1])
            assert torch.equal(found[0], found[2])
            cache.crop(-100)
            model(ids(1, 2)[[1, 0, 1]], **{CACHE: cache})
            cache.reset()
            torch.testing.assert_close(model(ids(tokens, 2), **{CACHE: cache}).logits, first)


def test_a_model_that_is_not_attached_is_refused_until_keys_are_coded() -> None:
    model = tiny("llama")
    cache = make_cache(recipe(), model)
    message = (
        r"transform 'scale' fits keys to the queries that meet them, which only an attached model shows; use: with"
    )
    with pytest.raises(CacheError, match=message):
        model(ids(40), **{CACHE: cache})
    assert cache.get_seq_length() == 0
    with attach(model):
        model(ids(90), **{CACHE: cache})
        expected = model(ids(1), **{CACHE: copy.deepcopy(cache)}).logits
    found = model(ids(1), **{CACHE: cache}).logits  # what was found of queries is all that is needed
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_where_queries_have_no_meaning_they_are_refused_by_name() -> None:
    values = {**recipe(), "tiers": [{"store": BALANCED}]}
    with pytest.raises(
        RecipeError, match=r"values\.transforms\[0\].*needs queries, which meet keys alone.*write it below keys"
    ):
        make_cache(values, tiny("llama"))
    later = recipe({**BALANCED, "transforms": ["hadamard", {"kind": "scale", "by": "queries"}]})
    with pytest.raises(RecipeError, match=r"transforms\[1\].*must be the first of its list, found 1 before it"):
        make_cache(later, tiny("llama"))


def test_mikv_has_its_balancer_and_groups_of_half_a_head() -> None:
    keys = load_recipe("mikv").tiers[-1].keys
    assert (keys.group_size, keys.transforms[0].by) == ("half", "queries")
    with attach(tiny("llama")):
        cache = make_cache("mikv", tiny("llama"))
        tiny("llama")(ids(120), **{CACHE: cache})
        store = cache.layers[0].tiers.stores["keys"][-1]
        assert store.group_size * 2 == store.head_dim
        assert store.direct
    odd = recipe({**PLAIN, "group_size": "half"})
    config = copy.deepcopy(tiny("llama").config)
    config.head_dim = 33
    with pytest.raises(RecipeError, match="group_size: half must go with an even head_dim, found 33"):
        make_cache(odd, config)
