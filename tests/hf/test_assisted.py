"""Assisted decoding rolls candidates back: what is left is what plain greedy decoding leaves.

Later queries of one chunk see the placement of its start, so with lossy stores the text may differ from that of
plain decoding; the placement for the same number of tokens may not.
"""

from __future__ import annotations

import copy
from functools import lru_cache
from typing import Any

import pytest
import torch
from models import bundled, ids, llama, tiny
from words import CACHE

from kvpolicy import CompressedCache, make_cache
from kvpolicy.tasks.load import load_task

SAME_TEXT = ("full", "logquant", "balanced", "streaming-quant")
"""Recipes that on this prompt leave no doubt about the next token."""
RECIPES: dict[str, dict[str, Any]] = {
    "full": {},
    "logquant": {"window": 12, "nbits": 4},
    "partial-logquant": {"window": 16, "nbits": 4},
    "kivi": {"residual": 32, "nbits": 4},
    "balanced": {"window": 16},
    "streaming-quant": {"window": 12, "nbits": 8},
    "logquant-evict": {"window": 40},
    "streaming-llm": {"window": 60},
}


def prompt() -> torch.Tensor:
    _, tokenizer = bundled()
    (sample,) = load_task("code", 1, seed=5, tokens=140)
    return tokenizer(sample.prompt, return_tensors="pt").input_ids


def generate(cache: CompressedCache, tokens: torch.Tensor, **options: Any) -> torch.Tensor:
    model, _ = bundled()
    with torch.no_grad():
        result = model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            **{CACHE: cache},
            max_new_tokens=40,
            min_new_tokens=40,
            do_sample=False,
            **options,
        )
    assert isinstance(result, torch.Tensor)
    return result


@lru_cache(maxsize=1)
def decoded(name: str) -> tuple[CompressedCache, torch.Tensor]:
    """What plain greedy decoding leaves, and its text."""
    cache = make_cache(name, bundled()[0], **RECIPES[name])
    return cache, generate(cache, prompt())


def held(cache: CompressedCache, length: int) -> list[Any]:
    """Positions and tiers of every layer once `length` tokens have been seen and committed."""
    committed = copy.deepcopy(cache)
    assert 0 <= committed.get_seq_length() - length <= 1
    committed.crop(length)
    committed.commit()
    return [[x.tolist() for x in committed.positions(i)] for i in range(len(committed.layers))]


@pytest.mark.parametrize("how", ["prompt lookup", "assistant"])
@pytest.mark.parametrize("name", RECIPES)
def test_greedy_decoding_with_candidates_leaves_what_plain_decoding_leaves(
    name: str, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = bundled()
    plain, expected = copy.deepcopy(decoded(name))
    assisted = make_cache(name, model, **RECIPES[name])
    removed: list[int] = []
    crop = CompressedCache.crop

    def counted(self: CompressedCache, n: int) -> None:
        before = self.get_seq_length()
        crop(self, n)
        if self is assisted:
            removed.append(before - self.get_seq_length())

    monkeypatch.setattr(CompressedCache, "crop", counted)
    tokens = prompt()
    options = {"prompt_lookup_num_tokens": 6} if how == "prompt lookup" else {"assistant_model": copy.deepcopy(model)}
    found = generate(assisted, tokens, **options)
    assert found.shape == expected.shape == (1, tokens.shape[1] + 40)
    assert sum(removed) > 0 or how == "assistant", "no candidate was ever rejected"
    assert len(removed) < 40, "no candidate was ever accepted"
    length = expected.shape[1] - 1
    assert held(assisted, length) == held(plain, length)
    if name in SAME_TEXT:
        assert torch.equal(found, expected)
        assisted.crop(length)
        assisted.commit()
        plain.commit()
        # A token of a chunk differs in its last bits, so a code may be its neighbour here and there.
        for a, b in zip(assisted.dense(0), plain.dense(0), strict=True):
            assert ((a - b).abs() < 1e-3).float().mean() > 0.999


def test_an_assistant_that_is_mostly_wrong_leaves_the_placement_of_plain_decoding() -> None:
    model, wrong = tiny("llama"), llama(32, 2, 1, torch.float32)
    tokens = ids(70)
    caches = [make_cache("logquant", model, window=12, nbits=8) for _ in range(2)]
    lengths = []
    for cache, options in zip(caches, ({}, {"assistant_model": wrong}), strict=True):
        with torch.no_grad():
            model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                **{CACHE: cache},
                max_new_tokens=50,
                do_sample=False,
                **options,
            )
        lengths.append(cache.get_seq_length())
    assert held(caches[0], 119) == held(caches[1], 119)


@lru_cache(maxsize=1)
def own() -> Any:
    """A model that no other test has: the caches that are kept here keep their hooks on it."""
    return tiny.__wrapped__("llama")


def after_a_chunk(name: str, rejected: int) -> tuple[CompressedCache, list[torch.Tensor]]:
    """A cache that was given a chunk of which all tokens but the first are rejected, and the logits of what follows."""
    model = own()
    cache = make_cache(name, model, **{**RECIPES[name], **({"group_size": 16} if name == "kivi" else {})})
    with torch.no_grad():
        model(ids(150), **{CACHE: cache})
        model(ids(64, seed=9)[:, : 1 + rejected], **{CACHE: cache})
        if rejected:
            cache.crop(-rejected)
        assert cache.get_seq_length() == 151
        return cache, [model(ids(1, seed=t), **{CACHE: cache}).logits for t in range(40)]


never_rejected = lru_cache(maxsize=1)(lambda name: after_a_chunk(name, 0))


@pytest.mark.parametrize("rejected", [1, 5, 63])
@pytest.mark.parametrize("name", RECIPES)
def test_rejected_tokens_leave_the_logits_of_what_follows_unchanged(name: str, rejected: int) -> None:
    clean, expected = never_rejected(name)
    used, found = after_a_chunk(name, rejected)
    for a, b in zip(expected, found, strict=True):
        # The kept token was computed in a chunk, so its last bits differ.
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    assert held(clean, 191) == held(used, 191)
