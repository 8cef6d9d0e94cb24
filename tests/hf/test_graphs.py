"""Decode steps as CUDA graphs: bit for bit those of a model that is attached without, and nothing is left behind."""

from __future__ import annotations

import copy
import functools
import gc
import inspect
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from models import ids, llama, tiny
from words import CACHE

from kvpolicy import CompressedCache, attach, make_cache
from kvpolicy.attention.cuda import graph, heads
from kvpolicy.errors import CacheError
from kvpolicy.hf.graphs import AGAIN, Captured
from kvpolicy.hf.model_state import ModelState

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
RECIPES: dict[str, dict[str, Any]] = {
    "logquant": {"window": 12},
    "kivi": {"residual": 32},
    "balanced": {"window": 16},
    "streaming-llm": {"window": 40},
    "partial-logquant": {"window": 16},
    "h2o": {},
    "mas": {"window": 8, "heavy": 60},
    "mikv": {"window": 16, "heavy": 20},
    "zipcache": {"period": 30},
    "rotated": {},
}
ROTATED = {
    "tiers": [
        {"policy": {"kind": "recent", "window": 16, "flush": 16}, "store": "full"},
        {
            "keys": {"kind": "int", "nbits": 2, "transforms": [{"kind": "hadamard"}]},
            "values": {"kind": "int", "nbits": 2, "transforms": [{"kind": "hadamard"}, {"kind": "scale"}]},
        },
    ],
}


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield


@functools.cache
def model_on_gpu() -> Any:
    return copy.deepcopy(llama(64, 4, 2, torch.bfloat16)).to("cuda")


def steps(model: Any, cache: CompressedCache, batch: int, count: int, first: int = 0, **options: Any) -> torch.Tensor:
    logits = []
    for seed in range(first, first + count):
        logits.append(model(ids(1, batch, seed=seed).to(model.device), **{CACHE: cache}, **options).logits)
    return torch.cat(logits, dim=1)


@gpu
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", RECIPES)
def test_steps_are_those_without_graphs_to_the_bit(name: str, batch: int) -> None:
    model, prompt = model_on_gpu(), ids(150, batch).to("cuda")
    found = []
    for graphs in (False, True):
        with attach(model, graphs=graphs) as handle:
            cache = make_cache({"rotated": ROTATED}.get(name, name), model, **RECIPES[name])
            model(prompt, **{CACHE: cache})
            found.append((steps(model, cache, batch, 130), cache.memory().bytes, cache.dense(1)))
            if graphs:
                assert handle.graphs.replayed >= 120, handle.graphs.reasons
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]
    assert all(torch.equal(a, b) for a, b in zip(found[0][2], found[1][2], strict=True))


@gpu
def test_caches_that_take_turns_keep_their_own_tokens() -> None:
    model = model_on_gpu()
    found = []
    for graphs in (False, True):
        with attach(model, graphs=graphs) as handle:
            caches = [make_cache(name, model, window=12) for name in ("logquant", "balanced", "logquant")] + [
                make_cache("zipcache", model, period=12),
                make_cache("zipcache", model, period=12),
            ]
            logits = [[] for _ in caches]
            for number, cache in enumerate(caches):
                model(ids(100 + 7 * number, seed=number).to("cuda"), **{CACHE: cache})
            for turn in range(40):
                for number, cache in enumerate(caches):
                    logits[number].append(steps(model, cache, 1, 1, 100 * number + turn))
                if turn == 20:
                    caches[0].crop(-1)
                    caches[1].reorder_cache(torch.zeros(1, dtype=torch.long))
                    caches[2] = copy.deepcopy(caches[2])
            found.append([torch.cat(x) for x in logits])
            if graphs:
                assert handle.graphs.replayed >= 110, handle.graphs.reasons
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@gpu
def test_generate_gives_the_same_tokens() -> None:
    model, prompt = model_on_gpu(), ids(120, 2).to("cuda")
    found = []
    for graphs in (False, True):
        with attach(model, recipe="logquant", window=12, graphs=graphs) as handle:
            found.append(model.generate(prompt, max_new_tokens=60, do_sample=False))
            if graphs:
                assert handle.graphs.replayed >= 50, handle.graphs.reasons
    assert torch.equal(*found)


