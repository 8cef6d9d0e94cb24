"""What moves in the stores of all layers at once leaves there what moves in one store after the other does."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from kvpolicy_int import Int
from models import build, ids
from torch import Tensor
from words import CACHE

import kvpolicy
from kvpolicy import make_cache
from kvpolicy.layer import mover
from kvpolicy.storage import gather

CODES = {"kind": "int", "nbits": 4, "per": "token"}
RANKED = {"kind": "attention", "budget": 40, "every": 10}


def ranked(keys: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """Tokens that are ranked anew each 10 steps move between two stores of codes."""
    newest = {"policy": {"kind": "recent", "window": 8, "flush": 5}, "store": "full"}
    return {
        "tiers": [
            newest,
            {"policy": RANKED, "keys": keys, "values": values},
            {"keys": {**keys, "nbits": 2}, "values": {**values, "nbits": 2}},
        ]
    }


RECIPES: dict[str, tuple[Any, dict[str, Any]]] = {
    "zipcache": ("zipcache", {"period": 15}),
    "mikv": ("mikv", {"window": 12, "heavy": 20}),
    "zipcache-code": ("zipcache-code", {"period": 15}),
    "hf-quantized": ("hf-quantized", {"residual": 16}),
    "tokens": (ranked(CODES, CODES), {}),
    "groups": (ranked({**CODES, "per": "channel", "group_size": 16}, {**CODES, "transforms": [{"kind": "scale"}]}), {}),
    "rotated": (ranked({**CODES, "transforms": [{"kind": "hadamard"}]}, {**CODES, "range": "rms"}), {}),
    "extras": (ranked(*[{**CODES, "extras": [{"kind": "sparse", "count": 2}]}] * 2), {}),
}
ALL = {"gather_from", "append_coded", "remove_coded"}
DONE = {
    "mikv": {"gather_from", "append_coded"},
    "hf-quantized": {"gather_from", "append_coded"},
    "extras": {"gather_from"},
}
"""What is done at once, if not all: of some no coded token moves, and extras are each store's own."""
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]


def held(model: Any, name: str, padded: bool) -> tuple[list[dict[str, Tensor]], Tensor]:
    """What stores hold after a prompt and some steps, and the logits of these."""
    recipe, options = RECIPES[name]
    mask = torch.ones((2, 70), dtype=torch.int64, device=model.device)
    mask[1, : 30 if padded else 0] = 0
    with torch.no_grad(), kvpolicy.attach(model, graphs=False):
        cache = make_cache(recipe, model, **options)
        logits = [model(ids(70, 2).to(model.device), attention_mask=mask, **{CACHE: cache}).logits[:, -1:]]
        cache.guard.commit(1)  # as a step that is replayed does: the prompt ends, and nothing comes
        for step in range(46):
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            token = ids(1, 2, step).to(model.device)
            logits.append(model(token, attention_mask=mask, **{CACHE: cache}).logits)
        cache.memory()
    stores = [store for layer in cache.layers for own in layer.tiers.stores.values() for store in own]
    return [store.tensors() for store in stores if store is not None], torch.cat(logits, 1)


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often something was done for all layers at once."""
    found: Counter[str] = Counter()

    def counted(name: str) -> Any:
        done = getattr(mover, name)

        def call(*given: Any) -> Any:
            answer = done(*given)
            found[name] += answer is not None or name != "gather_from"
            return answer

        return call

    for name in sorted(ALL):
        monkeypatch.setattr(mover, name, counted(name))
    return found


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("padded", [False, True], ids=["even", "padded"])
@pytest.mark.parametrize("name", RECIPES)
def test_layers_hold_what_each_would_alone(
    name: str, padded: bool, device: str, called: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build("llama", torch.bfloat16, num_hidden_layers=3).to(device)
    with monkeypatch.context() as numbers:
        numbers.setattr(gather, "_one_by_one", lambda x, index: True)
        found = [held(model, name, padded)]
    by_position = name == "hf-quantized" and not padded
    assert set(+called) == (set() if by_position else DONE.get(name, ALL))
    found.append(held(model, name, padded))
    monkeypatch.setattr(mover, "layers_beside", lambda tokens: 2)
    found.append(held(model, name, padded))
    monkeypatch.setattr(mover, "layers_beside", lambda tokens: 1)
    monkeypatch.setattr(mover, "coded_alike", lambda stores: [])
    called.clear()
    expected = held(model, name, padded)
    assert not called
    for stores, logits in found:
        assert torch.equal(logits, expected[1])
        for one, other in zip(stores, expected[0], strict=True):
            assert one.keys() == other.keys()
            for part, x in one.items():
                torch.testing.assert_close(x, other[part], rtol=0, atol=0, equal_nan=True)


def test_layers_whose_levels_differ_keep_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first has none, and would decode the others' codes otherwise."""
    squares = torch.linspace(0, 4, 16).square()
    monkeypatch.setattr(Int, "levels", lambda own, site: squares if own.nbits == 4 and site.layer else None)
    model = build("llama", torch.bfloat16, num_hidden_layers=3)
    found = held(model, "tokens", False)
    monkeypatch.setattr(mover, "coded_alike", lambda stores: [])
    monkeypatch.setattr(mover, "gather_from", lambda *given: None)
    expected = held(model, "tokens", False)
    assert torch.equal(found[1], expected[1])
    for one, other in zip(found[0], expected[0], strict=True):
        assert all(torch.equal(x, other[part]) for part, x in one.items())
