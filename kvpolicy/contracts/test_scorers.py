"""What every scorer must hold."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvpolicy.contracts.samples import name_of, scorers, tensor
from kvpolicy.errors import MissingDependencyError
from kvpolicy.interfaces.prompt_scorer import PromptScorer, noted, settled, spans_of
from kvpolicy.interfaces.scorer import BESIDE, Scorer
from kvpolicy.interfaces.scores import Scores
from kvpolicy.interfaces.site import Site
from kvpolicy.placement.selection import scored, scored_again

SCORERS = scorers()
EVERY = pytest.mark.parametrize("scorer", SCORERS, ids=[name_of(scorer) for scorer in SCORERS])
BATCH, HEADS, TOKENS, DIM = 3, 4, 50, 64
GROUPS = 2
"""Query heads of a KV head."""


def _rotary(positions: Tensor) -> tuple[Tensor, Tensor]:
    angles = positions.unsqueeze(2) * 100.0 ** -torch.arange(0.0, 1.0, 2 / DIM).repeat(2)
    return angles.cos(), angles.sin()


SITE = Site(layers=2, kv_heads=HEADS, head_dim=DIM, rotary=_rotary)


@pytest.fixture(autouse=True)
def _library(request: pytest.FixtureRequest) -> None:
    try:
        request.getfixturevalue("scorer").check(SITE)
    except MissingDependencyError as error:
        pytest.skip(str(error))


def _shown(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    positions = torch.arange(TOKENS).repeat(BATCH, HEADS, 1)
    return {
        "keys": tensor((BATCH, HEADS, TOKENS, DIM), dtype),
        "values": tensor((BATCH, HEADS, TOKENS, DIM), dtype, seed=1),
        "query": tensor((BATCH, HEADS * GROUPS, TOKENS, DIM), dtype, seed=2),
        "real": torch.ones(BATCH, HEADS, TOKENS, dtype=torch.bool),
        "told": torch.rand(BATCH, HEADS, TOKENS, generator=generator),
        "attention": torch.rand(BATCH, HEADS, TOKENS, generator=generator) * 20,
        "queries": torch.randint(0, 30, (BATCH, HEADS, TOKENS), generator=generator).float(),
        "positions": positions,
        "ages": TOKENS - positions,
    }


def _picked(shown: dict[str, Tensor], dim: int, index: Tensor) -> dict[str, Tensor]:
    """Some rows, heads or tokens; of the query the heads of some KV heads."""
    wide = (index.unsqueeze(1) * GROUPS + torch.arange(GROUPS)).flatten() if dim == 1 else index
    return {name: x.index_select(dim, wide if name == "query" else index) for name, x in shown.items()}


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_numbers_give_numbers_of_the_right_shape(scorer: Scorer, dtype: torch.dtype) -> None:
    shown = _shown(dtype)
    before = {name: x.clone() for name, x in shown.items()}
    found = scored(scorer, shown, SITE)
    assert found.shape == (BATCH, HEADS, TOKENS)
    assert not found.isnan().any(), "score must return numbers for numbers, found nan"
    assert all(torch.equal(x, before[name]) for name, x in shown.items()), "score must not change what it is given"


@EVERY
def test_it_is_given_what_it_needs_and_nothing_else(scorer: Scorer) -> None:
    needs = scorer.needs | {beside for name, beside in BESIDE.items() if name in scorer.needs}
    few = {name: x for name, x in _shown().items() if name in needs}
    assert torch.equal(scored(scorer, few, SITE), scored(scorer, _shown(), SITE))


@EVERY
@pytest.mark.parametrize(("dim", "what"), [(0, "rows"), (1, "heads")])
def test_rows_and_heads_may_stand_in_any_order(scorer: Scorer, dim: int, what: str) -> None:
    shown = _shown()
    order = torch.tensor([2, 0, 1] if dim == 0 else [3, 1, 0, 2])
    moved = scored(scorer, _picked(shown, dim, order), SITE)
    torch.testing.assert_close(
        moved,
        scored(scorer, shown, SITE).index_select(dim, order),
        msg=f"scores must not depend on the order of {what}",
    )


@EVERY
def test_rows_do_not_depend_on_each_other(scorer: Scorer) -> None:
    alone = scored(scorer, _picked(_shown(), 0, torch.tensor([1])), SITE)
    torch.testing.assert_close(alone, scored(scorer, _shown(), SITE)[1:2])


@EVERY
def test_tokens_are_scored_in_any_chunks_unless_it_pools(scorer: Scorer) -> None:
    if scorer.pools:
        pytest.skip("it says that a score depends on other tokens")
    shown = _shown()
    parts = [scored(scorer, _picked(shown, 2, index), SITE) for index in torch.arange(TOKENS).split([1, 30, 19])]
    torch.testing.assert_close(
        torch.cat(parts, dim=2),
        scored(scorer, shown, SITE),
        msg="a score must depend on its token alone; else declare pools: ClassVar[bool] = True",
    )


@EVERY
def test_what_is_not_finite_spoils_no_other_row_or_head(scorer: Scorer) -> None:
    shown = _shown()
    whole = scored(scorer, shown, SITE)
    for name in ("keys", "values", "query", "attention"):
        shown[name][0, 0, 3] = torch.nan
    spoilt = scored(scorer, shown, SITE)
    torch.testing.assert_close(spoilt[1:, 1:], whole[1:, 1:])
    if not scorer.pools:
        others = torch.arange(TOKENS) != 3
        torch.testing.assert_close(
            spoilt[..., others], whole[..., others], msg="a nan must spoil its own token at most"
        )


@EVERY
def test_the_attention_asked_for_is_the_same_each_time(scorer: Scorer) -> None:
    asked = [scorer.scores() for _ in range(3)]
    assert all(isinstance(scores, Scores) for scores in asked), "scores must return kvpolicy.Scores"
    assert asked[0] == asked[1] == asked[2], "scores must be the same each time"
    assert type(scorer).model_validate(scorer.model_dump()).scores() == asked[0], "scores must depend on options alone"


@EVERY
def test_what_it_noted_is_scored_again_token_by_token(scorer: Scorer) -> None:
    if not scorer._again:
        pytest.skip("it scores tokens once")
    shown = {name: x for name, x in _shown().items() if name not in ("keys", "values")}
    noted = scored(scorer, _shown(), SITE)
    before = noted.clone()
    found = scored_again(scorer, noted, shown, SITE)
    assert found.shape == noted.shape
    assert not found.isnan().any(), "again must return numbers for numbers, found nan"
    assert torch.equal(noted, before), "again must not change what it is given"
    order = torch.tensor([2, 0, 1])
    moved = scored_again(scorer, noted[order], _picked(shown, 0, order), SITE)
    torch.testing.assert_close(moved, found[order], msg="rows must not depend on their order")
    if scorer.pools:
        return
    parts = [
        scored_again(scorer, noted[..., index], _picked(shown, 2, index), SITE)
        for index in torch.arange(TOKENS).split([1, 30, 19])
    ]
    torch.testing.assert_close(torch.cat(parts, dim=2), found, msg="a score must depend on its token alone")


@EVERY
def test_a_prompt_read_again_is_scored_span_by_span(scorer: Scorer) -> None:
    if not isinstance(scorer, PromptScorer):
        pytest.skip("it needs no prompt read again")
    spans = spans_of(scorer, TOKENS)
    assert spans == spans_of(scorer, TOKENS), "spans must be the same each time"
    keys = tensor((1, HEADS, TOKENS + spans[0][1] - spans[0][0] + 3, DIM), torch.float32)
    query = tensor((1, HEADS * GROUPS, spans[0][1] - spans[0][0] + 3, DIM), torch.float32, seed=1)
    before = keys.clone(), query.clone()
    found = noted(scorer, query, keys, spans[0], DIM**-0.5, SITE)
    assert torch.equal(found, noted(scorer, query, keys, spans[0], DIM**-0.5, SITE)), "note must be the same each time"
    order = torch.tensor([3, 1, 0, 2])
    wide = (order.unsqueeze(1) * GROUPS + torch.arange(GROUPS)).flatten()
    moved = noted(scorer, query[:, wide], keys[:, order], spans[0], DIM**-0.5, SITE)
    torch.testing.assert_close(moved, found[:, order], msg="heads may stand in any order")
    layers = {layer: torch.rand(1, HEADS, TOKENS, generator=torch.Generator().manual_seed(layer)) for layer in (0, 3)}
    kept = {layer: x.clone() for layer, x in layers.items()}
    assert not any(x.isnan().any() for x in settled(scorer, layers).values())
    assert all(torch.equal(x, kept[layer]) for layer, x in layers.items()), "settle must not change what it is given"
    assert torch.equal(before[0], keys)
    assert torch.equal(before[1], query)
