"""Gradients, autocast and compiled forwards; models whose attention computes on what the cache gives."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from kvpolicy import attach, make_cache
from kvpolicy.attention.attend import attend
from kvpolicy.errors import CacheError
from kvpolicy.hf.modes import precise
from kvpolicy.layer.layer import LayerCache
from tests.support.models import build, exact, ids, tiny
from tests.support.words import CACHE, cache_of


def recipe(*tiers: Any) -> dict[str, Any]:
    return {"name": "r", "tiers": list(tiers)}


SINK = {"policy": {"kind": "sink", "tokens": 4}, "store": "full"}
RECENT = {"policy": {"kind": "recent", "window": 16}, "store": "full"}
INT = {"store": {"kind": "int", "nbits": 8, "group_size": 16}}
EVICT = {"store": "evict"}
QUANTIZE, DROP = recipe(SINK, RECENT, INT), recipe(SINK, RECENT, EVICT)
SIDES = ("unattached", "attached")


def ready(model: Any, side: str) -> Any:
    return attach(model) if side == "attached" else nullcontext()


def turns(model: Any, cache: Any, tokens: torch.Tensor, sizes: tuple[int, ...], mask: Any = None) -> torch.Tensor:
    """Logits of a text given in parts."""
    out, at = [], 0
    for n in sizes:
        given: dict[str, Any] = {CACHE: cache}
        if mask is not None:
            where = (mask[:, : at + n].cumsum(1) - 1).clamp(0)[:, at:]
            given.update(attention_mask=mask[:, : at + n], position_ids=where)
        out.append(model(tokens[:, at : at + n], **given).logits.float().clone())
        at += n
    return torch.cat(out, dim=1)


# Gradients


def gradient(model: Any, cache: Any, tokens: torch.Tensor, before: int, linked: bool = False) -> torch.Tensor:
    """Of the last logits by the embeddings, where the first `before` tokens are in the cache."""
    with torch.no_grad():
        embedded = model.get_input_embeddings()(tokens)
    embedded.requires_grad_()
    if before:
        with nullcontext() if linked else torch.no_grad():
            model(inputs_embeds=embedded[:, :before], **{CACHE: cache})
    model(inputs_embeds=embedded[:, before:], **{CACHE: cache}).logits[:, -1].logsumexp(-1).sum().backward()
    assert embedded.grad is not None
    return embedded.grad


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("family", ["llama", "deepseek_v3"])
def test_gradients_of_a_first_update_are_exact(family: str, side: str) -> None:
    model = tiny(family)
    want = gradient(model, exact(model), ids(30), 0)
    with ready(model, side):
        assert torch.equal(gradient(model, make_cache(QUANTIZE, model), ids(30), 0), want)


def test_gradients_of_a_first_update_are_exact_where_attention_is_watched() -> None:
    model = tiny("llama")
    want = gradient(model, exact(model), ids(30), 0)
    with attach(model):
        got = gradient(model, make_cache("h2o", model), ids(30), 0)
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("store", ["full", "int"])
def test_gradients_reach_the_new_tokens_of_an_unattached_model(store: str) -> None:
    model = tiny("llama")
    tiers = recipe({"policy": {"kind": "recent", "window": 100}, "store": "full"}, INT) if store == "int" else "full"
    want = gradient(model, exact(model), ids(40), 30)
    torch.testing.assert_close(gradient(model, make_cache(tiers, model), ids(40), 30), want, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("family", ["llama", "deepseek_v3", "diffllama"])
@pytest.mark.parametrize("new", [1, 10])
def test_gradients_of_a_second_update_of_an_attached_model_are_refused(family: str, new: int) -> None:
    model = tiny(family) if family != "diffllama" else build(family, torch.float32)
    cache = make_cache(QUANTIZE, model)
    with attach(model):
        with pytest.raises(CacheError, match="gradients can't pass"):
            gradient(model, cache, ids(40), 40 - new)
        assert cache.get_seq_length() == 40
        model(ids(1), **{CACHE: cache})  # outside no_grad, and nobody asks for gradients


@pytest.mark.parametrize("side", ["q_proj", "k_proj", "v_proj"])
def test_gradients_of_one_side_alone_are_refused(side: str) -> None:
    model = build("llama", torch.float32, num_hidden_layers=1)
    model.requires_grad_(False)
    getattr(model.model.layers[0].self_attn, side).weight.requires_grad_()
    cache = make_cache(QUANTIZE, model)
    with attach(model):
        model(ids(30), **{CACHE: cache})
        logits = model(ids(2), **{CACHE: cache}).logits
        with pytest.raises(CacheError, match="gradients can't pass"):
            logits.sum().backward()


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", ["logquant", "kivi", "h2o", "snapkv", "key-norm", "zipcache"])
def test_stores_are_read_where_they_lie_outside_no_grad(
    name: str, padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As models are called that nobody trains: nothing is decoded for them, and policies see attention."""
    monkeypatch.setattr(LayerCache, "densified", None)
    model, mask = tiny("llama"), torch.ones((2, 60), dtype=torch.int64)
    mask[0, : 13 if padded else 0] = 0
    found = []
    for wanted in (False, True):
        with attach(model), torch.set_grad_enabled(wanted):
            found.append(turns(model, make_cache(name, model), ids(60, 2), (40, 1, 1, 3, *[1] * 15), mask))
    assert torch.equal(found[0], found[1].detach())


