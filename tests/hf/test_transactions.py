"""A step that is interrupted anywhere: tried again it gives what a clean step gives, or the cache refuses."""

from __future__ import annotations

import copy
import itertools
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import pytest
import torch
from models import VOCAB, build, exact, ids, tiny
from transformers import LlamaForCausalLM
from words import CACHE

import kvpolicy
from kvpolicy import CompressedCache, make_cache
from kvpolicy.errors import CacheError, PluginError

QUANT: list[Any] = [
    {"policy": {"kind": "recent", "window": 8}, "store": "full"},
    {"store": {"kind": "int", "nbits": 4}},
]
EVICT: list[Any] = [
    {"policy": {"kind": "sink", "tokens": 2}, "store": "full"},
    {"policy": {"kind": "recent", "window": 8}, "store": "full"},
    {"store": "evict"},
]
HEADS: list[Any] = [
    {"policy": {"kind": "recent", "window": 4}, "store": "full"},
    {"policy": {"kind": "attention", "budget": 6}, "store": "full"},
    {"store": {"kind": "int", "nbits": 4}},
]
SHARED: list[Any] = [
    {"policy": {"kind": "recent", "window": 4}, "store": "full"},
    {"policy": {"kind": "attention", "budget": 6, "share": "model"}, "store": "full"},
    {"store": "evict"},
]
PLACES = ("kvpolicy", "kvpolicy_", "transformers", "torch/nn/modules/module.py")


class Stop(Exception):
    """What interrupts."""


@contextmanager
def interrupted(at: int, error: type[BaseException]) -> Iterator[list[int]]:
    """Raise an error at the `at`-th line that runs in kvpolicy, its plugins, or the model."""
    count = [0]
    mine = threading.get_ident()
    inside: dict[str, bool] = {}

    def lines(frame: Any, event: str, arg: Any) -> Any:
        if event == "line":
            count[0] += 1
            if count[0] == at:
                sys.settrace(None)
                raise error("interrupted")
        return lines

    def calls(frame: Any, event: str, arg: Any) -> Any:
        file = frame.f_code.co_filename
        if file not in inside:
            inside[file] = any(place in file for place in PLACES)
        return lines if inside[file] and threading.get_ident() == mine else None

    before = sys.gettrace()
    sys.settrace(calls)
    try:
        yield count
    finally:
        sys.settrace(before)


def mask_of(seen: int) -> torch.Tensor:
    mask = torch.ones(2, seen, dtype=torch.long)
    mask[0, :5] = 0
    return mask


class Case:
    """A model and a cache that holds a prompt and some decoded tokens; steps of it."""

    def __init__(self, tiers: list[Any], padded: bool) -> None:
        self.model, self.padded = tiny("llama"), padded
        self.recipe = {"name": "case", "tiers": tiers}
        self.tokens = ids(60, batch=2, seed=3)

    def step(self, cache: Any, start: int, n: int) -> torch.Tensor:
        more: dict[str, Any] = {CACHE: cache}
        if self.padded:
            more["attention_mask"] = mask_of(start + n)
            more["position_ids"] = (mask_of(start + n).cumsum(1) - 1).clamp(min=0)[:, start:]
        logits: torch.Tensor = self.model(self.tokens[:, start : start + n], **more).logits
        return logits

    def filled(self) -> CompressedCache:
        cache = make_cache(self.recipe, self.model)
        for start, n in ((0, 30), (30, 1), (31, 1)):
            self.step(cache, start, n)
        return cache

    def after(self, cache: Any, n: int, done: int = 0) -> list[torch.Tensor]:
        """The interrupted step, whole unless it is `done`, and two more."""
        return [self.step(cache, start, m) for start, m in ((32, n), (32 + n, 1), (33 + n, 1))[done:]]


def lengths(cache: CompressedCache) -> list[int]:
    return [layer.get_seq_length() for layer in cache.layers]


