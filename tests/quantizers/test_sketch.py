"""Extra `sketch`: unbiased, and as the formulas of QJL and TurboQuant have it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from kvpolicy_lloyd_max import LloydMax
from kvpolicy_sketch import Sketch
from torch import Tensor

from kvpolicy import Site, load_recipe
from kvpolicy.attention.products import add_values, key_scores
from kvpolicy.errors import RecipeError
from kvpolicy.interfaces.extra import Grouping
from kvpolicy.storage.make import make_store

DIM = 64


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bits", [1, 3])
def test_products_are_unbiased_over_seeds_and_vary_as_the_theorem_says(bits: int) -> None:
    error, rows = random(1, 1, 3, DIM, seed=1) ** 3, random(1, 1, 2, DIM, seed=2)
    found = []
    for seed in range(600):
        sketch, out = Sketch(bits=bits, seed=seed), torch.zeros(1, 1, 2, 3)
        sketch.add_scores(rows, out, sketch.fit(error, Grouping("token", DIM), Site()))
        found.append(out.double()[0, 0])
    all_ = torch.stack(found)
    exact = (rows.double() @ error.double().transpose(2, 3))[0, 0]
    norms = rows.double().norm(dim=3).square()[0, 0, :, None] * error.double().norm(dim=3).square()[0, 0]
    most = math.pi / (2 * bits * DIM) * norms
    assert ((all_.mean(0) - exact).abs() < 4.5 * (most / 600).sqrt() + 2**-9 * exact.abs()).all()
    assert (all_.var(0) < 1.3 * most).all()
    assert (all_.var(0) > 0.2 * most).all()


def test_codes_of_one_bit_alone_are_biased() -> None:
    """They shrink products by 2 / pi: what the sketch is for."""
    x, q = random(1, 1, 4000, DIM, seed=3), random(1, 1, 1, DIM, seed=4)
    store: Any = make_store(LloydMax(nbits=1, group_size=DIM), DIM)
    store.append(x)
    scores = torch.zeros(1, 1, 1, 4000)
    key_scores(store, q, scores, 0)
    exact = q @ x.transpose(2, 3)
    assert abs(float((scores * exact).sum() / exact.square().sum()) - 2 / math.pi) < 0.03


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [1, 2])
def test_a_store_adds_the_formula_to_its_codes(bits: int, dtype: torch.dtype) -> None:
    x = (random(2, 3, 40, DIM, seed=5) ** 3).to(dtype)
    inner: Any = make_store(LloydMax(nbits=2, group_size=DIM), DIM)
    store: Any = make_store(LloydMax(nbits=2, group_size=DIM, extras=(Sketch(bits=bits, seed=7),)), DIM)
    for one in (inner, store):
        one.append(x)
    codes, found = (torch.cat([p for _, p in s.decoded(9, torch.float32)], 2).double() for s in (inner, store))
    drawn = torch.from_numpy(np.random.RandomState(7).standard_normal((bits * DIM, DIM)))
    left = x.double() - codes
    signs = torch.where(left @ drawn.T >= 0, 1.0, -1.0).double()
    size = math.sqrt(math.pi / 2) / (bits * DIM) * left.norm(dim=3, keepdim=True)
    expected = codes + size * (signs @ drawn)
    assert ((found - expected).abs() <= 2**-8 * (expected - codes).abs() + 1e-4 * x.double().abs().max()).all()
    assert store.bytes()["extras"] == 2 * 3 * 40 * (bits * DIM // 8 + 2)
    rows, weights = random(2, 3, 5, DIM, seed=6), random(2, 3, 5, 40, seed=8)
    scores, out = torch.zeros(2, 3, 5, 40), torch.zeros(2, 3, 5, DIM)
    key_scores(store, rows, scores, 0)
    add_values(store, weights, out, 0)
    torch.testing.assert_close(scores.double(), rows.double() @ found.transpose(2, 3), rtol=1e-4, atol=1e-2)
    torch.testing.assert_close(out.double(), weights.double() @ found, rtol=1e-4, atol=1e-2)
    assert store.direct


def test_bits_out_of_range_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"extras\[0\]\.bits: must be .* 1, found 0"):
        load_recipe({"tiers": [{"store": {"kind": "int", "extras": [{"kind": "sketch", "bits": 0}]}}]})
