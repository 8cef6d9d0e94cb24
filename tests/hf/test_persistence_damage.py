"""Files whose checksum is right and whose contents can't be: each kind by name, besides those found by chance."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import ids, tiny
from recipes import by_channel, by_token, recent
from saved import rewritten
from words import CACHE

from kvpolicy import CompressedCache, make_cache
from kvpolicy.errors import CacheError

RECIPE = {
    "tiers": [
        {"policy": recent(9, 3), "store": "full"},
        {"keys": by_channel(4, 8), "values": by_token(4, transforms=["scale"])},
    ]
}
CHANNELS, SIZES, TIER, ORDER = "0.values.1.transforms.0.divisors", "0.keys.1.sizes", "state.0.tier.0", "state.0.keys.1"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    model = tiny("llama")
    cache = make_cache(RECIPE, model)
    with torch.no_grad():
        model(ids(60, batch=2), **{CACHE: cache})
    cache.save(tmp_path / "cache")
    return tmp_path / "cache"


def without(name: str) -> Any:
    return lambda t: {k: x for k, x in t.items() if k != name}


def each(name: str, change: Any) -> Any:
    return lambda t: {**t, name: change(t[name].clone()).contiguous()}


def filled(x: torch.Tensor, at: int, value: float) -> torch.Tensor:
    x.view(-1)[at] = value
    return x


TENSORS: dict[str, tuple[Any, str]] = {
    "no divisors": (without(CHANNELS), "what its transforms keep must be "),
    "a divisor of 0": (each(CHANNELS, lambda x: filled(x, 3, 0.0)), "its transforms must be invertible"),
    "a divisor that is nan": (each(CHANNELS, lambda x: filled(x, 3, torch.nan)), "must be finite"),
    "two divisors": (each(CHANNELS, lambda x: torch.cat([x, x], 2)), "divisors must be"),
    "an emptied tier": (each(TIER, lambda x: x[:0]), "the tiers and the keys of store 0 must hold the same tokens"),
    "an emptied store": (without("0.values.1.codes"), "must hold the parameters of 0 tokens"),
    "an emptied order": (each(ORDER, lambda x: x[:0]), "keys and values must be in the same order|must be of the same"),
    "positions that descend": (each(TIER, lambda x: x.flip(0)), "must ascend below the 60 tokens seen"),
    "a negative position": (each(ORDER, lambda x: filled(x, 0, -1)), "same order|same tokens"),
    "a position twice": (each(ORDER, lambda x: filled(x, 0, int(x[1]))), "same order|same tokens"),
    "positions that are no integers": (each(ORDER, lambda x: x.float()), "1 dimensions in torch.int32, found"),
    "groups that don't add up": (each(SIZES, lambda x: filled(x, 0, 7)), "must be in 6 groups of 1 to 8"),
    "a group of none": (each(SIZES, lambda x: filled(filled(x, 0, 0), 1, 16)), "must be in 6 groups of 1 to 8"),
    "a group too many": (each(SIZES, lambda x: torch.cat([x, x[:1]])), "must be in 6 groups"),
    "too many that wait": (
        each("0.keys.1.exact", lambda x: torch.cat([x] * 9, 2)),
        "at most 7 tokens may wait for their group",
    ),
    "another type": (each("0.keys.1.params", lambda x: x.half()), "params must be .* in torch.float32, found"),
    "another row": (each("1.keys.0.exact", lambda x: x[:1]), "exact must be"),
    "a tensor of nobody": (lambda t: {**t, "spare": torch.zeros(3)}, "have no use for 1 tensors, such as spare"),
    "huge": (each("0.keys.like", lambda x: x.new_empty((2, 2, 0, 2**40))), "must hold heads in 2 rows"),
}


@pytest.mark.parametrize("kind", TENSORS)
def test_tensors_that_can_not_be(kind: str, file: Path) -> None:
    change, told = TENSORS[kind]
    with pytest.raises(CacheError, match=f"is damaged: .*({told})"):
        CompressedCache.load(rewritten(file, tensors=change), tiny("llama"))


RECIPES: dict[str, tuple[str, str]] = {
    "other bits": ("nbits: 4", "nbits: 2"),
    "other groups": ("group_size: 8", "group_size: 4"),
    "no divisors": ("- scale", "[]"),
    "other axis": ("per: channel", "per: token"),
    "another tier": ("tiers:", "tiers:\n- policy: {kind: sink, tokens: 2}\n  store: full"),
}


@pytest.mark.parametrize("kind", RECIPES)
def test_a_recipe_of_other_tensors(kind: str, file: Path) -> None:
    old, new = RECIPES[kind]

    def changed(header: dict[str, str]) -> dict[str, str]:
        assert old in header["recipe"]
        return {**header, "recipe": header["recipe"].replace(old, new)}

    with pytest.raises(CacheError, match=r"is damaged|can't be used here"):
        CompressedCache.load(rewritten(file, header=changed), tiny("llama"))


def test_layers_must_have_seen_and_hold_the_same(file: Path) -> None:
    """A second layer with a state of its own, which counts otherwise or holds other tokens."""

    def split(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        more = {n.replace("state.0", "state.1"): t.clone() for n, t in tensors.items() if n.startswith("state.0")}
        order = more["state.1.keys.1"]
        order[:2] = order[:2].flip(0)
        more["state.1.values.1"] = order.clone()
        return {**tensors, **more}

    def states(seen: int) -> Any:
        layers = [{"type": "tiers", "state": 0}, {"type": "tiers", "state": 1}]
        counts = [{"seen": 60, "through": 0}, {"seen": seen, "through": 0}]
        return lambda h: {**h, "layers": json.dumps(layers), "states": json.dumps(counts)}

    content = file.read_bytes()
    for seen in (60, 61):
        file.write_bytes(content)
        with pytest.raises(CacheError, match="is damaged"):
            CompressedCache.load(rewritten(file, split, states(seen)), tiny("llama"))
