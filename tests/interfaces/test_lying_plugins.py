"""Plugins that break their contract: what notices it, and that nothing foreign is raised."""

from __future__ import annotations

import inspect
import itertools
import re
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

import numpy as np
import pytest
import torch
from honest import (
    Good,
    GoodExtra,
    GoodMerger,
    GoodPolicy,
    GoodRank,
    GoodReader,
    GoodTensors,
    GoodTransform,
    lying,
    raising,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from kvpolicy_hadamard import Hadamard
from kvpolicy_int import Int
from kvpolicy_scale import Scale
from layers import HEAD_DIM, Layer, random_tokens
from liars import LIARS

from kvpolicy import Extra, Merger, Policy, RankPolicy, Reader, Scores, Transform
from kvpolicy.errors import KvpolicyError, MissingDependencyError, PluginError, RecipeError
from kvpolicy.interfaces.component import Component
from kvpolicy.interfaces.policy import NEVER
from kvpolicy.interfaces.quantizer import AffineQuantizer, Quantizer
from kvpolicy.placement.selection import ranked, shared
from kvpolicy.plugins import HOOKS
from kvpolicy.storage.make import make_store

GOOD = {
    "affine": Good,
    "tensors": GoodTensors,
    "policy": GoodPolicy,
    "rank": GoodRank,
    "transform": GoodTransform,
    "extra": GoodExtra,
    "reader": GoodReader,
    "merger": GoodMerger,
}


def contract_tests(component: Component) -> Iterator[Callable[[], None]]:
    """The contract suite's tests of one plugin."""
    bases = [Policy, RankPolicy, Quantizer, AffineQuantizer, Transform, Extra, Reader, Merger]
    kinds = {base.__name__: base for base in bases}
    what = component._role
    module = import_module(f"kvpolicy.contracts.test_{HOOKS[what][0]}")
    for name, test in vars(module).items():
        if not name.startswith("test_") or not isinstance(component, kinds[inspect.get_annotations(test)[what]]):
            continue
        marks = [mark.args[:2] for mark in test.pytestmark if mark.args[0] != what]
        for values in itertools.product(*(values for _, values in marks)):
            options = {argument: value for (argument, _), value in zip(marks, values, strict=True)}
            yield lambda test=test, options=options: test(**{what: component}, **options)


def run(component: Component) -> None:
    """A prompt, single tokens, and all that was held."""
    full, last = {"policy": {"kind": "recent", "window": 3}, "store": "full"}, {"store": {"kind": "int", "nbits": 2}}
    if isinstance(component, Transform | Extra):
        component = Int(nbits=4, group_size=8, **{HOOKS[component._role][0]: (component,)})
    below = {"policy": component, "store": "full"} if isinstance(component, Policy) else {"store": component}
    if isinstance(component, Reader):
        below = {"store": Int(nbits=8, group_size=8), "read": component}
    if isinstance(component, Merger):
        full = {"policy": {"kind": "attention", "budget": 6}, "store": "full"}
        below = {"store": "evict", "merge": component}
    layer = Layer({"tiers": [full, below, *([last] if isinstance(component, Policy) else [])]})
    for step, n in enumerate((40, *(1,) * 8, 30)):
        layer(*random_tokens(n, step))
    layer.cache.commit()
    layer.cache.dense(0)


@pytest.mark.parametrize("name", GOOD)
def test_plugins_that_behave_pass(name: str) -> None:
    for test in contract_tests(GOOD[name]()):
        test()
    run(GOOD[name]())


@pytest.mark.parametrize("name", LIARS)
def test_the_contract_suite_notices(name: str) -> None:
    liar = LIARS[name]

    def try_all() -> None:
        for test in contract_tests(liar.make()):
            test()

    with pytest.raises(Exception):  # noqa: B017, PT011 whatever it is, pytest reports it as a failure
        try_all()


@pytest.mark.parametrize("name", LIARS)
def test_what_would_spoil_a_cache_is_refused_at_run_time(name: str) -> None:
    liar = LIARS[name]
    if not liar.run:
        run(liar.make())
        return
    with pytest.raises(PluginError, match=liar.run) as info:
        run(liar.make())
    assert "'liar'" in str(info.value)
    if "must not fail" in str(info.value):
        assert isinstance(info.value.__cause__, Exception)
        assert not isinstance(info.value.__cause__, KvpolicyError)


@pytest.mark.parametrize("name", [name for name, liar in LIARS.items() if issubclass(liar.base, Quantizer)])
def test_a_store_refuses_what_would_spoil_it_and_stays_as_it_was(name: str) -> None:
    """Whatever was found when the cache was made."""
    liar = LIARS[name]
    x = torch.randn(1, 2, 6, HEAD_DIM)
    store: Any = None
    held: dict[str, int] = {}
    try:
        store = make_store(liar.make(), HEAD_DIM)  # type: ignore[arg-type]
        for _ in range(3):
            held = {part: pages.length for part, pages in store.parts.items()}
            store.append(x.clone())
        held = {part: pages.length for part, pages in store.parts.items()}
        store.write(torch.empty(1, 2, 18, HEAD_DIM), 0)
    except PluginError as error:
        assert liar.run
        assert re.search(liar.run, str(error))  # noqa: PT017
        assert store is None or held == {part: pages.length for part, pages in store.parts.items()}
    else:
        assert not liar.run or name.startswith(("precision", "scores", "combine"))


METHODS = {
    "keep": GoodPolicy,
    "capacity": GoodPolicy,
    "departures": GoodPolicy,
    "budget_tokens": GoodRank,
    "rank": GoodRank,
    "scores": GoodRank,
    "calibrate": Good,
    "check": Good,
    "precision": Good,
    "encode": GoodTensors,
    "decode": GoodTensors,
    "combine": GoodTensors,
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "error",
    [
        KeyboardInterrupt(),
        SystemExit(1),
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
        RecipeError("ours"),
        MissingDependencyError("ours"),
    ],
    ids=lambda error: f"{type(error).__name__}",
)
def test_interrupts_and_memory_that_runs_out_pass_as_they_are(method: str, error: BaseException) -> None:
    made = lying(METHODS[method], "", **{method: raising(error)}).make
    with pytest.raises(type(error)) as info:
        run(made())
    assert info.value is error or isinstance(error, RecipeError)


def test_the_original_error_is_kept() -> None:
    original = KeyError("here")
    with pytest.raises(PluginError, match=r"policy 'liar': keep must not fail, found KeyError: 'here'") as info:
        run(lying(GoodPolicy, "", keep=raising(original)).make())
    assert info.value.__cause__ is original


def test_a_nan_ranks_below_every_number_and_fills_the_budget_all_the_same() -> None:
    def rank(self: Any, attention: Any, queries: Any, ages: Any) -> Any:
        return torch.where(ages % 12 == 0, attention, torch.nan)

    policy = lying(GoodRank, "", rank=rank).make()
    window = {"policy": {"kind": "recent", "window": 5}, "store": "full"}
    layer = Layer({"tiers": [window, {"policy": policy, "store": "full"}, {"store": "evict"}]})
    layer(*random_tokens(40, 0))
    for heads in layer.held():
        for newest, chosen, _ in heads:
            assert newest == [35, 36, 37, 38, 39]
            assert len(chosen) == 6
            assert {40 - 12, 40 - 24, 40 - 36} <= set(chosen)


@pytest.mark.parametrize("select", ["head", "layer"])
def test_a_nan_ranks_above_what_is_no_candidate(select: Any) -> None:
    policy: Any = lying(GoodRank, "", rank=lambda self, attention, queries, ages: attention).make()
    policy = policy.model_copy(update={"share": select})
    attention = torch.tensor([[[1.0, torch.nan, -torch.inf, 0.5], [-2.0, 0.0, -torch.inf, -torch.inf]]])
    rank = shared(policy, ranked(policy, attention, torch.ones(1, 2, 4), torch.ones(1, 2, 4)))
    assert (rank > -torch.inf).all()
    expected = attention if select == "head" else attention.mean(1, keepdim=True)
    assert torch.equal(rank[expected.isfinite()], expected[expected.isfinite()])
    assert (rank[~expected.isfinite()] < -1e30).all()


TOLD: list[int] = []


class Told(GoodPolicy):
    """Tokens leave as `TOLD` says."""

    def departures(self, *_: Any) -> Any:
        return np.array(TOLD)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.data())