def test_gradients_that_ended_in_the_cache_are_refused() -> None:
    """DynamicCache carries them from the second update to the first."""
    model = tiny("llama")
    assert gradient(model, exact(model), ids(40), 30, linked=True)[:, :30].abs().sum() > 0
    cache = make_cache(QUANTIZE, model)
    with pytest.raises(CacheError, match="must have come without gradients"):
        gradient(model, cache, ids(40), 30, linked=True)
    cache.reset()
    want = gradient(model, make_cache(QUANTIZE, model), ids(40), 30)
    assert torch.equal(gradient(model, cache, ids(40), 30), want)


# Autocast


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("family", ["llama", "gpt_oss", "deepseek_v3"])
def test_autocast(family: str, side: str) -> None:
    """A float32 model under autocast in bfloat16: as near to the exact cache as bfloat16 is to float32."""
    model = tiny(family)
    tokens, sizes = ids(120), (90, 10, *[1] * 20)
    with torch.no_grad():
        true = turns(model, exact(model), tokens, sizes)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            near = (turns(model, exact(model), tokens, sizes) - true).abs().max()
            with ready(model, side):
                cache = make_cache(QUANTIZE, model)
                got = turns(model, cache, tokens, sizes)
                dropped = turns(model, make_cache(DROP, model), tokens, sizes)
    assert (got - true).abs().max() < 2 * near
    assert dropped.isfinite().all()
    assert cache.memory().bytes


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("first", [True, False])
def test_autocast_of_a_part(side: str, first: bool) -> None:
    """Begun under autocast and gone on without, and the other way round."""
    model, tokens = tiny("llama"), ids(60)
    with torch.no_grad(), ready(model, side):
        true = turns(model, exact(model), tokens, (40, 20))[:, 40:]
        cache = make_cache(QUANTIZE, model)
        out, kinds = [], []
        for part, cast in ((tokens[:, :40], first), (tokens[:, 40:], not first)):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=cast):
                out.append(model(part, **{CACHE: cache}).logits.float())
            kinds.append([x.dtype for x in cache.dense()])
        assert kinds[1] == kinds[0]  # a layer keeps the types that it began with
        assert (out[1] - true).abs().max() < 0.1 * true.abs().max()


@pytest.mark.parametrize("name", ["best-2bit", "best-3bit", "turboquant", "zipcache"])
def test_a_cache_can_be_made_under_autocast(name: str) -> None:
    model, tokens = tiny("llama"), ids(70)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cache = make_cache(name, model)
        assert torch.is_autocast_enabled("cpu")
    with torch.no_grad(), attach(model):
        found = turns(model, cache, tokens, (60, 9, 1))
        assert torch.equal(found, turns(model, make_cache(name, model), tokens, (60, 9, 1)))


