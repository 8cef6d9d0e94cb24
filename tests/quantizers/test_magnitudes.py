"""Errors of what is stored, over all magnitudes, widths and types; and what one bad number may spoil."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kvpolicy_hqq import Hqq
from kvpolicy_int import Int
from kvpolicy_quanto import Quanto
from kvpolicy_scale import Scale
from torch import Tensor

from kvpolicy.interfaces.quantizer import AffineQuantizer, unit_factor
from kvpolicy.storage.group_size import group_size_of
from kvpolicy.storage.make import make_store
from kvpolicy.storage.packing import packed_width

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BITS = [1, 2, 3, 4, 8]
magnitudes = st.floats(-7, 4).map(lambda exponent: 10.0**exponent)


def decoded(quantizer: AffineQuantizer, x: Tensor) -> Tensor:
    store = make_store(quantizer, x.shape[3])
    assert store is not None
    store.append(x.clone())
    out = torch.full_like(x, torch.nan)
    store.write(out, 0)
    return out


def half_steps(quantizer: AffineQuantizer, x: Tensor, zero: bool = False) -> Tensor:
    """Half a step of each number's group, in float64; where `zero`, a group's range includes zero."""
    by_channel = quantizer.per == "channel"
    size = group_size_of(quantizer, x.shape[3])
    groups = (x.double().transpose(2, 3) if by_channel else x.double()).unflatten(3, (-1, size))
    low, high = groups.amin(4, keepdim=True), groups.amax(4, keepdim=True)
    if zero:
        low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    half = ((high - low) / (2**quantizer.nbits - 1) / 2).expand_as(groups).flatten(3)
    return half.transpose(2, 3) if by_channel else half


def numbers(data: st.DataObject, dtype: torch.dtype, offset: bool) -> Tensor:
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1 << 20)))
    x = torch.randn(1, 2, 32, 32, generator=generator).clamp(-6, 6)
    shift = data.draw(st.sampled_from([0.0, 0.0, 1.0, -5.0])) if offset else 0.0
    x = (x + shift) * data.draw(magnitudes)
    return (x.clamp(-3e4, 3e4) if dtype == torch.float16 else x).to(dtype)


def check(quantizer: AffineQuantizer, x: Tensor, factor: float, zero: bool = False) -> None:
    """Half a step, and what the type can't express: of the numbers, and of scale and offset kept in it."""
    found, info = decoded(quantizer, x), torch.finfo(x.dtype)
    smallest = info.smallest_normal * info.eps
    largest = x.double().abs().amax()
    bound = factor * half_steps(quantizer, x, zero) + info.eps * largest + 2 * smallest
    error = (found.double() - x.double()).abs()
    assert (error <= bound * (1 + 1e-5)).all(), float((error / bound).max())


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.data())
def test_integers_err_by_half_a_step_at_every_magnitude(data: st.DataObject) -> None:
    options = {
        "nbits": data.draw(st.sampled_from(BITS)),
        "per": data.draw(st.sampled_from(["token", "channel"])),
        "group_size": data.draw(st.sampled_from([8, 16, 32])),
        "scale_dtype": data.draw(st.sampled_from(["model", "float32"])),
    }
    check(Int(**options), numbers(data, data.draw(st.sampled_from(DTYPES)), True), 1.0)


@pytest.mark.parametrize("magnitude", [1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1.0, 1e4])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "quantizer",
    [Int(nbits=n, group_size=32) for n in BITS] + [Hqq(nbits=n, optimize=False) for n in BITS] + [Quanto(nbits=4)],  # type: ignore[arg-type]
    ids=lambda quantizer: f"{quantizer.kind}-{quantizer.nbits}",
)
def test_small_and_large_numbers(quantizer: AffineQuantizer, dtype: torch.dtype, magnitude: float) -> None:
    x = torch.rand(1, 2, 32, 32, generator=torch.Generator().manual_seed(0)).sub(0.5).mul(2 * magnitude).to(dtype)
    factor = 1.0 + 2**quantizer.nbits * torch.finfo(dtype).eps if isinstance(quantizer, Quanto) else 1.0
    check(quantizer, x, factor, zero=isinstance(quantizer, Quanto))


@settings(max_examples=80, deadline=None, derandomize=True)
@given(st.data())
def test_hqq_errs_by_little_more_than_half_a_step_at_every_magnitude(data: st.DataObject) -> None:
    options = {
        "nbits": data.draw(st.sampled_from(BITS)),
        "per": data.draw(st.sampled_from(["token", "channel"])),
        "group_size": data.draw(st.sampled_from([16, 32])),
        "optimize": data.draw(st.booleans()),
    }
    x = numbers(data, data.draw(st.sampled_from(DTYPES)), True)
    check(Hqq(**options), x, 2.0 if options["optimize"] else 1.0)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(st.data())
