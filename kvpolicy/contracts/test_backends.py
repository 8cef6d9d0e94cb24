"""What every backend must hold: what it serves is the reference's result, which is the oracle."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kvpolicy.attention.backend import merged, spec_of, split
from kvpolicy.attention.reference import REFERENCE
from kvpolicy.interfaces.backend import AttentionOptions, Backend, Part, StoreView
from kvpolicy.interfaces.component import call
from kvpolicy.plugins import registry
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
