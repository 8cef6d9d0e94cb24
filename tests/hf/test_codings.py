"""Whatever stands before, in and beside the codes of a store: attention reads what decoding gives."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kvpolicy_fp4 import MxFp4, NvFp4
from kvpolicy_fp8 import Fp8
from kvpolicy_hadamard import Hadamard
from kvpolicy_int import Int
from kvpolicy_lloyd_max import LloydMax, SplitLloydMax
from kvpolicy_nf4 import Nf4
from kvpolicy_scale import Scale
from kvpolicy_sketch import Sketch
from kvpolicy_sparse import Sparse
from kvpolicy_ternary import Ternary
from layers import HEAD_DIM, Layer, random_tokens
from models import ids, tiny
from per_head import reference
from safetensors.torch import load_file
from saved import rewritten
from torch import Tensor
from words import CACHE

from kvpolicy import Affine, CompressedCache, Extra, Site, TensorQuantizer, Transform, attach, load_recipe, make_cache
from kvpolicy.errors import CacheError, PluginError
from kvpolicy.storage.make import make_store

BLOCKS: dict[str, Any] = {"kind": "recent", "window": 5, "flush": 7}


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield


class Turn(Transform):
    """Turns pairs of channels by an angle that grows with the position: of no adjoint."""

    kind: Literal["turn"] = "turn"
    needs: ClassVar[frozenset[str]] = frozenset({"positions"})

    def _turned(self, x: Tensor, positions: Tensor | None, sign: int) -> Tensor:
        assert positions is not None
        angles = positions.to(x.dtype).unsqueeze(3) * 10.0 ** -torch.arange(x.shape[3] // 2, device=x.device).to(
            x.dtype
        )
        a, b = x[..., ::2], x[..., 1::2]
        cos, sin = angles.cos(), sign * angles.sin()
        return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)

    def forward(self, x: Tensor, state: Mapping[str, Tensor], positions: Tensor | None) -> Tensor:
        return self._turned(x, positions, -1)

    def inverse(self, y: Tensor, state: Mapping[str, Tensor], positions: Tensor | None) -> Tensor:
        return self._turned(y, positions, 1)


class Shift(Transform):
    """Subtracts the mean of the first tokens: not linear, of no adjoint."""

    kind: Literal["shift"] = "shift"

    def fit(self, x: Tensor, queries: Tensor | None, site: Site) -> dict[str, Tensor]:
        return {"mean": x.mean(2, keepdim=True)}

    def forward(self, x: Tensor, state: Mapping[str, Tensor], positions: Tensor | None) -> Tensor:
        return x - state["mean"]

    def inverse(self, y: Tensor, state: Mapping[str, Tensor], positions: Tensor | None) -> Tensor:
        return y + state["mean"]


class Cubes(Int):
    """Levels that are no line, in any number of bits."""

    kind: Literal["cubes"] = "cubes"  # type: ignore[assignment]

    def levels(self, site: Site) -> Tensor:
        return torch.linspace(-1, 1, 2**self.nbits) ** 3 * 2 + 0.25

    def calibrate(self, groups: Tensor) -> Affine:
        x, levels = groups.float(), self.levels(Site())
        offset = x.mean(1, keepdim=True)
        scale = (x - offset).abs().amax(1, keepdim=True) / 2
        codes = torch.bucketize((x - offset) / scale.clamp(min=1e-9), (levels[1:] + levels[:-1]) / 2)
        return Affine(codes.to(torch.uint8), scale, offset)


class Book(TensorQuantizer):
    """Residuals in float8 of the nearest of four tokens that came first; a scale for each arrival."""

    kind: Literal["book"] = "book"
    axes: ClassVar[Mapping[str, Any]] = {"book": "store", "scale": "arrival"}

    def encode(self, x: Tensor) -> dict[str, Tensor]:
        raise AssertionError("it is asked with what is kept")

    def encode_with(self, x: Tensor, kept: Mapping[str, Tensor]) -> dict[str, Tensor]:
        book = kept["book"] if kept else x[:, :, :4].float()
        nearest = torch.cdist(x.float(), book).argmin(3, keepdim=True)
        left = x.float() - book.gather(2, nearest.expand(-1, -1, -1, x.shape[3]))
        scale = left.abs().amax((2, 3), keepdim=True).clamp(min=1e-6)
        found = {"index": nearest.to(torch.uint8), "scale": scale, "left": (left / scale).to(torch.float8_e4m3fn)}
        return found if kept else {**found, "book": book}

    def decode(self, encoded: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
        left = encoded["left"].float()
        near = encoded["book"].gather(2, encoded["index"].long().expand(left.shape))
        return (near + left * encoded["scale"]).to(dtype)


class MeanError(Extra):
    """The mean error of each token, and of each channel of an arrival: of all three axes, additive."""

    kind: Literal["mean-error"] = "mean-error"
    axes: ClassVar[Mapping[str, Any]] = {"across": "arrival", "one": "store"}
    additive: ClassVar[bool] = True

    def fit(self, error: Tensor, grouping: Any, site: Site) -> dict[str, Tensor]:
        mean = error.mean(3, keepdim=True).half()
        across = (error - mean.float()).mean(2, keepdim=True).to(torch.float8_e5m2)
        return {"mean": mean, "across": across, "one": torch.ones(1, 1, 1, 1, device=error.device)}

    def add(self, out: Tensor, parts: Mapping[str, Tensor]) -> None:
        out += parts["one"] * (parts["mean"].float() + parts["across"].float())


EXTRAS: list[tuple[Extra, ...]] = [
    (),
    (Sparse(),),
    (Sparse(count=3), MeanError()),
    (MeanError(),),
    (Sparse(share=0.3),),
    (Sketch(),),
]
CHAINS: list[tuple[Transform, ...]] = [
    (),
    (Hadamard(),),
    (Scale(), Hadamard(seed=4)),
    (Hadamard(), Shift()),
    (Turn(), Hadamard()),
]


@st.composite
def stores(draw: st.DrawFn) -> Any:
    per = draw(st.sampled_from(["token", "channel"]))
    size = draw(st.sampled_from([8, 16, "head"] if per == "token" else [4, 8]))
    nbits = draw(st.sampled_from([1, 2, 3, 4, 8]))
    kind = draw(st.sampled_from([Int, Cubes, Nf4, Book, LloydMax, SplitLloydMax, Ternary, Fp8, MxFp4, NvFp4]))
    if kind in (Book, SplitLloydMax):
        return kind(transforms=draw(st.sampled_from(CHAINS)), extras=draw(st.sampled_from(EXTRAS)))
    if kind is Ternary:
        return Ternary(group_size=8, transforms=draw(st.sampled_from(CHAINS)), extras=draw(st.sampled_from(EXTRAS)))
    options = {"per": per, "group_size": size, "transforms": draw(st.sampled_from(CHAINS))}
    options |= {"extras": draw(st.sampled_from(EXTRAS))}
    if kind not in (MxFp4, NvFp4):
        options |= {"scale_dtype": draw(st.sampled_from(["model", "float32", "float8_e4m3", "e8m0"]))}
    widths = {Nf4: 4, MxFp4: 4, NvFp4: 4, Fp8: 8, LloydMax: nbits % 5 or 1}
    ranges: list[dict[str, Any]] = [{"clip": 1.0}, {"clip": 0.8}]
    ranges += [{"range": "rms"}, {"range": "percentiles", "percentile": 90.0}] if kind is Int else []
    return kind(nbits=widths.get(kind, nbits), **draw(st.sampled_from(ranges)), **options)


@st.composite
def recipes(draw: st.DrawFn) -> Any:
    last = {side: draw(stores()) for side in ("keys", "values")}
    tiers: list[dict[str, Any]] = [{"policy": draw(st.sampled_from([BLOCKS, {"kind": "recent", "window": 9}]))}]
    if draw(st.booleans()):
        budget = draw(st.sampled_from([6, 0.3]))
        select = draw(st.sampled_from(["head", "layer"]))
        tiers.append({"policy": {"kind": "attention", "budget": budget, "share": select}})
    tiers = [{**tier, "store": "full"} for tier in tiers]
    return load_recipe({"tiers": [*tiers, last]})


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_attention_is_that_on_what_is_decoded(data: st.DataObject) -> None:
    layer = Layer(data.draw(recipes()))
    total = data.draw(st.integers(30, 120))
    real = torch.ones(2, total, dtype=torch.bool)
    if data.draw(st.booleans()):
        real[data.draw(st.integers(0, 1)), : data.draw(st.integers(1, 20))] = False
    query, keys, values = random_tokens(total, data.draw(st.integers(0, 99)), 2)
    cuts = sorted({0, total, *data.draw(st.lists(st.integers(1, total - 1), max_size=6))})
    cuts = [*cuts[:-1], *range(max(cuts[-2] + 1, total - 9), total + 1)]
    for first, last in itertools.pairwise(cuts):
        now = slice(first, last)
        parts = [x[:, :, now] for x in (query, keys, values)]
        expected = reference(layer, parts[0], (parts[1], parts[2]), real[:, now], first) if first else None
        found = layer(*parts, real[:, now])
        if expected is not None:
            torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
        layer.cache.commit()
        held = sum(t.numel() * t.element_size() for s in held_stores(layer) for t in s.tensors().values())
        assert held == sum(sum(s.bytes().values()) for s in held_stores(layer))
        what = data.draw(st.sampled_from(["go on", "crop", "select"]))
        if what == "crop" and last < total:
            layer.cache.crop(-1)
            layer(*(x[:, :, last - 1 : last] for x in (query, keys, values)), real[:, last - 1 : last])
        elif what == "select":
            rows = torch.tensor(data.draw(st.sampled_from([[1, 0], [0, 0], [1, 1]])))
            layer.cache.batch_select_indices(rows)
            query, keys, values, real = (x[rows] for x in (query, keys, values, real))


def held_stores(layer: Layer) -> list[Any]:
    return [store for stores in layer.tiers.stores.values() for store in stores if store is not None]


MARK = 99.0


class Told(Transform):
    """Checks that the positions are those that the first channel of marked tokens says; it is the identity."""

    kind: Literal["told"] = "told"
    needs: ClassVar[frozenset[str]] = frozenset({"positions"})

    def forward(self, x: Tensor, state: Mapping[str, Tensor], positions: Tensor | None) -> Tensor:
        return self._checked(x, positions)

    def inverse(self, y: Tensor, state: Mapping[str, Tensor], positions: Tensor | None) -> Tensor:
        return self._checked(y, positions)

    def _checked(self, x: Tensor, positions: Tensor | None) -> Tensor:
        assert positions is not None
        assert ((x[..., 0].round() == positions) | (x[..., 1] != MARK)).all()
        return x


@pytest.mark.parametrize("per", ["token", "channel"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("select", [None, "layer", "head"])
def test_transforms_are_told_positions_among_real_tokens(per: Any, padded: bool, select: str | None) -> None:
    store = Int(nbits=8, per=per, group_size=1 if per == "token" else 8, transforms=(Told(),))
    tiers: list[dict[str, Any]] = [{"policy": BLOCKS, "store": "full"}]
    if select:
        tiers.append({"policy": {"kind": "attention", "budget": 6, "share": select}, "store": "full"})
    layer = Layer(load_recipe({"tiers": [*tiers, {"keys": store, "values": "full" if per == "token" else store}]}))
    total = 90
    real = torch.ones(2, total, dtype=torch.bool)
    if padded:
        real[1, :13] = False
    query, keys, values = random_tokens(total, 1, 2)
    text = (real.long().cumsum(1) - 1).float()
    for x in (keys, values):
        x[..., 0], x[..., 1] = text[:, None], torch.where(real, MARK, 0.0)[:, None]
    for first, last in itertools.pairwise([0, 40, 41, 55, *range(56, 80), 90]):
        layer(*(x[:, :, first:last] for x in (query, keys, values)), real[:, first:last])
    layer.cache.crop(-3)
    layer.cache.dense(0)


@pytest.mark.parametrize(
    "quantizer",
    [
        Int(nbits=4, transforms=(Hadamard(seed=1), Scale())),
        Int(nbits=2, per="channel", transforms=(Turn(), Scale())),
        Book(transforms=(Hadamard(),), extras=(MeanError(),)),
    ],
    ids=["token", "channel", "book"],
)
def test_a_restored_store_goes_on(quantizer: Any) -> None:
    stored = make_store(quantizer, HEAD_DIM)
    other = make_store(quantizer, HEAD_DIM)
    assert stored is not None
    assert other is not None
    x = random_tokens(50, 0)[1]
    stored.append(x, None, torch.arange(50))
    other.restore({name: t.clone() for name, t in stored.tensors().items()})
    for store in (stored, other):
        store.append(x + 1, None, torch.arange(50, 100))
    found = [torch.cat([part for _, part in store.decoded(64, torch.float32)], 2) for store in (stored, other)]
    assert torch.equal(*found)


def test_a_model_generates_alike_attached_and_not(tmp_path: Path) -> None:
    model = tiny("llama")
    recipe = {
        "tiers": [
            {"policy": {"kind": "recent", "window": 8}, "store": "full"},
            {
                "keys": {"kind": "int", "nbits": 4, "transforms": ["hadamard"]},
                "values": {
                    "kind": "int",
                    "nbits": 4,
                    "per": "channel",
                    "transforms": [{"kind": "hadamard", "seed": 2}],
                },
            },
        ]
    }
    cache, other = make_cache(recipe, model), make_cache(recipe, model)
    with attach(model):
        model(ids(60), **{CACHE: cache})
        one = [model(ids(1, seed=t), **{CACHE: cache}).logits for t in range(9)]
    model(ids(60), **{CACHE: other})
    two = [model(ids(1, seed=t), **{CACHE: other}).logits for t in range(9)]
    torch.testing.assert_close(torch.stack(one), torch.stack(two), rtol=1e-3, atol=1e-3)
    cache.save(tmp_path / "cache")
    loaded = CompressedCache.load(tmp_path / "cache", model)
    assert loaded.memory().total("state") == cache.memory().total("state") > 0
    with attach(model):
        one, two = ([model(ids(1, seed=99), **{CACHE: c}).logits] for c in (cache, loaded))
    assert torch.equal(one[0], two[0])


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("per", ["token", "channel"])
def test_caches_with_extras_are_saved(per: str, padded: bool, tmp_path: Path) -> None:
    model = tiny("llama")
    low = {"kind": "int", "nbits": 2, "per": per, "group_size": 8}
    low |= {"extras": [{"kind": "sparse", "count": 2}], "transforms": [{"kind": "hadamard", "seed": 5}]}
    recipe = {"tiers": [{"policy": BLOCKS, "store": "full"}, {"store": low}]}
    cache = make_cache(recipe, model)
    mask = torch.ones(2, 60, dtype=torch.long)
    mask[1, :9] = 1 - padded
    with attach(model):
        model(ids(60, batch=2), **{CACHE: cache}, attention_mask=mask)
        cache.save(tmp_path / "cache")
        loaded = CompressedCache.load(tmp_path / "cache", model)
        assert loaded.memory().stores == cache.memory().stores
        assert cache.memory().total("extras") > 0
        for seed in range(12):
            one, two = (model(ids(1, batch=2, seed=seed), **{CACHE: c}).logits for c in (cache, loaded))
            assert torch.equal(one, two)
    content = (tmp_path / "cache").read_bytes()
    names = sorted(n for n in load_file(tmp_path / "cache") if ".extras.0." in n)
    changes: list[Any] = [None, lambda t: t[:-1], lambda t: t[:, :, :-1] if t.ndim > 2 else t + 1, lambda t: t.double()]
    for name, change in itertools.product(names, changes):
        (tmp_path / "cache").write_bytes(content)

        def changed(held: dict[str, Tensor], name: str = name, change: Any = change) -> dict[str, Tensor]:
            rest = {n: t for n, t in held.items() if n != name}
            return rest if change is None else {**rest, name: change(held[name]).contiguous()}

        with pytest.raises(CacheError, match="damaged"):
            CompressedCache.load(rewritten(tmp_path / "cache", tensors=changed), model)
    if per == "token":
        (tmp_path / "cache").write_bytes(content)
        far = rewritten(tmp_path / "cache", lambda held: {n: t + 100 if "channel" in n else t for n, t in held.items()})
        with pytest.raises(CacheError, match=r"damaged.*quantizer 'int' with its extras can't decode it"):
            CompressedCache.load(far, model)


def test_tensors_per_arrival_and_store_are_kept_no_longer_than_needed() -> None:
    store: Any = make_store(Book(), HEAD_DIM)
    x = random_tokens(60, 3)[1]
    for part in x.split(6, dim=2):
        store.append(part)
    whole = torch.cat([part for _, part in store.decoded(9, torch.float32)], 2)
    assert (whole - x).abs().max() < 0.3
    assert store.named.parts["scale"].length == 10
    gone = torch.arange(60) < 40
    store.drop(gone.nonzero()[:, 0].numpy())
    assert store.named.parts["scale"].length == 4
    sizes = {"index": 1, "left": HEAD_DIM}
    assert store.bytes() == {"codes": 2 * 20 * sum(sizes.values()) + 2 * 4 * 4 + 2 * 4 * HEAD_DIM * 4, "indices": 32}
    store.differ_by_head((1, 2))
    assert torch.equal(store.gather(torch.arange(20).expand(1, 2, -1), torch.float32), whole[:, :, 40:])
    store.remove(torch.arange(15).expand(1, 2, -1))
    assert store.named.parts["scale"].length == 1
    store.append(x[:, :, :5])
    other: Any = make_store(Book(), HEAD_DIM)
    other.differ_by_head((1, 2))
    other.restore({name: t.clone() for name, t in store.tensors().items()})
    index = torch.arange(10).expand(1, 2, -1)
    assert torch.equal(other.gather(index, torch.float32), store.gather(index, torch.float32))
    assert other.bytes() == store.bytes()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"scale": lambda t: t.expand(-1, -1, 9, -1)}, r"\[batch, kv_heads, 1, \.\.\.\] of .* found scale"),
        ({"book": lambda t: t.repeat(2, 2, 1, 1)}, r"\[batch or 1, kv_heads or 1, \.\.\.\] of .* found book"),
        ({"index": lambda t: t[:, :, :-1]}, r"\[batch, kv_heads, tokens, \.\.\.\] of .* found index"),
    ],
)
def test_tensors_on_a_wrong_axis_are_named(change: dict[str, Any], told: str) -> None:
    class Wrong(Book):
        def encode_with(self, x: Tensor, kept: Mapping[str, Tensor]) -> dict[str, Tensor]:
            found = super().encode_with(x, kept)
            return {name: change[name](t) if name in change else t for name, t in found.items()}

    store: Any = make_store(Wrong(), HEAD_DIM)
    with pytest.raises(PluginError, match=told):
        store.append(random_tokens(9, 0)[1])
