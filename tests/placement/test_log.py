"""Policy `log` with a jitter and with an exponent: what stays, by counts and by distance."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from layers import Layer, random_tokens

from kvpolicy import load_recipe
from kvpolicy.errors import RecipeError
from kvpolicy.placement.simulate import history, simulate

TOKENS = 3000


def tiers(window: int = 32, **options: Any) -> Any:
    return load_recipe(
        {
            "tiers": [
                {"policy": {"kind": "recent", "window": window, "flush": window}, "store": "full"},
                {"policy": {"kind": "log", "budget": window, **options}, "store": "full"},
                {"store": "evict"},
            ]
        }
    ).tiers


@pytest.mark.parametrize("seed", [0, 1, 2**31 - 1])
def test_jitter_keeps_as_many_at_every_distance(seed: int) -> None:
    places = set()
    for tokens in range(1, TOKENS, 97):
        plain, jittered = simulate(tiers(), tokens)[1], simulate(tiers(jitter=seed), tokens)[1]
        assert len(plain) == len(jittered)
        for distance in 2 ** np.arange(12):
            near = [int((tokens - part <= distance).sum()) for part in (plain, jittered)]
            assert abs(near[0] - near[1]) <= 1
        places |= set(jittered % 8)
    assert len(places) == 8, "tokens of any alignment stay"


def test_a_seed_decides_and_nothing_else() -> None:
    found = [simulate(tiers(jitter=seed), TOKENS)[1].tolist() for seed in (0, 0, 1)]
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize("options", [{"jitter": 5}, {"exponent": 0.7}, {"exponent": 1.5, "jitter": 5}])
def test_who_stays_was_there_before(options: dict[str, Any]) -> None:
    picture = history(tiers(8, **options), 400)
    for step in range(1, len(picture)):
        assert (picture[step, :step] >= picture[step - 1, :step]).all()


def rank(position: int, distance: int, exponent: float) -> float:
    """By the van der Corput sequence in base 2, which `log` computes by other means."""
    share, digit = 0.0, 0.5
    for bit in f"{position:b}"[::-1]:
        share, digit = share + digit * int(bit), digit / 2
    return -math.log(share or 2.0**-65) - exponent * math.log(distance)


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0, 1.7])
def test_an_exponent_keeps_whom_it_would_choose_of_all(exponent: float) -> None:
    """Few tokens that left early are missed: the ranks of all tokens, now, give nearly the same."""
    for tokens in (200, 1000, 1024, TOKENS):
        recent, held, _ = simulate(tiers(32, exponent=exponent), tokens)
        flush = tokens - tokens % 32  # it is at flushes that tokens are chosen
        ranks = {p: rank(p, flush - p, exponent) for p in range(int(recent[0]))}
        best = sorted(ranks, key=lambda p: -ranks[p])[:32]
        assert len(held) == 32
        assert len(set(best) - set(held.tolist())) <= 3


@pytest.mark.parametrize("jitter", [None, 3])
@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0, 1.5])
def test_density_is_the_power_of_the_distance(exponent: float, jitter: int | None) -> None:
    tokens, budget = 1 << 15, 1024
    policy: Any = tiers(budget, exponent=exponent, jitter=jitter)[1].policy
    positions = np.arange(tokens - 256, dtype=np.int64)
    distances = tokens - positions[policy.keep(positions, tokens)]
    assert len(distances) == budget
    octaves = [int(((distances > 2**i) & (distances <= 2 ** (i + 1))).sum()) for i in range(11, 15)]
    for near, far in itertools.pairwise(octaves):
        noise = 0.05 if jitter is None else 4 / math.sqrt(min(near, far))
        assert far / near == pytest.approx(2 ** (1 - exponent), rel=noise)


def test_by_attention_the_better_of_each_two_stays() -> None:
    query, keys, values = random_tokens(200, 1)
    layer = Layer("logquant-attention", window=16, nbits=8)
    for first, last in itertools.pairwise([0, 130, *range(131, 201)]):
        layer(*(x[:, :, first:last] for x in (query, keys, values)))
    for tokens in [head for row in layer.held() for head in row]:
        plain = simulate(load_recipe("logquant", window=16).tiers, 200)
        assert tokens[0] == plain[0].tolist()
        assert 8 <= len(tokens[1]) <= 16
        assert sorted([*tokens[1], *tokens[2]]) == sorted([*plain[1].tolist(), *plain[2].tolist()])


@pytest.mark.parametrize("options", [{"jitter": -1}, {"jitter": 1.5}, {"exponent": -0.1}, {"exponent": 9.0}])
def test_options_out_of_their_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=next(iter(options))):
        tiers(**options)
