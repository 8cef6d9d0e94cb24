"""Layers that stand alike: what is known of them is what one would find by looking at all of their pages."""

from __future__ import annotations

import copy
import pickle
from threading import Lock
from typing import Any, ClassVar, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import build, ids
from torch import Tensor
from words import CACHE

import kvpolicy
from kvpolicy import AttentionOptions, AttentionSpec, Backend, Part, make_cache
from kvpolicy.attention import backend as backends
from kvpolicy.attention.reference import REFERENCE
from kvpolicy.attention.steady import _looked_up, asked_of, known_of, note, stood_of
from kvpolicy.errors import PluginError
from kvpolicy.layer.commit import commit_all
from kvpolicy.layer.held import Reading
from kvpolicy.layer.layer import LayerCache
from kvpolicy.layer.standing import Kind, Standing
from kvpolicy.placement.planner import Placement
from kvpolicy.placement.step import Step
from kvpolicy.recipe.load import load_recipe

RECIPES = {
    "logquant": {"window": 12},
    "kivi": {"residual": 16, "group_size": 8},
    "streaming-llm": {"window": 20},
    "kivi-sink": {"residual": 16, "group_size": 8},
    "h2o": {},
    "mikv": {},
    "zipcache": {"period": 20},
}


class Layers:
    """Some layers of one recipe that are given tokens as a pass of an attached model gives them."""

    def __init__(self, name: str) -> None:
        self.reading = Reading(attached=True, lasting=True)
        first = Step.first(Placement(load_recipe(name, **RECIPES[name]).tiers))
        self.layers = [LayerCache(first, None, self.reading) for _ in range(3)]
        self.rows = 2
        self.served = 0

    def update(self, n: int) -> None:
        self.reading.known.clear()
        self.marks: dict[Standing, Any] = {}
        if self.layers[0].stores:
            commit_all([[layer] for layer in self.layers], n)
        for layer in self.layers:
            layer.stage(*(torch.randn(self.rows, n, 2, 32).transpose(1, 2) for _ in range(2)))
            if layer.observes:
                layer.observe()
            self.check(layer)
            layer.heed(torch.randn(self.rows, 2, n, 32))
            layer.hold()

    def check(self, layer: LayerCache) -> None:
        """What is known of a layer holds, and what serves another that stands alike would serve it."""
        if not layer.committed:
            return
        x = torch.zeros(self.rows, 2, 1, 32)
        asked = asked_of(layer, x, (x, x))
        known = known_of(layer, asked)  # before anybody else looks whether what is known of the layer still holds
        found = layer.stood if known is not None else stood_of(layer)
        if found is None:
            return
        fresh = _looked_up(layer)
        assert fresh is not None
        assert found.addresses == fresh.addresses
        assert self.marks.setdefault(found.standing, fresh.standing.marks) == fresh.standing.marks
        if known is None:
            note(layer, asked, lambda *given: x)
        else:
            assert found.standing is known.standing
            self.served += 1

    def crop(self, n: int) -> None:
        for layer in self.layers:
            layer.crop(max(layer.seen - n, 1))

    def select(self, rows: list[int]) -> None:
        for layer in self.layers:
            layer.select(torch.tensor(rows))
        self.rows = len(rows)

    def alone(self, number: int) -> None:
        """A layer lets its tokens in by itself."""
        self.layers[number].commit()


STEPS = st.one_of(
    st.tuples(st.just("update"), st.sampled_from([1, 1, 1, 1, 1, 2, 7, 30])),
    st.tuples(st.just("crop"), st.integers(1, 9)),
    st.tuples(st.just("select"), st.sampled_from([[0, 1], [1, 0], [0, 0, 1], [1]])),
    st.tuples(st.just("alone"), st.integers(0, 2)),
    st.tuples(st.just("copy"), st.none()),
)


