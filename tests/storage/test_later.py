"""Tokens of several stores that are coded in one go: what is held is what one store after the other would hold."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kvpolicy_hadamard import Hadamard
from kvpolicy_int import Int
from torch.utils._python_dispatch import TorchDispatchMode

from kvpolicy.storage import later as module
from kvpolicy.storage.affine import AffineStore
from kvpolicy.storage.clock import Clock
from kvpolicy.storage.later import Later


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_the_order_and_the_codes_are_those_of_one_after_the_other(data: Any) -> None:
    seed = data.draw(st.sampled_from([None, 1]))
    quantizers = [
        Int(nbits=data.draw(st.sampled_from([2, 4, 8])), per="token"),
        Int(nbits=2, per="channel", group_size=data.draw(st.sampled_from([4, "arrival"]))),
        Int(nbits=3, range="rms", group_size="head", transforms=(Hadamard(seed=seed),)),
    ]
    which = data.draw(st.lists(st.integers(0, 2), min_size=1, max_size=4), "quantizer of each store")
    together, alone = ([AffineStore(quantizers[w], 8) for w in which] for _ in range(2))
    if data.draw(st.booleans(), "by head"):
        for store in (*together, *alone):
            store.differ_by_head((2, 1))
    before, module.TOGETHER = module.TOGETHER, data.draw(st.sampled_from([1, 2000, 1 << 25]), "bytes")
    try:
        for turn in range(data.draw(st.integers(1, 3))):
            coder = Later()
            for seed in range(data.draw(st.integers(1, 6), "arrivals")):
                number = data.draw(st.integers(0, len(which) - 1))
                tokens = data.draw(st.integers(1, 5))
                x = torch.randn(2, 1, tokens, 8, generator=torch.Generator().manual_seed(10 * turn + seed))
                together[number].append(x, later=coder)
                alone[number].append(x)
            coder.run()
    finally:
        module.TOGETHER = before
    for found, expected in zip(together, alone, strict=True):
        one, other = found.tensors(), expected.tensors()
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("independent", [True, False])
def test_what_depends_on_what_is_coded_together_is_coded_alone(independent: bool, monkeypatch: Any) -> None:
    monkeypatch.setattr(Int, "independent", independent)
    calls: list[int] = []
    real = Int.calibrate
    monkeypatch.setattr(Int, "calibrate", lambda self, groups: calls.append(len(groups)) or real(self, groups))
    stores, coder = [AffineStore(quantizer, 8) for quantizer in [Int(nbits=2)] * 3], Later()
    for store in stores:
        store.append(torch.randn(1, 1, 2, 8), later=coder)
    coder.run()
    assert len(calls) == (1 if independent else 3)


def test_transforms_that_keep_nothing_let_layers_be_coded_together(monkeypatch: Any) -> None:
    calls: list[int] = []
    real = Int.calibrate
    monkeypatch.setattr(Int, "calibrate", lambda self, groups: calls.append(len(groups)) or real(self, groups))
    quantizer = Int(nbits=2, group_size="head", transforms=(Hadamard(),))
    stores, coder = [AffineStore(quantizer, 8) for _ in range(3)], Later()
    for store in stores:
        store.append(torch.randn(1, 1, 2, 8))
        store.append(torch.randn(1, 1, 5, 8), later=coder)
    coder.run()
    assert calls == [2, 2, 2, 15]


class Bringing(TorchDispatchMode):
    """Notes what brings numbers of the CPU to another device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = [x for x in (*args, *(kwargs or {}).values()) if isinstance(x, torch.Tensor)]
        if isinstance(out, torch.Tensor) and out.device.type == "meta" and any(x.device.type == "cpu" for x in given):
            self.found.append(str(func))
        return out


@pytest.mark.parametrize(
    "options",
    [
        {"nbits": 2, "range": "rms", "group_size": "head", "transforms": (Hadamard(),)},
        {"nbits": 3, "scale_dtype": "e8m0"},
        {"nbits": 4, "per": "channel", "group_size": 4},
    ],
)
@pytest.mark.parametrize("scale_dtype", ["model", "float8_e4m3"])
def test_coding_waits_for_no_device(options: Any, scale_dtype: str) -> None:
    """Reading a meta tensor fails; what is brought from the host each time would make it wait."""
    store = AffineStore(Int(**{"scale_dtype": scale_dtype, **options}), 8)
    x = torch.empty((1, 2, 12, 8), dtype=torch.bfloat16, device="meta")
    store.append(x)
    with Bringing() as brought:
        store.append(x)
    assert brought.found == []
    assert store.length == 24


def test_groups_that_are_forgotten_part_layers_that_stood_alike() -> None:
    """Which groups are empty is for the tokens of a layer to say: another that moved with it may keep them."""
    store = AffineStore(Int(nbits=2, per="channel", group_size=4), 8)
    store.differ_by_head((1, 1))
    store.append(torch.randn(1, 1, 8, 8))
    before = Clock.grown
    store.remove(torch.tensor([[[0, 1, 4, 5]]]))
    assert Clock.grown == before
    store.remove(torch.tensor([[[0, 1]]]))
    assert store.parts["params"].length == 1
    assert Clock.grown != before