@gpu
def test_what_is_unusual_runs_without() -> None:
    model, prompt = model_on_gpu(), ids(90, 2).to("cuda")
    mask = torch.ones(2, 90, dtype=torch.long, device="cuda")
    mask[1, :20] = 0

    def run(graphs: bool, name: str, masked: bool, several: int, **params: Any) -> torch.Tensor:
        with attach(model, graphs=graphs):
            cache = make_cache(name, model, **params)
            model(prompt, **{CACHE: cache}, **({"attention_mask": mask} if masked else {}))
            logits = [steps(model, cache, 2, 6)]
            if several:
                logits.append(model(ids(several, 2, seed=50).to("cuda"), **{CACHE: cache}).logits)
            logits.append(steps(model, cache, 2, 30, 60))
            return torch.cat(logits, dim=1)

    for case in (("logquant", True, 0), ("logquant", False, 3), ("h2o", False, 0), ("logquant", True, 5)):
        assert torch.equal(run(False, *case), run(True, *case)), case


@gpu
def test_weights_that_moved_are_captured_anew() -> None:
    model = copy.deepcopy(model_on_gpu())
    with attach(model, graphs=True) as handle:
        cache = make_cache("logquant", model)
        model(ids(90).to("cuda"), **{CACHE: cache})
        steps(model, cache, 1, 5)
        layer = model.model.layers[0].mlp.down_proj
        layer.weight.data = layer.weight.data * 2
        twin = copy.deepcopy(cache)
        found = steps(model, cache, 1, 4, 20)
        assert handle.graphs.replayed
    with attach(model, graphs=False):
        assert torch.equal(found, steps(model, twin, 1, 4, 20))


@gpu
def test_a_hook_inside_the_model_is_run_at_every_step() -> None:
    model = copy.deepcopy(model_on_gpu())
    with attach(model, graphs=True) as handle:
        cache = make_cache("logquant", model)
        model(ids(90).to("cuda"), **{CACHE: cache})
        steps(model, cache, 1, 5)
        seen: list[int] = []
        model.model.layers[0].register_forward_hook(lambda *_: seen.append(1))
        steps(model, cache, 1, 4, 20)
        assert len(seen) == 4
        assert handle.graphs.reasons["hooks inside the model"]


@gpu
def test_what_the_ordinary_path_would_refuse_or_mask_is_not_replayed() -> None:
    model = model_on_gpu()
    with attach(model, graphs=True) as handle:
        one, two = (make_cache("logquant", model, window=12) for _ in range(2))
        model(ids(90).to("cuda"), **{CACHE: one})
        model(ids(90, 2).to("cuda"), **{CACHE: two})
        steps(model, one, 1, 5)
        assert handle.graphs.replayed
        with pytest.raises(CacheError, match="rows"):
            steps(model, two, 1, 1)
        assert handle.graphs.reasons["other rows than those of the cache"] == 1
        seen = one.get_seq_length()
        hidden = torch.ones(1, seen + 1, dtype=torch.long, device="cuda")
        hidden[0, 3] = 0
        before = handle.graphs.replayed
        steps(model, one, 1, 1, attention_mask=hidden)
        assert handle.graphs.replayed == before
        steps(model, one, 1, 1, attention_mask=torch.ones_like(torch.nn.functional.pad(hidden, (0, 1))))
        assert handle.graphs.replayed == before + 1


@gpu
def test_neither_a_graph_nor_its_handle_keeps_a_cache_or_memory() -> None:
    model = model_on_gpu()
    with attach(model, graphs=True) as handle:
        cache = make_cache("logquant", model, window=12)
        model(ids(90).to("cuda"), **{CACHE: cache})
        steps(model, cache, 1, 6)
        assert handle.graphs.replayed
        kept = weakref.ref(cache)
        del cache
        gc.collect()
        assert kept() is None
    assert not handle.graphs.steps


