"""Attention weights that are made once those of other layers are there are what they would be at once."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kvpolicy.interfaces.policy import Scores
from kvpolicy.placement import attention_scores as module
from kvpolicy.placement.attention_scores import Counted, Observer

KINDS = [Scores(), Scores(heads="sum"), Scores(heads="max")]
BATCH, HEADS, GROUPS, COLUMNS = 2, 3, 4, 9


def pair(seed: int, heads: int, live: int = COLUMNS - 1) -> tuple[Observer, Observer, tuple[Tensor, Tensor]]:
    """Of one query's attention an observer that was told of it, one that is told later, and what that needs."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(BATCH, HEADS, GROUPS, COLUMNS, generator=generator)
    sums = (scores.exp2().sum(3, keepdim=True)).log2()
    told, later = (Observer(Counted.of(KINDS, 1, COLUMNS - 1, None, 24), BATCH, heads) for _ in range(2))
    for observer in (told, later):
        observer.live, observer.held = live, COLUMNS - 1
    told.watch(torch.arange(1), (scores - sums).exp2().unsqueeze(3), None, slice(0, HEADS), HEADS)
    assert later.watch_later(scores, sums)
    return told, later, (scores, sums)


def check(told: Observer, later: Observer) -> None:
    for a, b in zip(told.found, later.found, strict=True):
        assert a is not None
        assert b is not None
        torch.testing.assert_close(a[0], b[0], rtol=1e-6, atol=0)  # vector units and what remains round differently
        assert a[1] is b[1] is None


CHANGES: list[Callable[[Observer], object]] = [
    lambda observer: None,
    lambda observer: observer.select(torch.tensor([1, 0, 1])),
    lambda observer: observer.to(torch.device("cpu")),
]


@pytest.mark.parametrize("heads", [1, HEADS])
@pytest.mark.parametrize("change", range(len(CHANGES)))
def test_one_layer(heads: int, change: int) -> None:
    told, later, given = pair(0, heads)
    before = [x.clone() for x in given]
    for observer in (told, later):
        CHANGES[change](observer)
    assert later.told
    check(told, later)
    assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True))


@pytest.mark.parametrize("heads", [1, HEADS])
@pytest.mark.parametrize("live", [COLUMNS - 1, 5])
def test_several_layers_at_once(heads: int, live: int) -> None:
    pairs = [pair(seed, heads, live) for seed in range(3)]
    assert len({later.kind for _, later, _ in pairs}) == 1
    together = [Observer.stacked([x[i] for x in pairs]) for i in range(2)]
    check(*together)
    added = [torch.zeros(3 * BATCH, heads, COLUMNS, 2 * len(KINDS)) for _ in together]
    for observer, x in zip(together, added, strict=True):
        observer.add(x[:, :, :live], 0, live)
        observer.add(x[:, :, live:], live, 1)
    torch.testing.assert_close(*added, rtol=1e-6, atol=0)


def test_what_was_told_and_what_is_to_be_made_are_not_stacked() -> None:
    told, later, _ = pair(0, HEADS)
    assert told.kind != later.kind


def test_the_last_word_counts() -> None:
    told, later, (scores, sums) = pair(0, HEADS)
    later.watch(torch.arange(1), torch.zeros(BATCH, HEADS, GROUPS, 1, COLUMNS), None, slice(0, HEADS), HEADS)
    assert all(x is not None and not x[0].any() for x in later.found)
    assert later.watch_later(scores, sums)
    check(told, later)


def test_a_copy_makes_its_own() -> None:
    told, later, _ = pair(0, HEADS)
    check(told, copy.deepcopy(later))
    check(told, later)


def test_what_inference_mode_left_can_be_used_outside() -> None:
    with torch.inference_mode():
        told, later, _ = pair(0, HEADS)
    with torch.no_grad():
        check(told, later)
        check(told, Observer.stacked([pair(0, HEADS)[1]]))


def test_others_must_be_told_of_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = Counted.of([Scores(decode="probe", newest=0.0, random=0.5)], 2, 8, None, 24)
    scores, sums = torch.zeros(BATCH, HEADS, GROUPS, COLUMNS), torch.zeros(BATCH, HEADS, GROUPS, 1)
    assert not Observer(counted, BATCH, HEADS).watch_later(scores, sums)
    told, _, _ = pair(0, HEADS)
    told.index = torch.zeros(BATCH, HEADS, 3, dtype=torch.int64)
    assert not told.watch_later(scores, sums)
    told, _, _ = pair(0, HEADS)
    monkeypatch.setattr(module, "LATER", scores.numel() - 1)
    assert not told.watch_later(scores, sums)