def outcome(case: Case, cache: CompressedCache, want: list[torch.Tensor], n: int, before: Any) -> str:
    """What an interrupted cache does: it is as before the step, or as after it, or it refuses."""
    try:
        done = int(cache.get_seq_length() == 32 + n)
        got = case.after(cache, n, done)
    except CacheError as error:
        message = str(error)
    else:
        assert all(map(torch.equal, got, want[done:]))
        assert len(set(lengths(cache))) == 1
        return "done" if done else "right"
    assert "interrupted" in message
    for use in (cache.memory, lambda: case.step(cache, 32, n)):
        with pytest.raises(CacheError, match="interrupted"):
            use()
    cache.reset()
    fresh = [case.step(cache, start, m) for start, m in ((0, 30), (30, 1), (31, 1))]
    assert all(map(torch.equal, fresh, before))
    return "refused"


CASES: dict[str, tuple[list[Any], bool, bool]] = {
    "unattached": (QUANT, False, False),
    "unattached-evict": (EVICT, False, False),
    "attached": (QUANT, True, False),
    "attached-evict": (EVICT, True, False),
    "heads": (HEADS, True, False),
    "shared": (SHARED, True, False),
    "padded": (QUANT, True, True),
    "padded-evict": (EVICT, True, True),
    "padded-heads": (HEADS, True, True),
}


def sweep(name: str, n: int, lines: Callable[[int], Any], error: type[BaseException]) -> dict[str, int]:
    """Interrupt a step of `n` tokens at some of its lines."""
    tiers, attached, padded = CASES[name]
    case, found = Case(tiers, padded), {"right": 0, "refused": 0, "done": 0}
    with torch.no_grad(), kvpolicy.attach(case.model) if attached else nullcontext():
        whole = case.filled()
        want = case.after(copy.deepcopy(whole), n)
        before = [
            case.step(c, s, m) for c in [make_cache(case.recipe, case.model)] for s, m in ((0, 30), (30, 1), (31, 1))
        ]
        with interrupted(-1, error) as count:
            case.step(copy.deepcopy(whole), 32, n)
        for at in lines(count[0]):
            cache = copy.deepcopy(whole)
            with interrupted(at, error), suppress(error, PluginError):  # the latter where a plugin was interrupted
                case.step(cache, 32, n)
            found[outcome(case, cache, want, n, before)] += 1
    return found


@pytest.mark.parametrize("error", [Stop, KeyboardInterrupt])
@pytest.mark.parametrize("name", CASES)
def test_a_step_interrupted_at_any_line(name: str, error: type[BaseException]) -> None:
    first = list(CASES).index(name)  # other lines of each case
    found = sweep(name, 1, lambda count: range(1 + first, count + 1, 151), error)
    assert found["right"] > found["refused"] + found["done"]


@pytest.mark.parametrize("name", ["unattached", "attached-evict", "heads", "padded-heads"])
def test_a_longer_update_interrupted(name: str) -> None:
    found = sweep(name, 25, lambda count: range(3, count + 1, 251), Stop)
    assert found["right"]


@pytest.mark.parametrize("tiers", [QUANT, EVICT])
@pytest.mark.parametrize("attached", [False, True])
def test_a_first_update_that_fails_leaves_an_empty_cache(tiers: list[Any], attached: bool) -> None:
    case = Case(tiers, False)
    with torch.no_grad(), kvpolicy.attach(case.model) if attached else nullcontext():
        want = case.step(make_cache(case.recipe, case.model), 0, 40)
        cache = make_cache(case.recipe, case.model)
        stop = case.model.model.layers[1].mlp.register_forward_pre_hook(fail)
        with pytest.raises(Stop):
            case.step(cache, 0, 40)
        stop.remove()
        assert lengths(cache) == [0, 0]
        assert torch.equal(case.step(cache, 0, 40), want)


def test_a_sliding_layer_goes_back_as_well() -> None:
    model = tiny("gemma3_text")
    tokens = ids(60, seed=5) % VOCAB
    with torch.no_grad(), kvpolicy.attach(model):
        cache = make_cache("logquant", model, window=8)
        model(tokens[:, :40], **{CACHE: cache})
        other = copy.deepcopy(cache)
        want = [model(tokens[:, i : i + 1], **{CACHE: other}).logits for i in range(40, 43)]
        for layer in range(4):
            stop = model.model.layers[layer].mlp.register_forward_pre_hook(fail)
            with pytest.raises(Stop):
                model(tokens[:, 40:41], **{CACHE: cache})
            stop.remove()
        got = [model(tokens[:, i : i + 1], **{CACHE: cache}).logits for i in range(40, 43)]
    assert all(map(torch.equal, got, want))


