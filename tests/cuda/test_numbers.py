"""On a GPU the kernels give what the reference gives, over formats, shapes, masks and policies."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kvpolicy import attend as reference
from kvpolicy import cuda
from kvpolicy.attend import observe
from kvpolicy.cuda.compile import missing
from kvpolicy.layer import Tiers
from kvpolicy.padding import Padding
from kvpolicy.placement import Placement
from kvpolicy.recipe import load_recipe

absent = "no CUDA device" if not torch.cuda.is_available() else missing()
pytestmark = pytest.mark.skipif(absent is not None, reason=f"the kernels can't run: {absent}")
DEVICE = "cuda"


def token(nbits: int, group: Any = "auto", **more: Any) -> dict[str, Any]:
    return {"kind": "int", "nbits": nbits, "group_size": group, "per": "token", **more}


def channel(nbits: int, group: int = 32, **more: Any) -> dict[str, Any]:
    return {"kind": "int", "nbits": nbits, "group_size": group, "per": "channel", **more}


def own(keys: Any, values: Any) -> dict[str, Any]:
    newest = {"policy": {"kind": "recent", "window": 40, "flush": 24}, "store": "full"}
    return {"name": "own", "summary": "own", "tiers": [newest, {"keys": keys, "values": values}]}


def some(batch: int, heads: int, n: int, queries: int) -> Tensor:
    mask = torch.rand(batch, 1, n, queries, device=DEVICE) > 0.3
    mask[..., -n:] = torch.ones(n, n, dtype=torch.bool, device=DEVICE).tril()
    return mask


def additive(batch: int, heads: int, n: int, seen: int) -> Tensor:
    mask = torch.randn(batch, heads, n, seen, device=DEVICE, dtype=torch.bfloat16)
    mask[torch.rand_like(mask) > 0.7] = torch.finfo(torch.bfloat16).min
    mask[..., 0] = 0
    return mask


class Case:
    """A layer that is filled update by update; each update is attended by the kernel and by the reference."""

    def __init__(self, recipe: Any, dim: int = 128, groups: int = 4, dtype: torch.dtype = torch.bfloat16) -> None:
        loaded = load_recipe(recipe)
        self.tiers = Tiers(Placement(loaded.tiers_of(0, 1), loaded.placement), None)
        self.dim, self.groups, self.dtype = dim, groups, dtype
        self.batch, self.kv = 2, 2
        self.padding: Padding | None = None
        torch.manual_seed(0)
        self.bias = 2 * torch.randn(1, self.kv, 1, dim, device=DEVICE)

    def draw(self, n: int, heads: int) -> Tensor:
        return torch.randn(self.batch, n, heads, self.dim, device=DEVICE).transpose(1, 2).to(self.dtype)

    def step(self, n: int, mask: Any = None, pad: int = 0, **options: Any) -> float | None:
        """The error of an update of `n` tokens; None where it was the first."""
        tiers, heads = self.tiers, self.kv * self.groups
        keys, values, query = (
            (self.draw(n, self.kv) + self.bias).to(self.dtype),
            self.draw(n, self.kv),
            self.draw(n, heads),
        )
        shown = self.pad(n, pad)
        first = not tiers.stores
        if first:
            tiers.start(keys, values)
        tiers.look(keys, values)
        observer = tiers.observe() if tiers.placement.kinds else None
        if mask is not None and not first:
            shown = mask(self.batch, heads, n, tiers.seen)
        if first:
            if observer is not None:
                observe(query, keys, observer, shown)
            tiers.commit()
            return None
        assert cuda.refuses(tiers, query, (keys, values)) == []
        given = {"scaling": None, "softcap": None, "sinks": None, **options}
        second = copy.deepcopy(observer)
        found = cuda.attend(tiers, query, (keys, values), shown, **given, observer=second)
        assert found is not None
        right = reference.reference(tiers, query.float(), (keys, values), shown, **given, observer=observer)
        if observer is not None:
            for a, b in zip(observer.found, second.found, strict=True):
                for x, y in zip(a or (), b or (), strict=True):
                    torch.testing.assert_close(x, y, rtol=2e-2, atol=2e-3)
        tiers.commit()
        return float((found.float() - right).norm() / right.norm())

    def pad(self, n: int, pad: int) -> Tensor | None:
        if not pad and self.padding is None:
            return None
        if self.padding is None:
            self.padding = self.tiers.padding = Padding(self.batch, 0)
        real = np.ones((self.batch, n), np.bool_)
        real[1, :pad] = False
        self.padding.append(real)
        return torch.from_numpy(self.padding.real[:, : self.padding.length].copy()).to(DEVICE)

    def check(self, updates: tuple[int, ...] = (517, 3, 1, 60, 1), **options: Any) -> None:
        pad = options.pop("pad", 0)
        errors = [self.step(n, pad=0 if i else pad, **options) for i, n in enumerate(updates)]
        worst = max(error for error in errors if error is not None)
        assert worst < (4e-3 if self.dtype == torch.bfloat16 else 1e-3)


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield


@pytest.mark.parametrize(
    "name", ["logquant", "kivi", "balanced", "hf-quantized", "streaming-quant", "kivi-sink", "atom"]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_recipes(name: str, dtype: torch.dtype) -> None:
    Case(name, dtype=dtype).check()


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
def test_bits_and_head_dims_per_token(bits: int, dim: int) -> None:
    if (bits, dim) == (8, 80):
        pytest.skip("groups of 40 channels cut sixteen channels of 8 bits in two")
    Case(own(token(bits), token(bits)), dim=dim).check((300, 1))


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("group", [16, 32, 48, 64, 128])
def test_bits_and_groups_per_channel(bits: int, group: int) -> None:
    Case(own(channel(bits, group), token(4))).check((500, 1))


@pytest.mark.parametrize("groups", [1, 2, 3, 5, 7, 8, 12])
def test_any_number_of_query_heads(groups: int) -> None:
    Case("logquant", groups=groups).check((300, 1, 5))


@pytest.mark.parametrize(
    ("keys", "values"),
    [
        (token(2, 16), token(2, 128)),
        (token(4), token(2)),
        ("full", token(2)),
        (channel(4), "full"),
        (token(2, scale_dtype="float32"), token(2, 32, scale_dtype="float32")),
        (channel(2, scale_dtype="float32"), token(2, 32, scale_dtype="float32")),
        (token(4, "head", channel_separable=True), token(4, "head", channel_separable=True)),
    ],
)
def test_formats_that_differ(keys: Any, values: Any) -> None:
    Case(own(keys, values)).check((500, 3, 1))


@pytest.mark.parametrize("name", ["logquant", "kivi", "balanced"])
@pytest.mark.parametrize("mask", [some, additive])
def test_masks(name: str, mask: Any) -> None:
    Case(name).check((500, 1, 3), mask=mask)


@pytest.mark.parametrize("name", ["logquant", "kivi"])
def test_softcap_and_sinks(name: str) -> None:
    Case(name).check(softcap=30.0, sinks=torch.randn(8, device=DEVICE))


@pytest.mark.parametrize("name", ["logquant", "h2o"])
def test_padded_rows(name: str) -> None:
    Case(name).check((300, 1, 1), pad=37)


@pytest.mark.parametrize("name", ["h2o", "mas", "mikv"])
def test_policies_are_told_of_attention(name: str) -> None:
    Case(name).check((300, 1, 1, 20))
