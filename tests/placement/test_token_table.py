"""Places found in masks, tables and among candidates, beside what a plain search finds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvpolicy.placement.candidates import Candidates
from kvpolicy.placement.moves import EMPTY
from kvpolicy.placement.selection import highest, lowest
from kvpolicy.placement.token_table import Run, TokenTable, first_of, indices_of, last_of
from kvpolicy.storage.pages import Pages

SHAPE = 2, 3


def drawn(data: st.DataObject, n: int, least: int = 0) -> Tensor:
    """A mask `[2, 3, n]`, at least so many True in each row and head."""
    rows = st.lists(st.booleans(), min_size=n, max_size=n).filter(lambda row: sum(row) >= least)
    return torch.tensor([data.draw(rows) for _ in range(6)]).view(*SHAPE, n)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), n=st.integers(1, 9))
def test_indices_are_those_of_the_mask(data: st.DataObject, n: int) -> None:
    mask = drawn(data, n)
    most = max(1, int(mask.sum(2).max())) + data.draw(st.integers(0, 1))
    found = indices_of(mask, most)
    assert found.shape == (*SHAPE, most)
    assert found.dtype == torch.int64
    for row, own in zip(mask.flatten(0, 1), found.flatten(0, 1), strict=True):
        at = row.nonzero()[:, 0].tolist()
        assert own.tolist() == at + [EMPTY] * (most - len(at))
        if at:
            assert first_of(row.view(1, 1, -1)).item() == at[0]
            assert last_of(row.view(1, 1, -1)).item() == at[-1]


@settings(max_examples=60, deadline=None)
@given(data=st.data(), n=st.integers(1, 9), leaving=st.integers(1, 3))
def test_the_last_empty_places_are_surplus(data: st.DataObject, n: int, leaving: int) -> None:
    n = max(n, leaving)
    empty = drawn(data, n, leaving)
    table = TokenTable(SHAPE, torch.device("cpu"), False, torch.int8)
    positions = torch.arange(n).expand(*SHAPE, -1).masked_fill(empty, EMPTY)
    table.append(positions, torch.zeros_like(positions), None)
    table.gaps = bool((empty.sum(2) > leaving).any())
    kept = [row[row >= 0].tolist() for row in table.positions.flatten(0, 1)]
    found = table.surplus(leaving)
    for row, own in zip(empty.flatten(0, 1), found.places.flatten(0, 1), strict=True):
        assert own.tolist() == row.nonzero()[-leaving:, 0].tolist()
    table.remove(found)
    assert table.length == n - leaving
    left = [row[row >= 0].sort().values.tolist() for row in table.positions.flatten(0, 1)]
    assert left == kept


@settings(max_examples=60, deadline=None)
@given(data=st.data(), n=st.integers(1, 9))
def test_the_lowest_is_the_one_that_the_highest_leave_over(data: st.DataObject, n: int) -> None:
    compete = drawn(data, n, 1)
    ranks = st.sampled_from([0.0, 1.0, -2.0, torch.inf, -(2.0**100)])
    rank = torch.tensor([data.draw(ranks) for _ in range(6 * n)]).view(*SHAPE, n)
    found = lowest(rank, compete)
    budgets = compete.sum(2).numpy().astype(np.int64) - 1
    stays = highest(torch.where(compete, rank, -torch.inf), budgets, stable=True)
    expected = compete & ~stays
    assert torch.equal(torch.zeros_like(compete).scatter_(2, found, True), expected)


@pytest.mark.parametrize("new", [0, 1, 4])
def test_tokens_are_taken_from_stores_and_new_ones(new: int) -> None:
    lengths = [5, 0, 3, new]
    bounds = np.cumsum([0, *lengths]).tolist()
    generator = torch.Generator().manual_seed(new)
    places = [torch.randint(0, 99, (*SHAPE, n), generator=generator) for n in lengths]
    places[:3] = [x.int() for x in places[:3]]
    noted = [torch.randn((*SHAPE, n, 2), generator=generator) for n in lengths]
    work = Candidates([0, 1, 2], bounds, places, torch.zeros((*SHAPE, bounds[-1])), noted)
    every, scores = torch.cat(places, dim=2).long(), torch.cat(noted, dim=2)
    assert torch.equal(work.positions, every)
    assert torch.equal(work.column(1, slice(1, 2)), scores[1:2, :, :, 1])
    for sources in (1, 2, 3):
        reach = [*range(bounds[sources]), *range(bounds[-2], bounds[-1])]
        index = torch.tensor(reach)[torch.randint(0, len(reach), (*SHAPE, 6), generator=generator)]
        index[:, :, -1] = EMPTY
        at, absent = index.clamp(min=0), index < 0
        positions, own = work.taken(index, sources, True)
        assert own is not None
        assert torch.equal(positions, every.gather(2, at).masked_fill(absent, EMPTY))
        wide = at.unsqueeze(3).expand(-1, -1, -1, 2)
        assert torch.equal(own, scores.gather(2, wide).masked_fill(absent.unsqueeze(3), 0.0))
    assert work.scores is not None
    work.scores[..., 0] = 7.0
    assert (work.column(0) == 7.0).all()


def test_a_table_writes_runs_once_it_is_read() -> None:
    shape = 2, 3
    late, soon = (TokenTable(shape, torch.device("cpu"), True, torch.int8) for _ in range(2))
    for table in (late, soon):
        table.parts["scores"].append(torch.ones(*shape, 1, 2))
        table.parts["positions"].append(torch.zeros((*shape, 1, 1), dtype=torch.int32))
        table.parts["tiers"].append(torch.ones((*shape, 1, 1), dtype=torch.int8))
    for run in (Run(1, 1, (0.0, -1.0)), Run(2, 3, (0.0, -1.0)), Run(7, 2, (0.0, -1.0)), Run(9, 1, (0.0, 0.0))):
        late.append_run(run)
        soon.append(*run.tensors(soon))
        assert late.length == soon.length
    assert late.positions[1, 2].tolist() == [0, 1, 2, 3, 4, 7, 8, 9]
    for name, x in soon.tensors().items():
        assert torch.equal(late.tensors()[name], x)
    assert late.bytes() == soon.bytes()


@pytest.mark.parametrize("rows", [[0, 0, 1, 1], [1]])
def test_runs_are_of_the_rows_that_were_there_as_they_came(rows: list[int]) -> None:
    late, soon = (TokenTable(SHAPE, torch.device("cpu"), False, torch.int8) for _ in range(2))
    for table in (late, soon):
        table.append(torch.arange(12).view(*SHAPE, 2), torch.zeros(*SHAPE, 2), None)
    run = Run(12, 3, ())
    late.append_run(run)
    soon.append(*run.tensors(soon))
    for table in (late, soon):
        table.select(torch.tensor(rows))
    assert late.positions.shape == (len(rows), SHAPE[1], 5)
    assert torch.equal(late.positions, soon.positions)
    late.append_run(Run(15, 1, ()))
    late.to(torch.device("meta"))
    assert late.positions.shape == (len(rows), SHAPE[1], 6)


def test_runs_that_could_not_be_written_are_written_when_memory_is_there_again(monkeypatch: pytest.MonkeyPatch) -> None:
    late, soon = (TokenTable(SHAPE, torch.device("cpu"), True, torch.int8) for _ in range(2))
    run = Run(0, 3, (0.0, -1.0))
    late.append_run(run)
    soon.append(*run.tensors(soon))
    before, calls = Pages.append, iter(range(3))

    def append(pages: Pages, x: Tensor) -> None:
        before(pages, x)
        if next(calls, 0) == 1:
            raise MemoryError

    monkeypatch.setattr(Pages, "append", append)
    with pytest.raises(MemoryError):
        late.tensors()
    assert late.length == 3
    for name, x in soon.tensors().items():
        assert torch.equal(late.tensors()[name], x)
    assert late.length == 3