@settings(deadline=None, max_examples=40)
@given(name=st.sampled_from(sorted(RECIPES)), first=st.integers(1, 150), steps=st.lists(STEPS, max_size=60))
def test_what_is_known_holds_whatever_happens(name: str, first: int, steps: list[tuple[str, Any]]) -> None:
    case = Layers(name)
    case.update(first)
    for what, value in steps:
        if what == "copy":
            case.reading.known[Kind(())] = Lock()  # what attention keeps can't be copied
            case = copy.deepcopy(case)
        elif what != "select" or max(value) < case.rows:
            getattr(case, what)(value)
    case.update(1)
    case.update(1)


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_layers_stay_known_from_step_to_step(name: str) -> None:
    case = Layers(name)
    case.update(150)
    kept, served = 0, case.served
    for _ in range(60):
        before = [layer.stood for layer in case.layers]
        case.update(1)
        kept += all(x is not None and x is layer.stood for x, layer in zip(before, case.layers, strict=True))
    assert kept > 40
    assert case.served == served + 2 * 60


class Uncopied:
    """What attends again; as that of a device it can't be copied."""

    def __call__(self, query: Tensor, new: tuple[Tensor, Tensor], *_: Any) -> Tensor:
        batch, heads, queries, _ = query.shape
        return query.new_zeros(batch, queries, heads, new[1].shape[3])

    def __reduce__(self) -> Any:
        raise TypeError("not to be copied")


class Knowing(Backend):
    """Serves all layers of a step at once."""

    kind: Literal["knowing"] = "knowing"
    priority: ClassVar[int] = 1

    def refuses(self, spec: AttentionSpec) -> str | None:
        return None

    def attend(
        self, query: Tensor, part: Part, mask: Tensor | None, options: AttentionOptions
    ) -> tuple[Tensor, Tensor]:
        return REFERENCE.attend(query, part, mask, options)

    def again(self, query: Tensor, part: Part, options: AttentionOptions) -> Uncopied:
        return Uncopied()


ANSWERS: dict[str, Any] = {
    "no function": 3,
    "other arguments": lambda query: query,
    "a channel less": lambda query, new, *_: query.transpose(1, 2)[..., 1:],
    "another type": lambda query, new, *_: query.transpose(1, 2).double(),
    "another order": lambda query, new, *_: query,
    "no tensor": lambda *_: 3,
}


@pytest.mark.parametrize("answer", ANSWERS)
def test_a_backend_whose_again_lies_is_named(answer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Knowing, "again", lambda self, *given: ANSWERS[answer])
    monkeypatch.setattr(backends, "others", lambda: (Knowing(),))
    backends.chosen.cache_clear()
    model = build("llama", torch.float32, num_hidden_layers=3)
    with torch.no_grad(), kvpolicy.attach(model):
        cache = make_cache("logquant", model)
        model(ids(150), **{CACHE: cache})
        with pytest.raises(PluginError, match="backend 'knowing': what again returns must"):
            model(ids(1), **{CACHE: cache})
    backends.chosen.cache_clear()


@pytest.mark.parametrize("when", ["in a pass", "after an interruption"])
def test_copies_leave_out_what_is_known_of_a_pass(when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "others", lambda: (Knowing(),))
    backends.chosen.cache_clear()
    model = build("llama", torch.float32, num_hidden_layers=3)
    copies: list[Any] = []

    def interrupt(*_: Any) -> None:
        assert cache.reading.known
        if when == "in a pass":
            copies.append(copy.deepcopy(cache.reading))
        raise KeyError

    with torch.no_grad(), kvpolicy.attach(model):
        cache = make_cache("logquant", model)
        model(ids(150), **{CACHE: cache})
        model(ids(1), **{CACHE: cache})
        hook = model.model.layers[2].register_forward_pre_hook(interrupt)
        with pytest.raises(KeyError):
            model(ids(1), **{CACHE: cache})
        hook.remove()
        copies.append(copy.deepcopy(cache).reading)
        copies.append(pickle.loads(pickle.dumps(cache)).reading)
    backends.chosen.cache_clear()
    assert all(not reading.known for reading in [*copies, cache.reading])
