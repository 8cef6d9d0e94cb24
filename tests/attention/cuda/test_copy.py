"""Tokens that one launch writes to where the stores of several layers keep them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from kernel_on_cpu import kernel_of, launch
from kernels import DEVICES
from torch import Tensor

from kvpolicy.attention.cuda import copy as module
from kvpolicy.attention.cuda.copy import PIECES, copy, shift
from kvpolicy.storage import later
from kvpolicy.storage.later import append_all
from kvpolicy.storage.pages import Leaving, Pages


@pytest.fixture
def device(request: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    name: str = request.param
    if name == "cpu":
        monkeypatch.setattr(module, "kernel_of", kernel_of)
        monkeypatch.setattr(module, "launch", launch)
    return name


def drawn(count: int, tokens: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    """Tokens as models give them: heads side by side in memory."""
    return [torch.randn(2, tokens, 3, 40, device=device).to(dtype).transpose(1, 2) for _ in range(count)]


def places(pages: list[Tensor], at: int) -> tuple[list[int], tuple[int, int, int]]:
    """Where the token `at` of each page stands, and the steps of a page."""
    steps = [page.element_size() * step for page in pages[:1] for step in page.stride()[:3]]
    return [page.data_ptr() + at * steps[2] for page in pages], (steps[0], steps[1], steps[2])


@pytest.mark.parametrize("device", DEVICES, indirect=True)
@pytest.mark.parametrize("tokens", [1, 7])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_tokens_stand_where_they_belong_and_nothing_else_changes(dtype: torch.dtype, tokens: int, device: str) -> None:
    pages = [torch.full((2, 3, 20, 40), 5.0, dtype=dtype, device=device) for _ in range(PIECES + 3)]
    given = drawn(len(pages), tokens, dtype, device)
    expected = [page.clone() for page in pages]
    for page, x in zip(expected, given, strict=True):
        page[:, :, 4 : 4 + tokens] = x
    assert copy(given, *places(pages, 4))
    assert all(map(torch.equal, pages, expected))


@pytest.mark.parametrize("device", DEVICES, indirect=True)
def test_tokens_that_lie_in_ways_that_differ_are_left_to_pytorch(device: str) -> None:
    pages = [torch.zeros((2, 3, 20, 40), dtype=torch.bfloat16, device=device) for _ in range(2)]
    one, other = drawn(2, 1, torch.bfloat16, device)
    odd = torch.randn(2, 3, 1, 41, device=device).to(torch.bfloat16)[..., 1:]
    for given in ([one, other.repeat(1, 1, 2, 1)[:, :, :1]], [odd, odd], [one, odd]):
        assert not copy(given, *places(pages, 4))
    assert not any(page.any() for page in pages)


@pytest.mark.parametrize("device", DEVICES, indirect=True)
def test_a_stride_of_one_element_tells_nothing_apart(device: str) -> None:
    pages = [torch.zeros((2, 3, 20, 40), dtype=torch.bfloat16, device=device) for _ in range(2)]
    (one,) = drawn(1, 1, torch.bfloat16, device)
    given = [one, torch.ones(2, 3, 1, 40, dtype=torch.bfloat16, device=device)]
    assert given[0].stride() != given[1].stride()
    assert copy(given, *places(pages, 4))
    assert all(torch.equal(page[:, :, 4:5], x) for page, x in zip(pages, given, strict=True))


@pytest.mark.parametrize("device", DEVICES, indirect=True)
def test_what_lies_alike_is_written_at_once(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[int] = []
    if device == "cpu":
        monkeypatch.setattr(later, "copiers", lambda device: (None,))
    monkeypatch.setattr(later, "copied", lambda *given: done.append(len(given[0])) or copy(*given))
    sides, alone = ([[Pages() for _ in range(3)] for _ in range(3)] for _ in range(2))
    for tokens in (50, 1, 2):
        waiting = later.Later()
        for number, (own, other) in enumerate(zip(sides, alone, strict=True)):
            given = drawn(3, tokens + number // 2, torch.bfloat16, device)
            waiting.append(own, given)
            for pages, x in zip(other, given, strict=True):
                pages.append(x)
        assert tokens != 50 or not any(pages.length for own in sides for pages in own)
        waiting.run()
        assert all(len(pages.marks[1]) == 1 for own in sides for pages in own)
    assert done == [6, 3] * 2
    for one, other in ((a, b) for own in zip(sides, alone, strict=True) for a, b in zip(*own, strict=True)):
        assert torch.equal(one.slice(0, one.length), other.slice(0, other.length))


@pytest.mark.parametrize("device", DEVICES, indirect=True)
def test_pages_of_several_layers(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[bool] = []
    if device == "cpu":
        monkeypatch.setattr(later, "copiers", lambda device: (None,))
    monkeypatch.setattr(later, "copied", lambda *given: done.append(copy(*given)) or done[-1])
    together, alone = [Pages() for _ in range(3)], [Pages() for _ in range(3)]
    for tokens in (60, 1, 1, 5, 900, 2000, 1, 1, 1):
        given = drawn(3, tokens, torch.bfloat16, device)
        append_all(together, given)
        for pages, x in zip(alone, given, strict=True):
            pages.append(x)
        for pages in (*together, *alone):
            pages.drop(np.arange(tokens // 3))
            assert len(pages.marks[1]) == len(pages.pages)
    assert len(done) > 3
    assert all(done)
    for one, other in zip(together, alone, strict=True):
        assert one.length == other.length
        assert torch.equal(one.slice(0, one.length), other.slice(0, other.length))


@pytest.mark.parametrize("device", DEVICES, indirect=True)
@pytest.mark.parametrize("shape", [(2, 3), (1, 3), (2, 1)])
@pytest.mark.parametrize("leave", [1, 6])
@pytest.mark.parametrize(("width", "dtype"), [(40, torch.bfloat16), (2, torch.bfloat16), (1, torch.int32)], ids=str)
def test_tokens_that_leave_are_replaced_by_the_last(
    width: int, dtype: torch.dtype, leave: int, shape: tuple[int, int], device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[bool] = []
    if device == "cpu":
        monkeypatch.setattr(later, "copiers", lambda device: (None,))
    monkeypatch.setattr(later, "shifted", lambda *given: done.append(shift(*given)) or done[-1])
    together, alone = [Pages(whole=True) for _ in range(3)], [Pages(whole=True) for _ in range(3)]
    for own, other, x in zip(together, alone, drawn(3, 20, torch.float32, device), strict=True):
        x = (1000 * x[..., :width]).to(dtype)
        own.append(x)
        other.append(x)
    index = [torch.stack([torch.randperm(20)[:leave].sort().values for _ in range(6)]).view(2, 3, -1) for _ in range(3)]
    leaving = [Leaving.of(x[: shape[0], : shape[1]].to(device), 20) for x in index]
    later.remove_all(together, leaving)
    for own, other, moves in zip(together, alone, leaving, strict=True):
        other.remove(moves)
        assert own.length == other.length == 20 - leave
        assert torch.equal(own.all(), other.all())
    assert done == [True]
