"""A step that is replayed reads what each layer holds then; of layers that stand alike it plans for the first alone."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from kernel_reader import fake_kernel, fake_launch
from models import ids, llama
from served import channel, own, token
from words import CACHE

from kvpolicy import attach, make_cache
from kvpolicy.attention.attend import whole
from kvpolicy.attention.cuda import backend, plan, renew
from kvpolicy.attention.cuda.graph import Launch
from kvpolicy.attention.cuda.spaces import joined
from kvpolicy.attention.reference import REFERENCE
from kvpolicy.hf import graphs
from kvpolicy.interfaces.backend import AttentionOptions

SCALED = own(token(2), token(2, transforms=[{"kind": "scale"}]))
NEWEST = {"policy": {"kind": "recent", "window": 20, "flush": 24}, "store": "full"}
UNLIKE = {**own(token(2), token(2)), "layers": {"1": [NEWEST, {"keys": token(4), "values": token(2)}]}}
RECIPES: dict[str, tuple[Any, dict[str, Any]]] = {
    "unlike layers": (UNLIKE, {}),
    "per channel": (own(channel(2), token(2)), {}),
    "h2o": ("h2o", {"window": 20, "heavy": 30}),
    "logquant": ("logquant", {"window": 12}),
    "kivi": ("kivi", {"residual": 32}),
    "streaming-llm": ("streaming-llm", {"window": 40}),
    "partial-logquant": ("partial-logquant", {"window": 16}),
    "scaled": (SCALED, {}),
}


@pytest.fixture(autouse=True)
def _on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(plan, "kernel_of", fake_kernel)
    monkeypatch.setattr(backend, "_plans", {})
    monkeypatch.setattr(plan, "_known", {})

    def change(graph: int, node: Any, kernel: Any, arguments: bytes, grid: Any, threads: int) -> None:
        fake_launch(kernel, arguments, grid, None)

    monkeypatch.setattr(renew, "change", change)
    with torch.no_grad():
        yield


def captured(tiers: Any, spaces: int) -> Launch:
    """A launch as a graph records it, with new tokens of its own."""
    kv_heads, dim, heads = 2, 64, 4
    dtype = tiers.like["keys"].dtype
    query, keys, values = (torch.randn(2, 1, n, dim).transpose(1, 2).to(dtype) for n in (heads, kv_heads, kv_heads))
    shape = (2, 1, heads, dim)
    out = torch.empty(shape, dtype=dtype) if spaces == 1 else torch.empty(spaces, *shape)
    lse, partial, zeros = torch.empty(2, heads, 1), torch.empty(1 << 18), torch.zeros(1 << 12)
    chains = [s.chain for s in tiers.stores["values"] if getattr(s, "chain", None) is not None]
    twins = tuple(("values", i, chain.twin()) for i, chain in enumerate(chains))
    call = query, (keys, values), AttentionOptions(dim**-0.5, alone=True)
    numbers = ((), (-1,)) if spaces == 1 else ((), (-1, *range(len(chains))))
    return Launch(object(), (), call, (None, None, out, lse, partial, None, None, None, zeros), (), twins, numbers)


@pytest.mark.parametrize("name", RECIPES)
def test_launches_of_all_layers_read_what_there_is(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    planned = backend._planned
    monkeypatch.setattr(backend, "_planned", lambda *given: asked.append(1) or planned(*given))
    recipe, params = RECIPES[name]
    model, spaces = llama(64, 4, 2, torch.bfloat16), 2 if name == "scaled" else 1
    cache = make_cache(recipe, model, **params)
    launches: list[Launch] = []
    kinds = 2 if name == "unlike layers" else 1
    with attach(model):
        model(ids(150, 2), **{CACHE: cache})
        for seed in range(70):
            if seed % 13 == 5:
                cache.crop(-2)
            if seed % 17 == 7:
                cache = copy.deepcopy(cache)
            if seed % 19 == 3:
                cache.reorder_cache(torch.tensor([1, 0]))
            model(ids(1, 2, seed=seed), **{CACHE: cache})
            graphs._commit(cache, model.device)
            layers = graphs._tiers(cache)
            assert len(layers) > 1
            launches = launches or [captured(tiers, spaces) for tiers in layers]
            asked.clear()
            for launch, tiers in zip(launches, layers, strict=True):
                assert graphs._renewed(0, launch, tiers) is None
                query, new, options = launch.call
                wanted, _ = REFERENCE.attend(query, whole(tiers, new), None, options)
                out = launch.tensors[2]
                if spaces > 1:
                    out = joined(out, [None, *(twin for _, _, twin in launch.chains)], 2, query.dtype)
                error = (out.transpose(1, 2).float() - wanted.float()).norm() / wanted.float().norm()
                assert error < 8e-3
            assert len(asked) == kinds


def test_a_launch_that_needs_more_than_there_is_says_why() -> None:
    model = llama(64, 4, 2, torch.bfloat16)
    cache = make_cache("logquant", model, window=12)
    with attach(model):
        model(ids(150, 2), **{CACHE: cache})
        model(ids(1, 2), **{CACHE: cache})
        graphs._commit(cache, model.device)
        tiers = graphs._tiers(cache)[0]
        launch = captured(tiers, 1)
        mask, places, out, lse, _, *rest = launch.tensors
        small = launch._replace(tensors=(mask, places, out, lse, torch.empty(0), *rest))
        assert graphs._renewed(0, small, tiers) == "a launch needs more room"
        other = launch._replace(spaces=((), (0,)))
        assert graphs._renewed(0, other, tiers) == "its attention has other transforms"
        assert graphs._renewed(0, launch, tiers) is None
