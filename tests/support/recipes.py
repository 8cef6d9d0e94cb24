"""Recipes for tests: a handful that covers every mechanism, and a strategy for random ones."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from kvpolicy import Recipe, load_recipe
from kvpolicy.interfaces.policy import RankPolicy
from kvpolicy.recipe.load import bundled_names

__all__ = ["BY_POSITION", "DISTINCT", "NAMED", "UNCALIBRATED", "named", "one_lossy_store", "recipes"]

ALIKE = ("best-2bit", "turboquant", "turboquant-3.5", "turboquant-prod", "quarot", "fp8", "mxfp4", "nvfp4", "nf4")
"""Recipes of one tier, whose tokens lie and move as those of `atom` or `turboquant-2.5`."""
VARIANTS = (
    "gear-l", "gear-kcvt", "gear-code", "qaq", "adakv", "pyramidkv", "tova", "key-norm", "expected-attention",
    "logquant-attention", "logquant-jitter", "quest", "cam", "kvzip", "best-3bit", "best-4bit",
)  # fmt: skip
"""Recipes whose stores and moves are those of another (gear, zipcache, snapkv, logquant, balanced), with other options.
What they select has tests of its own."""
UNCALIBRATED = [name for name in bundled_names() if not load_recipe(name).calibration]
"""The bundled recipes that need no calibration; the others are tested with calibrations of their models."""
DISTINCT = [name for name in UNCALIBRATED if load_recipe(name).model_layers is None and name not in (*ALIKE, *VARIANTS)]
"""The bundled recipes for models of any number of layers, without those like another: what runs models takes time."""
BY_POSITION = [name for name in DISTINCT if not any(isinstance(t.policy, RankPolicy) for t in load_recipe(name).tiers)]
"""Of these, those that a model can use without being attached, too."""


def recent(window: float, flush: int = 1) -> dict[str, Any]:
    return {"kind": "recent", "window": window, "flush": flush}


def log(budget: float) -> dict[str, Any]:
    return {"kind": "log", "budget": budget}


def sink(tokens: int) -> dict[str, Any]:
    return {"kind": "sink", "tokens": tokens}


def by_token(nbits: int = 2, group_size: Any = "auto", **options: Any) -> dict[str, Any]:
    return {"kind": "int", "nbits": nbits, "group_size": group_size, "per": "token", **options}


def by_channel(nbits: int = 2, group_size: Any = 8, **options: Any) -> dict[str, Any]:
    return {"kind": "int", "nbits": nbits, "group_size": group_size, "per": "channel", **options}


NAMED: dict[str, dict[str, Any]] = {
    "full": {"tiers": [{"store": "full"}]},
    "logquant": {
        "tiers": [
            {"policy": recent(12, 12), "store": "full"},
            {"policy": log(12), "store": "full"},
            {"store": by_token()},
        ]
    },
    "partial-logquant": {
        "tiers": [
            {"policy": recent(0, 16), "store": "full"},
            {"policy": recent(16, 16), "keys": "full", "values": by_token()},
            {"policy": log(16), "keys": "full", "values": by_token()},
            {"store": by_token()},
        ]
    },
    "kivi": {
        "tiers": [
            {"policy": recent(0, 32), "store": "full"},
            {"policy": recent(32), "keys": by_channel(), "values": "full"},
            {"keys": by_channel(), "values": by_token()},
        ]
    },
    "streaming-llm": {
        "tiers": [
            {"policy": recent(20), "store": "full"},
            {"policy": sink(3), "store": "full"},
            {"store": "evict"},
        ]
    },
    "logquant-evict": {
        "tiers": [
            {"policy": recent(10, 10), "store": "full"},
            {"policy": log(10), "store": "full"},
            {"store": "evict"},
        ]
    },
    "fractions": {
        "tiers": [
            {"policy": recent(0.2, 3), "store": "full"},
            {"policy": sink(2), "store": "full"},
            {"policy": log(0.15), "store": "full"},
            {"store": by_token(3, "head")},
        ]
    },
    "eight-then-two": {
        "tiers": [
            {"policy": recent(8), "store": "full"},
            {"policy": recent(30, 4), "store": by_token(8)},
            {"store": by_token(2, scale_dtype="float32")},
        ]
    },
    "channel-evict": {
        "tiers": [
            {"policy": recent(5, 5), "store": "full"},
            {"policy": recent(60, 7), "store": by_channel(4)},
            {"store": "evict"},
        ]
    },
    "arrival": {
        "tiers": [
            {"policy": recent(4, 10), "store": "full"},
            {"keys": by_channel(4, "arrival"), "values": by_token(4)},
        ]
    },
    "hf-quantized": {
        "tiers": [{"policy": {"kind": "residual", "length": 24}, "store": "full"}, {"store": by_token(4)}],
    },
    "layers": {
        "tiers": [{"policy": recent(6, 6), "store": "full"}, {"store": by_token()}],
        "layers": {"0": "full", "-1": [{"store": by_token(1)}]},
    },
}


def named(name: str) -> Recipe:
    return load_recipe({"name": name, **NAMED[name]})


_RANK = {"full": 9, "evict": 0}


def _stores(head_dim: int) -> st.SearchStrategy[Any]:
    nbits = st.sampled_from([1, 2, 3, 4, 8])
    sizes = [d for d in (4, 8, 16) if head_dim % d == 0]
    scale = st.sampled_from(["model", "float32"])
    token = st.builds(by_token, nbits, st.sampled_from([*sizes, "auto", "head"]), scale_dtype=scale)
    channel = st.builds(by_channel, nbits, st.sampled_from([3, 8, 20]), scale_dtype=scale)
    return st.one_of(token, channel)


def _policies() -> st.SearchStrategy[dict[str, Any]]:
    window = st.one_of(st.integers(0, 25), st.sampled_from([0.1, 0.3]))
    budget = st.one_of(st.integers(1, 20), st.sampled_from([0.1, 0.25]))
    return st.one_of(
        st.builds(recent, window, st.integers(1, 12)), st.builds(log, budget), st.builds(sink, st.integers(1, 6))
    )


def _rank(store: Any) -> int:
    return _RANK[store] if isinstance(store, str) else int(store["nbits"])


@st.composite
def recipes(draw: st.DrawFn, head_dim: int = 16) -> Recipe:
    """Up to four tiers below a recent one, stores of falling precision on each side, sometimes evicting last."""
    n = draw(st.integers(1, 4))
    policies = [draw(st.builds(recent, st.integers(0, 12), st.integers(1, 12)))]
    policies += [draw(_policies()) for _ in range(n - 1)]
    sides: dict[str, list[Any]] = {}
    for side in ("keys", "values"):
        drawn = draw(st.lists(st.one_of(st.just("full"), _stores(head_dim)), min_size=n + 1, max_size=n + 1))
        held = sorted(drawn, key=_rank, reverse=True)
        # Equal neighbours are common, so that tiers which share a store are met.
        if draw(st.booleans()):
            held = [held[0], *[held[-1]] * n]
        sides[side] = held
    if draw(st.integers(0, 3)) == 0:
        sides["keys"][-1] = sides["values"][-1] = "evict"
    tiers: list[dict[str, Any]] = [
        {"policy": p, "keys": k, "values": v}
        for p, k, v in zip([*policies, None], sides["keys"], sides["values"], strict=True)
    ]
    del tiers[-1]["policy"]
    return load_recipe({"tiers": tiers})


def one_lossy_store(recipe: Recipe) -> bool:
    """Whether no token passes two different lossy stores, so that its codes don't depend on the chunking."""
    return all(len({getattr(tier, side) for tier in recipe.tiers} - {"full"}) <= 1 for side in ("keys", "values"))
