"""Assisted decoding rolls candidates back: what is left is what plain greedy decoding leaves.

Later queries of one chunk see the placement of its start, so with lossy stores the text may differ from that of
plain decoding; the placement for the same number of tokens may not.
"""

from __future__ import annotations

import copy
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


def held(cache: CompressedCache, length: int) -> list[Any]:
    """Positions and tiers of every layer once `length` tokens have been seen and committed."""
    committed = copy.deepcopy(cache)
    assert 0 <= committed.get_seq_length() - length <= 1
    committed.crop(length)
    committed.commit()
    return [[x.tolist() for x in committed.positions(i)] for i in range(len(committed.layers))]


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("how", ["prompt lookup", "assistant"])
def test_greedy_decoding_with_candidates_leaves_what_plain_decoding_leaves(
    name: str, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = bundled()
    plain, assisted = (make_cache(name, model, **RECIPES[name]) for _ in range(2))
    removed: list[int] = []
    crop = CompressedCache.crop

    def counted(self: CompressedCache, n: int) -> None:
        before = self.get_seq_length()
        crop(self, n)
        if self is assisted:
            removed.append(before - self.get_seq_length())

    monkeypatch.setattr(CompressedCache, "crop", counted)
    tokens = prompt()
    expected = generate(plain, tokens)
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


@pytest.mark.parametrize("rejected", [1, 5, 63])
@pytest.mark.parametrize("name", RECIPES)
def test_rejected_tokens_leave_the_logits_of_what_follows_unchanged(name: str, rejected: int) -> None:
    model = tiny("llama")
    options = {**RECIPES[name], **({"group_size": 16} if name == "kivi" else {})}
    clean, used = (make_cache(name, model, **options) for _ in range(2))
    with torch.no_grad():
        for cache in (clean, used):
            model(ids(150), **{CACHE: cache})
        junk = ids(1 + rejected, seed=9)
        model(junk, **{CACHE: used})
        used.crop(-rejected)
        model(junk[:, :1], **{CACHE: clean})
        assert clean.get_seq_length() == used.get_seq_length() == 151
        for t in range(40):
            step = ids(1, seed=t)
            a, b = model(step, **{CACHE: clean}).logits, model(step, **{CACHE: used}).logits
            # The kept token was computed in a chunk, so its last bits differ.
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    assert held(clean, 191) == held(used, 191)
