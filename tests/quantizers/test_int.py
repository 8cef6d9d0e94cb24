"""Quantizer `int`."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kvpolicy_int import STEPS, Int
from torch import Tensor

from kvpolicy import load_recipe
from kvpolicy.attention.products import add_values, key_scores
from kvpolicy.errors import RecipeError
from kvpolicy.interfaces.quantizer import Affine
from kvpolicy.storage.make import make_store

BITS = [1, 2, 3, 4, 8]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def random_groups(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def decode(affine: Affine) -> Tensor:
    return affine.scale * affine.codes + affine.offset


@pytest.mark.parametrize("nbits", BITS)
def test_arithmetic(nbits: int) -> None:
    levels = 2**nbits - 1
    codes, scale, offset = Int(nbits=nbits).calibrate(torch.arange(levels + 1.0).mul(0.5).sub(3.0)[None])
    assert codes.tolist() == [list(range(levels + 1))]
    assert scale.tolist() == [[0.5]]
    assert offset.tolist() == [[-3.0]]


def test_symmetric_arithmetic() -> None:
    groups = torch.tensor([[-3.0, -1.0, 1.0, 2.0]])
    assert decode(Int(nbits=2, symmetric=True).calibrate(groups)).tolist() == [[-3.0, -1.0, 1.0, 1.0]]
    assert decode(Int(nbits=1, symmetric=True).calibrate(groups)).tolist() == [[-3.0, -3.0, 3.0, 3.0]]


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("nbits", BITS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_types_shapes_and_error(dtype: torch.dtype, nbits: int, symmetric: bool) -> None:
    groups = random_groups(50, 32, dtype=dtype)
    affine = Int(nbits=nbits, symmetric=symmetric).calibrate(groups)
    assert [t.dtype for t in affine] == [torch.uint8, torch.float32, torch.float32]
    assert [tuple(t.shape) for t in affine] == [(50, 32), (50, 1), (50, 1)]
    assert int(affine.codes.max()) == 2**nbits - 1
    error = (decode(affine) - groups.float()).abs()
    assert (error <= affine.scale * 0.5 + 1e-6).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    groups = random_groups(20, 64, dtype=dtype)
    for mine, reference in zip(Int(nbits=4).calibrate(groups), Int(nbits=4).calibrate(groups.float()), strict=True):
        assert torch.equal(mine, reference)


def test_the_range_of_float16_does_not_overflow() -> None:
    groups = torch.tensor([[-60000.0, 60000.0, 0.0, 30000.0]], dtype=torch.float16)
    assert torch.allclose(decode(Int(nbits=8).calibrate(groups)), groups.float(), atol=300)


@given(
    value=st.floats(-60000, 60000, width=16),
    nbits=st.sampled_from(BITS),
    symmetric=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
@settings(max_examples=60, deadline=None)
def test_equal_numbers_are_exact(value: float, nbits: int, symmetric: bool, dtype: torch.dtype) -> None:
    groups = torch.full((3, 16), value, dtype=dtype)
    affine = Int(nbits=nbits, symmetric=symmetric).calibrate(groups)
    assert torch.equal(decode(affine), groups.float())
    assert (affine.scale == 0).all()
    assert (affine.codes == 0).all()


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("options", [{"symmetric": False}, {"symmetric": True}])
def test_inf_and_nan_spoil_their_group_only(bad: float, options: dict[str, Any]) -> None:
    quantizer = Int(nbits=3, **options)
    groups = random_groups(10, 16)
    clean = quantizer.calibrate(groups)
    groups[4, 7] = bad
    affine = quantizer.calibrate(groups)
    others = torch.arange(10) != 4
    for mine, reference in zip(affine, clean, strict=True):
        assert torch.equal(mine[others], reference[others])
    assert not decode(affine)[4].isfinite().any()
    assert int(affine.codes.max()) < 8


def test_groups_are_independent() -> None:
    groups = random_groups(30, 8)
    whole = Int(nbits=2).calibrate(groups)
    parts = [Int(nbits=2).calibrate(part) for part in groups.split(7)]
    for mine, pieces in zip(whole, zip(*parts, strict=True), strict=True):
        assert torch.equal(mine, torch.cat(pieces))


def normal_error(nbits: int, step: float) -> float:
    """Mean squared error of evenly spaced levels on a standard normal distribution, by quadrature."""
    x = torch.linspace(-9, 9, 400_001, dtype=torch.float64)
    top = 2**nbits - 1
    near = ((x / step + top / 2).round().clamp(0, top) - top / 2) * step
    return float(torch.trapezoid((x - near) ** 2 * (-(x**2) / 2).exp(), x)) / math.sqrt(2 * math.pi)


@pytest.mark.parametrize("nbits", BITS)
def test_the_steps_of_range_rms_are_the_best_for_normal_numbers(nbits: int) -> None:
    published = {2: 0.9957, 3: 0.5860, 4: 0.3352}
    assert round(STEPS[nbits], 4) == published.get(nbits, round(STEPS[nbits], 4))
    here, *beside = (normal_error(nbits, STEPS[nbits] * factor) for factor in (1, 0.999, 1.001))
    assert here < min(beside)
    # The slopes on either side meet at the bottom.
    assert abs(beside[0] - beside[1]) < 0.02 * (beside[0] - here)


def exact_rms(x: Tensor, nbits: int, axis: int) -> Tensor:
    """What `range: rms` stands for, in float64, of groups along an axis."""
    scale = STEPS[nbits] * x.double().square().mean(axis, keepdim=True).sqrt()
    top = (2**nbits - 1) / 2
    every = scale.unsqueeze(-1) * (torch.arange(2**nbits, dtype=torch.float64) - top)
    nearest = (every - x.double().unsqueeze(-1)).abs().argmin(-1, keepdim=True)
    return every.expand(*x.shape, 2**nbits).gather(-1, nearest).squeeze(-1)


@pytest.mark.parametrize("nbits", BITS)
@pytest.mark.parametrize("per", ["token", "channel"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_range_rms_keeps_a_scale_and_no_offset(dtype: torch.dtype, per: Any, nbits: Any) -> None:
    x = random_groups(2, 3, 32, 64, dtype=dtype) * 5
    store: Any = make_store(Int(nbits=nbits, range="rms", per=per, group_size=32), 64)
    store.append(x)
    groups, axis = (x.unflatten(3, (2, 32)), 4) if per == "token" else (x, 2)
    expected = exact_rms(groups, nbits, axis).view(x.shape)
    found = torch.cat([part for _, part in store.decoded(50, torch.float32)], dim=2)
    # A rounded scale moves levels by so much; a number half-way may go either way.
    near = 2.0**-8 if dtype == torch.bfloat16 else 1e-5
    assert ((found.double() - expected).abs() <= near * expected.abs() + 1e-6).double().mean() > 0.999
    used = store.bytes()
    assert (used["codes"], used["zeros"]) == (2 * 3 * 32 * 64 * nbits // 8, 0)
    assert used["scales"] == 2 * 3 * 64 * dtype.itemsize
    rows = random_groups(2, 3, 2, 64)
    scores, out = torch.zeros(2, 3, 2, 32), torch.zeros(2, 3, 2, 64)
    key_scores(store, rows, scores, 0)
    torch.testing.assert_close(scores, rows @ found.transpose(2, 3), rtol=1e-4, atol=1e-3)
    add_values(store, scores, out, 0)
    torch.testing.assert_close(out, scores @ found, rtol=1e-4, atol=0.1)
    assert store.format == "affine", "codes one apart are read plane by plane"


@pytest.mark.parametrize("magnitude", [1e-30, 1e-3, 1e30])
def test_squares_of_range_rms_neither_vanish_nor_overflow(magnitude: float) -> None:
    groups = random_groups(20, 64) * magnitude
    found = decode_levels(Int(nbits=4, range="rms"), groups)
    assert (found / magnitude - groups / magnitude).square().mean() < 0.015
    assert not decode_levels(Int(nbits=4, range="rms"), torch.zeros(3, 8)).any()


def decode_levels(quantizer: Int, groups: Tensor) -> Tensor:
    affine = quantizer.calibrate(groups)
    return affine.scale * (affine.codes - (2**quantizer.nbits - 1) / 2) + affine.offset


@pytest.mark.parametrize(("percentile", "symmetric"), [(None, False), (90.0, False), (75.0, True), (99.0, False)])
@pytest.mark.parametrize("size", [1, 7, 64])
def test_percentiles_bound_the_levels(percentile: float | None, symmetric: bool, size: int) -> None:
    groups = random_groups(40, size)
    codes, scale, offset = Int(nbits=8, range="percentiles", percentile=percentile, symmetric=symmetric).calibrate(
        groups
    )
    upper = (percentile or 99.5) / 100
    low, high = (groups.double().quantile(q, dim=1, keepdim=True) for q in (1 - upper, upper))
    if symmetric and size > 1:
        high = torch.maximum(-low, high)
        low = -high
    torch.testing.assert_close(offset.double(), low, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close((offset + 255 * scale).double(), high, rtol=1e-5, atol=1e-6)
    found = decode(Affine(codes, scale, offset)).double()
    inside = torch.maximum(torch.minimum(groups.double(), high), low)
    assert ((found - inside).abs() <= 0.51 * scale + 1e-6).all()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (
            {"range": "rms", "symmetric": True},
            "symmetric goes with range: extremes or percentiles, found it with range: rms; remove it",
        ),
        ({"range": "rms", "clip": 0.9}, "clip goes with range: extremes, found it with range: rms"),
        ({"range": "percentiles", "clip": 0.9}, "clip goes with range: extremes"),
        ({"percentile": 99.0}, "percentile goes with range: percentiles, found it with range: extremes"),
        ({"range": "percentiles", "percentile": 50.0}, "percentile: must be greater than 50"),
        ({"range": "percentiles", "percentile": 100.0}, "percentile: must be less than 100"),
        ({"range": "minmax"}, "range: must be 'extremes', 'percentiles' or 'rms'"),
    ],
)
def test_options_that_would_do_nothing_are_refused(options: dict[str, Any], told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        load_recipe({"tiers": [{"store": {"kind": "int", **options}}]})
