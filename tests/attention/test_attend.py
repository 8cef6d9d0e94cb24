"""Attention from the stores equals attention over what they decode to, computed in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from recipes import NAMED, named, recipes
from torch import Tensor
from transformers import LlamaConfig

from kvpolicy import Recipe, make_cache
from kvpolicy.attention import attend, products
from kvpolicy.errors import CacheError
from kvpolicy.layer.layer import LayerCache

BATCH, KV_HEADS, GROUPS, DIM = 2, 2, 3, 16
CONFIG = LlamaConfig(num_hidden_layers=3, hidden_size=96, num_attention_heads=6, num_key_value_heads=2, head_dim=DIM)


def filled(recipe: Recipe, tokens: int, dtype: torch.dtype = torch.float32, layer: int = 1) -> LayerCache:
    x = torch.randn(2, BATCH, KV_HEADS, tokens, DIM, generator=torch.Generator().manual_seed(tokens)).to(dtype)
    tiers: LayerCache = make_cache(recipe, CONFIG).layers[layer].tiers
    for at in range(0, tokens, 50):
        tiers.add(x[0, :, :, at : at + 50], x[1, :, :, at : at + 50])
    tiers.commit()
    return tiers


def inputs(queries: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(queries)
    query = torch.randn(BATCH, KV_HEADS * GROUPS, queries, DIM, generator=generator).to(dtype)
    keys, values = torch.randn(2, BATCH, KV_HEADS, queries, DIM, generator=generator).to(dtype)
    return query, (keys, values)


def reference(
    tiers: LayerCache,
    query: Tensor,
    new: tuple[Tensor, Tensor],
    mask: Tensor | None = None,
    scaling: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    keys, values = (torch.cat([x, n], dim=2).double() for x, n in zip(tiers.dense(), new, strict=True))
    keys, values = (x.repeat_interleave(GROUPS, dim=1) for x in (keys, values))
    scores = query.double() @ keys.transpose(2, 3) * (scaling or DIM**-0.5)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    n, held, seen = query.shape[2], keys.shape[2] - query.shape[2], tiers.seen
    if mask is None or mask.ndim == 2:
        visible = torch.ones(n, held + n, dtype=torch.bool)
        visible[:, held:] = torch.ones(n, n, dtype=torch.bool).tril()
        scores = scores.masked_fill(~visible, -math.inf)
    if mask is not None:
        columns = torch.cat([torch.from_numpy(tiers.positions().positions), torch.arange(seen, seen + n)])
        mask = mask[..., columns]
        mask = mask[:, None, None] if mask.ndim == 2 else mask
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask.double()
    if sinks is not None:
        scores = torch.cat([scores, sinks.double().view(1, -1, 1, 1).expand(BATCH, -1, n, -1)], dim=3)
    weights = scores.softmax(-1).nan_to_num(0.0)
    if sinks is not None:
        weights = weights[..., :-1]
    return (weights @ values).transpose(1, 2)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(recipe=recipes(DIM), tokens=st.integers(1, 260), queries=st.sampled_from([1, 1, 2, 17]))
def test_random_recipes(recipe: Recipe, tokens: int, queries: int) -> None:
    tiers = filled(recipe, tokens)
    query, new = inputs(queries)
    found = attend.attend(tiers, query, new)
    torch.testing.assert_close(found.double(), reference(tiers, query, new), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMED)
def test_everything_at_once(name: str, dtype: torch.dtype) -> None:
    tiers = filled(named(name), 230, dtype)
    query, new = inputs(5, dtype)
    mask = torch.rand(BATCH, 1, 5, 235, generator=torch.Generator().manual_seed(0)) > 0.3
    options = {"mask": mask, "scaling": 0.4, "softcap": 3.0, "sinks": torch.randn(KV_HEADS * GROUPS)}
    found = attend.attend(tiers, query, new, **options)
    assert found.dtype == dtype
    assert found.shape == (BATCH, 5, KV_HEADS * GROUPS, DIM)
    expected, eps = reference(tiers, query, new, **options), torch.finfo(dtype).eps
    # What `dense` gives is rounded to the type; attention is not.
    torch.testing.assert_close(found.double(), expected, rtol=2 * eps, atol=max(eps, 1e-5))


@pytest.mark.parametrize(
    "shape", [(BATCH, 1, 4, 204), (1, 1, 4, 204), (BATCH, KV_HEADS * GROUPS, 4, 204), (BATCH, 204)]
)
@pytest.mark.parametrize("additive", [False, True])
def test_masks_of_every_shape(shape: tuple[int, ...], additive: bool) -> None:
    tiers = filled(named("logquant"), 200)
    query, new = inputs(4)
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)) > 0.5
    if additive and len(shape) == 4:
        mask = torch.where(mask, torch.randn(shape), torch.finfo(torch.float32).min)
    found = attend.attend(tiers, query, new, mask)
    torch.testing.assert_close(found.double(), reference(tiers, query, new, mask), rtol=1e-4, atol=1e-5)


def test_rows_that_may_see_nothing_are_zero() -> None:
    tiers = filled(named("logquant"), 100)
    query, new = inputs(2)
    mask = torch.ones(BATCH, 1, 2, 102, dtype=torch.bool)
    mask[1] = False
    found = attend.attend(tiers, query, new, mask)
    assert found[0].isfinite().all()
    assert found[0].abs().min() > 0
    assert torch.equal(found[1], torch.zeros_like(found[1]))


def test_a_mask_of_another_length_is_refused() -> None:
    tiers = filled(named("logquant"), 100)
    query, new = inputs(1)
    with pytest.raises(CacheError, match="a column for each of the 101 tokens seen, found 70"):
        attend.attend(tiers, query, new, torch.ones(BATCH, 1, 1, 70, dtype=torch.bool))


@pytest.mark.parametrize("name", ["logquant", "kivi", "fractions", "arrival"])
def test_blocks_and_turns_make_no_difference(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tiers = filled(named(name), 300)
    query, new = inputs(20)
    expected = attend.attend(tiers, query, new)
    monkeypatch.setattr(products, "BLOCK", 1)
    monkeypatch.setattr(attend, "SCORES", 320 * BATCH * KV_HEADS * GROUPS * 3)
    torch.testing.assert_close(attend.attend(tiers, query, new), expected)


def test_an_infinite_value_spoils_its_own_channel_at_most() -> None:
    tiers = filled(named("logquant"), 100)
    query, (keys, values) = inputs(1)
    values[0, 0, 0, 3] = torch.nan
    found = attend.attend(tiers, query, (keys, values))
    spoilt = torch.zeros_like(found, dtype=torch.bool)
    spoilt[0, :, :GROUPS, 3] = True
    assert torch.equal(found.isnan(), spoilt)
