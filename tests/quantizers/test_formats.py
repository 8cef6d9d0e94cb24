"""Quantizers with levels of their own: their tables and codes against quadrature and search in float64."""

from __future__ import annotations

import math
from typing import Any

import kvpolicy_hadamard
import numpy as np
import pytest
import torch
from kvpolicy_fp4 import MxFp4, NvFp4
from kvpolicy_fp8 import Fp8
from kvpolicy_hadamard import Hadamard
from kvpolicy_lloyd_max import ABOVE, LloydMax, SplitLloydMax
from kvpolicy_ternary import Ternary
from torch import Tensor

from kvpolicy import Site, load_recipe
from kvpolicy.errors import RecipeError
from kvpolicy.storage.make import make_store

DTYPES = [torch.float32, torch.bfloat16]


def floats(exponents: int, mantissas: int, left_out: int = 0) -> Tensor:
    """The numbers of a small format that are not negative, in the order of their bits, by arithmetic."""
    bias = 2 ** (exponents - 1) - 1
    found = []
    for bits in range(2 ** (exponents + mantissas) - left_out):
        exponent, mantissa = bits >> mantissas, bits & (2**mantissas - 1)
        whole = (mantissa / 2**mantissas) + (exponent > 0)
        found.append(whole * 2.0 ** (max(exponent, 1) - bias))
    return torch.tensor(found, dtype=torch.float64)


E2M1, E4M3, E5M2 = floats(2, 1), floats(4, 3, 1), floats(5, 2, 4)


def rounded(x: Tensor, numbers: Tensor) -> Tensor:
    """Each number as the nearest of some and their negatives, of two equally near the one of even bits."""
    apart = (x.double().abs().unsqueeze(-1) - numbers).abs()
    near = apart == apart.amin(-1, keepdim=True)
    odd = torch.arange(len(numbers)) % 2 == 1
    chosen = (near.double() - 0.5 * odd).argmax(-1)
    return numbers[chosen] * x.double().sign()


def decoded(quantizer: Any, x: Tensor) -> tuple[Any, Tensor]:
    store: Any = make_store(quantizer, x.shape[3])
    store.append(x)
    return store, torch.cat([part for _, part in store.decoded(50, torch.float32)], dim=2).double()


def grouped(x: Tensor, per: str, size: int) -> Tensor:
    return (x if per == "token" else x.transpose(2, 3)).double().unflatten(3, (-1, size))


def ungrouped(x: Tensor, per: str) -> Tensor:
    flat = x.flatten(3)
    return flat if per == "token" else flat.transpose(2, 3)


