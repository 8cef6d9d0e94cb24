"""Of many tokens tiles are larger: the kernels give what the reference gives there too."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from served import Served, additive, own, some, token

from kvpolicy.attention.cuda import backend, layout, plan
from kvpolicy.attention.cuda.compile import MEMORY, missing
from kvpolicy.attention.cuda.formats import is_large
from kvpolicy.attention.cuda.kernel import ROOM


def _absent() -> str | None:
    if not torch.cuda.is_available():
        return "no CUDA device"
    major, minor = torch.cuda.get_device_capability()
    room = MEMORY.get(f"sm_{major}{minor}", 0) >= ROOM
    return missing() if room else "multiprocessors of this card have too little shared memory"


absent = _absent()
pytestmark = pytest.mark.skipif(absent is not None, reason=f"no kernels of larger tiles: {absent}")
DEVICE = "cuda"


@pytest.fixture(autouse=True)
def _of_any_number(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(layout, "MANY", 0)
    monkeypatch.setattr(layout, "LONG", 0)
    monkeypatch.setattr(layout, "large_tiles", lambda device: True)
    monkeypatch.setattr(backend, "_plans", {})
    monkeypatch.setattr(plan, "_known", {})
    with torch.no_grad():
        yield
    assert any(is_large(kind.name) for kinds in plan._known.values() for kind in kinds)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logquant(dtype: torch.dtype) -> None:
    Served("logquant", dtype=dtype).check((900, 1, 60, 3, 1))


@pytest.mark.parametrize("bits", [1, 2])
@pytest.mark.parametrize("dim", [64, 80, 96, 128])
@pytest.mark.parametrize("groups", [1, 4, 5, 8])
def test_bits_and_head_dims(bits: int, dim: int, groups: int) -> None:
    Served(own(token(bits), token(3 - bits)), dim=dim, groups=groups).check((300, 1, 20, 1))


@pytest.mark.parametrize(
    ("keys", "values"),
    [
        (token(2, 32), token(2, 128)),
        (token(2, 64, scale_dtype="float32"), token(2, 64, scale_dtype="float32")),
        (token(2, transforms=[{"kind": "hadamard", "seed": 1}]), token(2)),
        (token(2), token(2, transforms=[{"kind": "hadamard"}])),
        (token(2, "head", range="rms"), token(1, 64, range="rms")),
        (token(2, 32, scale_dtype="float8_e4m3"), token(2, 64, scale_dtype="float8_e4m3")),
        (token(2, "head", range="rms", scale_dtype="float8_e4m3"), token(2, 32, scale_dtype="float8_e4m3")),
    ],
)
def test_formats(keys: Any, values: Any) -> None:
    Served(own(keys, values)).check((501, 3, 1, 60, 1))


@pytest.mark.parametrize("mask", [some, additive])
@pytest.mark.parametrize("groups", [4, 7])
def test_masks(mask: Any, groups: int) -> None:
    Served("logquant", groups=groups).check((500, 1, 3), mask=mask)


def test_softcap_and_sinks() -> None:
    Served("logquant").check(softcap=30.0, sinks=torch.randn(8, device=DEVICE))


def test_padded_rows() -> None:
    Served("logquant").check((300, 1, 60, 1), pad=37)


def test_policies_are_told_of_attention() -> None:
    ranked = {"policy": {"kind": "attention", "budget": 200}, "store": token(2, 64)}
    recipe = own("full", "full")
    recipe["tiers"] = [recipe["tiers"][0], ranked, {"store": "evict"}]
    Served(recipe).check((300, 1, 20, 1))


@pytest.mark.parametrize("parts", [1, 2, 3, 40])
def test_kinds_with_few_tokens(parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "_parts", lambda *given: parts)
    Served("logquant").check((5000, 1, 60, 30, 1))
    middle = {"policy": {"kind": "recent", "window": 200, "flush": 24}, "store": token(4)}
    recipe = own(token(2), token(2))
    recipe["tiers"].insert(1, middle)
    Served(recipe).check((5000, 1, 60, 1))
