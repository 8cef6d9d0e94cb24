"""What is handed to the kernels, read by another reader on a CPU: where tokens lie, masks, transforms, blocks."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from kernel_reader import fake_kernel, fake_launch
from served import APART, Served, additive, channel, own, some, token

from kvpolicy.attention.attend import whole
from kvpolicy.attention.cuda import again, backend, layout, plan
from kvpolicy.attention.cuda.formats import Format, is_large, kind_of
from kvpolicy.attention.cuda.layout import scan
from kvpolicy.attention.steady import stood_of
from kvpolicy.interfaces.backend import AttentionOptions, AttentionSpec, Part, StoreView
from kvpolicy.recipe.load import load_recipe
from kvpolicy.storage.make import make_store


@pytest.fixture(autouse=True)
def _on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(plan, "kernel_of", fake_kernel)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 0, raising=False)
    monkeypatch.setattr(backend, "launch", lambda kernel, given, *to: fake_launch(kernel, _bytes(given), *to))
    monkeypatch.setattr(
        again, "prepared", lambda kernel, given, *to: lambda: fake_launch(kernel, _bytes(given), *to[:2])
    )
    for module in (backend, again):
        for name in ("counters", "partials"):
            monkeypatch.setattr(module, name, lambda count, device: torch.zeros(count))
    monkeypatch.setattr(backend, "_plans", {})
    monkeypatch.setattr(plan, "_known", {})
    with torch.no_grad():
        yield


def _bytes(given: Any) -> bytes:
    return given if isinstance(given, bytes) else bytes(given.buffer)


def served(recipe: Any, **more: Any) -> Served:
    return Served(recipe, dim=64, groups=2, device="cpu", **more)


@pytest.mark.parametrize(
    "name",
    [
        "logquant",
        "kivi",
        "balanced",
        "hf-quantized",
        "kivi-sink",
        "streaming-quant",
        "mikv",
        "h2o",
        "zipcache",
        "partial-logquant",
    ],
)
def test_recipes(name: str) -> None:
    case = served(name)
    case.check((213, 1, 3, 1))
    assert case.repeated == 3


@pytest.mark.parametrize("name", APART)
def test_keys_and_values_that_lie_in_other_stores_and_orders(name: str) -> None:
    served(APART[name]).check((150, 1, 21), mask=additive if name in ("both", "by head") else None)


@pytest.mark.parametrize("recipe", ["kivi", APART["both"]])
def test_padded_rows_whose_keys_and_values_lie_apart(recipe: Any) -> None:
    served(recipe).check((150, 1, 1), pad=37)


def test_pages_of_values_of_which_each_has_some_of_the_keys() -> None:
    served("partial-logquant", window=16).check((1500, 1))


def test_groups_of_which_each_head_holds_other_tokens() -> None:
    case = served("zipcache", period=20)
    case.check((500, 1, 60, 30, 1))
    case = served("zipcache", period=20)
    case.check((100, 25, 25, 1), pad=13)


def test_groups_per_channel_that_rows_hold_otherwise() -> None:
    served("balanced").check((250, 1, 2), pad=37)


@pytest.mark.parametrize("rest", ["evict", token(4, 32)])
@pytest.mark.parametrize("pad", [0, 37])
def test_heads_of_different_length(rest: Any, pad: int) -> None:
    policy = {"kind": "rank", "scorer": "key_norm", "heads": "scores", "floor": 0.1, "budget": 60, "when": "prompt"}
    case = served({"tiers": [{"policy": policy, "store": "full"}, {"store": rest}]})
    case.bias[:, 0] *= 1.1  # whose keys are longer, so that fewer stay
    case.check((213, 1, 1, 3), pad=pad)
    for store in case.tiers.stores["keys"]:
        assert store is None or store.front is not None


@pytest.mark.parametrize("mask", [some, additive])
@pytest.mark.parametrize("name", ["logquant", "kivi"])
def test_masks(name: str, mask: Any) -> None:
    served(name).check((150, 1, 2), mask=mask)


@pytest.mark.parametrize("name", ["logquant", "kivi"])
def test_tokens_in_several_pages(name: str) -> None:
    served(name).check((1500, 300, 1))


def test_padded_rows() -> None:
    served("logquant").check((150, 1, 1), pad=37)


def test_softcap_and_sinks() -> None:
    served("kivi").check((150, 2), softcap=30.0, sinks=torch.randn(4))


@pytest.mark.parametrize(
    ("keys", "values"),
    [
        (token(3), token(1)),
        (channel(2, 48), token(4)),
        (channel(8, 16, scale_dtype="float32"), "full"),
        ("full", token(8, 32, scale_dtype="float32")),
        (channel(4, 64, scale_dtype="float8_e4m3"), token(2, "head", range="rms", scale_dtype="float8_e4m3")),
        (token(3, 32, scale_dtype="float8_e4m3"), "full"),
        (token(3, "head", range="rms"), token(2, "head", range="rms", transforms=[{"kind": "hadamard"}])),
        (token(2, transforms=[{"kind": "hadamard", "seed": 3}]), token(2, transforms=[{"kind": "hadamard"}])),
    ],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_formats(keys: Any, values: Any, dtype: torch.dtype) -> None:
    served(own(keys, values), dtype=dtype).check((150, 2, 60, 1))


def test_values_of_another_width() -> None:
    served(own(channel(2), token(2)), value_dim=96).check((150, 1))


def test_of_an_extra_that_is_there_in_part_one_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = AttentionSpec(
        ("exact",), ("exact",), "cuda", torch.bfloat16, 64, 64, 4, 1, False, False, False, False
    )  # fmt: skip
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(backend, "missing", lambda: "NVRTC can't be loaded")
    backend._tell.cache_clear()
    with pytest.warns(UserWarning, match=r"since NVRTC can't be loaded; .* torch was built with, 12\.8"):
        assert backend.Cuda().refuses(spec) == "NVRTC can't be loaded"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backend.Cuda().refuses(spec) == "NVRTC can't be loaded"
    backend._tell.cache_clear()


@pytest.mark.parametrize(
    ("recipe", "why"),
    [
        (own(channel(4, "arrival"), token(4, 32)), "no multiple of 16 tokens"),
        (own(token(4, 32), channel(4)), "values: values per channel"),
        (own(token(4, 32, scale_dtype="e8m0"), "full"), "keys: scales in e8m0"),
    ],
)
def test_what_is_not_served_is_declined_in_a_sentence(recipe: Any, why: str) -> None:
    with pytest.raises(AssertionError, match=why):
        served(recipe).check((613, 1))


def test_formats_that_are_read_otherwise_have_plans_of_their_own() -> None:
    own_options: list[dict[str, Any]] = [
        {},
        {"nbits": 2},
        {"group_size": 32},
        {"scale_dtype": "float32"},
        {"scale_dtype": "float8_e4m3"},
        {"transforms": [{"kind": "hadamard"}]},
        {"extras": [{"kind": "sparse", "count": 2}]},
        {"kind": "nf4"},
        {"per": "channel", "group_size": 16},
    ]
    x, keys = torch.randn(1, 2, 64, 64, dtype=torch.bfloat16), []
    for options in own_options:
        found = load_recipe({"tiers": [{"keys": {"kind": "int", "nbits": 4, **options}, "values": "full"}]})
        store, exact = make_store(found.tiers[0].keys, 64), make_store("full", 64)
        for held in (store, exact):
            held.append(x)
        part = Part((StoreView(store, 0),), (StoreView(exact, 0),), 64, False, torch.Tensor, 2, 64, (x, x))
        keys.append(scan(part)[0])
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("name", ["logquant", "kivi", "best-2bit"])
def test_few_tokens_of_a_kind_are_for_some_warps(name: str, parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "_parts", lambda *given: parts)
    found: list[int] = []
    warps = plan._warps
    monkeypatch.setattr(plan, "_warps", lambda *given: found.append(warps(*given)) or found[-1])
    served(name).check((7000, 1))
    assert min(found) < plan.WARPS


@pytest.mark.parametrize(("name", "large"), [("logquant", True), ("partial-logquant", False), ("kivi", False)])
def test_tiles_of_many_tokens_are_larger(name: str, large: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    case = served(name)
    monkeypatch.setattr(layout, "LONG", 0)
    monkeypatch.setattr(layout, "MANY", case.batch * case.kv_heads * 430)
    monkeypatch.setattr(layout, "large_tiles", lambda device: True)
    case.check((401, 1, 50, 1))
    found = {many: any(is_large(kind.name) for kind in kinds) for (*_, many), kinds in plan._known.items()}
    assert found == {False: False, True: large}


@pytest.mark.parametrize(
    ("keys", "values", "large"),
    [
        (Format(2, 64, False, 1, 128), Format(2, 64, False, 1, 128), True),
        (Format(2, 32, False, 1, 128), Format(1, 64, False, 6, 64), True),
        (Format(2, 32, False, 2, 128), Format(2, 64, False, 1, 128), False),
        (Format(2, 64, False, 1, 128), Format(2, 16, False, 1, 128), False),
        (Format(2, 64, False, 1, 256), Format(2, 64, False, 1, 128), False),
        (Format(2, 64, False, 1, 128), Format(4, 64, False, 1, 128), False),
        (Format(2, 32, True, 1, 128), Format(2, 64, False, 1, 128), False),
    ],
)
def test_larger_tiles_are_those_of_which_shared_memory_holds_three_stages(
    keys: Format, values: Format, large: bool
) -> None:
    assert is_large(kind_of(keys, values, many=True)[0]) is large
    assert not is_large(kind_of(keys, values)[0])
    assert not is_large(kind_of(keys, values, by_slot=True, many=True)[0])


def test_tiles_are_as_before_where_a_card_is_not_faster_with_larger_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "MANY", 0)
    served("logquant").check((401, 1))
    assert not any(is_large(kind.name) for kinds in plan._known.values() for kind in kinds)


ROTATED = own(token(2, transforms=[{"kind": "hadamard", "seed": 1}]), token(2, transforms=[{"kind": "scale"}]))


@pytest.mark.parametrize(
    "recipe", ["zipcache", "mikv", ROTATED, "logquant"], ids=["zipcache", "mikv", "own", "logquant"]
)
def test_what_serves_another_layer_takes_what_its_transforms_keep(recipe: Any) -> None:
    """Layers that stand alike have transforms fitted to other tokens."""
    serves, found = backend.Cuda(), []
    for seed in range(2):
        case = served(recipe)
        torch.manual_seed(seed)
        case.check((213, 1, 1))
        new = (case.draw(1, case.kv_heads, 64), case.draw(1, case.kv_heads, 64))
        query = case.draw(1, case.kv_heads * case.groups, 64)
        case.tiers.stage(*new)
        case.tiers.observe()
        part, options = whole(case.tiers, new), AttentionOptions(0.125, alone=True)
        assert serves.declines(query, part, None, options) is None
        right = serves.attend(query, part, None, options)[0].transpose(1, 2).to(query.dtype)
        stood = stood_of(case.tiers)
        assert stood is not None
        run = serves.again(query, part, options)
        assert run is not None
        found.append((run, (query, new, stood.addresses, case.tiers.stores, None, None), right))
    for run, _, _ in found:
        for _, given, right in found:
            out = run(*given)
            assert out is not None
            assert torch.equal(out, right)
