"""How much a decode step of an attached model asks of PyTorch: each call costs a launch on a device."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
import torch
from models import exact, ids, tiny
from torch.profiler import ProfilerActivity, profile
from words import CACHE

import kvpolicy

MOST = 150
"""Calls of a layer and step, those of the model itself included (68 for `DynamicCache`)."""


@torch.no_grad()
def calls(model: Any, cache: Any) -> float:
    """Calls of a layer in a step in which nothing descends."""
    model(ids(400), **{CACHE: cache})
    found = []
    for seed in range(20):
        token = ids(1, seed=seed)
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            model(token, **{CACHE: cache})
        found.append(sum(event.cpu_parent is None for event in seen.events()))
    return min(found) / model.config.num_hidden_layers


@lru_cache(maxsize=1)
def least() -> float:
    """Those of a model with transformers' own cache."""
    model = tiny("llama")
    return calls(model, exact(model))


@pytest.mark.parametrize("recipe", ["full", "streaming-llm", "balanced", "logquant", "logquant-evict"])
def test_a_step_without_a_flush_makes_few_calls(recipe: str) -> None:
    model = tiny("llama")
    alone = least()
    with kvpolicy.attach(model):
        found = calls(model, kvpolicy.make_cache(recipe, model))
    assert alone < found <= MOST