def test_arithmetic_of_a_cache_is_float32_under_autocast() -> None:
    """The layer's own products are not rounded to bfloat16."""
    model, tokens = tiny("llama"), ids(90)
    caches = [make_cache(QUANTIZE, model) for _ in range(2)]
    with torch.no_grad(), attach(model):
        for cache in caches:
            model(tokens, **{CACHE: cache})
    layers = [cache.layers[0].tiers for cache in caches]
    new = torch.randn(2, 1, 2, 1, 32, generator=torch.Generator().manual_seed(0))
    query = torch.randn(1, 4, 1, 32, generator=torch.Generator().manual_seed(1))
    for tiers in layers:
        tiers.commit()
    want = attend(layers[0], query, (new[0], new[1]))
    with torch.autocast("cpu", dtype=torch.bfloat16), precise(query.device):
        assert torch.equal(attend(layers[1], query, (new[0], new[1])), want)


# Compiled forwards


@pytest.mark.parametrize(("side", "whole"), [("attached", False), ("unattached", True)])
def test_compiled(side: str, whole: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The logits are the same, and the cache's own code is not compiled, which torch can't."""
    model = build("llama", torch.float32, num_hidden_layers=1, head_dim=32)
    tokens, sizes, seen = ids(42), (40, 1, 1), []
    name = "stage" if side == "attached" else "update"
    update = getattr(LayerCache, name)

    def spy(tiers: LayerCache, keys: torch.Tensor, values: torch.Tensor) -> Any:
        seen.append(torch.compiler.is_compiling())
        return update(tiers, keys, values)

    monkeypatch.setattr(LayerCache, name, spy)
    torch.compiler.reset()
    with torch.no_grad(), ready(model, side):
        want = turns(model, make_cache(QUANTIZE, model), tokens, sizes)
        if whole:
            compiled = torch.compile(model, backend="eager")
        else:
            compiled = model
            model.forward = torch.compile(model.forward, backend="eager")
        cache = make_cache(QUANTIZE, model)
        torch.testing.assert_close(turns(compiled, cache, tokens, sizes), want, atol=1e-5, rtol=1e-5)
        assert cache.get_seq_length() == 42
    assert seen == [False] * 6


# Models whose attention computes on what the cache gives


def family_of(name: str) -> Any:
    return build(name, torch.float32, **({"keep_window_size": 30} if name == "doge" else {}))


def padded(kind: str, tokens: int) -> torch.Tensor | None:
    mask = torch.ones(2, tokens, dtype=torch.long)
    if kind == "left":
        mask[0, :9] = 0
    elif kind == "inside":
        mask[0, 31:40] = 0
    return mask if kind != "none" else None


@pytest.mark.parametrize("padding", ["none", "left", "inside"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["diffllama", "doge"])
def test_quantizing_recipes(name: str, implementation: str, padding: str) -> None:
    model, tokens, sizes = family_of(name), ids(70, 2), (40, 10, *[1] * 20)
    model.set_attn_implementation(implementation)
    mask = padded(padding, 70)
    real = slice(None) if mask is None else mask.bool()
    with torch.no_grad():
        want = turns(model, exact(model), tokens, sizes, mask)[real]
        assert torch.equal(turns(model, make_cache("full", model), tokens, sizes, mask)[real], want)
        coded = recipe(RECENT, INT)
        plain = turns(model, make_cache(coded, model), tokens, sizes, mask)[real]
        with attach(model):
            got = turns(model, make_cache(coded, model), tokens, sizes, mask)[real]
    if padding != "inside":  # there a window counts a row's own tokens, once the model is attached
        torch.testing.assert_close(got, plain, atol=2e-3, rtol=0)  # a code may fall to the other side
    for near in (plain, got):
        assert (near - want).abs().max() < 0.1 * want.abs().max()


SHORTEST = {"policy": {"kind": "rank", "scorer": {"kind": "key_norm"}, "budget": 12, "share": "head"}, "store": "full"}


@pytest.mark.parametrize("tiers", [DROP, recipe(RECENT, SHORTEST, EVICT)], ids=["position", "head"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_eviction_in_diffllama(implementation: str, tiers: Any) -> None:
    """Attached, a padded row is served as it is alone; unattached the same tokens stay."""
    model, tokens = family_of("diffllama"), ids(70, 2)
    model.set_attn_implementation(implementation)
    with torch.no_grad():
        plain = turns(model, make_cache(tiers, model), tokens[:1], (40, 10, *[1] * 20))
        with attach(model):
            got = turns(model, make_cache(tiers, model), tokens[:1], (40, 10, *[1] * 20))
            torch.testing.assert_close(got, plain, atol=2e-5, rtol=1e-4)
            mask = padded("left", 70)
            both = turns(model, make_cache(tiers, model), tokens, (40, 10, *[1] * 20), mask)
            alone = turns(model, make_cache(tiers, model), tokens[:1, 9:], (31, 10, *[1] * 20))
    torch.testing.assert_close(both[:1, 9:], alone, atol=2e-5, rtol=1e-4)


def test_eviction_in_doge() -> None:
    """Its attention makes masks from values: attached, they would not cover the tokens that the model's masks do."""
    model, tokens = family_of("doge"), ids(70, 2)
    with torch.no_grad():
        cache = make_cache(DROP, model)
        assert turns(model, cache, tokens, (40, 10, *[1] * 20)).isfinite().all()
        with attach(model), pytest.raises(CacheError, match="DogeAttention makes its mask from the values"):
            turns(model, make_cache(DROP, model), tokens, (40, 10, *[1] * 20))


@pytest.mark.parametrize("name", ["diffllama", "doge"])
def test_selection_by_attention_is_refused(name: str) -> None:
    model = family_of(name)
    with torch.no_grad(), attach(model), pytest.raises(CacheError, match="computes on keys and values before"):
        model(ids(30), **{CACHE: make_cache("h2o", model)})


# What readers of a cache find


def test_keys_and_values_are_decoded_for_their_readers() -> None:
    model, tokens = tiny("llama"), ids(60)
    cache, truth = make_cache(QUANTIZE, model), exact(model)
    assert not cache.is_initialized
    assert [layer.keys for layer in cache.layers] == [None, None]
    assert list(cache) == [(None, None, None)] * 2
    with torch.no_grad():
        for part in (tokens[:, :50], tokens[:, 50:]):
            model(part, **{CACHE: cache})
            model(part, **{CACHE: truth})
    assert cache.is_initialized
    cache.commit()
    for found, want, layer in zip(cache, truth, cache.layers, strict=True):
        assert found[2] is None
        for got, given, x in zip(found, (layer.keys, layer.values), want, strict=False):
            assert torch.equal(got, given)
            assert got.shape == x.shape
            assert 0 < (got - x).abs().max() < 0.05 * x.abs().max()
    copy = DynamicCache(iter([(k, v) for k, v, _ in cache]))
    with torch.no_grad():
        got = model(tokens[:, :1], **{CACHE: copy}).logits
        want = model(tokens[:, :1], **{CACHE: cache}).logits
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    with pytest.raises(CacheError, match=r"must come by update, found an assignment to layer\.keys"):
        cache.layers[0].keys = torch.zeros(1)
    with pytest.raises(CacheError, match="must come by update"):
        cache.layers[0].values = None
    cache.reset()
    assert not cache.is_initialized
    assert cache.layers[1].values is None


def test_an_early_initialization_is_served() -> None:
    model = tiny("llama")
    cache = make_cache(QUANTIZE, model)
    cache.early_initialization(batch_size=1, num_heads=2, head_dim=32, dtype=torch.float32, device=torch.device("cpu"))
    assert cache.is_initialized
    assert cache.layers[0].keys.numel() == cache.get_seq_length() == 0
    with torch.no_grad():
        got = model(ids(40), **{CACHE: cache})
        assert cache_of(got) is cache
        assert torch.equal(got.logits, model(ids(40)).logits)


def test_hybrid_caches_are_iterated() -> None:
    model = tiny("gemma3_text")
    cache, truth = make_cache("full", model), exact(model)
    with torch.no_grad():
        for held in (cache, truth):
            model(ids(40), **{CACHE: held})
    for found, want in zip(cache, truth, strict=True):
        assert torch.equal(found[0], want[0])
        assert (found[2] is None) == (want[2] is None)
