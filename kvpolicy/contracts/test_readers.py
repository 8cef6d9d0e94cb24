"""What every reader must hold."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvpolicy.contracts.samples import name_of, readers, tensor
from kvpolicy.interfaces.component import check_answer
from kvpolicy.interfaces.reader import Reader
from kvpolicy.interfaces.reader_checks import page_count, page_scores, summarized
from kvpolicy.interfaces.site import Site

READERS = readers()
EVERY = pytest.mark.parametrize("reader", READERS, ids=[name_of(reader) for reader in READERS])
BATCH, HEADS, GROUPS, PAGES, DIM = 3, 4, 2, 6, 64
SITE = Site(layers=2, kv_heads=HEADS, head_dim=DIM)


def _pages(reader: Reader, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Keys of pages, the last of which is half full, and which are tokens."""
    size = min(reader.page, 64)
    keys = tensor((BATCH, HEADS, PAGES * size, DIM), dtype).unflatten(2, (PAGES, size))
    real = torch.ones(BATCH, 1, PAGES, size, dtype=torch.bool)
    real[:, :, -1, (size + 1) // 2 :] = False
    return keys.masked_fill(~real.unsqueeze(4), 0.0), real


def _query() -> Tensor:
    return tensor((BATCH, HEADS, GROUPS, DIM), torch.float32, seed=3)


def _scores(reader: Reader, dtype: torch.dtype = torch.float32) -> Tensor:
    return page_scores(reader, _query(), summarized(reader, *_pages(reader, dtype), SITE), SITE)


@EVERY
def test_it_reads_as_many_pages_each_time(reader: Reader) -> None:
    check_answer(reader, "check", SITE)
    assert len({page_count(reader) for _ in range(4)}) == 1, "count must be the same each time"


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_pages_of_numbers_score_numbers(reader: Reader, dtype: torch.dtype) -> None:
    found = _scores(reader, dtype)
    assert not found.isnan().any(), "score must return numbers for numbers, found nan"
    assert torch.equal(found, _scores(reader, dtype)), "the same pages must score the same"


@EVERY
def test_pages_do_not_depend_on_each_other(reader: Reader) -> None:
    keys, real = _pages(reader)
    keys, query = keys.round(), _query().round()  # sums of whole numbers are the same in any order
    every = summarized(reader, keys, real, SITE)
    whole = page_scores(reader, query, every, SITE)
    for page in range(PAGES):
        own = summarized(reader, keys[:, :, page : page + 1], real[:, :, page : page + 1], SITE, every)
        found = page_scores(reader, query, own, SITE)
        torch.testing.assert_close(found, whole[..., page : page + 1], msg="a page must not depend on others")


@EVERY
def test_rows_and_heads_do_not_depend_on_each_other(reader: Reader) -> None:
    keys, real = _pages(reader)
    whole = _scores(reader)
    for row, head in ((0, 0), (1, 2), (2, 3)):
        at = slice(row, row + 1), slice(head, head + 1)
        own = summarized(reader, keys[at], real[row : row + 1], SITE)
        torch.testing.assert_close(page_scores(reader, _query()[at], own, SITE), whole[at])


@EVERY
def test_what_is_no_token_is_of_no_account(reader: Reader) -> None:
    keys, real = _pages(reader)
    half = (keys.shape[3] + 1) // 2
    last = summarized(reader, keys[:, :, -1:, :half], real[:, :, -1:, :half], SITE)
    found = page_scores(reader, _query(), last, SITE)
    torch.testing.assert_close(found, _scores(reader)[..., -1:], msg="keys that are not real must count for nothing")


@EVERY
def test_a_page_that_is_not_finite_spoils_no_other(reader: Reader) -> None:
    keys, real = _pages(reader)
    keys[0, 0, 1, 0] = torch.nan
    found = page_scores(reader, _query(), summarized(reader, keys, real, SITE), SITE)
    whole = _scores(reader)
    others = torch.arange(PAGES) != 1
    torch.testing.assert_close(found[..., others], whole[..., others], msg="a nan must spoil its own page at most")
    torch.testing.assert_close(found[1:], whole[1:])