def test_departures_are_taken_where_they_are_possible(data: st.DataObject) -> None:
    start = data.draw(st.integers(0, 20))
    stop = start + data.draw(st.integers(1, 10))
    n = data.draw(st.integers(1, 6))
    arrivals = data.draw(st.lists(st.integers(start, stop), min_size=n, max_size=n))
    found = data.draw(st.lists(st.one_of(st.integers(-2, 35), st.just(int(NEVER))), min_size=n, max_size=n))
    policy = Told()
    TOLD[:] = found
    arrays = np.arange(n, dtype=np.int64), np.array(arrivals, dtype=np.int64)
    fits = all(left == NEVER or max(at, start + 1) <= left <= stop for left, at in zip(found, arrivals, strict=True))
    if fits:
        assert policy._left(*arrays, start, stop, None).tolist() == found
    else:
        with pytest.raises(PluginError, match="must leave then or later"):
            policy._left(*arrays, start, stop, None)


WORDS = ["all", "probe", "newest", "last", "last probe", "mean", "sum", "max", "bananas", "", None, 1, True]
NUMBERS = st.one_of(
    st.integers(-2, 3), st.floats(allow_nan=True), st.booleans(), st.none(), st.just("1"), st.just(2**31)
)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.sampled_from(WORDS), st.sampled_from(WORDS), st.sampled_from(WORDS), NUMBERS, NUMBERS, NUMBERS, NUMBERS)
def test_every_field_of_scores_is_checked(
    queries: Any, decode: Any, heads: Any, newest: Any, random: Any, period: Any, seed: Any
) -> None:
    words = ("all", "probe", "newest", "last", "last probe")
    allowed = {
        "queries": isinstance(queries, str) and queries in words,
        "decode": isinstance(decode, str) and decode in words,
        "heads": isinstance(heads, str) and heads in ("mean", "sum", "max"),
        "newest": type(newest) in (int, float)
        and 0 <= newest <= (2**31 - 1 if type(newest) is int else 1)
        and ("newest" not in (queries, decode) or (type(newest) is int and newest > 0)),
        "random": type(random) in (int, float) and 0 <= random <= 1,
        "period": type(period) is int and 1 <= period < 2**31,
        "seed": type(seed) is int and 0 <= seed < 2**31,
    }
    given_ = (queries, decode, heads, newest, random, period, seed)
    wrong = [name for name, fits in allowed.items() if not fits]
    if not wrong:
        assert hash(Scores(*given_)) == hash(Scores(*given_))
        return
    with pytest.raises(PluginError, match=f"Scores: {wrong[0]} must be"):
        Scores(*given_)


