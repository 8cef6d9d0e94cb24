"""Packing of integer codes, and their decoding."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvpolicy.storage import packing
from kvpolicy.storage.packing import dequantize, pack, packed_width, planes, unpack

BITS = [1, 2, 3, 4, 5, 6, 7, 8]


def random_codes(*shape: int, nbits: int, seed: int = 0) -> Tensor:
    return torch.randint(2**nbits, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def expected(codes: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    channels = codes.shape[-1] // scale.shape[-1]
    scale, offset = (p.float().repeat_interleave(channels, dim=-1) for p in (scale, offset))
    return codes.float() * scale + offset


@pytest.mark.parametrize(("nbits", "width"), [(1, 16), (2, 32), (3, 48), (4, 64), (5, 80), (6, 96), (7, 112), (8, 128)])
def test_width(nbits: int, width: int) -> None:
    assert packed_width(128, nbits) == width


@given(
    nbits=st.sampled_from(BITS),
    head_dim=st.integers(1, 130),
    shape=st.lists(st.integers(0, 3), max_size=3),
    seed=st.integers(0, 9),
)
@settings(max_examples=150, deadline=None)
def test_round_trip(nbits: int, head_dim: int, shape: list[int], seed: int) -> None:
    codes = random_codes(*shape, head_dim, nbits=nbits, seed=seed)
    packed = pack(codes, nbits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (*shape, packed_width(head_dim, nbits))
    assert packed_width(head_dim, nbits) * 8 < head_dim * nbits + 8 * len(packing.PARTS[nbits])
    assert torch.equal(unpack(packed, nbits, head_dim), codes)


@pytest.mark.parametrize("shifted", [True, False])
@pytest.mark.parametrize("head_dim", [5, 64, 128])
@pytest.mark.parametrize("nbits", BITS)
def test_codes_are_the_sum_of_their_planes(nbits: int, head_dim: int, shifted: bool) -> None:
    codes = random_codes(3, 7, head_dim, nbits=nbits)
    packed, found = pack(codes, nbits), torch.zeros(3, 7, head_dim)
    before = packed.clone()
    for factor, first, last, plane in planes(packed, nbits, head_dim, shifted):
        found[..., first:last] += plane * factor
    assert torch.equal(found, codes.float())
    assert torch.equal(packed, before)


def test_two_bits_are_four_planes() -> None:
    codes = random_codes(128, nbits=2)
    a, b, c, d = codes.int().split(32)
    assert pack(codes, 2).int().tolist() == (a | b << 2 | c << 4 | d << 6).tolist()


def test_three_bits_are_two_and_one() -> None:
    codes = random_codes(2, 64, nbits=3)
    assert torch.equal(pack(codes, 3), torch.cat([pack(codes & 3, 2), pack(codes >> 2, 1)], dim=-1))


def test_four_bits_are_two_halves() -> None:
    codes = random_codes(5, 80, nbits=4)
    assert torch.equal(pack(codes, 4), codes[:, :40] | codes[:, 40:] << 4)


def test_padding_is_zero() -> None:
    assert pack(torch.full((5,), 3, dtype=torch.uint8), 2).tolist() == [0b111111, 0b1111]


def test_codes_too_large_stay_within_their_channel() -> None:
    codes = torch.tensor([255, 0, 0, 0], dtype=torch.uint8)
    assert unpack(pack(codes, 2), 2, 4).tolist() == [3, 0, 0, 0]


def test_non_contiguous_codes() -> None:
    codes = random_codes(64, 7, nbits=2).T
    assert torch.equal(unpack(pack(codes, 2), 2, 64), codes)


@pytest.mark.parametrize("nbits", BITS)
@pytest.mark.parametrize("head_dim", [1, 9, 64, 80, 96, 128])
def test_dequantize_is_scale_times_code_plus_offset(nbits: int, head_dim: int) -> None:
    codes = random_codes(2, 3, 5, head_dim, nbits=nbits)
    for groups in [d for d in range(1, head_dim + 1) if head_dim % d == 0]:
        scale, offset = torch.rand(2, 3, 5, groups), torch.randn(2, 3, 5, groups)
        out = torch.full((2, 3, 5, head_dim), torch.nan)
        dequantize(pack(codes, nbits), nbits, head_dim, scale, offset, out)
        assert torch.equal(out, expected(codes, scale, offset))


@pytest.mark.parametrize("params", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dequantize_rounds_once(dtype: torch.dtype, params: torch.dtype) -> None:
    codes = random_codes(2, 2, 9, 64, nbits=4)
    scale, offset = torch.rand(2, 2, 9, 2).to(params), torch.randn(2, 2, 9, 2).to(params)
    out = torch.empty(2, 2, 9, 64, dtype=dtype)
    dequantize(pack(codes, 4), 4, 64, scale, offset, out)
    assert torch.equal(out, expected(codes, scale, offset).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("groups", [1, 2, 64])
@pytest.mark.parametrize("shape", [(), (8,), (4, 1), (1, 3, 4, 1), (2, 3, 1, 1), (2, 1, 4, 8)])
def test_parameters_broadcast(dtype: torch.dtype, groups: int, shape: tuple[int, ...]) -> None:
    codes = random_codes(2, 3, 4, 8, 64, nbits=2)
    scale, offset = torch.rand(*shape, groups), torch.randn(*shape, groups)
    out = torch.empty(2, 3, 4, 8, 64, dtype=dtype)
    dequantize(pack(codes, 2), 2, 64, scale, offset, out)
    assert torch.equal(out, expected(codes, scale, offset).to(dtype))


@pytest.mark.parametrize("nbits", BITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_into_a_slice(nbits: int, dtype: torch.dtype) -> None:
    codes = random_codes(2, 3, 5, 64, nbits=nbits)
    scale, offset = torch.rand(2, 3, 5, 4), torch.randn(2, 3, 5, 4)
    whole = torch.full((2, 3, 20, 64), 7.0, dtype=dtype)
    dequantize(pack(codes, nbits), nbits, 64, scale, offset, whole[:, :, 10:15])
    assert torch.equal(whole[:, :, 10:15], expected(codes, scale, offset).to(dtype))
    assert (whole[:, :, :10] == 7).all()
    assert (whole[:, :, 15:] == 7).all()


@pytest.mark.parametrize("shape", [(), (0,), (1, 2, 0)])
def test_no_tokens_or_one(shape: tuple[int, ...]) -> None:
    codes = random_codes(*shape, 16, nbits=2)
    out = torch.empty(codes.shape)
    dequantize(pack(codes, 2), 2, 16, torch.ones(*shape, 2), torch.zeros(*shape, 2), out)
    assert torch.equal(out, codes.float())


@pytest.mark.parametrize("shape", [(2, 3, 7, 5, 2), (2, 3, 7, 1, 32), (7, 1, 1), (5, 32), (1,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kept", ["float32", "model"])
@pytest.mark.parametrize("nbits", [3, 8])
def test_blocks_and_parameter_types_make_no_difference(
    nbits: int, kept: str, dtype: torch.dtype, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    codes = random_codes(2, 3, 7, 5, 32, nbits=nbits)
    parameters = dtype if kept == "model" else torch.float32
    scale, offset = torch.rand(shape).to(parameters), torch.randn(shape).to(parameters)
    for size in [1, 64, 2000, 10_000, 1 << 31]:
        monkeypatch.setattr(packing, "BLOCK_BYTES", size)
        out = torch.empty(2, 3, 7, 5, 32, dtype=dtype)
        dequantize(pack(codes, nbits), nbits, 32, scale, offset, out)
        assert torch.equal(out, expected(codes, scale.float(), offset.float()).to(dtype))


def test_nan_parameters_spoil_their_group_only() -> None:
    codes = random_codes(4, 64, nbits=2)
    scale, offset = torch.ones(4, 2), torch.zeros(4, 2)
    scale[1, 0] = torch.nan
    out = torch.empty(4, 64)
    dequantize(pack(codes, 2), 2, 64, scale, offset, out)
    spoilt = torch.zeros(4, 64, dtype=torch.bool)
    spoilt[1, :32] = True
    assert torch.equal(out.isnan(), spoilt)


@pytest.mark.parametrize("head_dim", [8, 64, 128])
@pytest.mark.parametrize("nbits", [(7, 6, 5, 4, 3, 3, 2, 0), (0, 8), (8, 8), (1, 0, 4, 4)], ids=str)
def test_bits_may_differ_by_run_of_channels(nbits: tuple[int, ...], head_dim: int) -> None:
    widths = torch.tensor(nbits).repeat_interleave(head_dim // len(nbits))
    drawn = random_codes(3, 5, head_dim, nbits=8)
    codes = (drawn.int() % 2**widths).to(torch.uint8)
    packed = pack(codes, nbits)
    assert packed.shape == (3, 5, packed_width(head_dim, nbits))
    if head_dim >= 64:
        assert packed.shape[2] * 8 == int(widths.sum())
    assert torch.equal(unpack(packed, nbits, head_dim), codes)
    scale, offset, out = torch.rand(3, 5, head_dim), torch.rand(3, 5, head_dim), torch.empty(3, 5, head_dim)
    dequantize(packed, nbits, head_dim, scale, offset, out)
    assert torch.equal(out, codes.float() * scale + offset)
