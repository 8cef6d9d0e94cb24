"""What every policy must hold."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from kvpolicy.contracts.samples import Block, TwoTier, name_of, policies
from kvpolicy.interfaces.policy import NEVER, Policy, RankPolicy, Scores
from kvpolicy.placement.planner import Placement, State
from kvpolicy.placement.simulate import history

Ints = NDArray[np.int64]
POLICIES = policies()
EVERY = pytest.mark.parametrize("policy", POLICIES, ids=[name_of(policy) for policy in POLICIES])
TOKENS = 400
CHUNKS = [(400,), (1, 399), (128, 128, 144), (7,) * 57 + (1,), (300, *(1,) * 100)]


def _cases(seed: int = 0) -> list[tuple[Ints, int]]:
    """Positions held, and tokens seen: none, one, all, and random ones."""
    rng = np.random.default_rng(seed)
    cases = [(np.arange(0), 5), (np.array([0]), 1), (np.arange(TOKENS), TOKENS), (np.arange(40, 50), TOKENS)]
    for seen in rng.integers(2, TOKENS, 12).tolist():
        cases.append((np.flatnonzero(rng.random(seen) < rng.random()), seen))
    return [(positions.astype(np.int64), seen) for positions, seen in cases]


def _prompts(policy: Policy, seen: int) -> list[tuple[int | None, ...]]:
    """What a policy may be told of the prompt, after the arguments that all are: nothing, unless it asks."""
    if not policy._prompted:
        return [()]
    return [(None,), *((prompt,) for prompt in sorted({1, seen // 2 or 1, seen}))]


def _asked(policy: Policy) -> list[tuple[Ints, int, tuple[int | None, ...]]]:
    return [(positions, seen, told) for positions, seen in _cases() for told in _prompts(policy, seen)]


@EVERY
def test_keep_returns_a_boolean_mask_of_the_tokens(policy: Policy) -> None:
    for positions, seen, told in _asked(policy):
        mask = policy.keep(positions.copy(), seen, *told)
        assert isinstance(mask, np.ndarray), f"keep must return a numpy array, found {type(mask).__name__}"
        assert mask.dtype == np.bool_, f"keep must return booleans, found {mask.dtype}"
        assert mask.shape == positions.shape, f"keep must return {positions.shape}, found {mask.shape}"


@EVERY
def test_keep_is_pure(policy: Policy) -> None:
    cases = _asked(policy)
    first = [policy.keep(positions.copy(), seen, *told) for positions, seen, told in cases]
    for (positions, seen, told), mask in reversed(list(zip(cases, first, strict=True))):
        shown = positions.copy()
        assert np.array_equal(policy.keep(shown, seen, *told), mask), "keep must give the same for the same tokens"
        assert np.array_equal(shown, positions), "keep must not change the positions that it is shown"
    fresh = type(policy).model_validate(policy.model_dump())
    assert all(np.array_equal(fresh.keep(p.copy(), s, *t), m) for (p, s, t), m in zip(cases, first, strict=True))


@EVERY
def test_a_capacity_is_a_number_of_tokens(policy: Policy) -> None:
    for seen in range(1, TOKENS):
        capacity = policy.capacity(seen)
        assert isinstance(capacity, int | np.integer), f"capacity must return an integer, found {capacity!r}"
        assert not isinstance(capacity, bool), f"capacity must return an integer, found {capacity}"
        assert capacity >= 0, f"capacity must return 0 or more, found {capacity}"


@EVERY
def test_all_tokens_stay_within_the_capacity(policy: Policy) -> None:
    cases = _cases()
    for seen in (1, 10, 100, TOKENS):
        most = min(seen, int(policy.capacity(seen)))
        cases += [(np.arange(most), seen), (np.arange(seen - most, seen), seen), (np.arange(seen)[::seen], seen)]
    for positions, seen in cases:
        if len(positions) <= policy.capacity(seen):
            for told in _prompts(policy, seen):
                stays = policy.keep(positions, seen, *told)
                assert stays.all(), "no token may leave while no more than capacity(seen) are held"


def _one_by_one(
    policy: Policy, positions: Ints, arrivals: Ints, start: int, stop: int, told: tuple[int | None, ...]
) -> Ints:
    left = np.full(len(positions), NEVER, dtype=np.int64)
    for seen in range(start + 1, stop + 1):
        held = np.flatnonzero((np.maximum(arrivals, start) <= seen) & (left == NEVER))
        if len(held):
            left[held[~policy.keep(positions[held], seen, *told)]] = seen
    return left


@EVERY
@pytest.mark.parametrize("block", [1, 8, 42])
def test_departures_equal_calling_keep_one_by_one(policy: Policy, block: int) -> None:
    start, stop = 0, TOKENS
    positions = np.arange(stop, dtype=np.int64)
    arrivals = (positions // block + 1) * block
    here = arrivals <= stop
    positions, arrivals = positions[here], arrivals[here]
    for told in [(None,), (1,)] if policy._prompted else [()]:
        expected = _one_by_one(policy, positions, arrivals, start, stop, told)
        _check_departures(policy, positions, arrivals, (start, stop), told, expected)


@EVERY
@pytest.mark.parametrize("block", [1, 8, 42])
def test_departures_go_on_from_what_is_held(policy: Policy, block: int) -> None:
    start, stop = 150, 260
    positions = np.arange(stop, dtype=np.int64)
    arrivals = (positions // block + 1) * block
    for told in [(None,), (40,)] if policy._prompted else [()]:
        early = arrivals <= start
        left = _one_by_one(policy, positions[early], arrivals[early], 0, start, told)
        held = np.concatenate([left == NEVER, ~early[len(left) :]]) & (arrivals <= stop)
        here = positions[held], np.maximum(arrivals[held], start)
        expected = _one_by_one(policy, *here, start, stop, told)
        _check_departures(policy, *here, (start, stop), told, expected)


def _check_departures(
    policy: Policy,
    positions: Ints,
    arrivals: Ints,
    steps: tuple[int, int],
    told: tuple[int | None, ...],
    expected: Ints,
) -> None:
    shown = positions.copy(), arrivals.copy()
    found = policy._left(*shown, *steps, *told) if policy._prompted else policy.departures(*shown, *steps)
    assert isinstance(found, np.ndarray), f"departures must return a numpy array, found {type(found).__name__}"
    assert np.issubdtype(found.dtype, np.signedinteger), f"departures must return integers, found {found.dtype}"
    assert found.shape == positions.shape, f"departures must return {positions.shape}, found {found.shape}"
    assert np.array_equal(found, expected), f"departures must equal keep, found token {_first(found, expected)}"
    same = np.array_equal(shown[0], positions) and np.array_equal(shown[1], arrivals)
    assert same, "departures must not change what it is shown"


def _first(found: Ints, expected: Ints) -> str:
    at = int(np.flatnonzero(found != expected)[0])
    return f"{at} leaving at {found[at]} instead of {expected[at]}"


def _placed(tiers: list[TwoTier], chunks: tuple[int, ...]) -> State:
    """After a prompt in `chunks`, then as many tokens again."""
    planner = Placement(tiers)
    state = planner.start()
    for chunk in chunks:
        state, _ = planner.advance(state, chunk)
    if planner.prompted:
        prompt = state.seen
        state, _ = planner.end_prompt(state)
        for chunk in chunks:
            state, _ = planner.advance(state, chunk, prompt)
    return state


@EVERY
@pytest.mark.parametrize("below", [False, True], ids=["first", "second"])
def test_any_chunking_gives_the_same_placement(policy: Policy, below: bool) -> None:
    tiers = [TwoTier(policy), TwoTier(None)]
    if below:
        tiers = [TwoTier(Block()), *tiers]
    one = _placed(tiers, (1,) * TOKENS)
    for chunks in CHUNKS:
        other = _placed(tiers, chunks)
        for tier, (a, b) in enumerate(zip(one.tiers, other.tiers, strict=True)):
            differ = np.setxor1d(a, b).tolist()
            assert not differ, f"tier {tier} must hold the same tokens after chunks {chunks[:4]}, found {differ} in one"


@EVERY
def test_tokens_only_descend(policy: Policy) -> None:
    tiers = [TwoTier(Block()), TwoTier(policy), TwoTier(None)]
    for prompt in (1, 100):
        picture = history(tiers, 200, prompt)
        for step in range(1, len(picture)):
            before, after = picture[step - 1, :step], picture[step, :step]
            assert (after >= before).all(), f"a token that left must not come back, found one at step {step}"


RANKS = [policy for policy in POLICIES if isinstance(policy, RankPolicy)]
ATTENDING = [policy for policy in RANKS if policy._scorer() is None]
"""Those that rank by attention, without a scorer."""


@pytest.mark.parametrize("policy", ATTENDING, ids=[name_of(policy) for policy in ATTENDING])
def test_tokens_are_ranked_each_for_itself(policy: RankPolicy) -> None:
    generator = torch.Generator().manual_seed(0)
    attention = torch.rand(2, 3, 50, generator=generator) * 20
    queries = torch.randint(0, 30, (2, 3, 50), generator=generator).float()
    ages = torch.arange(50, 0, -1).repeat(2, 3, 1)
    shown = attention.clone(), queries.clone(), ages.clone()
    rank = policy.rank(*shown)
    assert isinstance(rank, torch.Tensor), f"rank must return a tensor, found {type(rank).__name__}"
    assert rank.is_floating_point(), f"rank must return floats, found {rank.dtype}"
    assert rank.shape == attention.shape, f"rank must return {tuple(attention.shape)}, found {tuple(rank.shape)}"
    assert rank.device == attention.device, f"rank must return a tensor on {attention.device}, found {rank.device}"
    assert not rank.isnan().any(), "rank must return numbers for numbers, found nan"
    same = all(torch.equal(x, y) for x, y in zip(shown, (attention, queries, ages), strict=True))
    assert same, "rank must not change what it is given"
    order = torch.randperm(50, generator=generator)
    moved = policy.rank(attention[..., order], queries[..., order], ages[..., order])
    torch.testing.assert_close(moved, rank[..., order], msg="rank must not depend on the order of the tokens")


@pytest.mark.parametrize("policy", ATTENDING, ids=[name_of(policy) for policy in ATTENDING])
def test_tokens_that_no_counted_query_saw_are_ranked(policy: RankPolicy) -> None:
    for ages in (torch.arange(6, 0, -1), torch.zeros(6, dtype=torch.int64)):
        rank = policy.rank(torch.zeros(1, 1, 6), torch.zeros(1, 1, 6), ages.view(1, 1, -1))
        assert not rank[ages.view(1, 1, -1) > 0].isnan().any(), "rank must return numbers without attention, found nan"


@pytest.mark.parametrize("policy", RANKS, ids=[name_of(policy) for policy in RANKS])
def test_a_budget_is_a_number_of_tokens_that_never_falls(policy: RankPolicy) -> None:
    budgets = [policy.budget_tokens(seen, min(seen, 100)) for seen in range(1, TOKENS)]
    for budget in budgets:
        assert isinstance(budget, int | np.integer), f"a budget must be an integer, found {budget!r}"
        assert not isinstance(budget, bool), f"a budget must be an integer, found {budget}"
        assert budget >= 0, f"a budget must be 0 or more, found {budget}"
    assert budgets == sorted(budgets), "a budget must not fall as more tokens are seen: tokens that left do not return"


@pytest.mark.parametrize("policy", ATTENDING, ids=[name_of(policy) for policy in ATTENDING])
def test_scores_are_the_same_each_time(policy: RankPolicy) -> None:
    asked = [policy.scores() for _ in range(3)]
    assert all(isinstance(scores, Scores) for scores in asked), (
        f"scores must return kvpolicy.Scores, found {asked[0]!r}"
    )
    assert asked[0] == asked[1] == asked[2], "scores must be the same each time"
    assert type(policy).model_validate(policy.model_dump()).scores() == asked[0], "scores must depend on options alone"


@pytest.mark.parametrize("policy", RANKS, ids=[name_of(policy) for policy in RANKS])
def test_who_ranks_is_the_same_each_time(policy: RankPolicy) -> None:
    assert policy.ranked_by() == policy.ranked_by(), "ranked_by must be the same each time"
    assert type(policy).model_validate(policy.model_dump()).ranked_by() == policy.ranked_by()


@pytest.mark.parametrize("policy", RANKS, ids=[name_of(policy) for policy in RANKS])
def test_thresholds_and_budgets_of_heads_fit_what_competes(policy: RankPolicy) -> None:
    generator = torch.Generator().manual_seed(0)
    rank = torch.randn(2, 3, 40, generator=generator)
    rank[:, 1, 10:] = -torch.inf
    shown, budgets = rank.clone(), torch.full((2, 3), 7)
    stays, counts = policy.stay(rank), policy.head_budgets(rank, budgets)
    assert torch.equal(shown, rank), "stay and head_budgets must not change what they are given"
    for found, dtype, shape in ((stays, torch.bool, rank.shape), (counts, torch.int64, budgets.shape)):
        assert found is None or (found.dtype, found.shape) == (dtype, shape)
    if counts is not None:
        assert (counts >= 0).all()
    order = torch.randperm(40, generator=generator)
    if stays is not None:
        moved = policy.stay(rank[..., order])
        assert moved is not None
        assert torch.equal(moved, stays[..., order]), "stay must not depend on the order of the tokens"
