"""Scorer `kvpress`, with a library of the same contract in its place."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest
import torch
from models import ids, tiny
from torch import Tensor
from words import CACHE

from kvpolicy import attach, load_recipe, make_cache
from kvpolicy.errors import MissingDependencyError, RecipeError

PROMPT = 120


@dataclass
class WindowPress:
    """SnapKV as a press computes it: queries from hidden states, rotated by the embeddings that it is told."""

    compression_ratio: float = 0.0
    window_size: int = 16
    kernel_size: int = 5

    def score(
        self, module: Any, hidden_states: Tensor, keys: Tensor, values: Tensor, attentions: Any, kwargs: Any
    ) -> Tensor:
        assert hidden_states.shape[1] > self.window_size, "more tokens than the window"
        assert attentions is None
        batch, kv_heads, n, dim = keys.shape
        heads = module.config.num_attention_heads
        query = module.q_proj(hidden_states[:, -self.window_size :]).view(batch, -1, heads, module.head_dim)
        query = query.transpose(1, 2)
        cos, sin = (x[:, None, -self.window_size :] for x in kwargs["position_embeddings"])
        turned = torch.cat([-query[..., dim // 2 :], query[..., : dim // 2]], dim=-1)
        query = query * cos + turned * sin
        scores = query @ keys.repeat_interleave(heads // kv_heads, 1).transpose(2, 3) / dim**0.5
        hidden = torch.ones_like(scores).triu(n - self.window_size + 1) > 0
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)[..., : -self.window_size].mean(2)
        pooled = torch.nn.functional.avg_pool1d(weights, self.kernel_size, 1, self.kernel_size // 2)
        pooled = pooled.unflatten(1, (kv_heads, -1)).mean(2)
        return torch.nn.functional.pad(pooled, (0, self.window_size), value=float(pooled.max()) + 1)


class OldestPress:
    def score(self, module: Any, hidden_states: Any, keys: Tensor, *_: Any) -> Tensor:
        return -torch.arange(keys.shape[2]).expand(keys.shape[:3])


class WeightsPress:
    def score(self, module: Any, hidden_states: Tensor, *_: Any) -> Any:
        return module.k_proj(hidden_states)


@pytest.fixture
def _library(monkeypatch: pytest.MonkeyPatch) -> None:
    library = ModuleType("kvpress")
    for cls in (WindowPress, OldestPress, WeightsPress):
        setattr(library, cls.__name__, cls)
    monkeypatch.setitem(sys.modules, "kvpress", library)


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield


def recipe(scorer: dict[str, Any], budget: int = 36) -> Any:
    policy = {"kind": "rank", "scorer": scorer, "budget": budget, "when": "prompt"}
    return load_recipe({"tiers": [{"policy": policy, "store": "full"}, {"store": "evict"}]})


def press(name: str, **options: Any) -> Any:
    return recipe({"kind": "kvpress", "press": name, "options": options})


def kept(model: Any, of: Any, pad: int = 0) -> list[Any]:
    tokens, mask = ids(PROMPT + 1, batch=2, seed=3), torch.ones(2, PROMPT + 1, dtype=torch.long)
    mask[1, :pad] = 0
    places = (mask.cumsum(1) - 1).clamp(min=0)
    cache = make_cache(of, model)
    with attach(model):
        for at in (slice(0, PROMPT), slice(PROMPT, PROMPT + 1)):
            shown = {"attention_mask": mask[:, : at.stop], "position_ids": places[:, at]}
            model(tokens[:, at], **shown, **{CACHE: cache})
    cache.commit()
    return [cache.positions(i).positions.tolist() for i in range(len(cache.layers))]


@pytest.mark.usefixtures("_library")
@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("pad", [0, 25])
def test_a_press_selects_what_our_scorer_of_the_same_formula_does(family: str, pad: int) -> None:
    model = tiny(family)
    ours = recipe({"kind": "window_attention", "window": 16, "pool": "mean", "size": 5})
    assert kept(model, press("WindowPress"), pad) == kept(model, ours, pad)
    for layer in kept(model, press("OldestPress"), pad):
        for first, row in zip((0, pad), layer, strict=True):
            assert row == [[*range(first, first + 36), PROMPT]] * len(row)


@pytest.mark.usefixtures("_library")
def test_options_are_those_of_the_press() -> None:
    model = tiny("llama")
    assert kept(model, press("WindowPress", window_size=8)) != kept(model, press("WindowPress", window_size=16))
    again = load_recipe({"tiers": [tier.plain() for tier in press("WindowPress", window_size=8).tiers]})
    assert again.tiers == press("WindowPress", window_size=8).tiers
    assert hash(again.tiers) == hash(press("WindowPress", window_size=8).tiers)


@pytest.mark.usefixtures("_library")
@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("Nothing", {}, r"policy\.scorer \(kvpress\), layer 0: press must name a scorer of kvpress, found 'Nothing'"),
        ("WindowPress", {"window": 8}, "options must be those of WindowPress, found TypeError"),
    ],
)
def test_presses_that_can_not_be_are_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        make_cache(press(name, **options), tiny("llama"))


@pytest.mark.usefixtures("_library")
@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("WeightsPress", {}, "press 'WeightsPress' must score 120 tokens by keys, values and queries, .* 'k_proj'"),
        ("WindowPress", {"window_size": 500}, "found AssertionError: more tokens than the window"),
    ],
)
def test_presses_that_ask_for_more_are_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        kept(tiny("llama"), press(name, **options))


def test_without_the_library_one_error_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kvpress", None)
    with pytest.raises(MissingDependencyError, match=r"scorer 'kvpress' must import kvpress, .*pip install kvpress"):
        make_cache(press("SnapKVPress"), tiny("llama"))
