"""What every backend must hold: what it serves is the reference's result, which is the oracle."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kvpolicy.attention.backend import merged, observed, spec_of, split
from kvpolicy.attention.reference import REFERENCE
from kvpolicy.interfaces.backend import AttentionOptions, Backend, Part, StoreView
from kvpolicy.interfaces.component import call
from kvpolicy.interfaces.scores import Scores
from kvpolicy.placement.attention_scores import Counted, Observer
from kvpolicy.placement.padding import Padding
from kvpolicy.plugins import registry
from kvpolicy.storage.affine import AffineStore
from kvpolicy.storage.fused import encoding_of
from kvpolicy.storage.make import make_store

BACKENDS: list[Backend] = [
    info.cls(kind=info.kind) for info in registry().backends.values() if info.missing is None and info.cls.priority >= 0
]
EVERY = pytest.mark.parametrize("backend", BACKENDS, ids=[backend.kind for backend in BACKENDS])
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
HEADS, KV_HEADS = 4, 2


def _quantizer(nbits: int, per: str) -> Any:
    known: Any = registry().quantizers["int"].cls
    return known(kind="int", nbits=nbits, per=per, group_size=32)


def _part(head_dim: int, dtype: torch.dtype, device: str, batch: int) -> tuple[Part, Tensor]:
    """Two stores a side, their borders at different tokens, and the tokens coming in."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((3, batch, KV_HEADS, 150, head_dim), generator=generator).to(device, dtype)
    query = torch.randn((batch, HEADS, 3, head_dim), generator=generator).to(device, dtype)
    views = []
    for kept, border, per in ((x[0], 96, "channel"), (x[1], 64, "token")):
        stores = [make_store(_quantizer(2, per), head_dim), make_store("full", head_dim)]
        for store, tokens in zip(stores, (kept[:, :, :border], kept[:, :, border:147]), strict=True):
            assert store is not None
            store.append(tokens)
        views.append((StoreView(stores[0], 0), StoreView(stores[1], border)))
    new = x[0][:, :, 147:], x[1][:, :, 147:]
    positions = torch.arange(147, device=device)
    return Part(views[0], views[1], 147, False, lambda: positions, KV_HEADS, head_dim, new), query


@EVERY
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_dim", [64, 96, 128])
@pytest.mark.parametrize("case", ["plain", "softcap", "sinks", "mask", "nothing"])
def test_what_it_serves_is_the_reference(
    backend: Backend, case: str, head_dim: int, dtype: torch.dtype, device: str
) -> None:
    part, query = _part(head_dim, dtype, device, 2)
    options = AttentionOptions(head_dim**-0.5)
    if case in ("softcap", "sinks"):
        sinks = torch.tensor([0.5, -1.0, 2.0, 0.0], device=device)
        options = replace(options, softcap=5.0) if case == "softcap" else replace(options, sinks=sinks)
    mask = None
    if case in ("mask", "nothing"):
        mask = torch.rand((2, 1, 1, 1, 150), generator=torch.Generator().manual_seed(1)).to(device) > 0.3
        mask[1] = mask[1] & (case == "mask")
    for number, piece in enumerate([part, *split(part)]):
        asked = options if number < 2 else replace(options, sinks=None)
        if call(backend, "refuses", spec_of(query, piece, mask, asked, False)) is not None:
            continue
        if call(backend, "declines", query, piece, mask, asked) is not None:
            continue
        expected, expected_lse = REFERENCE.attend(query, piece, mask, asked)
        found, lse = backend.attend(query, piece, mask, asked)
        assert found.dtype == lse.dtype == torch.float32
        atol = 2e-5 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(found, expected, rtol=0.0, atol=atol)
        torch.testing.assert_close(lse, expected_lse, rtol=0.0, atol=atol)


@EVERY
def test_it_answers_the_same_each_time(backend: Backend) -> None:
    part, query = _part(64, torch.float32, "cpu", 1)
    spec = spec_of(query, part, None, AttentionOptions(1.0), False)
    answers = {call(backend, "refuses", spec) for _ in range(3)}
    assert len(answers) == 1
    assert all(answer is None or isinstance(answer, str) for answer in answers)