def numbers(dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Small multiples of a power of two, of which many lie half-way between levels, and others."""
    generator = torch.Generator().manual_seed(seed)
    whole = torch.randint(-24, 25, (2, 2, 32, 64), generator=generator) / 4
    x = torch.randn(2, 2, 32, 64, generator=generator) * 10 ** torch.randint(-2, 3, (2, 2, 32, 1), generator=generator)
    whole[:, 1] = x[:, 1]
    whole[0, 0, 3] = 0
    return whole.to(dtype)


def test_the_formats_are_those_of_torch() -> None:
    for expected, dtype in ((E4M3, torch.float8_e4m3fn), (E5M2, torch.float8_e5m2)):
        bits = torch.arange(len(expected), dtype=torch.uint8)
        assert torch.equal(bits.view(dtype).double(), expected)
    assert E2M1.tolist() == [0, 0.5, 1, 1.5, 2, 3, 4, 6]


@pytest.mark.parametrize("per", ["token", "channel"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_mxfp4_is_that_of_its_specification(dtype: torch.dtype, per: Any) -> None:
    x = numbers(dtype)
    store, found = decoded(MxFp4(per=per), x)
    groups = grouped(x, per, 32)
    largest = groups.abs().amax(4, keepdim=True)
    scale = torch.where(largest > 0, 2.0 ** (largest.log2().floor() - 2), 1.0)
    expected = scale * rounded((groups / scale).clamp(-6, 6), E2M1)
    assert torch.equal(found, ungrouped(expected, per))
    assert (largest / scale > 6).any(), "some are beyond the largest number"
    assert store.bytes()["scales"] == x.numel() // 32
    assert store.bytes()["codes"] == x.numel() // 2
    assert not store.bytes()["zeros"]


@pytest.mark.parametrize("per", ["token", "channel"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nvfp4_is_the_nearest_with_a_scale_in_e4m3(dtype: torch.dtype, per: Any) -> None:
    x = numbers(dtype)
    store, found = decoded(NvFp4(per=per), x)
    groups = grouped(x, per, 16)
    scale = rounded((groups.abs().amax(4, keepdim=True).float() / 6).clamp(max=448), E4M3)
    divided = (groups.float() / torch.where(scale > 0, scale, 1.0).float()).clamp(-6, 6)
    assert torch.equal(found, ungrouped(scale * rounded(divided, E2M1), per))
    assert per == "channel" or (scale < 2.0**-6).any()
    assert store.bytes()["scales"] == x.numel() // 16
    assert not store.bytes()["zeros"]


@pytest.mark.parametrize("size", [1e-4, 1e4])
def test_unit_brings_numbers_of_any_size_to_where_nvfp4_is_fine(size: float) -> None:
    x = torch.randn(2, 3, 40, 64, generator=torch.Generator().manual_seed(1)) * size
    x[1] *= 8
    transforms = load_recipe({"tiers": [{"store": {"kind": "nvfp4", "transforms": ["unit"]}}]}).tiers[0].keys
    store, found = decoded(transforms, x)
    state = store.tensors()["transforms.0.size"].double()
    root = x.double().square().mean((2, 3), keepdim=True).sqrt()
    assert torch.equal(state, 2.0 ** root.log2().round())
    assert ((found - x).square().mean((2, 3)).sqrt() < 0.1 * root[..., 0, 0]).all()
    _, without = decoded(NvFp4(), x)
    assert (without - x).square().mean().sqrt() > 0.3 * root.min()
    assert store.bytes()["state"] == 2 * 3 * 4


@pytest.mark.parametrize(("kind", "every"), [("e4m3", E4M3), ("e5m2", E5M2)])
@pytest.mark.parametrize("per", ["token", "channel"])
def test_fp8_is_the_nearest_of_its_numbers(kind: Any, every: Tensor, per: Any) -> None:
    x = numbers(torch.float32, 2)
    size = 64 if per == "token" else 32
    store, found = decoded(Fp8(format=kind, per=per, group_size=size), x)
    groups = grouped(x, per, size)
    scale = (groups.abs().amax(4, keepdim=True).float() / every.max()).float()
    divided = groups.float() / torch.where(scale > 0, scale, 1.0)
    expected = scale.double() * rounded(divided.clamp(-every.max(), every.max()), every)
    torch.testing.assert_close(found, ungrouped(expected, per), rtol=1e-6, atol=0)
    assert store.bytes()["codes"] == x.numel()
    assert store.bytes()["scales"] == 4 * x.numel() // size
    small = torch.finfo(torch.float8_e4m3fn if kind == "e4m3" else torch.float8_e5m2).eps
    assert ((found - x).abs() <= small / 2 * x.abs() + ungrouped(scale.expand_as(groups), per) * every[1] * 0.51).all()


def cell_means(levels: Tensor) -> tuple[Tensor, float]:
    """Of a standard normal distribution the means of the cells around levels, and the mean squared error."""
    x = torch.linspace(-10, 10, 800_001, dtype=torch.float64)
    weight = (-(x**2) / 2).exp() / math.sqrt(2 * math.pi) * (x[1] - x[0])
    cell = torch.bucketize(x, (levels[1:] + levels[:-1]) / 2)
    mass, first = (torch.zeros(len(levels), dtype=torch.float64).index_add(0, cell, w) for w in (weight, weight * x))
    return first / mass, float((weight * (x - levels[cell]) ** 2).sum())


@pytest.mark.parametrize(("nbits", "error"), [(1, 0.3634), (2, 0.1175), (3, 0.0345), (4, 0.0095)])
def test_lloyd_max_levels_are_the_means_of_their_cells(nbits: Any, error: float) -> None:
    levels = LloydMax(nbits=nbits).levels(Site()).double()
    assert len(levels) == 2**nbits
    assert torch.equal(levels, -levels.flip(0))
    means, found = cell_means(levels)
    torch.testing.assert_close(levels, means, rtol=0, atol=3e-5)
    assert abs(found - error) < 6e-5
    exact = torch.tensor([*(-n for n in reversed(ABOVE[nbits])), *ABOVE[nbits]], dtype=torch.float64)
    assert found <= cell_means(exact + 1e-3)[1]


@pytest.mark.parametrize("nbits", [1, 2, 3, 4])
@pytest.mark.parametrize("per", ["token", "channel"])
def test_lloyd_max_keeps_the_nearest_level_and_the_norm(nbits: Any, per: Any) -> None:
    x = torch.randn(2, 2, 32, 128, generator=torch.Generator().manual_seed(nbits)) * 7
    store, found = decoded(LloydMax(nbits=nbits, per=per, group_size=32), x)
    groups = grouped(x, per, 32)
    norm = groups.square().sum(4, keepdim=True).sqrt()
    levels = torch.tensor([*(-n for n in reversed(ABOVE[nbits])), *ABOVE[nbits]], dtype=torch.float64)
    every = (norm / math.sqrt(32)).unsqueeze(-1) * levels
    nearest = (every - groups.unsqueeze(-1)).abs().argmin(-1, keepdim=True)
    expected = every.expand(*groups.shape, -1).gather(-1, nearest).squeeze(-1)
    torch.testing.assert_close(found, ungrouped(expected, per), rtol=1e-5, atol=1e-5)
    assert store.bytes()["zeros"] == 0


@pytest.mark.parametrize("nbits", [1, 2, 3, 4])
@pytest.mark.parametrize("dim", [64, 128])
def test_rotated_vectors_of_any_kind_err_as_normal_ones(nbits: Any, dim: int) -> None:
    """The distortion of TurboQuant's theorem 1, for vectors that are anything but normal."""
    x = torch.zeros(1, 1, 400, dim)
    x[:, :, :200] = torch.randn(1, 1, 200, dim, generator=torch.Generator().manual_seed(5)) ** 3
    x[:, :, 200:, 0] = 1
    x[:, :, 200:] += 0.05 * torch.randn(1, 1, 200, dim, generator=torch.Generator().manual_seed(6))
    store = {"kind": "lloyd_max", "nbits": nbits, "group_size": "head", "transforms": [{"kind": "hadamard", "seed": 1}]}
    _, found = decoded(load_recipe({"tiers": [{"store": store}]}).tiers[0].keys, x)
    error = ((found - x).square().sum(3) / x.double().square().sum(3)).mean()
    normal = {1: 0.3634, 2: 0.1175, 3: 0.0345, 4: 0.0095}[nbits]
    assert error <= 1.06 * normal


@pytest.mark.parametrize(
    ("store", "told"),
    [
        ({"kind": "fp8", "nbits": 4}, "nbits: must be 8"),
        ({"kind": "fp8", "format": "e3m4"}, "format: must be 'e4m3' or 'e5m2'"),
        ({"kind": "mxfp4", "scale_dtype": "model"}, "scale_dtype: must be 'e8m0'"),
        ({"kind": "nvfp4", "scale_dtype": "e8m0"}, "scale_dtype: must be 'float8_e4m3'"),
        ({"kind": "lloyd_max", "nbits": 8}, "nbits: must be 1, 2, 3 or 4"),
    ],
)
def test_what_a_format_is_not_is_refused(store: dict[str, Any], told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        load_recipe({"tiers": [{"store": store}]})


def two_vectors(x: Tensor, nbits: int, wide_bits: int, wide: int, seed: int) -> Tensor:
    """TurboQuant with two sets of channels, in float64: algorithm 1 for each."""
    out = torch.empty_like(x)
    for row in range(x.shape[0]):
        for head in range(x.shape[1]):
            tokens = x[row, head]
            order = tokens.square().mean(0).argsort(descending=True)
            for channels, bits in ((order[:wide].sort().values, wide_bits), (order[wide:].sort().values, nbits)):
                drawn = torch.from_numpy(np.random.RandomState(seed).standard_normal((len(channels), len(channels))))
                q, r = torch.linalg.qr(drawn)
                rotation = q * r.diagonal().sign()
                part = tokens[:, channels]
                norm = part.norm(dim=1, keepdim=True)
                levels = torch.tensor([*(-n for n in reversed(ABOVE[bits])), *ABOVE[bits]], dtype=torch.float64)
                y = part @ rotation.T / norm * math.sqrt(len(channels))
                near = levels[(y.unsqueeze(2) - levels).abs().argmin(2)]
                out[row, head][:, channels] = norm / math.sqrt(len(channels)) * near @ rotation
    return out


@pytest.mark.parametrize(("nbits", "wide_bits"), [(2, 3), (3, 4), (1, 4)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_split_channels_are_two_vectors_of_their_own(nbits: Any, wide_bits: Any, dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, 50, 128, generator=torch.Generator().manual_seed(9))
    x[..., torch.randperm(128, generator=torch.Generator().manual_seed(8))[:30]] *= 12
    x = x.to(dtype)
    quantizer = SplitLloydMax(nbits=nbits, wide_bits=wide_bits, seed=5)
    store, found = decoded(quantizer, x)
    expected = two_vectors(x.double(), nbits, wide_bits, 32, 5)
    error = (found - expected).norm(dim=3) / expected.norm(dim=3)
    assert (error < (2**-8 if dtype == torch.bfloat16 else 1e-5)).double().mean() > 0.99  # a code at a bound may differ
    bits = (32 * wide_bits + 96 * nbits) / 128
    assert store.quantizer.precision() == bits
    held = store.bytes()["codes"] - 2 * 3 * 128
    assert held == 2 * 3 * 50 * (128 * bits / 8 + 2 * dtype.itemsize)
    plain = LloydMax(nbits=nbits, group_size="head", transforms=(Hadamard(seed=5),))
    assert (found - x).square().mean() < 0.7 * (decoded(plain, x)[1] - x).square().mean(), "what the split is for"


def test_effective_bits_are_those_of_the_paper() -> None:
    x = torch.randn(1, 2, 4096, 128, generator=torch.Generator().manual_seed(1)).bfloat16()
    published = {
        "turboquant-2.5": 2.5,
        "turboquant-3.5": 3.5,
        "turboquant:nbits=2": 2.125,
        "quarot": 4.25,
        "fp8": 8.125,
        "mxfp4": 4.25,
        "nvfp4": 4.5,
        "nf4": 4.25,
    }
    for name, bits in published.items():
        (tier,) = load_recipe(name).tiers
        store: Any = make_store(tier.keys, 128)
        store.append(x)
        assert abs(8 * sum(store.bytes().values()) / x.numel() - bits) < 0.003, name


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"nbits": 3, "wide_bits": 3}, "wide_bits must be more than nbits, found 3 and 3"),
        ({"share": 1.0}, "share: must be less than 1"),
        ({"nbits": 4}, "nbits: must be 1, 2 or 3"),
    ],
)
def test_splits_that_are_none_are_refused(options: dict[str, Any], told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        load_recipe({"tiers": [{"store": {"kind": "split_lloyd_max", **options}}]})
    with pytest.raises(RecipeError, match=r"share must leave channels on both sides, found 0.01 of 32 channels"):
        make_store(SplitLloydMax(share=0.01), 32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("channels", "size", "clip"), [(128, 64, 1.0), (64, 64, 0.9), (36, 12, 0.5)])
def test_ternary_keeps_the_nearest_of_three_levels_in_a_fifth_of_a_byte(
    channels: int, size: int, clip: float, dtype: torch.dtype
) -> None:
    x = torch.randn(2, 3, 40, channels, generator=torch.Generator().manual_seed(2)).to(dtype)
    store, found = decoded(Ternary(group_size=size, clip=clip), x)
    groups = grouped(x, "token", size)
    low, high = groups.amin(4, keepdim=True) * clip, groups.amax(4, keepdim=True) * clip
    levels = torch.stack([low, (low + high) / 2, high], dim=5)
    expected = levels.expand(*groups.shape, 3).gather(
        5, (groups.unsqueeze(5) - levels).abs().argmin(5, keepdim=True)
    )  # fmt: skip
    near = 2.0**-7 if dtype == torch.bfloat16 else 1e-5
    assert ((found - expected.flatten(3)).abs() <= near * high.amax()).double().mean() > 0.999
    assert store.bytes()["codes"] == 2 * 3 * 40 * (math.ceil(channels / 5) + 2 * channels // size * dtype.itemsize)


@pytest.mark.parametrize("dtype", DTYPES)
def test_ternary_with_scales_of_8_bits_keeps_the_nearest_of_the_levels_that_these_give(dtype: torch.dtype) -> None:
    x = (3 * torch.randn(2, 3, 40, 64, generator=torch.Generator().manual_seed(2))).to(dtype)
    store, found = decoded(Ternary(group_size=32, clip=0.95, scale_dtype="float8_e4m3"), x)
    groups = grouped(x, "token", 32)
    low = rounded((groups.amin(4, keepdim=True).float() * 0.95), E4M3)
    scale = rounded(((groups.amax(4, keepdim=True).float() * 0.95).double() - low) / 2, E4M3)
    levels = torch.cat([low, low + scale, low + 2 * scale], dim=4).unsqueeze(4)
    least = (groups.unsqueeze(5) - levels).abs().amin(5)
    found = found.unflatten(3, (-1, 32))
    assert ((found.unsqueeze(5) - levels).abs().amin(5) < 1e-6).double().mean() > 0.999
    assert (((found - groups).abs() - least).abs() < 1e-6).double().mean() > 0.999
    assert store.bytes()["codes"] == 2 * 3 * 40 * (13 + 2 * 2), "1.625 bits, and 8 of scale and offset for 32 each"


def test_ternary_groups_that_fit_no_head_are_refused() -> None:
    with pytest.raises(RecipeError, match="group_size must divide head_dim, found group_size 64 and head_dim 80"):
        make_store(Ternary(), 80)


@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
def test_a_device_rotates_sums_back_in_one_call_as_exactly(dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    size = dim & -dim
    block = np.ones((1, 1))
    while len(block) < size:
        block = np.kron([[1, 1], [1, -1]], block)
    whole = torch.from_numpy(np.kron(np.eye(dim // size), block) / math.sqrt(size))
    transform, y = Hadamard(), torch.randn(2, 3, 4, dim, generator=torch.Generator().manual_seed(dim))
    expected = y.double() @ whole
    by_sums, by_product = transform.inverse(y, {}, None), transform.adjoint(y, {})
    for found in (by_sums, by_product):
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=4e-6)
    there = y.to("meta")
    transform.inverse(there, {}, None)  # makes the matrix
    monkeypatch.setattr(kvpolicy_hadamard, "_rotated", None)
    assert transform.inverse(there, {}, None).shape == y.shape