def test_quanto_errs_by_half_a_step_at_every_magnitude(data: st.DataObject) -> None:
    quantizer = Quanto(nbits=data.draw(st.sampled_from([2, 4])), per=data.draw(st.sampled_from(["token", "channel"])))
    x = numbers(data, data.draw(st.sampled_from(DTYPES)), False)
    # The library computes in the type of the numbers, where rounding may take a number to the next code.
    check(quantizer, x, 1.0 + 2**quantizer.nbits * torch.finfo(x.dtype).eps, zero=True)


@pytest.mark.parametrize("nbits", BITS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_bytes_are_those_of_the_type_in_which_scales_are_kept(dtype: torch.dtype, nbits: Any) -> None:
    kept = torch.float32 if dtype == torch.float16 and nbits > 2 else dtype
    store = make_store(Int(nbits=nbits, group_size=16), 64)
    assert store is not None
    store.append(torch.randn(2, 3, 10, 64).to(dtype))
    assert store.parts["params"].pages[0].dtype == kept
    scales = 2 * 3 * 10 * 4 * kept.itemsize
    assert store.bytes() == {
        "codes": 60 * packed_width(64, nbits), "scales": scales, "zeros": scales, "exact": 0, "indices": 0
    }  # fmt: skip


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.floats(2.0**-149, 2.0**126, width=32))
def test_unit_factors_are_powers_of_two(size: float) -> None:
    factor = float(unit_factor(torch.tensor([[size]])))
    assert math.frexp(factor)[0] == 0.5
    assert 1 <= size * factor < 2 or (size < 2.0**-126 and factor == 2.0**127)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(head_dim=st.integers(1, 600), nbits=st.sampled_from(BITS))
def test_automatic_groups_cost_no_more_than_their_codes_wherever_a_head_allows(head_dim: int, nbits: Any) -> None:
    size = group_size_of(Int(nbits=nbits), head_dim)
    assert head_dim % size == 0
    usual = max(d for d in range(1, 65) if head_dim % d == 0)
    if usual * nbits >= 64:
        assert size == usual
    else:
        assert size == min(
            d for d in range(1, head_dim + 1) if (head_dim % d == 0 and d * nbits >= 64) or d == head_dim
        )
    if head_dim * nbits >= 64:
        assert 64 / size <= nbits


@pytest.mark.parametrize(
    ("head_dim", "nbits", "size"),
    [
        (67, 4, 67),
        (134, 4, 67),
        (130, 4, 26),
        (130, 2, 65),
        (80, 4, 40),
        (80, 1, 80),
        (576, 2, 64),
        (7, 4, 7),
        (1, 8, 1),
    ],
)
def test_automatic_group_sizes(head_dim: int, nbits: Any, size: int) -> None:
    assert group_size_of(Int(nbits=nbits), head_dim) == size


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.data())
def test_a_bad_number_spoils_its_group_alone_where_channels_are_apart(data: st.DataObject) -> None:
    """Everything else is as if a zero stood in its place."""
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    dtype = data.draw(st.sampled_from(DTYPES))
    x = (torch.randn(2, 2, 12, 32, generator=generator) * 10 ** (torch.arange(32) % 3 - 1)).to(dtype)
    quantizer = Int(nbits=data.draw(st.sampled_from(BITS)), group_size=8, transforms=(Scale(),))
    places = data.draw(
        st.lists(
            st.tuples(st.integers(0, 1), st.integers(0, 1), st.integers(0, 11), st.integers(0, 31)),
            min_size=1,
            max_size=3,
        )
    )
    spoilt, zeroed, dirty = torch.zeros(2, 2, 12, 32, dtype=torch.bool), x.clone(), x.clone()
    for row, head, token, channel in places:
        zeroed[row, head, token, channel] = 0.0
        dirty[row, head, token, channel] = data.draw(st.sampled_from([torch.nan, torch.inf, -torch.inf]))
        spoilt[row, head, token, channel // 8 * 8 : channel // 8 * 8 + 8] = True
    assert torch.equal(decoded(quantizer, dirty)[~spoilt], decoded(quantizer, zeroed)[~spoilt])
    assert decoded(quantizer, dirty)[~spoilt].isfinite().all()