def test_parts_are_merged_to_the_whole() -> None:
    part, query = _part(64, torch.float32, "cpu", 2)
    options = AttentionOptions(0.125)
    whole = REFERENCE.attend(query, part, None, options)
    pieces = [REFERENCE.attend(query, piece, None, options) for piece in split(part)]
    assert len(pieces) == 2  # the borders of keys and values differ: what is held stays together
    for found, expected in zip(merged(pieces), whole, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


KINDS = {
    "sums": (Scores("probe", random=0.2), Scores("all", heads="sum"), Scores("newest", newest=20)),
    "queries": (Scores("all", heads="max"), Scores("last")),
}
PROMPT = 150


def _weights(query: Tensor, keys: Tensor, visible: Tensor, options: AttentionOptions) -> Tensor:
    """Of every query on every token, in float64: `[batch, kv_heads, groups, queries, tokens]`."""
    grouped = query.double().unflatten(1, (KV_HEADS, -1))
    scores = grouped @ keys.double().unsqueeze(2).transpose(3, 4) * options.scaling
    if options.softcap is not None:
        scores = options.softcap * (scores / options.softcap).tanh()
    weights: Tensor = scores.masked_fill(~visible.unsqueeze(2), -torch.inf).softmax(-1).nan_to_num(0.0)
    return weights


def _expected(weights: Tensor, visible: Tensor, kind: Scores, counted: Tensor) -> Tensor:
    """What tokens received, and how many of the queries that count could see them: `[batch, kv_heads, tokens, 2]`."""
    reduced = {"mean": weights.mean(2), "sum": weights.sum(2), "max": weights.amax(2)}[kind.heads]
    share = counted.to(weights.device).double()[:, None, :, None]
    seen = visible.double().expand(*reduced.shape)
    return torch.stack([(reduced * share).sum(2), (seen * share).sum(2)], dim=3)


@EVERY
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("padded", [False, True], ids=["plain", "padded"])
@pytest.mark.parametrize("kinds", list(KINDS))
def test_what_it_observes_is_the_attention_of_the_queries_that_count(
    backend: Backend, kinds: str, padded: bool, dtype: torch.dtype, device: str
) -> None:
    generator = torch.Generator().manual_seed(3)
    query = torch.randn((2, HEADS, PROMPT, 64), generator=generator).to(device, dtype)
    keys = torch.randn((2, KV_HEADS, PROMPT, 64), generator=generator).to(device, dtype)
    real = np.ones((2, PROMPT), dtype=np.bool_)
    real[1, :37] = not padded
    padding = Padding.none(2, 0).append(real) if padded else None
    counted = Counted.of(KINDS[kinds], PROMPT, 0, padding, keep=24)
    observer = Observer(counted, 2, KV_HEADS)
    visible = torch.ones(PROMPT, PROMPT, dtype=torch.bool).tril() & torch.from_numpy(real)[:, None, None]
    visible = visible.to(device)
    options = AttentionOptions(0.125, softcap=4.0 if padded else None, observer=observer)
    shown = query.clone(), keys.clone()
    done = observed(backend, query, keys, visible if padded else None, options)
    assert torch.equal(query, shown[0])
    assert torch.equal(keys, shown[1])
    assert observer.told == done  # the reference then begins with an observer that knows nothing
    if not done:
        return
    found = torch.zeros((2, KV_HEADS, PROMPT, 2 * len(counted.kinds)), device=device)
    observer.add(found, 0, PROMPT)
    weights = _weights(query, keys, visible, options)
    tolerance = 1e-4 if dtype == torch.float32 else 1e-2
    for k, (kind, mask) in enumerate(zip(counted.kinds, counted.masks, strict=True)):
        expected = _expected(weights, visible, kind, mask)
        torch.testing.assert_close(found[..., 2 * k].double(), expected[..., 0], rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(found[..., 2 * k + 1].double(), expected[..., 1], rtol=0.0, atol=1e-3)


CODED: list[dict[str, Any]] = [
    {"nbits": 2, "group_size": 32},
    {"nbits": 3, "group_size": 64, "symmetric": True},
    {"nbits": 4, "per": "channel", "group_size": 32},
    {"nbits": 2, "per": "channel", "group_size": 16, "scale_dtype": "float8_e4m3"},
    {"nbits": 8, "range": "rms", "group_size": "head", "transforms": ("hadamard",)},
    {"nbits": 2, "group_size": "head", "transforms": ("scale",)},
    {"nbits": 4, "per": "channel", "group_size": "arrival"},
]


def _given(shape: tuple[int, ...], dtype: torch.dtype, device: str, seed: int) -> Tensor:
    """Numbers of many sizes, with zeros, equal ones, an infinity and a nan among them, not side by side in memory."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * torch.exp(torch.randn((*shape[:3], 1), generator=generator))
    x[0, 0, 0], x[0, 0, 1], x[0, 1, 2, 5], x[1, 0, 3, 7] = 0.0, 0.25, torch.inf, torch.nan
    return x.to(device, dtype).transpose(1, 2).contiguous().transpose(1, 2)


def _place(like: Tensor) -> tuple[Tensor, Tensor]:
    """Where something goes within a larger page, and that page, all of it the same byte."""
    page = like.new_empty((*like.shape[:2], like.shape[2] + 5, like.shape[3]))
    page.view(torch.uint8).fill_(77)
    return page[:, :, 2 : 2 + like.shape[2]], page


@EVERY
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", CODED, ids=str)
def test_what_it_codes_is_what_pytorch_codes_to_the_bit(
    backend: Backend, options: dict[str, Any], dtype: torch.dtype, device: str
) -> None:
    if backend.device not in (None, device):
        return
    known: Any = registry().quantizers["int"].cls
    rotations = tuple(registry().transforms[kind].cls(kind=kind) for kind in options.get("transforms", ()))
    store = AffineStore(known(kind="int", **{**options, "transforms": rotations}), 64)
    encoding = encoding_of(store, dtype)
    assert encoding is not None
    answers = [call(backend, "encodes", encoding) for _ in range(2)]
    assert answers in ([False, False], [True, True])
    if not answers[0]:
        return
    pieces, pages, every = [], [], []
    for seed in range(2):
        x = _given((2, 2, 64, 64), dtype, device, seed)
        if store.chain is not None:
            store.chain.begin(x)
        coded = store.encode(x, store.group_size or x.shape[2])
        chain = store.chain
        beside = (chain.state[0]["divisors"],) if encoding.divided and chain is not None else ()
        places = [_place(part) for part in coded]
        pieces.append((x, places[0][0], places[1][0], *beside))
        pages.append([page for _, page in places])
        every.append((x, x.clone(), coded))
    call(backend, "encode", encoding, pieces)
    for own, kept, (x, before, coded) in zip(pieces, pages, every, strict=True):
        assert torch.equal(x.view(torch.int16), before.view(torch.int16))
        for found, page, expected in zip(own[1:3], kept, coded, strict=True):
            torch.testing.assert_close(found, expected, rtol=0.0, atol=0.0, equal_nan=True)
            around = torch.cat([page[:, :, :2], page[:, :, 2 + found.shape[2] :]], dim=2)
            assert (around.contiguous().view(torch.uint8) == 77).all()


@EVERY
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("tokens", [1, 5])
def test_what_it_copies_stands_where_it_belongs(backend: Backend, tokens: int, device: str) -> None:
    if backend.device not in (None, device):
        return
    given = [_given((2, KV_HEADS, 8, 64), torch.bfloat16, device, seed)[:, :, :tokens] for seed in range(3)]
    pages = [torch.full((2, KV_HEADS, 32, 64), 7.0, dtype=torch.bfloat16, device=device) for _ in given]
    expected = [page.clone() for page in pages]
    size = pages[0].element_size()
    steps = size * pages[0].stride(0), size * pages[0].stride(1), size * pages[0].stride(2)
    addresses = [page.data_ptr() + 3 * steps[2] for page in pages]
    if call(backend, "copies", given, addresses, steps):
        for page, x in zip(expected, given, strict=True):
            page[:, :, 3 : 3 + tokens] = x
    bits = [(a.view(torch.int16), b.view(torch.int16)) for a, b in zip(pages, expected, strict=True)]
    assert all(torch.equal(a, b) for a, b in bits)


@EVERY
@pytest.mark.parametrize("device", DEVICES)
def test_what_it_moves_within_pages_stands_where_it_belongs(backend: Backend, device: str) -> None:
    if backend.device not in (None, device):
        return
    pages = [torch.randn((2, KV_HEADS, 32, 64), device=device).to(torch.bfloat16) for _ in range(3)]
    expected = [page.clone() for page in pages]
    sources = [torch.arange(28, 32, device=device).expand(2, KV_HEADS, -1).contiguous() for _ in pages]
    places = [torch.tensor([1, 4, 9, 20], device=device).expand(2, KV_HEADS, -1).contiguous() for _ in pages]
    if call(backend, "shifts", pages, sources, places):
        for page in expected:
            page[:, :, [1, 4, 9, 20]] = page[:, :, 28:]
    assert all(map(torch.equal, pages, expected))
