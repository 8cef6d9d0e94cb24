"""What policies are told of a prompt's attention, against the formula in float64, however it is cut into blocks."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

module = importlib.import_module("kvpolicy.attention.attend")


class Recorder:
    """Keeps the attention of each query that counts."""

    def __init__(self, queries: list[int], shape: tuple[int, ...]) -> None:
        self.offset = shape[4] - shape[3]
        self.queries = [query + self.offset for query in queries]
        self.found = torch.full(shape, torch.nan, dtype=torch.float64)
        self.visible = torch.zeros(shape, dtype=torch.bool)

    def watch(self, at: Tensor, weights: Tensor, visible: Tensor | None, heads: slice, of: int) -> None:
        assert of == self.found.shape[1]
        visible = torch.ones_like(weights, dtype=torch.bool) if visible is None else visible
        for i, query in enumerate((at - self.offset).tolist()):
            self.found[:, heads, :, query] = 0.0
            self.found[:, heads, :, query, : weights.shape[-1]] = weights[:, :, :, i].double()
            self.visible[:, heads, :, query, : weights.shape[-1]] = visible.expand_as(weights)[:, :, :, i]


def truth(query: Tensor, keys: Tensor, hidden: Tensor, softcap: float | None, sinks: Tensor | None) -> Tensor:
    _, kv_heads, tokens, dim = keys.shape
    grouped = query.double().unflatten(1, (kv_heads, -1))
    scores = grouped @ keys.double().unsqueeze(2).transpose(3, 4) * dim**-0.5
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(hidden, -torch.inf)
    if sinks is not None:
        extra = sinks.double().view(1, kv_heads, -1, 1, 1).expand(*scores.shape[:4], 1)
        return torch.cat([scores, extra], -1).softmax(-1)[..., :tokens]
    return scores.softmax(-1).nan_to_num(0.0)


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_every_query_that_counts_is_told_of_whatever_the_blocks(data: Any) -> None:
    tokens = data.draw(st.integers(1, 40), "tokens")
    queries = data.draw(st.sampled_from([tokens, max(1, tokens // 2), 1]), "queries")
    groups, kv_heads, batch = (data.draw(st.integers(1, 2), name) for name in ("groups", "kv_heads", "batch"))
    counted = sorted(data.draw(st.sets(st.integers(0, queries - 1)), "counted"))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99), "seed"))
    query = torch.randn(batch, groups * kv_heads, queries, 8, generator=generator)
    keys = torch.randn(batch, kv_heads, tokens, 8, generator=generator)
    softcap = data.draw(st.sampled_from([None, 2.0]), "softcap")
    sinks = torch.randn(groups * kv_heads, generator=generator) if data.draw(st.booleans(), "sinks") else None
    later = torch.arange(tokens) > torch.arange(queries)[:, None] + tokens - queries
    kind, hidden, mask = data.draw(st.sampled_from(["none", "2-D", "bool", "additive"]), "mask"), later, None
    if kind != "none":
        seen = torch.rand(batch, tokens, generator=generator) < 0.8
        hidden = later | ~seen[:, None, None, None]
        mask = {
            "2-D": seen,
            "bool": (~hidden)[:, 0],
            "additive": torch.zeros(hidden.shape).masked_fill(hidden, torch.finfo(torch.float32).min)[:, 0],
        }[kind]
    recorder = Recorder(counted, (batch, kv_heads, groups, queries, tokens))
    before = module.OBSERVED, module.KEYS
    module.OBSERVED = data.draw(st.sampled_from([1, 64, 1 << 19]), "scores at a time")
    module.KEYS = data.draw(st.sampled_from([1, 7, 2048]), "keys at a time")
    try:
        module.observe(query, keys, recorder, mask, softcap=softcap, sinks=sinks)
    finally:
        module.OBSERVED, module.KEYS = before
    expected = truth(query, keys, hidden, softcap, sinks)
    others = [q for q in range(queries) if q not in counted]
    assert recorder.found[:, :, :, others].isnan().all()
    torch.testing.assert_close(recorder.found[:, :, :, counted], expected[:, :, :, counted], atol=2e-6, rtol=1e-5)
    shown = ~hidden.expand(recorder.visible.shape)
    assert torch.equal(recorder.visible[:, :, :, counted], shown[:, :, :, counted])
