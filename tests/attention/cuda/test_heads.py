"""Weights of a query's attention, those of the heads of a KV head as one, take one launch and are PyTorch's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernels import DEVICES, Grids, grids_of
from torch import Tensor

from kvpolicy.attention.cuda import heads as module
from kvpolicy.attention.cuda.again import watch
from kvpolicy.attention.cuda.heads import added
from kvpolicy.interfaces.scores import Scores
from kvpolicy.placement.attention_scores import Counted, Observer


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Grids:
    """The grid of each launch; on a CPU the kernel's source is run."""
    return grids_of(module, monkeypatch)


def drawn(shape: tuple[int, ...], device: str) -> tuple[Tensor, Tensor]:
    """Scores of a query, and log2 of the sums of their powers."""
    scores = torch.randn(shape, device=device) * 4
    scores.view(-1)[5::7] = -torch.inf
    return scores, torch.logsumexp(scores * 0.6931472, 3, keepdim=True) / 0.6931472


def same(found: Tensor, expected: Tensor) -> None:
    exact = found.device.type == "cuda"  # a CPU's powers of two are rounded otherwise than the compiler's
    assert found.shape == expected.shape
    bounds = (0.0, 0.0) if exact else (1e-6, 1e-9)
    torch.testing.assert_close(found, expected, rtol=bounds[0], atol=bounds[1], equal_nan=True)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("columns", [1, 127, 513, 1640])
@pytest.mark.parametrize("groups", [1, 2, 3, 4, 7, 8])
def test_weights_are_added_up_as_pytorch_does(groups: int, columns: int, device: str, launches: Grids) -> None:
    for batch, kv_heads in ((1, 1), (3, 2)):
        scores, sums = drawn((batch, kv_heads, groups, columns), device)
        weights = torch.sub(scores, sums).exp2_().unsqueeze(3)
        launches.clear()
        found = added(scores, sums, [False, False])
        assert launches == [(batch * kv_heads, -(-columns // 512), 1)]
        assert found is not None
        assert found[0] is found[1]
        same(found[0], weights.sum(2))
        means = added(scores, sums, [True, False])
        assert (means is None) == (groups in (3, 7))
        if means is not None:
            same(means[0], weights.mean(2))
            same(means[1], weights.sum(2))


@pytest.mark.parametrize("why", [None, "cuda-core is not installed"])
def test_the_kernel_is_loaded_where_there_is_one(why: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[int] = []
    monkeypatch.setattr(module, "missing", lambda: why)
    monkeypatch.setattr(module, "kernel_of", lambda source, device: found.append(device))
    module.load(torch.device("cuda", 1))
    assert found == ([1] if why is None else [])


def test_what_lies_otherwise_is_left_to_pytorch(launches: Grids) -> None:
    scores, sums = drawn((2, 2, 4, 64), "cpu")
    assert added(scores.transpose(0, 1), sums.transpose(0, 1), [False]) is None
    assert added(scores[..., :32], sums, [False]) is None
    assert added(scores[:0], sums[:0], [False]) is None
    assert not launches


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("by", ["sum", "mean", "max", "shared"])
def test_observers_know_what_they_would_of_the_weights(
    by: str, device: str, launches: Grids, monkeypatch: pytest.MonkeyPatch
) -> None:
    heads = "sum" if by == "shared" else by
    kinds = [Scores(heads=heads), Scores(heads="sum", queries="last")]  # type: ignore[arg-type]
    scores, sums = drawn((2, 4, 4, 300), device)
    known: list[list[Any]] = []
    for whole in (True, False):
        observer = Observer(Counted.of(kinds, 1, 299, None, 24), 2, 1 if by == "shared" else 4)
        observer.live = observer.held = 299
        if not whole:
            monkeypatch.setattr(Observer, "by_heads", lambda *_: None)
        watch(observer, scores.clone(), sums, 1, 1, False)
        known.append(observer.found)
    for found, expected in zip(*known, strict=True):
        assert found[1] is expected[1] is None
        same(found[0], expected[0])
    assert bool(launches) == (by in ("sum", "mean"))
