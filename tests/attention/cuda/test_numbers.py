"""On a GPU the kernels give what the reference gives, over formats, shapes, masks and policies."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from served import APART, Served, additive, channel, own, some, token

from kvpolicy.attention.attend import attend
from kvpolicy.attention.cuda import backend, plan
from kvpolicy.attention.cuda.compile import missing

absent = "no CUDA device" if not torch.cuda.is_available() else missing()
pytestmark = pytest.mark.skipif(absent is not None, reason=f"the kernels can't run: {absent}")
DEVICE = "cuda"


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield


@pytest.mark.parametrize(
    "name",
    [
        "logquant",
        "kivi",
        "balanced",
        "hf-quantized",
        "streaming-quant",
        "kivi-sink",
        "atom",
        "mikv",
        "zipcache",
        "best-2bit",
        "best-3bit",
        "partial-logquant",
    ],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_recipes(name: str, dtype: torch.dtype) -> None:
    Served(name, dtype=dtype).check()


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
def test_bits_and_head_dims_per_token(bits: int, dim: int) -> None:
    if (bits, dim) == (8, 80):
        pytest.skip("groups of 40 channels cut sixteen channels of 8 bits in two")
    Served(own(token(bits), token(bits)), dim=dim).check((300, 1))


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("group", [16, 32, 48, 64, 128])
def test_bits_and_groups_per_channel(bits: int, group: int) -> None:
    Served(own(channel(bits, group), token(4))).check((500, 1))


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("dim", [96, 256])
def test_bits_and_head_dims_per_channel(bits: int, dim: int) -> None:
    Served(own(channel(bits), token(bits)), dim=dim).check((300, 1))


@pytest.mark.parametrize("name", APART)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_keys_and_values_that_lie_in_other_stores_and_orders(name: str, dtype: torch.dtype) -> None:
    Served(APART[name], dtype=dtype).check((500, 3, 1, 60, 1))
    Served(APART[name], dtype=dtype).check((300, 1, 1), pad=37)
    Served(APART[name], dtype=dtype, groups=7).check((300, 1, 3), mask=additive)


@pytest.mark.parametrize(("dim", "value_dim"), [(64, 64), (80, 80), (96, 96), (256, 256), (128, 64), (64, 128)])
@pytest.mark.parametrize("groups", [1, 4, 8])
def test_values_by_slot_of_any_width(dim: int, value_dim: int, groups: int) -> None:
    Served("partial-logquant", dim=dim, value_dim=value_dim, groups=groups, window=16).check((300, 1, 5))


def test_values_by_slot_in_several_pages() -> None:
    case = Served("partial-logquant")
    case.check((1500, *[60] * 6, 1), softcap=30.0, sinks=torch.randn(8, device=DEVICE))


@pytest.mark.parametrize("groups", [1, 2, 3, 5, 7, 8, 12])
def test_any_number_of_query_heads(groups: int) -> None:
    Served("logquant", groups=groups).check((300, 1, 5))


@pytest.mark.parametrize(
    ("keys", "values"),
    [
        (token(2, 16), token(2, 128)),
        (token(4), token(2)),
        ("full", token(2)),
        (channel(4), "full"),
        (token(2, scale_dtype="float32"), token(2, 32, scale_dtype="float32")),
        (channel(2, scale_dtype="float32"), token(2, 32, scale_dtype="float32")),
        (token(4, "head", transforms=[{"kind": "scale"}]), token(4, "head", transforms=[{"kind": "scale"}])),
        (token(2, transforms=[{"kind": "hadamard", "seed": 1}]), token(2)),
        (channel(2), token(2, transforms=[{"kind": "hadamard"}])),
        (token(3, "head", range="rms", transforms=[{"kind": "hadamard"}]), token(2, "head", range="rms")),
        (token(2, "head", range="rms"), token(4, 32, range="rms", transforms=[{"kind": "hadamard"}])),
        (token(1, 64, range="rms"), token(8, 32, range="rms", scale_dtype="float32")),
    ],
)
def test_formats_that_differ(keys: Any, values: Any) -> None:
    Served(own(keys, values)).check((500, 3, 1))


@pytest.mark.parametrize(
    ("keys", "values", "dim"),
    [
        (token(2, 16), token(2, 128), 128),
        (token(4, 32, range="rms"), token(4, "head", range="rms"), 128),
        (token(8, 48), token(3, 48, range="rms"), 96),
        (token(1, 40), token(2, 40), 80),
        (channel(1, 16), token(2, 64), 64),
        (channel(2, 48), token(2, 40), 80),
        (channel(3, 32), token(1, 128, range="rms"), 256),
        (channel(8, 128), "full", 128),
    ],
)
def test_scales_of_eight_bits(keys: Any, values: Any, dim: int) -> None:
    sides = [x if x == "full" else {**x, "scale_dtype": "float8_e4m3"} for x in (keys, values)]
    Served(own(*sides), dim=dim).check((501, 3, 1, 60, 1))


@pytest.mark.parametrize("name", ["logquant", "kivi", "balanced"])
@pytest.mark.parametrize("mask", [some, additive])
def test_masks(name: str, mask: Any) -> None:
    Served(name).check((500, 1, 3), mask=mask)


@pytest.mark.parametrize("name", ["logquant", "kivi"])
def test_softcap_and_sinks(name: str) -> None:
    Served(name).check(softcap=30.0, sinks=torch.randn(8, device=DEVICE))


@pytest.mark.parametrize("updates", [(500, 1, 60, 30, 1), (100, 25, 25, 1, 60)])
@pytest.mark.parametrize("bits", [(4, 2), (8, 3)])
def test_groups_of_which_each_head_holds_other_tokens(updates: tuple[int, ...], bits: tuple[int, int]) -> None:
    Served("zipcache", period=20, high=bits[0], low=bits[1]).check(updates)


@pytest.mark.parametrize("name", ["logquant", "h2o", "balanced", "zipcache", "kivi", "partial-logquant"])
def test_padded_rows(name: str) -> None:
    Served(name).check((300, 1, 1), pad=37)


@pytest.mark.parametrize("name", ["h2o", "mas", "mikv", "zipcache"])
def test_policies_are_told_of_attention(name: str) -> None:
    Served(name).check((300, 1, 1, 20))


@pytest.mark.parametrize(("dim", "value_dim"), [(128, 64), (64, 128), (96, 64), (256, 128)])
def test_values_of_another_width(dim: int, value_dim: int) -> None:
    Served(own(channel(2), token(4, 16)), dim=dim, value_dim=value_dim).check((300, 1, 5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_masks_of_other_types(dtype: torch.dtype) -> None:
    def mask(*given: Any) -> torch.Tensor:
        return additive(*given, dtype)

    Served("logquant", dtype=torch.float16).check((300, 1, 4), mask=mask)


def test_a_row_that_sees_nothing_is_zero() -> None:
    def mask(batch: int, heads: int, n: int, seen: int, device: str) -> torch.Tensor:
        found = torch.ones((batch, 1, n, seen), dtype=torch.bool, device=device)
        found[1] = False
        return found

    case = Served("logquant")
    case.check((300, 1), mask=mask)


def test_more_tokens_than_one_block_takes() -> None:
    Served("kivi").check((9000, 1, 60, 1))


@pytest.mark.parametrize("parts", [1, 2, 3, 40])
@pytest.mark.parametrize("name", ["logquant", "kivi", "best-2bit", "mikv"])
def test_some_warps_of_a_block_serve_kinds_with_few_tokens(
    name: str, parts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "_plans", {})
    monkeypatch.setattr(plan, "_parts", lambda *given: parts)
    Served(name).check((5000, 1, 60, 30, 1))


DIVIDED = own(token(2, transforms=[{"kind": "scale"}]), token(2, transforms=[{"kind": "scale"}]))


@pytest.mark.parametrize(
    "recipe", ["logquant", "kivi", "partial-logquant", DIVIDED], ids=["logquant", "kivi", "partial-logquant", "divided"]
)
def test_launches_that_overlap_read_what_the_last_one_wrote(recipe: Any) -> None:
    """The output of each is the query of the next one: a graph of them gives what single launches give, to the bit."""
    case = Served(recipe)
    case.check((3000, 1))
    new = (case.draw(1, case.kv_heads, 128), case.draw(1, case.kv_heads, 128))
    query = 8 * case.draw(1, case.kv_heads * case.groups, 128)
    case.tiers.stage(*new)

    def chain(alone: bool) -> torch.Tensor:
        found = query
        for _ in range(30):
            found = attend(case.tiers, found, new).transpose(1, 2)
            if alone:
                torch.cuda.synchronize()
        return found

    right, stream = chain(True), torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.testing.assert_close(chain(False), right, rtol=0, atol=0)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            found = chain(False)
    for _ in range(3):
        graph.replay()
        torch.cuda.synchronize()
        torch.testing.assert_close(found, right, rtol=0, atol=0)