def test_scores_list_what_is_allowed() -> None:
    with pytest.raises(
        PluginError, match="queries must be one of 'all', 'probe', 'newest', 'last', 'last probe', found 'banan"
    ):
        Scores(queries="bananas")  # type: ignore[arg-type]
    with pytest.raises(PluginError, match="heads must be one of 'mean', 'sum', 'max', found 'median'"):
        Scores(heads="median")  # type: ignore[arg-type]
    with pytest.raises(
        PluginError, match="newest must be a number from 0 to 1, or an integer to 2147483647, found nan"
    ):
        Scores(newest=float("nan"))
    with pytest.raises(PluginError, match="newest must be an integer, 1 or more, with queries or decode 'newest'"):
        Scores(queries="newest")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "quantizer",
    [
        Good(nbits=2),
        Good(nbits=8, per="channel", group_size=8),
        Good(transforms=(Scale(), Hadamard(seed=1)), group_size=8),
        GoodTensors(),
    ],
    ids=["token", "channel", "transforms", "tensors"],
)
def test_what_is_checked_waits_for_no_device(quantizer: Quantizer, dtype: torch.dtype) -> None:
    """Tensors of the device `meta` have no numbers: to read one is an error."""
    store = make_store(quantizer, HEAD_DIM)
    assert store is not None
    with torch.no_grad():
        for n in (40, 1, 8):
            store.append(torch.empty(1, 2, n, HEAD_DIM, dtype=dtype, device="meta"))
        store.write(torch.empty(1, 2, 49, HEAD_DIM, dtype=dtype, device="meta"), 0)
    assert store.length == 49


def test_codes_beyond_nbits_never_reach_their_neighbours() -> None:
    """Where no device is asked for them, packing cuts them off."""
    from kvpolicy.storage.packing import pack, unpack

    codes = torch.randint(256, (5, 2 * HEAD_DIM), dtype=torch.uint8)
    for nbits in (1, 2, 3, 4, 8):
        assert torch.equal(unpack(pack(codes, nbits), nbits, 2 * HEAD_DIM), codes & (2**nbits - 1))