@gpu
def test_threads_share_graphs() -> None:
    model = model_on_gpu()

    def run(seed: int) -> torch.Tensor:
        with torch.no_grad():
            cache = make_cache("logquant", model, window=12)
            model(ids(70, seed=seed).to("cuda"), **{CACHE: cache})
            return steps(model, cache, 1, 25, 100 * seed).cpu()

    with attach(model, graphs=False):
        expected = [run(seed) for seed in range(4)]
    with attach(model, graphs=True) as handle, ThreadPoolExecutor(4) as pool:
        run(9)
        found = list(pool.map(run, range(4)))
        assert handle.graphs.replayed > 50, handle.graphs.reasons
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_model_that_changed_is_noticed() -> None:
    from peft import LoraConfig, get_peft_model

    model = copy.deepcopy(tiny("llama"))
    inside = get_peft_model(model, LoraConfig(target_modules=["q_proj"])).base_model.model
    inside.eval()
    state = ModelState(inside)
    assert state.unfit() is None
    assert state.same()
    layer = inside.model.layers[0]
    changes: list[tuple[Any, Any]] = [
        (lambda: layer.self_attn.q_proj.enable_adapters(False), lambda: layer.self_attn.q_proj.enable_adapters(True)),
        (lambda: setattr(layer.mlp, "forward", layer.mlp.forward), lambda: delattr(layer.mlp, "forward")),
    ]
    for change, back in changes:
        change()
        assert not state.same()
        back()
    handle = layer.register_forward_hook(lambda *_: None)
    assert not state.same()
    assert state.unfit() == "hooks inside the model"
    handle.remove()
    layer.mlp.down_proj.weight.data = layer.mlp.down_proj.weight.data.clone()
    assert not state.same()


def test_a_capture_that_failed_is_tried_again_after_some_steps() -> None:
    step = Captured(tiny("llama"), {"input_ids": ids(1)})
    assert not any(step.stale() for _ in range(2 * AGAIN))
    step.reason = "some"
    assert [step.stale() for _ in range(AGAIN)] == [False] * (AGAIN - 1) + [True]


@pytest.mark.parametrize("room", [0, 600])
def test_a_kernel_that_a_capture_may_be_the_first_to_ask_for_is_loaded_before(
    room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eager steps of few scores leave the weights to PyTorch, and nothing can be loaded within a capture."""
    done: list[str] = []

    def recording(device: torch.device) -> None:
        done.append("recording")
        raise RuntimeError("no CUDA device")

    monkeypatch.setattr(heads, "load", lambda device: done.append("load"))
    monkeypatch.setattr(graph, "Recording", recording)
    step = Captured(tiny("llama"), {"input_ids": ids(1)})
    step.room = room
    given: Any = None
    with pytest.raises(RuntimeError, match="no CUDA device"):
        step.capture(lambda: None, given, given)
    assert done == (["load", "recording"] if room else ["recording"])


def test_a_call_that_asked_for_hidden_states_leaves_no_hooks_that_count() -> None:
    model = copy.deepcopy(tiny("llama"))
    model(ids(5), output_hidden_states=True)
    assert ModelState(model).unfit() is None


def test_a_shallow_copy_runs_itself() -> None:
    model = copy.deepcopy(tiny("llama"))
    with attach(model, graphs=True):
        twin = copy.copy(model)
        twin._modules = dict(model._modules)
        twin.lm_head = copy.deepcopy(model.lm_head)
        twin.lm_head.weight.data.zero_()
        assert not twin(ids(5)).logits.any()
        assert model(ids(5)).logits.any()


def test_on_a_cpu_nothing_differs_and_nothing_is_left() -> None:
    model = tiny("llama")
    before, signature = dict(model.__dict__), inspect.signature(model.forward)
    found = []
    for graphs in (False, True):
        with attach(model, graphs=graphs) as handle:
            assert inspect.signature(model.forward) == signature
            cache = make_cache("logquant", model, window=12)
            model(ids(90), **{CACHE: cache})
            found.append(steps(model, cache, 1, 20))
            if graphs:
                assert handle.graphs.reasons == {"not one token on a GPU": 21}
                twin = copy.deepcopy(model)
        assert model.__dict__.keys() == before.keys()
    assert torch.equal(*found)
    # A copy of a model that was attached is a model like any other.
    assert torch.equal(twin(ids(9)).logits, model(ids(9)).logits)


def test_a_forward_of_the_users_own_comes_back() -> None:
    model = tiny("llama")
    own = model.forward = functools.partial(type(model).forward, model)
    try:
        with attach(model, graphs=True):
            assert model.forward is not own
            model(ids(5))
        assert model.forward is own
    finally:
        del model.forward
