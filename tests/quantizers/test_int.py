"""Quantizer `int`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kvpolicy_int import Int
from torch import Tensor

from kvpolicy.interfaces.quantizer import Affine

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
