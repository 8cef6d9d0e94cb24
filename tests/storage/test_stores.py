"""Stores: equal to quantizing every group once and keeping a plain list; and bytes of the tensors held."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpolicy.errors import CacheError, PluginError, RecipeError
from kvpolicy.interfaces.quantizer import Affine, AffineQuantizer, TensorQuantizer
from kvpolicy.plugins import registry
from kvpolicy.storage.affine import AffineStore
from kvpolicy.storage.base import Store
from kvpolicy.storage.group_size import group_size_of
from kvpolicy.storage.make import make_store
from kvpolicy.storage.named import NamedStore
from kvpolicy.storage.packing import packed_width

HEADS, DIM = 2, 16


def quantizer(**options: Any) -> AffineQuantizer:
    found = registry().quantizers["int"].cls(**options)
    assert isinstance(found, AffineQuantizer)
    return found


class Halves(TensorQuantizer):
    """Keeps float16 and the parity of the channels' count, to have two tensors of different rank."""

    kind: str = "halves"

    def encode(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"half": x.half().unflatten(3, (2, -1)), "norm": x.norm(dim=3)}

    def decode(self, encoded: dict[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        assert encoded["norm"].shape == encoded["half"].shape[:3]
        return encoded["half"].flatten(3).to(dtype)


def once(q: AffineQuantizer, groups: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Groups `[n, size]` quantized and decoded, parameters in the dtype in which they are kept."""
    codes, scale, offset = q.calibrate(groups)
    kept = torch.float32 if q.scale_dtype == "float32" else dtype
    return (scale.to(kept).float() * codes.float() + offset.to(kept).float()).to(dtype)


class Reference:
    """A list of decoded tokens `[batch, heads, dim]`; the tokens of an incomplete group wait at its end."""

    def __init__(self, spec: Any, dim: int = DIM) -> None:
        self.spec = spec
        self.coded: list[torch.Tensor] = []
        self.waiting: list[torch.Tensor] = []
        self.size = group_size_of(spec, dim) if isinstance(spec, AffineQuantizer) else 0

    @property
    def tokens(self) -> list[torch.Tensor]:
        return self.coded + self.waiting

    def append(self, x: torch.Tensor) -> None:
        tokens = list(x.unbind(2))
        if self.spec == "full":
            self.coded += tokens
        elif isinstance(self.spec, TensorQuantizer):
            self.coded += [t.half().to(t.dtype) for t in tokens]
        elif self.spec.per == "token":
            for t in tokens:
                self.coded.append(once(self.spec, t.reshape(-1, self.size), t.dtype).view(t.shape))
        else:
            self.waiting += tokens
            size = self.size or len(self.waiting)
            while self.waiting and len(self.waiting) >= size:
                block = torch.stack(self.waiting[:size], dim=-1)
                self.waiting = self.waiting[size:]
                decoded = once(self.spec, block.reshape(-1, size), block.dtype).view(block.shape)
                self.coded += list(decoded.unbind(-1))

    def drop(self, index: list[int]) -> None:
        n, gone = len(self.coded), set(index)
        self.coded = [t for i, t in enumerate(self.coded) if i not in gone]
        self.waiting = [t for i, t in enumerate(self.waiting, n) if i not in gone]

    def dense(self) -> torch.Tensor:
        return torch.stack(self.tokens, dim=2)


SPECS: dict[str, Any] = {
    "full": "full",
    "token-2": quantizer(nbits=2),
    "token-3-groups": quantizer(nbits=3, group_size=4),
    "token-1-float32": quantizer(nbits=1, group_size=8, scale_dtype="float32"),
    "channel-2": quantizer(nbits=2, per="channel", group_size=8),
    "channel-4-odd": quantizer(nbits=4, per="channel", group_size=5),
    "channel-8-large": quantizer(nbits=8, per="channel", group_size=70),
    "arrival": quantizer(nbits=4, per="channel", group_size="arrival"),
    "tensors": Halves(),
}


def make(spec: Any) -> Store:
    store = make_store(spec, DIM)
    assert store is not None
    return store


def dense(store: Store, dtype: torch.dtype) -> torch.Tensor:
    out = torch.full((2, HEADS, store.length + 3, DIM), torch.nan, dtype=dtype)
    store.write(out, 2)
    assert out[:, :, :2].isnan().all()
    assert out[:, :, -1:].isnan().all()
    return out[:, :, 2:-1]


def check(store: Store, reference: Reference, dtype: torch.dtype) -> None:
    assert store.length == len(reference.tokens)
    if not store.length:
        return
    expected = reference.dense()
    written = dense(store, dtype)
    assert torch.equal(written, expected)
    order = torch.randperm(store.length, generator=torch.Generator().manual_seed(store.length))
    out = torch.zeros_like(expected)
    store.scatter(out, order)
    assert torch.equal(out[:, :, order], expected)
    for block in (7, 256):
        parts = list(store.decoded(block, dtype))
        assert [first for first, _ in parts] == np.cumsum([0, *(x.shape[2] for _, x in parts)])[:-1].tolist()
        assert torch.equal(torch.cat([x for _, x in parts], dim=2), expected)
    index = np.flatnonzero(np.random.default_rng(store.length).random(store.length) < 0.4)
    if len(index):
        assert torch.equal(store.take(index, dtype), expected[:, :, index])


def check_bytes(store: Store, dtype: torch.dtype) -> None:
    named = store.named.parts if isinstance(store, NamedStore) else {}
    pages = [page for part in (*store.parts.values(), *named.values()) for page in part.pages]
    assert store.reserved() == sum(page.untyped_storage().nbytes() for page in pages)
    found = store.bytes()
    if isinstance(store, AffineStore):
        q, coded = store.quantizer, store.length - store.parts["exact"].length
        rows = 2 * HEADS
        assert found["codes"] == rows * coded * packed_width(DIM, q.nbits)
        groups = len(store.groups.sizes) * DIM if q.per == "channel" else coded * (DIM // store.group_size)
        itemsize = 4 if q.scale_dtype == "float32" else dtype.itemsize
        assert found["scales"] == found["zeros"] == rows * groups * itemsize
        assert found["exact"] == rows * store.parts["exact"].length * DIM * dtype.itemsize
        assert found["indices"] == len(store.groups.sizes) * 8
        assert store.groups.sizes.sum() == (coded if q.per == "channel" else 0)
    parts = [*store.parts.values(), *named.values()]
    held = sum(b.numel() * b.element_size() for part in parts for _, b in part.blocks())
    assert sum(found.values()) == held + found.get("indices", 0)


operation = st.one_of(
    st.tuples(st.just("append"), st.sampled_from([1, 1, 2, 5, 8, 31, 64, 70, 140, 1030])),
    st.tuples(st.just("some"), st.floats(0, 1)),
    st.tuples(st.just("front"), st.floats(0, 1)),
    st.tuples(st.just("back"), st.floats(0, 1)),
    st.tuples(st.just("select"), st.lists(st.integers(0, 1), min_size=2, max_size=2)),
    st.tuples(st.just("reload"), st.none()),
)


@pytest.mark.parametrize("name", SPECS)
@settings(deadline=None, derandomize=True, max_examples=14)
@given(operations=st.lists(operation, min_size=3, max_size=10), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_stores_hold_what_was_quantized_once(name: str, operations: list[tuple[str, Any]], dtype: torch.dtype) -> None:
    spec = SPECS[name]
    store, reference = make(spec), Reference(spec)
    generator = torch.Generator().manual_seed(0)
    for step, (kind, value) in enumerate([("append", 12), *operations]):
        n = store.length
        if kind == "append":
            x = torch.randn(2, HEADS, value, DIM, generator=generator).to(dtype)
            store.append(x)
            reference.append(x)
        elif kind == "select":
            store.select(torch.tensor(value))
            reference.coded = [t[value] for t in reference.coded]
            reference.waiting = [t[value] for t in reference.waiting]
        elif kind == "reload":
            tensors, store = store.tensors(), make(spec)
            store.restore(tensors)
        else:
            at = np.arange(n)
            chosen = {
                "some": np.random.default_rng(step).random(n) < value,
                "front": at < value * n,
                "back": at >= n - value * n,
            }[kind]
            store.drop(np.flatnonzero(chosen))
            reference.drop(np.flatnonzero(chosen).tolist())
        check(store, reference, dtype)
        check_bytes(store, dtype)


@pytest.mark.parametrize("name", ["token-2", "channel-2", "arrival"])
def test_codes_do_not_change_when_others_leave(name: str) -> None:
    store = make(SPECS[name])
    store.append(torch.randn(2, HEADS, 64, DIM))
    before = dense(store, torch.float32)
    kept = np.arange(64) % 3 == 1
    store.drop(np.flatnonzero(~kept))
    assert torch.equal(dense(store, torch.float32), before[:, :, torch.from_numpy(kept)])


def test_parameters_of_a_group_stay_until_it_is_empty() -> None:
    store = make(SPECS["channel-2"])
    store.append(torch.randn(2, HEADS, 24, DIM))
    full = store.bytes()["scales"]
    store.drop(np.arange(7))
    assert store.bytes()["scales"] == full
    store.drop(np.arange(1))
    assert store.bytes()["scales"] == full * 2 // 3


def test_one_nan_or_inf_spoils_its_own_group_at_most() -> None:
    for bad in (torch.nan, torch.inf, -torch.inf):
        for name in ("token-3-groups", "channel-2"):
            clean, dirty = make(SPECS[name]), make(SPECS[name])
            x = torch.randn(2, HEADS, 32, DIM)
            clean.append(x)
            x = x.clone()
            x[0, 1, 9, 5] = bad
            dirty.append(x)
            a, b = dense(clean, torch.float32), dense(dirty, torch.float32)
            spoilt = torch.zeros_like(a, dtype=torch.bool)
            if name == "channel-2":
                spoilt[0, 1, 8:16, 5] = True
            else:
                spoilt[0, 1, 9, 4:8] = True
            assert torch.equal(a[~spoilt], b[~spoilt])


@pytest.mark.parametrize(
    ("options", "head_dim", "size"),
    [
        ({}, 64, 64),
        ({}, 80, 40),
        ({}, 96, 48),
        ({}, 128, 64),
        ({}, 256, 64),
        ({"group_size": "head"}, 80, 80),
        ({"group_size": 16}, 80, 16),
        ({"per": "channel"}, 80, 32),
        ({"per": "channel", "group_size": 7}, 80, 7),
        ({"per": "channel", "group_size": "arrival"}, 80, 0),
    ],
)
def test_group_sizes(options: dict[str, Any], head_dim: int, size: int) -> None:
    assert group_size_of(quantizer(**options), head_dim) == size


def test_a_group_size_that_does_not_divide_is_refused_with_those_that_do() -> None:
    with pytest.raises(RecipeError, match=r"group_size must divide head_dim.*found group_size 64 and head_dim 80.*40"):
        make_store(quantizer(group_size=64), 80)
    with pytest.raises(RecipeError, match="arrival needs per: channel"):
        make_store(quantizer(group_size="arrival"), 64)


def test_evict_needs_no_store() -> None:
    assert make_store("evict", DIM) is None


def test_a_quantizer_that_gives_wrong_shapes_is_named() -> None:
    class Bad(AffineQuantizer):
        kind: str = "bad"

        def calibrate(self, groups: torch.Tensor) -> Affine:
            one = torch.ones(len(groups), 1)
            return Affine(torch.zeros_like(groups, dtype=torch.uint8), one, one[:, 0])

    with pytest.raises(PluginError, match=r"'bad' must give codes .*scale and offset"):
        make(Bad()).append(torch.zeros(1, 1, 4, DIM))

    class Worse(Halves):
        kind: str = "worse"

        def encode(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"sum": x.sum(2)}

    with pytest.raises(PluginError, match=r"'worse' must give tensors \[batch, kv_heads, tokens"):
        make(Worse()).append(torch.zeros(1, 1, 4, DIM))


def test_restoring_foreign_tensors_is_refused() -> None:
    with pytest.raises(CacheError, match="4-D tensors named"):
        make("full").restore({"nonsense": torch.zeros(1, 1, 1, 1)})
