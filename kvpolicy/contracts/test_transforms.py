"""What every transform must hold, in float64 alone and in the stores in float32."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kvpolicy.attention.products import add_values, key_scores
from kvpolicy.contracts.samples import calibration, name_of, tensor, transforms
from kvpolicy.errors import CacheError, RecipeError
from kvpolicy.interfaces.quantizer import AffineQuantizer
from kvpolicy.interfaces.site import Site
from kvpolicy.interfaces.transform import Transform
from kvpolicy.plugins import registry
from kvpolicy.storage.base import Store
from kvpolicy.storage.chain import Chain
from kvpolicy.storage.coded import CodedStore
from kvpolicy.storage.make import make_store

TRANSFORMS = transforms()
EVERY = pytest.mark.parametrize("transform", TRANSFORMS, ids=[name_of(transform) for transform in TRANSFORMS])
DIMS = pytest.mark.parametrize("head_dim", [16, 64, 80, 96, 128])
LAYOUTS = pytest.mark.parametrize("layout", ["token", "channel"])
BATCH, HEADS, TOKENS = 2, 3, 40
PLACES = torch.arange(TOKENS)


def _rotary(positions: Tensor) -> tuple[Tensor, Tensor]:
    angles = positions.float().unsqueeze(-1) * 10.0 ** (-torch.arange(8) / 2)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def _site(head_dim: int) -> Site:
    return Site(3, 8, "keys", HEADS, head_dim, _rotary, fitted=calibration(HEADS, head_dim))


@pytest.fixture(autouse=True)
def _fits(request: pytest.FixtureRequest) -> None:
    transform: Transform = request.getfixturevalue("transform")
    head_dim = request.getfixturevalue("head_dim") if "head_dim" in request.fixturenames else 64
    try:
        Chain((transform,), _site(head_dim))
    except RecipeError as error:
        pytest.skip(str(error))


def _queries(head_dim: int, rows: int = BATCH) -> Tensor:
    """The least and the greatest of each channel."""
    x = tensor((BATCH, HEADS, TOKENS, head_dim), torch.float32, seed=7)
    return torch.stack([x.amin(2).clamp(max=0.0), x.amax(2).clamp(min=0.0)], dim=2)[:rows]


def _fit(transform: Transform, x: Tensor) -> dict[str, Tensor]:
    asked = _queries(x.shape[3], len(x)) if "queries" in transform.needed() else None
    return transform.fit(x, asked, _site(x.shape[3]))


def _fitted(transform: Transform, head_dim: int) -> tuple[Tensor, dict[str, Tensor]]:
    x = tensor((BATCH, HEADS, TOKENS, head_dim), torch.float64)
    return x, _fit(transform, x)


@EVERY
def test_it_needs_what_its_class_says(transform: Transform) -> None:
    assert transform.needed() <= type(transform).needs, "needed must give a part of needs"
    if "queries" not in transform.needed():
        return
    site = replace(_site(64), side="values")
    with pytest.raises(RecipeError, match="needs queries, which meet keys alone"):
        Chain((transform,), site)
    with pytest.raises(CacheError, match="must be shown queries before keys are coded"):
        Chain((transform,), _site(64)).forward(tensor((1, 1, 2, 64), torch.float32), None)


@EVERY
def test_queries_may_be_of_any_size(transform: Transform) -> None:
    x = tensor((BATCH, HEADS, TOKENS, 64), torch.float32)
    for factor in (0.0, 1e-6, 1e4):
        chain = Chain((transform,), _site(64))
        chain.heed(_queries(64) * factor)
        chain.heed(_queries(64) * factor * 0.5)
        back = chain.inverse(chain.forward(x, PLACES.view(1, 1, -1)), PLACES.view(1, 1, -1))
        assert torch.allclose(back, x, rtol=1e-4, atol=1e-4), "inverse(forward(x)) must be x whatever queries were"


@EVERY
def test_butterflies_are_sums_and_differences(transform: Transform) -> None:
    """Backends compute them in its place."""
    x, state = _fitted(transform, 64)
    if not transform.butterflies or state:
        return
    y, width = x, 1
    while width < 64:
        a, b = y.unflatten(-1, (-1, 2, width)).unbind(-2)
        y, width = torch.stack([a + b, a - b], dim=-2).flatten(-3), 2 * width
    assert torch.equal(transform.forward(x, state, None), y * 64**-0.5), "forward must be the Hadamard matrix"


@EVERY
def test_divisors_divide_and_multiply(transform: Transform) -> None:
    """They are used in its place."""
    x, state = _fitted(transform, 64)
    name = type(transform).divides
    if name is None or set(state) != {name}:
        return
    divisors = state[name].to(x.dtype)
    assert torch.equal(transform.forward(x, state, None), x / divisors), "forward must divide by the divisors"
    assert torch.equal(transform.inverse(x, state, None), x * divisors), "inverse must multiply by the divisors"
    back = transform.adjoint(x, state)
    assert back is not None, "adjoint must multiply by the divisors, found None"
    assert torch.equal(back, x * divisors), "adjoint must multiply by the divisors"


@EVERY
@DIMS
def test_the_inverse_gives_back_what_went_through(transform: Transform, head_dim: int) -> None:
    x, state = _fitted(transform, head_dim)
    places = PLACES.expand(BATCH, 1, -1) if "positions" in transform.needed() else None
    y = transform.forward(x, state, places)
    assert y.shape == x.shape, f"forward must give {tuple(x.shape)}, found {tuple(y.shape)}"
    assert y.dtype == x.dtype, f"forward must stay in {x.dtype}, found {y.dtype}"
    back = transform.inverse(y, state, places)
    worst = float((back - x).abs().max() / x.abs().max())
    assert worst < 1e-5, f"inverse(forward(x)) must be x, found a relative error of {worst:.2g}"


@EVERY
@DIMS
def test_the_adjoint_moves_the_inverse_to_the_query(transform: Transform, head_dim: int) -> None:
    x, state = _fitted(transform, head_dim)
    q = tensor((BATCH, HEADS, 5, head_dim), torch.float64, seed=1)
    mapped = transform.adjoint(q, state)
    if "positions" in transform.needed() or mapped is None:
        pytest.skip("it has no adjoint: stores are decoded block by block")
    y = transform.forward(x, state, None)
    one, other = q @ transform.inverse(y, state, None).transpose(2, 3), mapped @ y.transpose(2, 3)
    close = torch.allclose(one, other, rtol=1e-9, atol=1e-9 * float(one.abs().max()))
    assert close, "<q, inverse(y)> must be <adjoint(q), y>"
    weights = torch.rand(BATCH, HEADS, 5, TOKENS, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    one, other = weights @ transform.inverse(y, state, None), transform.inverse(weights @ y, state, None)
    assert torch.allclose(one, other, rtol=1e-9, atol=1e-9 * float(one.abs().max())), "inverse must be linear"


def _odd(head_dim: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Tokens that plugins forget: what they divide by may be zero."""
    x = tensor((BATCH, HEADS, TOKENS, head_dim), dtype)
    spike = torch.zeros_like(x)
    spike[:, :, 3, 1] = 100
    gaps = x.masked_fill(torch.arange(head_dim) % 3 == 0, 0.0)
    return {"zeros": x * 0, "a spike": spike, "equal numbers": x * 0 + 3, "channels of zeros": gaps, "one": x[:, :, :1]}


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_numbers_give_numbers(transform: Transform, dtype: torch.dtype) -> None:
    for what, x in _odd(64, dtype).items():
        chain, places = Chain((transform,), _site(64)), PLACES[: x.shape[2]].view(1, 1, -1)
        chain.heed(_queries(64))
        y = chain.forward(x, places)
        assert y.isfinite().all(), f"forward must give numbers for {what}, found nan or inf"
        assert chain.inverse(y, places).isfinite().all(), f"inverse must give numbers for {what}, found nan or inf"
        if chain.linear:
            for seed in range(3):  # the answer is None always or never
                q = tensor((BATCH, HEADS, seed + 1, 64), torch.float32, seed)
                assert chain.adjoint(q).isfinite().all(), f"adjoint must give numbers after {what}, found nan or inf"


