"""Pages: whatever is appended, dropped and selected, they hold what a plain tensor would."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpolicy.storage.pages import FULL, LARGEST, SMALLEST, Pages


def numbered(n: int, first: int = 0, width: int = 3, batch: int = 2) -> torch.Tensor:
    x = torch.arange(first, first + n, dtype=torch.float32).view(1, 1, n, 1)
    return x + torch.arange(batch).view(batch, 1, 1, 1) * 0.25 + torch.arange(width) * 0.01


def content(pages: Pages) -> torch.Tensor:
    return torch.cat([block for _, block in pages.blocks()], dim=2)


def check(pages: Pages, expected: torch.Tensor) -> None:
    assert pages.length == expected.shape[2]
    assert pages.used() == expected.numel() * expected.element_size()
    assert pages.reserved() == sum(p.untyped_storage().nbytes() for p in pages.pages)
    assert pages.reserved() >= pages.used()
    sizes, addresses = [p.shape[2] for p in pages.pages], [p.data_ptr() for p in pages.pages]
    assert pages.marks == ((pages.start, pages.length, 0, *sizes), addresses)  # 0: nothing lies flat before the pages
    if not pages.length:
        assert pages.reserved() == 0
        return
    assert torch.equal(content(pages), expected)
    assert [offset for offset, _ in pages.blocks()] == [
        sum(b.shape[2] for _, b in list(pages.blocks())[:i]) for i in range(len(list(pages.blocks())))
    ]


operation = st.one_of(
    st.tuples(st.just("append"), st.sampled_from([1, 2, 63, 64, 65, 130, 1024, 1500, 5000])),
    st.tuples(st.just("front"), st.floats(0, 1)),
    st.tuples(st.just("back"), st.floats(0, 1)),
    st.tuples(st.just("some"), st.integers(0, 2**30)),
    st.tuples(st.just("select"), st.lists(st.integers(0, 1), min_size=2, max_size=2)),
)


@settings(deadline=None, derandomize=True, max_examples=80)
@given(operations=st.lists(operation, min_size=1, max_size=14))
def test_pages_hold_what_a_plain_tensor_would(operations: list[tuple[str, Any]]) -> None:
    pages, expected, counter = Pages(), numbered(0), 0
    for name, value in operations:
        n = expected.shape[2]
        if name == "append":
            x = numbered(value, counter)
            counter += value
            pages.append(x)
            expected = torch.cat([expected, x], dim=2)
            check(pages, expected)
            continue
        if name == "select":
            pages.select(torch.tensor(value))
            expected = expected[value]
            check(pages, expected)
            continue
        if name == "some":
            mask = torch.rand(n, generator=torch.Generator().manual_seed(value)) < 0.4
        else:
            at = torch.arange(n)
            mask = at < int(value * n) if name == "front" else at >= n - int(value * n)
        pages.drop(mask.nonzero()[:, 0].numpy())
        expected = expected[:, :, ~mask]
        check(pages, expected)
        m = expected.shape[2]
        if m:
            generator = torch.Generator().manual_seed(m)
            lo, hi = sorted(torch.randint(0, m + 1, (2,), generator=generator).tolist())
            if lo < hi:
                assert torch.equal(pages.slice(lo, hi), expected[:, :, lo:hi])
            index = (torch.rand(m, generator=generator) < 0.3).nonzero()[:, 0]
            if len(index):
                assert torch.equal(pages.take(index.numpy()), expected[:, :, index])


def test_a_few_tokens_are_one_page() -> None:
    pages = Pages()
    copies, at = 0, 0
    for i in range(LARGEST):
        pages.append(numbered(1, i))
        copies, at = copies + (pages.pages[0].data_ptr() != at), pages.pages[0].data_ptr()
        assert len(pages.pages) == 1
    assert copies < 20
    assert pages.reserved() <= pages.used() * 5 // 4 + SMALLEST * 2 * 3 * 4


def test_growth_copies_no_page() -> None:
    pages = Pages()
    pages.append(numbered(LARGEST + 1))
    addresses = []
    for i in range(5200):
        pages.append(numbered(1, i))
        now = [p.data_ptr() for p in pages.pages]
        assert now[: len(addresses)] == addresses
        addresses = now
    assert max(p.shape[2] for p in pages.pages[1:]) == LARGEST
    assert min(p.shape[2] for p in pages.pages) >= SMALLEST
    assert pages.reserved() <= pages.used() + LARGEST * 2 * 3 * 4


def test_tokens_that_leave_at_either_end_free_whole_pages() -> None:
    pages = Pages()
    pages.append(numbered(4 * FULL))
    assert len(pages.pages) == 4
    pages.drop(np.arange(FULL - 1))
    assert len(pages.pages) == 4
    pages.drop(np.arange(1))
    assert len(pages.pages) == 3
    pages.drop(np.arange(6000, 3 * FULL))
    assert len(pages.pages) == 2
    assert content(pages)[0, 0, 0, 0] == FULL
    pages.drop(np.arange(6000))
    assert pages.pages == []


def test_a_slice_within_a_page_is_a_view_and_take_is_a_copy() -> None:
    pages = Pages()
    pages.append(numbered(200))
    storage = pages.pages[0].untyped_storage().data_ptr()
    assert pages.slice(3, 190).untyped_storage().data_ptr() == storage
    assert pages.take(np.array([3, 4])).untyped_storage().data_ptr() != storage
    assert pages.take(np.array([3, 5])).untyped_storage().data_ptr() != storage


def test_what_is_appended_is_copied() -> None:
    x = numbered(70)
    pages = Pages()
    pages.append(x)
    x.zero_()
    assert torch.equal(content(pages), numbered(70))


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_pages_made_in_one_mode_are_written_in_another(mode: Any) -> None:
    pages = Pages()
    with mode():
        pages.append(numbered(10))
        pages.select(torch.tensor([1, 0]))
    pages.append(numbered(5, 10))
    assert pages.length == 15
    assert not any(p.is_inference() for p in pages.pages)
