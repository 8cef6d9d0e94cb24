"""What every merger must hold."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvpolicy.contracts.samples import mergers, name_of
from kvpolicy.interfaces.component import check_answer
from kvpolicy.interfaces.merger import Merger, Tokens, shares_of
from kvpolicy.interfaces.site import Site

MERGERS = mergers()
EVERY = pytest.mark.parametrize("merger", MERGERS, ids=[name_of(merger) for merger in MERGERS])
BATCH, HEADS, GONE, KEPT = 3, 4, 20, 30
SITE = Site(layer=1, layers=2, side="values", kv_heads=HEADS)


def _shown() -> tuple[Tokens, Tokens]:
    generator = torch.Generator().manual_seed(0)
    places = torch.stack([torch.randperm(60, generator=generator)[: GONE + KEPT] for _ in range(BATCH * HEADS)])
    attention = torch.rand(BATCH, HEADS, GONE + KEPT, generator=generator) * 5
    both = zip(places.view(BATCH, HEADS, -1).split([GONE, KEPT], 2), attention.split([GONE, KEPT], 2), strict=True)
    gone, kept = (Tokens(*x) for x in both)
    kept.positions[0, :, 3:6] = -1
    return gone, kept


def _picked(tokens: Tokens, dim: int, index: Tensor) -> Tokens:
    return Tokens(*(x.index_select(dim, index) for x in tokens))


@EVERY
def test_shares_are_finite_and_the_same_each_time(merger: Merger) -> None:
    check_answer(merger, "check", SITE)
    found = shares_of(merger, *_shown(), SITE)
    assert found.isfinite().all(), "shares must be finite numbers"
    assert torch.equal(found, shares_of(merger, *_shown(), SITE)), "shares must be the same each time"


@EVERY
def test_dropped_tokens_do_not_depend_on_each_other(merger: Merger) -> None:
    gone, kept = _shown()
    parts = [shares_of(merger, _picked(gone, 2, i), kept, SITE) for i in torch.arange(GONE).split([1, 12, 7])]
    torch.testing.assert_close(
        torch.cat(parts, dim=2), shares_of(merger, gone, kept, SITE), msg="a token must not depend on others dropped"
    )


@EVERY
def test_rows_do_not_depend_on_each_other_nor_on_the_order_of_what_stays(merger: Merger) -> None:
    gone, kept = _shown()
    whole = shares_of(merger, gone, kept, SITE)
    order = torch.tensor([2, 0, 1])
    torch.testing.assert_close(shares_of(merger, _picked(gone, 0, order), _picked(kept, 0, order), SITE), whole[order])
    torch.testing.assert_close(
        shares_of(merger, _picked(gone, 0, order[:1]), _picked(kept, 0, order[:1]), SITE), whole[2:]
    )
    mixed = torch.randperm(KEPT, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(
        shares_of(merger, gone, _picked(kept, 2, mixed), SITE), whole[..., mixed], msg="the order must not matter"
    )


@EVERY
def test_places_without_token_are_of_no_account(merger: Merger) -> None:
    gone, kept = _shown()
    whole = shares_of(merger, gone, kept, SITE)
    kept.attention[0, :, 3:6] = 1e6
    torch.testing.assert_close(shares_of(merger, gone, kept, SITE), whole)