@EVERY
def test_what_is_kept_does_not_depend_on_how_many_tokens_there_are(transform: Transform) -> None:
    chain = Chain((transform,), _site(64))
    chain.heed(_queries(64))
    chain.check_state(tensor((BATCH, HEADS, TOKENS, 64), torch.float32))


@EVERY
def test_rows_and_heads_are_fitted_each_for_itself(transform: Transform) -> None:
    x, state = _fitted(transform, 64)
    places = PLACES.expand(BATCH, 1, -1) if "positions" in transform.needed() else None
    whole = transform.forward(x, state, places)
    for row in range(BATCH):
        alone = x[row : row + 1]
        one = None if places is None else places[:1]
        asked = _queries(64)[row : row + 1] if "queries" in transform.needed() else None
        found = transform.forward(alone, transform.fit(alone, asked, _site(64)), one)
        assert torch.allclose(found, whole[row : row + 1]), "a row must not depend on the others"


def _quantizer(transform: Transform, layout: str) -> AffineQuantizer:
    cls: Any = registry().quantizers["int"].cls
    made = cls(nbits=8, per=layout, group_size=8, transforms=(transform,))
    assert isinstance(made, AffineQuantizer)
    return made


def _filled(transform: Transform, layout: str, x: Tensor, *cuts: int) -> Store:
    store = make_store(_quantizer(transform, layout), x.shape[3], _site(x.shape[3]))
    assert isinstance(store, CodedStore)
    assert store.chain is not None
    store.chain.heed(_queries(x.shape[3], len(x)))
    for part, places in zip(x.tensor_split(cuts, dim=2), PLACES[: x.shape[2]].tensor_split(cuts), strict=True):
        store.append(part, None, places)
    return store


