"""Whether tokens come one by one, in chunks, or with candidates that are cropped again is of no account."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from recipes import NAMED, named, one_lossy_store, recipes
from transformers import LlamaConfig

from kvpolicy import CompressedCache, Recipe, load_recipe, make_cache

LAYERS, HEADS, DIM = 2, 2, 16


def config(layers: int = LAYERS) -> LlamaConfig:
    return LlamaConfig(
        num_hidden_layers=layers, hidden_size=64, num_attention_heads=4, num_key_value_heads=HEADS, head_dim=DIM
    )


CONFIG = config()


def states(cache: CompressedCache) -> list[Any]:
    found: list[Any] = []
    for i in range(len(cache.layers)):
        held = cache.positions(i)
        found += [held.positions.tolist(), held.tiers.tolist(), *cache.dense(i)]
    return found


def same(a: CompressedCache, b: CompressedCache) -> bool:
    return all(
        torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in zip(states(a), states(b), strict=True)
    )


def feed(cache: CompressedCache, x: torch.Tensor, start: int, stop: int) -> None:
    for i in range(len(cache.layers)):
        cache.update(x[0, i, :, :, start:stop], x[1, i, :, :, start:stop], i)


@settings(deadline=None, derandomize=True, max_examples=30)
@given(
    recipe=recipes(DIM).filter(one_lossy_store), cuts=st.lists(st.integers(1, 100), max_size=6), n=st.integers(1, 200)
)
def test_any_chunking_gives_the_same_codes(recipe: Recipe, cuts: list[int], n: int) -> None:
    x = torch.randn(2, LAYERS, 1, HEADS, n, DIM, generator=torch.Generator().manual_seed(n))
    one, many = make_cache(recipe, CONFIG), make_cache(recipe, CONFIG)
    for t in range(n):
        feed(one, x, t, t + 1)
    ends = [min(end, n) for end in np.cumsum(cuts).tolist() if end < n]
    for start, end in zip([0, *ends], [*ends, n], strict=True):
        feed(many, x, start, end)
    one.commit()
    many.commit()
    assert same(one, many)


@pytest.mark.parametrize("name", [name for name in NAMED if name != "hf-quantized"])
@pytest.mark.parametrize("prompt", [1, 30, 64, 65, 129])
def test_cropped_candidates_leave_no_trace(name: str, prompt: int) -> None:
    """Assisted decoding: chunks of candidates of which some are cropped again, always among the newest 64."""
    layers = 3 if name == "layers" else LAYERS  # a first, a last and another
    x = torch.randn(2, layers, 1, HEADS, 400, DIM, generator=torch.Generator().manual_seed(1))
    junk = torch.randn(2, layers, 1, HEADS, 64, DIM, generator=torch.Generator().manual_seed(2))
    plain, assisted = make_cache(named(name), config(layers)), make_cache(named(name), config(layers))
    feed(plain, x, 0, prompt)
    feed(assisted, x, 0, prompt)
    at = prompt
    for accepted, rejected in [(1, 4), (3, 0), (1, 63), (5, 5), (40, 24), (1, 1), (2, 6), (9, 1), (1, 63)]:
        chunk = torch.cat([x[..., at : at + accepted, :], junk[..., :rejected, :]], dim=4)
        feed(assisted, chunk, 0, accepted + rejected)
        assisted.crop(-rejected)
        for t in range(at, at + accepted):
            feed(plain, x, t, t + 1)
        at += accepted
        # The pending tokens differ, so both commit on copies.
        a, b = copy.deepcopy(plain), copy.deepcopy(assisted)
        a.commit()
        b.commit()
        if name == "eight-then-two":
            assert states(a)[:2] == states(b)[:2]
        else:
            assert same(a, b)


def test_a_prompt_whose_tail_is_cropped_is_placed_like_the_shorter_prompt() -> None:
    x = torch.randn(2, LAYERS, 1, HEADS, 400, DIM, generator=torch.Generator().manual_seed(1))
    for name in ("logquant", "partial-logquant", "kivi", "fractions", "eight-then-two", "arrival", "hf-quantized"):
        short, long = make_cache(named(name), CONFIG), make_cache(named(name), CONFIG)
        feed(short, x, 0, 100)
        feed(long, x, 0, 140)
        long.crop(100)
        for t in range(100, 170):
            feed(short, x, t, t + 1)
            feed(long, x, t, t + 1)
        if name == "eight-then-two":
            assert states(short)[:2] == states(long)[:2]
        else:
            assert same(short, long), name


def test_a_cropped_layer_is_that_of_every_layer() -> None:
    recipe = load_recipe("logquant")
    cache = make_cache(recipe, CONFIG)
    x = torch.randn(2, LAYERS, 1, HEADS, 300, DIM)
    feed(cache, x, 0, 300)
    cache.crop(33)
    assert [layer.get_seq_length() for layer in cache.layers] == [33] * LAYERS
    assert all(cache.positions(i).positions.tolist() == list(range(33)) for i in range(LAYERS))
