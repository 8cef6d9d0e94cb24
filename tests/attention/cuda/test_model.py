"""Whole models on a GPU: the kernels serve their layers, tell what the reference tells, and wait for nothing."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from models import build, ids
from torch import Tensor
from words import CACHE

from kvpolicy import attach, make_cache
from kvpolicy.attention import backend as backends
from kvpolicy.attention.cuda.compile import missing
from kvpolicy.recipe.inherit import bundled_names

absent = "no CUDA device" if not torch.cuda.is_available() else missing()
pytestmark = pytest.mark.skipif(absent is not None, reason=f"the kernels can't run: {absent}")

OTHERS = ("kvtuner", "kvquant", "skvq", "wkvquant", "logquant-exponent", "kvzip")
"""Recipes that need a calibration, a prompt read twice, or a certain model."""


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def model(dtype: torch.dtype = torch.bfloat16, **more: Any) -> Any:
    return build("llama", dtype, head_dim=64, num_attention_heads=8, num_key_value_heads=2, **more).to("cuda")


def steps(model: Any, cache: Any, count: int = 40, mask: Tensor | None = None) -> Tensor:
    tokens = ids(300 + count, 2).to("cuda")
    given = {} if mask is None else {"attention_mask": mask}
    found = [model(tokens[:, :300], **{CACHE: cache}, **given).logits[:, -1:]]
    for t in range(300, 300 + count):
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones((2, 1))], dim=1)
            given = {"attention_mask": mask}
        found.append(model(tokens[:, t : t + 1], **{CACHE: cache}, **given).logits)
    return torch.cat(found, dim=1)


@pytest.mark.parametrize("padded", [False, True], ids=["even", "padded"])
@pytest.mark.parametrize(
    "name", ["logquant", "kivi", "balanced", "kivi-sink", "h2o", "mas", "streaming-llm", "zipcache", "partial-logquant"]
)
def test_models_tell_what_they_tell_with_the_reference(
    name: str, padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, mask = model(), None
    if padded:
        mask = torch.ones((2, 300), dtype=torch.long, device="cuda")
        mask[1, :90] = 0
    with attach(one, graphs=False):
        found = steps(one, cache := make_cache(name, one), mask=mask)
        assert padded or "attention by cuda" in str(cache.summary())
        monkeypatch.setattr(backends, "others", tuple)
        backends.chosen.cache_clear()
        expected = steps(one, make_cache(name, one), mask=mask)
    backends.chosen.cache_clear()
    error = (found - expected).float().norm() / expected.float().norm()
    assert error < 2e-2


@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
@pytest.mark.parametrize("name", [name for name in bundled_names() if not name.startswith(OTHERS)])
def test_every_recipe_gives_what_it_gives_with_the_reference(
    name: str, graphs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether kernels, the reference or both serve it."""
    one, params = model(num_hidden_layers=3), {"quest": {"budget": 64}}.get(name, {})
    with attach(one, graphs=graphs):
        found = steps(one, make_cache(name, one, **params))
    monkeypatch.setattr(backends, "others", tuple)
    backends.chosen.cache_clear()
    with attach(one, graphs=False):
        expected = steps(one, make_cache(name, one, **params))
    backends.chosen.cache_clear()
    assert (found - expected).float().norm() < 3e-2 * expected.float().norm()


@pytest.mark.parametrize("name", ["logquant", "kivi", "balanced", "h2o", "mikv", "zipcache", "partial-logquant"])
@pytest.mark.parametrize("graphs", [False, True])
def test_steps_wait_for_nothing(name: str, graphs: bool) -> None:
    one = model()
    with attach(one, graphs=graphs):
        cache = make_cache(name, one)
        steps(one, cache, 300)
        token = ids(1, 2).to("cuda")
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(200):
                one(token, **{CACHE: cache})
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_a_graph_replays_a_layer_as_it_was() -> None:
    from served import Served

    from kvpolicy.attention.attend import attend

    case = Served("logquant")
    case.check((9000, 1))
    keys, values, query = case.draw(1, 2, 128), case.draw(1, 2, 128), case.draw(1, 8, 128)
    case.tiers.stage(keys, values)
    expected = attend(case.tiers, query, (keys, values))
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        attend(case.tiers, query, (keys, values))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            found = [attend(case.tiers, query, (keys, values)) for _ in range(3)]
        for _ in range(3):
            graph.replay()
    torch.cuda.synchronize()
    for x in found:
        torch.testing.assert_close(x, expected, rtol=0, atol=0)


def test_without_the_extra_one_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from kvpolicy.plugins import PluginInfo, registry

    absent = property(lambda info: "cuda-core" if info.kind == "cuda" else None)
    monkeypatch.setattr(PluginInfo, "missing", absent)
    backends.tell_missing.cache_clear()
    assert "cuda" in registry().backends
    with pytest.warns(UserWarning, match=r"backend 'cuda' needs cuda-core.*pip install 'kvpolicy\[cuda\]'"):
        backends.tell_missing("cuda")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backends.tell_missing("cuda")
    backends.tell_missing.cache_clear()
