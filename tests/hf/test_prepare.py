"""Prompts that are read again before they are kept, against the model's own attention weights in float64."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from kvpolicy_kvzip import KVzip
from models import ids, tiny
from torch import Tensor
from words import CACHE

from kvpolicy import CompressedCache, attach, make_cache, prepare
from kvpolicy.errors import CacheError, PluginError

INSTRUCTION = [3, 4, 5]
LENGTH, CHUNK, SINKS = 60, 25, 4


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield


def kvzip(model: Any, prompt: Tensor) -> Tensor:
    """What each pair scores, `[layers, kv_heads, tokens]`, of one prompt: from the weights that the model returns."""
    shown = copy.deepcopy(model)
    shown.set_attn_implementation("eager")
    n, found = prompt.shape[1], torch.zeros(2, 2, prompt.shape[1], dtype=torch.float64)
    for first in range(0, n, CHUNK):
        last = min(first + CHUNK, n)
        fed = torch.cat([torch.tensor([INSTRUCTION]), prompt[:, first:last]], 1)
        every = shown(torch.cat([prompt, fed], 1), output_attentions=True).attentions
        columns = [*range(min(SINKS, first)), *range(first, last), *range(n, n + fed.shape[1])]
        for layer, weights in enumerate(every):
            part = weights[0, :, n:].double()[..., columns]
            part = part / part.sum(-1, keepdim=True)
            own = part[..., min(SINKS, first) : min(SINKS, first) + last - first]
            found[layer, :, first:last] = own.unflatten(0, (2, -1)).amax((1, 2))
    found[..., :SINKS] = torch.inf
    return found


def held(cache: CompressedCache, row: int) -> set[tuple[int, int, int]]:
    return {
        (layer, head, int(p))
        for layer in range(2)
        for head, places in enumerate(cache.positions(layer).positions[row])
        for p in places
        if p >= 0
    }


def made(model: Any, **options: Any) -> CompressedCache:
    return make_cache("kvzip", model, chunk=CHUNK, sinks=SINKS, **options)


def test_the_pairs_stay_that_the_formula_says_in_padded_rows_too() -> None:
    model, tokens = tiny("llama"), ids(LENGTH, batch=2)
    mask = torch.ones_like(tokens)
    mask[0, :13] = 0
    with attach(model):
        cache = prepare(model, made(model, threshold=0.6), tokens, mask, instruction=INSTRUCTION)
    for row, skipped in enumerate((13, 0)):
        scores = kvzip(model, tokens[row : row + 1, skipped:])
        count = scores.numel() - int(0.6 * scores.numel())
        least = scores.flatten().sort(descending=True).values
        found = held(cache, row)
        assert abs(len(found) - count) <= 1
        wrong = {(a, b, c) for a, b, c in found if scores[a, b, c - skipped] < least[count] * (1 - 1e-4)}
        assert not wrong
        assert {(a, b, c + skipped) for a in range(2) for b in range(2) for c in range(SINKS)} <= found


def test_a_prepared_cache_answers_question_after_question(tmp_path: Path) -> None:
    model, tokens, question = tiny("llama"), ids(LENGTH, batch=2), ids(6, batch=2)
    whole = torch.cat([tokens, question], 1)
    with attach(model):
        cache = prepare(model, made(model), tokens, instruction=INSTRUCTION)
        before = [held(cache, row) for row in range(2)]
        cache.save(tmp_path / "cache")
        others = [copy.deepcopy(cache), CompressedCache.load(tmp_path / "cache", model)]
        found = [model.generate(whole, max_new_tokens=4, do_sample=False, **{CACHE: one}) for one in (cache, *others)]
        assert all(torch.equal(found[0], other) for other in found[1:])
        late = {(a, b, p) for a in range(2) for b in range(2) for p in range(LENGTH, LENGTH + 9)}
        assert [held(cache, row) for row in range(2)] == [kept | late for kept in before]
        cache.crop(LENGTH)  # for another question
        assert [held(cache, row) for row in range(2)] == before
        exact = make_cache("kvzip", model, threshold=0.0, chunk=CHUNK)
        logits = model(question, **{CACHE: prepare(model, exact, tokens)}).logits
    torch.testing.assert_close(logits, model(whole).logits[:, LENGTH:], rtol=1e-4, atol=1e-4)


def test_layers_with_a_window_take_part_in_the_passes_and_a_scorer_that_misbehaves_is_named() -> None:
    model, tokens = tiny("gemma3_text"), ids(LENGTH)
    with attach(model):
        cache = prepare(model, made(model, threshold=0.5), tokens, instruction=INSTRUCTION)
        kept = sum(int((cache.positions(layer).positions >= 0).sum()) for layer in (1, 3))
        assert abs(kept - 0.5 * 2 * 2 * LENGTH) <= 1
        for method, lie in {"spans": [(0, LENGTH + 1)], "note": torch.ones(1), "settle": {}}.items():
            scorer = type("Liar", (KVzip,), {method: lambda self, *args, lie=lie: lie})(chunk=CHUNK)
            policy = {"kind": "rank", "scorer": scorer, "threshold": 0.5, "when": "prompt"}
            liar = make_cache({"tiers": [{"policy": policy, "store": "full"}, {"store": "evict"}]}, model)
            with pytest.raises(PluginError, match=f"scorer 'kvzip': {method} must"):
                prepare(model, liar, tokens)


def test_what_was_not_prepared_or_can_not_be_is_refused() -> None:
    model, tokens = tiny("llama"), ids(20)
    with pytest.raises(CacheError, match=r"prepare must be given an attached model; use: with kvpolicy.attach"):
        prepare(model, made(model), tokens)
    with attach(model):
        cache = made(model)
        with pytest.raises(CacheError, match=r"scorer 'kvzip' must have the prompt read again .* kvpolicy.prepare"):
            model.generate(tokens, max_new_tokens=2, **{CACHE: cache})
        prepare(model, cache, tokens)  # and is as it was
        with pytest.raises(CacheError, match="must be given an empty cache, found 20 tokens"):
            prepare(model, cache, tokens)
        with pytest.raises(CacheError, match="found recipe 'h2o'; use generate alone"):
            prepare(model, make_cache("h2o", model), tokens)
        with pytest.raises(CacheError, match="each row of a prompt must have a token"):
            prepare(model, made(model), tokens, torch.zeros_like(tokens))
