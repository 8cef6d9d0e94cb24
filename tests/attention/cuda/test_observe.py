"""On a GPU kernels sum up what tokens of a prompt receive of attention as the reference does."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kvpolicy.attention.attend import observe
from kvpolicy.attention.backend import others
from kvpolicy.attention.cuda.compile import missing
from kvpolicy.attention.cuda.observe import COLUMNS, LOG2E, Call, Queries, Sums, has_groups, weighed
from kvpolicy.interfaces.backend import AttentionOptions
from kvpolicy.interfaces.scores import Scores
from kvpolicy.placement.attention_scores import Counted, Observer
from kvpolicy.placement.padding import Padding

absent = "no CUDA device" if not torch.cuda.is_available() else missing()
pytestmark = pytest.mark.skipif(absent is not None, reason=f"the kernels can't run: {absent}")
PROBES = Scores(queries="probe", heads="sum", newest=32, random=0.2, seed=3)
ALL = Scores(queries="all", heads="mean")
SHAPES = [
    (300, 300, 2, 2, 4),
    (1025, 1025, 1, 3, 1),
    (700, 200, 2, 2, 4),
    (129, 129, 1, 2, 2),
    (1500, 1, 1, 2, 8),
    (5, 5, 1, 1, 60),
]
"""Tokens, queries, rows, KV heads, and heads of each."""


def found(
    query: Tensor, keys: Tensor, counted: Counted, heads: int, mask: Tensor | None, options: dict[str, Any]
) -> list[tuple[Tensor, Tensor]]:
    observer = Observer(counted, keys.shape[0], heads)
    options = {name: x.to(query.device) if isinstance(x, Tensor) else x for name, x in options.items()}
    observe(query, keys, observer, mask, **options)
    return [(x[0].cpu(), x[1].cpu()) for x in observer.found if x is not None and x[1] is not None]


@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("masked", ["none", "padded left", "padded right", "2-D"])
@pytest.mark.parametrize("grouped", [True, False])
def test_sums_of_attention(dim: int, masked: str, grouped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not grouped:
        if masked != "none" or not has_groups(torch.cuda.current_device()):
            pytest.skip("the same kernels again")
        monkeypatch.setattr("kvpolicy.attention.cuda.observe.has_groups", lambda device: False)
    generator = torch.Generator().manual_seed(dim)
    for number, (tokens, queries) in enumerate([(300, 300), (1025, 1025), (700, 200), (129, 129), (200, 1)]):
        batch, kv_heads, groups = (2, 2, 4) if number % 2 else (1, 3, 1)
        dtype = torch.bfloat16 if number % 2 else torch.float16
        query = torch.randn(batch, queries, kv_heads * groups, dim, generator=generator).to(dtype).transpose(1, 2)
        keys = (torch.randn(batch, tokens, kv_heads, dim, generator=generator) + 1).to(dtype).transpose(1, 2)
        real = np.ones((batch, tokens), dtype=bool)
        real[-1, slice(0, 70) if masked == "padded left" else slice(tokens - 70, tokens)] = False
        real |= masked == "none"
        seen = torch.from_numpy(real)
        later = torch.arange(tokens) > torch.arange(queries)[:, None] + tokens - queries
        mask = None if masked == "none" else seen if masked == "2-D" else seen[:, None, None] & ~later
        padding = None if masked == "none" else Padding.none(batch, 0).append(real)
        for options in ({}, {"softcap": 3.0}, {"sinks": torch.randn(kv_heads * groups, generator=generator)}):
            for heads, kinds in ((kv_heads, [PROBES]), (1, [ALL]), (kv_heads, [ALL, replace(PROBES, heads="mean")])):
                counted = Counted.of(kinds, tokens, 0, padding, 0)
                known = [n for n in counted.queries if n >= tokens - queries]
                counted = counted._replace(queries=known)
                ours = found(query.cuda(), keys.cuda(), counted, heads, None if mask is None else mask.cuda(), options)
                truth = found(query.float(), keys.float(), counted, heads, mask, options)
                assert len(ours) == len(truth) == len(kinds) or not known
                for (weights, counts), (expected, seen_by) in zip(ours, truth, strict=True):
                    torch.testing.assert_close(counts, seen_by)
                    torch.testing.assert_close(weights, expected, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("dim", [64, 80, 96, 128])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("least", "at_once"), [(8, 24 << 20), (1 << 30, 24 << 20), (1, 24 << 20), (8, 1), (1, 1)])
def test_shares_of_blocks(
    dim: int, dtype: torch.dtype, least: int, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights on warpgroups are those in float64, however tokens and queries are cut."""
    if not has_groups(torch.cuda.current_device()):
        pytest.skip("no products of warpgroups")
    for name, x in (("LEAST", least), ("AT_ONCE", at_once), ("FEW", 0)):
        monkeypatch.setattr(f"kvpolicy.attention.cuda.observe.{name}", x)
    generator = torch.Generator("cuda").manual_seed(dim)
    for tokens, asked, batch, kv_heads, groups in SHAPES:
        for some in (False, True):
            query = drawn(generator, batch, asked, kv_heads * groups, dim).to(dtype).transpose(1, 2)
            keys = drawn(generator, batch, tokens, kv_heads, dim).add_(1).to(dtype).transpose(1, 2)
            numbers = torch.randperm(asked)[: max(1, asked // 3)].sort().values if some else torch.arange(asked)
            at = torch.nn.functional.pad(numbers, (0, -len(numbers) % COLUMNS), value=int(numbers[-1])).int().cuda()
            for causal in {asked > 1, False}:
                options = AttentionOptions(dim**-0.5, None, None, None)
                call = Call(query, keys, None, options, Queries(at, numbers, {}, {}), causal)
                lse, expected = truth(call, numbers.cuda())
                assert call.variant(True).grouped
                found = weighed(call, lse).double()
                torch.testing.assert_close(found, expected, rtol=2e-4, atol=2e-5)
                assert not found[expected == 0].any()


def drawn(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, device="cuda")


def truth(call: Call, numbers: Tensor) -> tuple[Tensor, Tensor]:
    """The logarithms that the second pass is given, and what it finds, in float64; the middle query counts nothing."""
    query, keys = call.query.double()[:, :, numbers], call.keys.double()
    groups = query.shape[1] // keys.shape[1]
    scores = query @ keys.repeat_interleave(groups, 1).transpose(2, 3) * call.options.scaling
    if call.causal:
        offset = keys.shape[2] - call.query.shape[2]
        scores.masked_fill_(torch.arange(keys.shape[2], device="cuda") > numbers[:, None] + offset, -torch.inf)
    weights, middle = scores.softmax(3), len(numbers) // 2
    weights[:, :, middle] = 0.0
    lse = torch.full((*query.shape[:2], len(call.queries.at)), torch.inf, device="cuda")
    lse[..., : len(numbers)] = scores.logsumexp(3) * LOG2E
    lse[..., middle] = torch.inf
    return lse, weights.unflatten(1, (-1, groups)).sum((2, 3))


def test_kernels_serve_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """That is, the reference is not asked."""
    query = torch.randn(1, 4, 300, 64, device="cuda", dtype=torch.bfloat16)
    monkeypatch.setattr("kvpolicy.attention.attend.weights", None)
    found(query, query[:, :2].contiguous(), Counted.of([ALL], 300, 0, None, 0), 2, None, {})
    assert any(backend.kind == "cuda" for backend in others())
    assert Sums(64, True, False).rows == 256