def fail(*args: Any) -> None:
    raise Stop


def failing(model: Any, module: Any, run: Any) -> None:
    """Run a step in which a hook on `module` raises."""
    stop = module.register_forward_hook(fail)
    with pytest.raises(Stop):
        run()
    stop.remove()


@pytest.mark.parametrize("attached", [False, True])
@pytest.mark.parametrize("first", [False, True])
def test_a_hook_of_the_users_on_the_model_that_raises(first: bool, attached: bool) -> None:
    model = tiny("qwen3")
    with torch.no_grad(), kvpolicy.attach(model) if attached else nullcontext():
        stop = model.register_forward_hook(fail) if first else None
        cache = make_cache("logquant", model)
        stop = stop or model.register_forward_hook(fail)
        with pytest.raises(Stop):
            model(ids(10), **{CACHE: cache})
        stop.remove()
        assert lengths(cache) == [0, 0]
        try:
            fail()
        except Stop:  # an error that is being handled is not the pass's own
            model(ids(10), **{CACHE: cache})
        assert lengths(cache) == [10, 10]


def test_states_of_linear_attention_go_back_as_well() -> None:
    model = build("lfm2", torch.float32, layer_types=["full_attention", "conv"], conv_L_cache=3)
    with torch.no_grad():
        cache = make_cache("logquant", model, window=8)
        model(ids(30), **{CACHE: cache})
        want = model(ids(1), **{CACHE: copy.deepcopy(cache)}).logits
        failing(model, model.model.layers[1], lambda: model(ids(1), **{CACHE: cache}))
        assert torch.equal(model(ids(1), **{CACHE: cache}).logits, want)


def test_layers_of_transformers_with_a_window_count_among_those_that_must_agree() -> None:
    model = tiny("gemma3_text")
    stranger = copy.deepcopy(model)  # it tells the cache nothing of its passes
    with torch.no_grad():
        cache = make_cache("full", model.config)
        stranger(ids(20), **{CACHE: cache})
        failing(stranger, stranger.model.layers[1].mlp, lambda: stranger(ids(1), **{CACHE: cache}))
        with pytest.raises(CacheError, match=r"\[21, 20, 21, 20\]|\[21, 20, 20\]|crop\(20\)"):
            stranger(ids(1), **{CACHE: cache})
        whole = make_cache("full", model)
        model(ids(40), **{CACHE: whole})
        with pytest.raises(CacheError, match="can't be cropped by 2 tokens"):
            whole.crop(-2)
        assert lengths(whole) == [40] * 4
        model(ids(1), **{CACHE: whole})


def test_an_inner_model_that_is_called_in_parts() -> None:
    class Parts(LlamaForCausalLM):
        def forward(self, input_ids: Any = None, attention_mask: Any = None, **kwargs: Any) -> Any:
            for part in input_ids.split(16, dim=1):
                out = super().forward(part, **kwargs)
            return out

    model = Parts(tiny("llama").config).eval()
    with torch.no_grad():
        for n in (16, 17, 32, 44):
            want = model(ids(n), **{CACHE: exact(model)}).logits
            for attached in (False, True):
                with kvpolicy.attach(model) if attached else nullcontext():
                    cache = make_cache("full", model)
                    assert torch.equal(model(ids(n), **{CACHE: cache}).logits, want)
                    assert lengths(cache) == [n, n]


def all_lines() -> None:
    """Every line of every case: some ten minutes. Run by hand."""
    for (name, error), n in itertools.product(itertools.product(CASES, (Stop, KeyboardInterrupt)), (1, 25)):
        print(name, error.__name__, n, sweep(name, n, lambda count: range(1, count + 1), error), flush=True)


if __name__ == "__main__":
    all_lines()
