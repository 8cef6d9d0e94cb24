"""Levels, and scales of 8 bits: against tables of all numbers of a format, in float64."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from kvpolicy_int import Int
from kvpolicy_nf4 import LEVELS, Nf4
from torch import Tensor

from kvpolicy import Site, load_recipe
from kvpolicy.errors import PluginError, RecipeError
from kvpolicy.storage.make import make_store


def decoded(store: Any) -> Tensor:
    return torch.cat([x for _, x in store.decoded(50, torch.float32)], dim=2)


def filled(quantizer: Any, x: Tensor) -> Any:
    store: Any = make_store(quantizer, x.shape[3])
    store.append(x)
    return store


def test_the_levels_of_nf4_are_quantiles_of_the_normal_distribution() -> None:
    offset = 0.9677083
    above = torch.special.ndtri(torch.linspace(offset, 0.5, 9, dtype=torch.float64)[:-1])
    below = -torch.special.ndtri(torch.linspace(offset, 0.5, 8, dtype=torch.float64)[:-1])
    expected = torch.cat([below, torch.zeros(1, dtype=torch.float64), above]).sort().values / above.max()
    torch.testing.assert_close(torch.tensor(LEVELS, dtype=torch.float64), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("per", ["token", "channel"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nf4_keeps_the_nearest_level_and_no_offset(per: Any, dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, 32, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    store = filled(Nf4(per=per, group_size=32), x)
    groups = (x if per == "token" else x.transpose(2, 3)).double().unflatten(3, (-1, 32))
    scale = groups.abs().amax(4, keepdim=True)
    every = scale.unsqueeze(5) * torch.tensor(LEVELS, dtype=torch.float64)
    nearest = (every - groups.unsqueeze(5)).abs().argmin(5, keepdim=True)
    expected = every.expand(*groups.shape, 16).gather(5, nearest).flatten(3)
    expected = expected if per == "token" else expected.transpose(2, 3)
    torch.testing.assert_close(decoded(store).double(), expected, rtol=1e-6, atol=1e-6)
    used = store.bytes()
    assert used["zeros"] == 0
    assert used["scales"] == 2 * 3 * 32 * 2 * dtype.itemsize
    assert used["codes"] == 2 * 3 * 32 * 32


E4M3 = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
"""All numbers of the format that are not negative."""


@pytest.mark.parametrize("nbits", [1, 2, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_scales_in_float8_cover_what_was_there(nbits: Any, symmetric: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, 2, 40, 32, generator=generator) * 3 + torch.randn(1, 2, 40, 1, generator=generator) * 5
    store = filled(Int(nbits=nbits, group_size=16, scale_dtype="float8_e4m3", symmetric=symmetric), x)
    params = store.parts["params"].slice(0, 40)
    assert params.dtype == torch.uint8
    scale, offset = (t.double().unsqueeze(4) for t in store.scales.split(params, 2))
    for part in (scale, offset.abs()):
        assert (part.unsqueeze(-1) == E4M3).any(-1).all()
    groups = x.double().unflatten(3, (2, 16))
    top = 2**nbits - 1
    assert (offset <= groups.amin(4, keepdim=True)).all()
    assert (offset + top * scale >= groups.amax(4, keepdim=True) - 1e-6).all()
    levels = offset + torch.arange(top + 1) * scale
    best = (groups.unsqueeze(5) - levels.unsqueeze(4)).abs().amin(5).flatten(3)
    found = (decoded(store).double() - x.double()).abs()
    assert (found <= best + 1e-5).all()
    assert (best <= scale.expand_as(groups).flatten(3) / 2 + 1e-6).all()
    assert store.bytes()["scales"] == store.bytes()["zeros"] == 2 * 40 * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("per", ["token", "channel"])
def test_scales_in_e8m0_are_the_next_power_of_two(dtype: torch.dtype, per: Any) -> None:
    x = (torch.randn(2, 1, 32, 32, generator=torch.Generator().manual_seed(2)) * 10).to(dtype)
    x[0, 0, 0] = 0
    exact = filled(Int(nbits=4, group_size=32, per=per), x)
    store = filled(Int(nbits=4, group_size=32, per=per, scale_dtype="e8m0"), x)
    (scale, _), (wanted, offset) = (
        s.scales.split(s.parts["params"].slice(0, s.parts["params"].length), s.numbers) for s in (store, exact)
    )
    power = torch.where(wanted > 0, torch.exp2(torch.ceil(torch.log2(wanted.double()))), 0.0)
    near = (wanted.double() / power).nan_to_num(1) > 0.99  # rounding in the model's type may have crossed the power
    assert ((scale.double() == power) | near).all()
    kept = 2 if dtype == torch.bfloat16 else 4
    assert store.bytes()["zeros"] == kept * store.bytes()["scales"] == kept * offset.numel()
    assert ((decoded(store) - x.float()).abs() <= 0.51 * scale.max() + 0.2).all()
    zeros = decoded(filled(Nf4(group_size=32, scale_dtype="e8m0"), torch.zeros(1, 1, 3, 32)))
    assert not zeros.any()


@pytest.mark.parametrize("clip", [0.5, 0.9, 1.0])
@pytest.mark.parametrize("per", ["token", "channel"])
def test_clip_shrinks_the_extremes_of_a_group(clip: float, per: Any) -> None:
    x = torch.randn(1, 2, 16, 16, generator=torch.Generator().manual_seed(3), dtype=torch.float32)
    found = decoded(filled(Int(nbits=8, group_size=16, per=per, clip=clip), x))
    axis = 3 if per == "token" else 2
    low, high = x.amin(axis, keepdim=True) * clip, x.amax(axis, keepdim=True) * clip
    assert ((found - x.clamp(low, high)).abs() <= (high - low) / 255 * 0.51).all()


def test_options_out_of_range_are_refused() -> None:
    for options, told in (
        ({"clip": 0.0}, r"clip: must be greater than 0"),
        ({"clip": 1.5}, r"clip: must be less than or equal to 1"),
        ({"scale_dtype": "e5m2"}, "scale_dtype: must be 'model', 'float32', 'float8_e4m3' or 'e8m0'"),
    ):
        with pytest.raises(RecipeError, match=told):
            load_recipe({"tiers": [{"store": {"kind": "int", **options}}]})


@pytest.mark.parametrize(
    "levels",
    [
        torch.zeros(15),
        torch.zeros(1),
        torch.arange(17.0),
        torch.arange(16),
        torch.zeros(16),
        torch.arange(16).float().flip(0),
        [0.0] * 16,
        3,
    ],
)
def test_levels_that_are_none_are_refused_by_name(levels: Any) -> None:
    class Wrong(Nf4):
        kind: Literal["wrong"] = "wrong"  # type: ignore[assignment]

        def levels(self, site: Site) -> Any:
            return levels

    with pytest.raises(
        PluginError, match="quantizer 'wrong' must give 2 to 16 ascending numbers in float32 from levels"
    ):
        make_store(Wrong(), 64)
