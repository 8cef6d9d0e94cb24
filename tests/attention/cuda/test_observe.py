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
from kvpolicy.attention.cuda.observe import Sums
from kvpolicy.interfaces.scores import Scores
from kvpolicy.placement.attention_scores import Counted, Observer
from kvpolicy.placement.padding import Padding

absent = "no CUDA device" if not torch.cuda.is_available() else missing()
pytestmark = pytest.mark.skipif(absent is not None, reason=f"the kernels can't run: {absent}")
PROBES = Scores(queries="probe", heads="sum", newest=32, random=0.2, seed=3)
ALL = Scores(queries="all", heads="mean")


def found(
    query: Tensor, keys: Tensor, counted: Counted, heads: int, mask: Tensor | None, options: dict[str, Any]
) -> list[tuple[Tensor, Tensor]]:
    observer = Observer(counted, keys.shape[0], heads)
    options = {name: x.to(query.device) if isinstance(x, Tensor) else x for name, x in options.items()}
    observe(query, keys, observer, mask, **options)
    return [(x[0].cpu(), x[1].cpu()) for x in observer.found if x is not None and x[1] is not None]


@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("masked", ["none", "padded left", "padded right", "2-D"])
def test_sums_of_attention(dim: int, masked: str) -> None:
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


def test_kernels_serve_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """That is, the reference is not asked."""
    query = torch.randn(1, 4, 300, 64, device="cuda", dtype=torch.bfloat16)
    monkeypatch.setattr("kvpolicy.attention.attend.weights", None)
    found(query, query[:, :2].contiguous(), Counted.of([ALL], 300, 0, None, 0), 2, None, {})
    assert any(backend.kind == "cuda" for backend in others())
    assert Sums(64, True, False).rows == 256