def _decoded(store: Store, x: Tensor) -> Tensor:
    out = torch.full_like(x, torch.nan)
    store.write(out, 0)
    return out


@EVERY
@LAYOUTS
def test_what_is_stored_decodes_to_what_came(transform: Transform, layout: str) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = tensor((BATCH, HEADS, TOKENS - 3, 64), dtype)
        store = _filled(transform, layout, x)
        found = _decoded(store, x)
        error = float((found.float() - x.float()).square().mean().sqrt())
        assert error < 0.02 * float(x.float().abs().max()), f"8 bits must come near, found an error of {error:.3g}"
        if layout == "channel":
            waiting = found[:, :, 32:]
            assert torch.equal(waiting, x[:, :, 32:]), "tokens that wait for their group must stay as they came"


@EVERY
@LAYOUTS
def test_later_tokens_may_come_in_any_pieces(transform: Transform, layout: str) -> None:
    x = tensor((BATCH, HEADS, TOKENS, 64), torch.float32)
    whole = _decoded(_filled(transform, layout, x, 8), x)
    for cuts in ((8, 9, 10, 30), (8, 16, 39), tuple(range(8, TOKENS))):
        assert torch.equal(_decoded(_filled(transform, layout, x, *cuts), x), whole)


@EVERY
@LAYOUTS
def test_tokens_rows_and_files_follow(transform: Transform, layout: str) -> None:
    x = tensor((BATCH, HEADS, TOKENS, 64), torch.float32)
    store = _filled(transform, layout, x, 21)
    whole = _decoded(store, x)
    keep = torch.arange(TOKENS) % 3 != 1
    store.drop((~keep).nonzero()[:, 0].numpy())
    store.select(torch.tensor([1, 0, 1]))
    expected = whole[[1, 0, 1]][:, :, keep]
    assert torch.equal(_decoded(store, expected), expected)
    other = make_store(_quantizer(transform, layout), 64, _site(64))
    assert other is not None
    other.restore({name: part.clone() for name, part in store.tensors().items()})
    assert torch.equal(_decoded(other, expected), expected)
    held = sum(t.numel() * t.element_size() for t in store.tensors().values())
    assert sum(store.bytes().values()) == sum(other.bytes().values()) == held, "bytes must be those of all tensors"


@EVERY
@LAYOUTS
def test_attention_reads_what_decoding_gives(transform: Transform, layout: str) -> None:
    x = tensor((BATCH, HEADS, TOKENS - 3, 64), torch.float32)
    store = _filled(transform, layout, x, 9, 10)
    dense = torch.cat([part for _, part in store.decoded(7, torch.float32)], dim=2).double()
    rows = tensor((BATCH, HEADS, 5, 64), torch.float32, seed=3)
    scores = torch.zeros(BATCH, HEADS, 5, TOKENS - 3)
    key_scores(store, rows, scores, 0)
    exact = rows.double() @ dense.transpose(2, 3)
    assert torch.allclose(scores.double(), exact, rtol=1e-4, atol=1e-5 * float(exact.abs().max()))
    weights = torch.rand(scores.shape, generator=torch.Generator().manual_seed(4))
    out = torch.ones(BATCH, HEADS, 5, 64)
    add_values(store, weights, out, 0)
    exact = 1 + weights.double() @ dense
    assert torch.allclose(out.double(), exact, rtol=1e-4, atol=1e-5 * float(exact.abs().max()))
