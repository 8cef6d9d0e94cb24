"""Recipes with policies by attention, and what a layer of one must hold and attend."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from layers import Layer
from torch import Tensor

from kvpolicy import Recipe, load_recipe

__all__ = ["check", "recipes", "reference"]

EIGHT = [
    {"kind": "int", "nbits": 8, "per": "token", "group_size": 8},
    {"kind": "int", "nbits": 8, "per": "channel", "group_size": 8},
    {"kind": "int", "nbits": 8, "per": "channel", "group_size": "arrival"},
    {"kind": "int", "nbits": 8, "per": "token", "group_size": "head", "transforms": ["scale"]},
]


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    """Policies by position, then by attention, over stores that are exact at first and 8 bits later."""
    above = st.sampled_from(
        [
            {"kind": "recent", "window": 12},
            {"kind": "recent", "window": 5, "flush": 7},
            {"kind": "recent", "window": 0.2},
            {"kind": "sink", "tokens": 3},
            {"kind": "log", "budget": 9},
        ]
    )
    policies = draw(st.lists(above, max_size=2))
    select = draw(st.sampled_from([["head", "head"], ["layer", "head"], ["layer", "layer"], ["model", "layer"]]))
    uneven = draw(st.booleans())
    for finest in select[: draw(st.integers(0 if policies else 1, 2))]:
        if uneven:
            policies.append(draw(_uneven()))
            continue
        policies.append(
            {
                "kind": "attention",
                "budget": draw(st.sampled_from([6, 0.15, 0.4])),
                "of": draw(st.sampled_from(["seen", "prompt"])),
                "score": draw(st.sampled_from(["accumulated", "normalised", "last"])),
                "queries": draw(st.sampled_from(["all", "probe"])),
                "every": draw(st.sampled_from([1, 10])),
                "share": finest,
            }
        )
    count = len(policies) + 1
    sides = {}
    for side in ("keys", "values"):
        exact = draw(st.integers(1, count))
        store = draw(st.sampled_from(EIGHT))
        sides[side] = ["full"] * exact + [store] * (count - exact)
    if draw(st.booleans()):
        sides = {side: [*stores[:-1], "evict"] for side, stores in sides.items()}
    tiers: list[dict[str, Any]] = [{"keys": k, "values": v} for k, v in zip(*sides.values(), strict=True)]
    for tier, policy in zip(tiers, policies, strict=False):
        tier["policy"] = policy
    return load_recipe({"tiers": tiers})


@st.composite
def _uneven(draw: st.DrawFn) -> dict[str, Any]:
    """A policy whose heads keep different numbers of tokens."""
    scorer = draw(st.sampled_from(["key_norm", {"kind": "window_attention", "window": 4, "pool": "none"}]))
    policy = {"kind": "rank", "scorer": scorer}
    policy |= draw(st.sampled_from([{"when": "prompt"}, {"when": "prompt"}, {"every": 10}, {"every": 1}]))
    if draw(st.integers(0, 4)) == 0:
        return {**policy, "threshold": -3.9 if scorer == "key_norm" else 0.05}
    return {
        **policy,
        "heads": "scores",
        "floor": draw(st.sampled_from([0.0, 0.2])),
        "budget": draw(st.sampled_from([8, 0.4])),
    }


def reference(layer: Layer, query: Tensor, new: tuple[Tensor, Tensor], real: Tensor, first: int) -> Tensor:
    """Attention over what a layer holds and the new tokens, in float64."""
    batch, n = query.shape[0], query.shape[2]
    held, at = layer.cache.dense(0), torch.as_tensor(layer.cache.positions(0).positions).expand(batch, 2, -1)
    keys, values = (torch.cat([x, y], dim=2).double() for x, y in zip(held, new, strict=True))
    places = torch.cat([at, torch.arange(first, first + n).expand(batch, 2, -1)], dim=2)
    shown = torch.cat([at >= 0, real[:, None].expand(-1, 2, -1)], dim=2)
    causal = places[:, :, None] <= torch.arange(first, first + n)[:, None]
    scores = query.double().unflatten(1, (2, 2)) @ keys.unsqueeze(2).transpose(3, 4) * 0.25
    scores = scores.masked_fill(~(shown[:, :, None] & causal).unsqueeze(2), -torch.inf)
    return (scores.softmax(-1).nan_to_num() @ values.unsqueeze(2)).flatten(1, 2).transpose(1, 2)


def check(layer: Layer, keys: Tensor, values: Tensor, real: Tensor) -> None:
    """What is held is what was given, at its place, once; nothing of it is padding."""
    stores = [store for specs in layer.tiers.placement.specs.values() for store in specs]
    few = any(getattr(store, "nbits", 8) < 8 for store in stores)
    # Divisors may have been found on a single token.
    bound = torch.inf if few else 0.3 if any(getattr(store, "transforms", ()) for store in stores) else 0.08
    places = torch.as_tensor(layer.cache.positions(0).positions).expand(len(keys), 2, -1)
    for found, given_to in zip(layer.cache.dense(0), (keys, values), strict=True):
        at = places.clamp(min=0).unsqueeze(3).expand(-1, -1, -1, found.shape[3])
        assert ((found - given_to.gather(2, at)).abs().amax(3)[places >= 0] < bound).all()
        assert (found[places < 0] == 0).all()
    for row, heads in enumerate(places):
        for head in heads:
            held = head[head >= 0].tolist()
            assert held == sorted(set(held))
            assert real[row, held].all()
