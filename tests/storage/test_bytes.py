"""Tensors of any type are moved as bytes: float8, which most operations by index refuse, and every other."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import HEAD_DIM, Layer, random_tokens
from torch import Tensor

from kvpolicy import CompressedCache, TensorQuantizer
from kvpolicy.errors import CacheError
from kvpolicy.plugins import PluginInfo, registry
from kvpolicy.storage.make import make_store
from kvpolicy.storage.named import NamedStore
from kvpolicy.storage.pages import Pages

TYPES = [
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.bfloat16,
    torch.float32,
    torch.int64,
    torch.float64,
    torch.complex64,
]


class Float8(TensorQuantizer):
    """Keeps float8 numbers, and per token the largest one, by which they were divided."""

    kind: Literal["float8"] = "float8"

    def encode(self, x: Tensor) -> dict[str, Tensor]:
        scale = x.abs().amax(3, keepdim=True).clamp(min=1e-6)
        return {"small": (x / scale).to(torch.float8_e4m3fn), "scale": scale.squeeze(3)}

    def decode(self, encoded: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
        return (encoded["small"].to(torch.float32) * encoded["scale"].float().unsqueeze(3)).to(dtype)


class Plain8(Float8):
    """The same in types that every operation knows."""

    kind: Literal["plain8"] = "plain8"  # type: ignore[assignment]

    def encode(self, x: Tensor) -> dict[str, Tensor]:
        return {"small": super().encode(x)["small"].float(), "scale": super().encode(x)["scale"]}


@pytest.fixture
def _installed(monkeypatch: pytest.MonkeyPatch) -> None:
    info = PluginInfo("float8", Float8, "tests", "1", __file__, "float8")
    monkeypatch.setitem(registry().quantizers, "float8", info)  # type: ignore[arg-type]


def recipe(quantizer: Any, evicts: bool = False) -> dict[str, Any]:
    tiers: list[dict[str, Any]] = [
        {"policy": {"kind": "recent", "window": 5}, "store": "full"},
        {"policy": {"kind": "attention", "budget": 9}, "store": quantizer},
        {"store": "evict" if evicts else {"kind": "int", "nbits": 2}},
    ]
    return {"tiers": tiers}


def grown(layer: Layer, steps: int = 6) -> list[Tensor]:
    """A padded prompt of three rows, then single tokens."""
    real = torch.ones(3, 40, dtype=torch.long)
    real[0, :17], real[2, :4] = 0, 0
    found = [layer(*random_tokens(40, 0, batch=3), real)]
    return found + [layer(*random_tokens(1, step, batch=3)) for step in range(1, steps + 1)]


@pytest.mark.parametrize("evicts", [False, True], ids=["keeps", "evicts"])
def test_padded_rows_that_keep_float8_go_on_like_others(evicts: bool) -> None:
    ours, plain = (Layer(recipe(quantizer, evicts)) for quantizer in (Float8(), Plain8()))
    for a, b in zip(grown(ours), grown(plain), strict=True):
        assert torch.equal(a, b)
    for layer in (ours, plain):
        layer.cache.batch_select_indices(torch.tensor([2, 0, 2]))
        layer.cache.crop(-3)
    for step in range(20, 26):
        a, b = (layer(*random_tokens(1, step, batch=3)) for layer in (ours, plain))
        assert torch.equal(a, b)
    assert ours.held() == plain.held()
    assert all(torch.equal(a, b) for a, b in zip(ours.cache.dense(0), plain.cache.dense(0), strict=True))
    assert ours.cache.memory().bytes < plain.cache.memory().bytes


@pytest.mark.usefixtures("_installed")
def test_float8_is_saved_loaded_and_copied(tmp_path: Path) -> None:
    layer = Layer(recipe({"kind": "float8"}))
    grown(layer)
    layer.cache.save(tmp_path / "cache")
    loaded = CompressedCache.load(tmp_path / "cache", _config(layer))
    for other in (loaded, copy.deepcopy(layer.cache)):
        assert all(torch.equal(a, b) for a, b in zip(layer.cache.dense(0), other.dense(0), strict=True))
        assert other.memory().bytes == layer.cache.memory().bytes
        store = other.layers[0].tiers.stores["keys"][1]
        assert store.tensors()["small"].dtype == torch.float8_e4m3fn


def _config(layer: Layer) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=4 * HEAD_DIM,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=HEAD_DIM,
        num_hidden_layers=len(layer.cache.layers),
    )


class Any_(TensorQuantizer):
    """Keeps whatever type it is told, as bytes that depend on the numbers; decodes to them."""

    kind: str = "any"
    dtype: Any = None
    shape: Any = ()

    def encode(self, x: Tensor) -> dict[str, Tensor]:
        n = int(np.prod(self.shape)) * self.dtype.itemsize
        raw = (x[..., :1].view(torch.int32) + torch.arange(n, dtype=torch.int32)).to(torch.uint8)
        raw = raw & 1 if self.dtype == torch.bool else raw
        return {"x": x.clone(), "any": raw.contiguous().view(self.dtype).view(*x.shape[:3], *self.shape)}

    def decode(self, encoded: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
        expected = self.encode(encoded["x"])["any"]
        found = encoded["any"]
        assert found.dtype == expected.dtype
        assert found.shape == expected.shape
        assert torch.equal(*(t.contiguous().view(-1).view(torch.uint8) for t in (found, expected)))
        return encoded["x"].to(dtype)


moves = st.lists(
    st.tuples(st.sampled_from(["append", "drop", "select", "reload"]), st.integers(0, 1 << 16)), max_size=6
)


@settings(max_examples=120, deadline=None, derandomize=True)
@given(
    dtype=st.sampled_from(TYPES), shape=st.lists(st.integers(1, 3), max_size=2), moves=moves, seed=st.integers(0, 99)
)
def test_a_store_moves_tensors_of_any_type_and_shape(
    dtype: torch.dtype, shape: list[int], moves: list[tuple[str, int]], seed: int
) -> None:
    quantizer = Any_(dtype=dtype, shape=tuple(shape))
    generator = torch.Generator().manual_seed(seed)
    rng = np.random.default_rng(seed)
    store: Any = NamedStore(quantizer, 4)
    known = torch.empty(2, 2, 0, 4)
    for what, number in [("append", 70), *moves]:
        n = known.shape[2]
        if what == "append":
            x = torch.randn(2, 2, number % 90, 4, generator=generator)
            store.append(x)
            known = torch.cat([known, x], dim=2)
        elif what == "drop":
            gone = rng.random(n) < 0.3
            store.drop(np.flatnonzero(gone))
            known = known[:, :, torch.from_numpy(~gone)]
        elif what == "select":
            rows = torch.tensor([number % 2, number // 2 % 2])
            store.select(rows)
            known = known[rows]
        else:
            tensors, store = store.tensors(), NamedStore(quantizer, 4)
            store.restore(tensors)
        assert store.length == known.shape[2]
        out = torch.full_like(known, torch.nan)
        store.write(out, 0)
        assert torch.equal(out, known)
        width = 16 + int(np.prod(shape)) * dtype.itemsize
        assert store.bytes() == {"codes": 4 * store.length * width}
    if store.length < 2:
        return
    store.differ_by_head((2, 2))
    index = torch.rand(2, 2, store.length, generator=generator).argsort(2)[..., : store.length // 2]
    expected = known.gather(2, index[..., None].expand(-1, -1, -1, 4))
    assert torch.equal(store.gather(index, known.dtype), expected)
    store.remove(index.sort(2).values)
    left = store.gather(torch.arange(store.length).expand(2, 2, -1), known.dtype)
    for at in np.ndindex(2, 2):
        stays = torch.ones(known.shape[2], dtype=torch.bool)
        stays[index[at]] = False
        assert torch.equal(known[at][stays].sort(0).values, left[at].sort(0).values)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(dtype=st.sampled_from(TYPES), width=st.integers(1, 9), n=st.integers(2, 90), seed=st.integers(0, 99))
def test_pages_move_tokens_of_any_type(dtype: torch.dtype, width: int, n: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    high = 2 if dtype == torch.bool else 256
    raw = torch.randint(high, (2, 3, n, width * dtype.itemsize), dtype=torch.uint8, generator=generator)
    pages, whole = Pages(), Pages(whole=True)
    for part in raw.view(dtype).tensor_split((n // 3, n // 2), dim=2):
        pages.append(part)
        whole.append(part)

    def plain(x: Tensor) -> Tensor:
        assert x.dtype == dtype
        return x.contiguous().view(torch.uint8)

    some = torch.arange(n)[torch.rand(n, generator=generator) < 0.5]
    if len(some):
        assert torch.equal(plain(pages.take(some.numpy())), raw[:, :, some])
    order = torch.randperm(n, generator=generator)
    spread = Pages()
    spread.append(raw.view(dtype))
    assert torch.equal(plain(spread.scatter_between(order, n))[:, :, order], raw) or n > 64
    rows = torch.tensor([1, 0, 1])
    pages.select(rows)
    assert torch.equal(plain(pages.slice(0, n)), raw[rows])
    index = torch.rand(2, 3, n, generator=generator).argsort(2)[..., : n // 2]
    expected = raw.gather(2, index[..., None].expand(-1, -1, -1, raw.shape[3]))
    assert torch.equal(plain(whole.gather(index)), expected)
    whole.remove(index.sort(2).values)
    assert whole.length == n - n // 2
    left = plain(whole.all())
    for at in np.ndindex(2, 3):
        stays = torch.ones(n, dtype=torch.bool)
        stays[index[at]] = False
        assert sorted(map(tuple, left[at].tolist())) == sorted(map(tuple, raw[at][stays].tolist()))


def test_an_update_of_no_tokens_changes_no_store() -> None:
    for spec in (Float8(), registry().quantizers["int"].cls(), "full"):
        store = make_store(spec, HEAD_DIM)  # type: ignore[arg-type]
        assert store is not None
        for n in (0, 5, 0):
            store.append(torch.ones(1, 2, n, HEAD_DIM))
        assert store.length == 5


def test_saved_tensors_of_different_tokens_are_refused() -> None:
    store = NamedStore(Float8(), HEAD_DIM)
    for wrong in ({"small": torch.zeros(1, 2, 5, 4), "scale": torch.zeros(1, 2, 4)}, {"small": torch.zeros(2, 5)}):
        with pytest.raises(CacheError, match="of the same tokens"):
            store.restore(wrong)
