"""Layers whose prompt is let in together hold what each would alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import build, ids
from words import CACHE

import kvpolicy
from kvpolicy import make_cache
from kvpolicy.hf import passes

RECIPES = ["h2o", "zipcache", "snapkv", "adakv", "tova", "logquant", "quest", "cam", "mas", "best-2bit"]


def run(model: Any, name: str) -> tuple[list[Any], torch.Tensor]:
    """What is held, and the logits of some steps, after a prompt in two chunks with padding."""
    mask = torch.ones(2, 200, dtype=torch.int64)
    mask[1, :30] = 0
    with torch.no_grad(), kvpolicy.attach(model):
        cache = make_cache(name, model)
        logits = [model(ids(150, 2), attention_mask=mask[:, :150], **{CACHE: cache}).logits[:, -1:]]
        logits.append(model(ids(50, 2, 1), attention_mask=mask, **{CACHE: cache}).logits)
        for step in range(5):
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            logits.append(model(ids(1, 2, step), attention_mask=mask, **{CACHE: cache}).logits)
    held: list[Any] = []
    for layer in range(len(cache.layers)):
        held += [torch.from_numpy(x) for x in cache.positions(layer)] + list(cache.dense(layer))
    return held, torch.cat(logits, 1)


@pytest.mark.parametrize("at_once", [1, 2, 8])
@pytest.mark.parametrize("name", RECIPES)
def test_layers_at_once(name: str, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama", torch.float32, num_hidden_layers=5)
    monkeypatch.setattr(passes, "LATE", ())
    alone = run(model, name)
    monkeypatch.setattr(passes, "LATE", ("cpu",))
    monkeypatch.setattr(passes, "AT_ONCE", at_once)
    together = run(model, name)
    assert torch.equal(alone[1], together[1])
    for one, other in zip(alone[0], together[0], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def test_an_interrupted_prompt_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes, "LATE", ("cpu",))
    model = build("llama", torch.float32, num_hidden_layers=3)
    with torch.no_grad(), kvpolicy.attach(model):
        cache = make_cache("h2o", model)
        hook = model.model.layers[2].register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(ids(150), **{CACHE: cache})
        hook.remove()
        again = model(ids(150), **{CACHE: cache}).logits
        assert cache.get_seq_length() == 150
        fresh = model(ids(150), **{CACHE: make_cache("h2o", model)}).logits
    assert torch.equal(again, fresh)
