"""What every extra must hold, beside codes of two bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kvpolicy.attention.products import add_values, key_scores
from kvpolicy.contracts.samples import extras, name_of, tensor
from kvpolicy.errors import PluginError, RecipeError
from kvpolicy.interfaces.component import check_answer
from kvpolicy.interfaces.extra import Extra, Grouping
from kvpolicy.interfaces.site import Site
from kvpolicy.plugins import registry
from kvpolicy.storage.beside import Beside
from kvpolicy.storage.make import make_store

EXTRAS = extras()
EVERY = pytest.mark.parametrize("extra", EXTRAS, ids=[name_of(extra) for extra in EXTRAS])
LAYOUTS = pytest.mark.parametrize("layout", ["token", "channel"])
BATCH, HEADS, TOKENS, DIM, SIZE = 2, 3, 40, 64, 8


@pytest.fixture(autouse=True)
def _fits(request: pytest.FixtureRequest) -> None:
    extra: Extra = request.getfixturevalue("extra")
    layouts: list[Any] = (
        [request.getfixturevalue("layout")] if "layout" in request.fixturenames else ["token", "channel"]
    )
    for layout in layouts:
        try:
            beside = Beside((extra,), Site(0, 1, "keys", HEADS, DIM), Grouping(layout, SIZE))
            beside.take(tensor((1, HEADS, SIZE, DIM), torch.float32))
        except RecipeError as error:
            pytest.skip(str(error))
        except PluginError:
            return  # a test will say so


def _store(extra: Extra, layout: str, x: Tensor, *cuts: int) -> Any:
    cls: Any = registry().quantizers["int"].cls
    store = make_store(cls(nbits=2, per=layout, group_size=SIZE, extras=(extra,)), DIM)
    assert store is not None
    for part in x.tensor_split(cuts, dim=2):
        store.append(part)
    return store


def _decoded(store: Any, x: Tensor) -> Tensor:
    out = torch.full_like(x, torch.nan)
    store.write(out, 0)
    return out


@EVERY
@LAYOUTS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_what_was_taken_comes_back_exactly(extra: Extra, layout: Any, dtype: torch.dtype) -> None:
    x = tensor((BATCH, HEADS, SIZE, DIM), dtype)
    shown = x.clone()
    rest, parts = extra.take(shown, Grouping(layout, SIZE), Site(0, 1, "keys", HEADS, DIM))
    assert torch.equal(shown, x), "take must not change its argument"
    assert (rest.shape, rest.dtype) == (x.shape, x.dtype), "what is left must be like what was given"
    assert rest.isfinite().all(), "what is left must be finite"
    if not parts:
        assert torch.equal(rest, x), "an extra that keeps nothing must leave all"
        return
    out = rest.float()
    if type(extra).fit is Extra.fit:
        extra.add(out, parts)
        assert torch.equal(out.to(dtype), x), "take, then add must give back what was given"


@EVERY
@LAYOUTS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_numbers_give_numbers(extra: Extra, layout: Any, dtype: torch.dtype) -> None:
    x = tensor((BATCH, HEADS, SIZE, DIM), dtype)
    spike = torch.zeros_like(x)
    spike[:, :, 3, 1] = 100
    for what, tokens in {"zeros": x * 0, "a spike": spike, "equal numbers": x * 0 + 3}.items():
        store = _store(extra, layout, tokens)
        found = {"decoding": _decoded(store, tokens)}
        rows, weights = tensor((BATCH, HEADS, 2, DIM), torch.float32), torch.ones(BATCH, HEADS, 2, SIZE)
        found["add_scores"], found["add_values"] = torch.zeros_like(weights), torch.zeros_like(rows)
        key_scores(store, rows, found["add_scores"], 0)
        add_values(store, weights, found["add_values"], 0)
        for name, numbers in found.items():
            assert numbers.isfinite().all(), f"{name} must give numbers for {what}, found nan or inf"


@EVERY
def test_groups_are_refused_by_an_error(extra: Extra) -> None:
    for grouping in (Grouping("token", 16), Grouping("channel", 32), Grouping("channel", 0)):
        try:
            check_answer(extra, "check_grouping", grouping)
        except RecipeError:
            continue


@EVERY
@LAYOUTS
def test_decoding_comes_nearer_and_stays_as_it_is(extra: Extra, layout: Any) -> None:
    x = tensor((BATCH, HEADS, TOKENS, DIM), torch.float32)
    store = _store(extra, layout, x, 8)
    whole = _decoded(store, x)
    cls: Any = registry().quantizers["int"].cls
    bare = make_store(cls(nbits=2, per=layout, group_size=SIZE), DIM)
    assert bare is not None
    bare.append(x)
    errors = [float((found - x).square().mean()) for found in (whole, _decoded(bare, x))]
    assert errors[0] <= errors[1] * (2 if extra.unbiased else 1.001), (
        f"an extra must not make it worse, found {errors[0]:.4g} over {errors[1]:.4g}"
    )
    held = sum(t.numel() * t.element_size() for t in store.tensors().values())
    assert sum(store.bytes().values()) == held, "bytes must be those of all tensors"
    other = _store(extra, layout, x[:, :, :0])
    other.restore({name: t.clone() for name, t in store.tensors().items()})
    keep = torch.arange(TOKENS) % 3 != 1
    for one in (store, other):
        one.drop((~keep).nonzero()[:, 0].numpy())
        one.select(torch.tensor([1, 0, 1]))
        expected = whole[[1, 0, 1]][:, :, keep]
        assert torch.equal(_decoded(one, expected), expected), "what stays must decode to the same"


@EVERY
@LAYOUTS
@pytest.mark.parametrize("heads", [1, HEADS], ids=["rows", "heads"])
def test_tokens_follow_where_rows_differ(extra: Extra, layout: Any, heads: int) -> None:
    x = tensor((BATCH, HEADS, TOKENS, DIM), torch.float32)
    store = _store(extra, layout, x, 16)
    whole = _decoded(store, x)
    store.differ_by_head((BATCH, heads))
    generator = torch.Generator().manual_seed(1)
    index = torch.stack([torch.randperm(TOKENS, generator=generator)[:17] for _ in range(BATCH * heads)])
    index = index.view(BATCH, heads, 17).sort(2).values
    expected = whole.gather(2, index[..., None].expand(BATCH, HEADS, -1, DIM))
    assert torch.equal(store.gather(index, x.dtype), expected)
    store.remove(index)
    gone = torch.zeros(BATCH, HEADS, TOKENS, dtype=torch.bool).scatter_(2, index.expand(BATCH, HEADS, -1), True)
    found = store.gather(torch.arange(TOKENS - 17).expand(BATCH, heads, -1), x.dtype)
    for row, stays in enumerate((~gone).flatten(0, 1)):
        left, right = whole.flatten(0, 1)[row, stays], found.flatten(0, 1)[row]
        assert torch.equal(left.sort(0).values, right.sort(0).values), "tokens must stay as they were as others leave"


@EVERY
@LAYOUTS
def test_attention_reads_what_decoding_gives(extra: Extra, layout: Any) -> None:
    x = tensor((BATCH, HEADS, TOKENS - 3, DIM), torch.float32)
    store = _store(extra, layout, x, 9, 10)
    dense = torch.cat([part for _, part in store.decoded(7, torch.float32)], dim=2).double()
    rows = tensor((BATCH, HEADS, 5, DIM), torch.float32, seed=3)
    scores = torch.zeros(BATCH, HEADS, 5, TOKENS - 3)
    key_scores(store, rows, scores, 0)
    exact = rows.double() @ dense.transpose(2, 3)
    assert torch.allclose(scores.double(), exact, rtol=1e-4, atol=1e-5 * float(exact.abs().max()))
    weights = torch.rand(scores.shape, generator=torch.Generator().manual_seed(4))
    out = torch.ones(BATCH, HEADS, 5, DIM)
    add_values(store, weights, out, 0)
    exact = 1 + weights.double() @ dense
    assert torch.allclose(out.double(), exact, rtol=1e-4, atol=1e-5 * float(exact.abs().max()))
