"""Policies that rank tokens by a scorer, with models that are attached and with others."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import torch
import transformers
from models import ids, tiny
from recipes import DISTINCT
from torch import Tensor
from words import CACHE

import kvpolicy
from kvpolicy import CompressedCache, attach, load_recipe, make_cache
from kvpolicy.errors import CacheError, PluginError, RecipeError


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield


def recipe(last: Any = "evict", **options: Any) -> Any:
    policy = {"kind": "rank", "scorer": "key_norm", "budget": 12, **options}
    window = {"policy": {"kind": "recent", "window": 6}, "store": "full"}
    return load_recipe({"tiers": [window, {"policy": policy, "store": "full"}, {"store": last}]})


def decoded(model: Any, cache: Any, tokens: Tensor, prompt: int) -> Tensor:
    found = [model(tokens[:, :prompt], **{CACHE: cache}).logits[:, -1:]]
    found += [model(tokens[:, t : t + 1], **{CACHE: cache}).logits for t in range(prompt, tokens.shape[1])]
    return torch.cat(found, dim=1)


@pytest.mark.parametrize("share", ["head", "layer", "model"])
@pytest.mark.parametrize(
    "options", [{}, {"when": "prompt"}, {"among": "pairs"}, {"among": "arrival", "budget": 0.3}, {"every": 7}]
)
def test_unattached_models_hold_and_say_what_attached_ones_do(share: str, options: dict[str, Any]) -> None:
    model, tokens = tiny("llama"), ids(100, batch=2)
    plain, read = (make_cache(recipe(share=share, **options), model) for _ in range(2))
    expected = decoded(model, plain, tokens, 70)
    with attach(model):
        found = decoded(model, read, tokens, 70)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    for layer in range(len(plain.layers)):
        for a, b in zip(plain.positions(layer), read.positions(layer), strict=True):
            assert (a == b).all()


@pytest.mark.parametrize("when", ["every", "prompt"])
def test_a_cache_is_saved_and_goes_on(when: str, tmp_path: Path) -> None:
    model, tokens = tiny("llama"), ids(100, batch=2)
    options = {"when": when} if when == "prompt" else {"among": "arrival"}
    store = {"kind": "int", "nbits": 4}
    cache = make_cache(recipe(store, **options), model)
    decoded(model, cache, tokens[:, :80], 70)
    cache.save(tmp_path / "cache")
    again = CompressedCache.load(tmp_path / "cache", model)
    for t in range(80, 100):
        a, b = (model(tokens[:, t : t + 1], **{CACHE: x}).logits for x in (cache, again))
        assert torch.equal(a, b)
    assert (cache.positions(0).positions == again.positions(0).positions).all()
    assert cache.memory().bytes == again.memory().bytes
    assert cache.memory().total("scores") > 0


@pytest.mark.parametrize("name", DISTINCT)
def test_a_cache_may_be_made_before_its_model_is_attached_or_after(name: str) -> None:
    model, tokens = tiny("llama"), ids(80)
    early = make_cache(name, model)
    with attach(model):
        late = make_cache(name, model)
        found = [decoded(model, cache, tokens, 60) for cache in (early, late)]
    assert torch.equal(*found)
    attends = early.layers[0].tiers.attending if name != "full" else []
    for made in (early, late):
        made.reset()
        if attends:
            with pytest.raises(CacheError, match="which only an attached model shows"):
                decoded(model, made, tokens, 60)
        else:
            decoded(model, made, tokens, 60)


def test_budgets_are_those_of_each_layer() -> None:
    model = tiny("llama")
    layers = model.config.num_hidden_layers
    tokens = ids(100)
    with attach(model):
        by_list = make_cache(recipe(budget=[10 + i for i in range(layers)]), model)
        by_name = make_cache(recipe(budget={"0": 10, "1--1": 20}), model)
        for cache in (by_list, by_name):
            decoded(model, cache, tokens, 90)
            cache.commit()
    for layer in range(layers):
        for cache, budget in ((by_list, 10 + layer), (by_name, 20 if layer else 10)):
            assert (cache.positions(layer).tiers == 1).sum(-1).tolist() == [[budget] * 2]
    with pytest.raises(CacheError, match="must hold the same number of tokens"):
        make_cache(recipe(budget={"0": 10, "1--1": 20}), model)
    for wrong in ([10], {"0": 10}, {"0-5": 3, "0": 4}):
        with pytest.raises(
            RecipeError,
            match=r"\.policy\.budget(\.0)?: (budgets by layer must|a list of budgets must|a layer may be named once)",
        ):
            make_cache(recipe(budget=wrong if wrong != [10] else [10] * (layers + 1)), model)
    assert (
        load_recipe({"tiers": [t.plain() for t in recipe(budget={"0": 10, "1--1": 0.5}).tiers]}).tiers
        == recipe(budget={"0": 10, "1--1": 0.5}).tiers
    )


@pytest.mark.parametrize("options", [{"threshold": -4.0, "budget": 0.1}, {"heads": "scores"}])
def test_counts_that_the_device_alone_knows_take_an_attached_model(options: dict[str, Any]) -> None:
    model, tokens = tiny("llama"), ids(60)
    cache = make_cache(recipe(**options), model)
    with pytest.raises(CacheError, match="other numbers of tokens stay in each row and head"):
        decoded(model, cache, tokens, 50)
    cache.reset()
    with attach(model):
        decoded(model, cache, tokens, 50)
    assert cache.positions(0).positions.ndim == 3


class Reads(kvpolicy.Scorer):
    """Reads what it did not ask for."""

    kind: Literal["reads"] = "reads"
    needs: ClassVar[frozenset[str]] = frozenset({"keys"})

    def score(self, given: kvpolicy.Given, site: kvpolicy.Site) -> Tensor:
        return given.values.norm(dim=-1)


class Pooled(kvpolicy.Scorer):
    """The attention of a token and its neighbours."""

    kind: Literal["pooled"] = "pooled"
    needs: ClassVar[frozenset[str]] = frozenset({"attention", "positions"})
    pools: ClassVar[bool] = True

    def score(self, given: kvpolicy.Given, site: kvpolicy.Site) -> Tensor:
        assert (given.positions.diff(dim=2) >= 0).all(), "tokens come in order"
        return torch.nn.functional.max_pool1d(given.attention, 5, 1, 2)


def test_a_scorer_is_given_what_it_asks_for_alone() -> None:
    model = tiny("llama")
    cache = make_cache(recipe(scorer=Reads()), model)
    with pytest.raises(PluginError, match=r"^scorer '\w+' must name what it reads, .* add 'values' to its needs"):
        decoded(model, cache, ids(100), 70)


def test_a_scorer_of_attention_sees_tokens_in_order_on_an_attached_model() -> None:
    model = tiny("llama")
    cache = make_cache(recipe(scorer=Pooled()), model)
    with pytest.raises(CacheError, match="which only an attached model shows"):
        decoded(model, cache, ids(100), 70)
    cache.reset()
    with attach(model):
        decoded(model, cache, ids(100), 70)
    cache.commit()
    assert (cache.positions(0).tiers == 1).sum(-1).tolist() == [[12, 12]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"select": "shared"}, "write share: model"),
        ({"share": "shared"}, "'head', 'layer' or 'model'"),
        ({"when": "prompt", "every": 3}, "option 'every' must go with when: every"),
        ({"when": "prompt", "among": "arrival"}, "'among: arrival' must go with when: every"),
        ({"among": "pairs", "threshold": 0.0}, "option 'budget' must go with no threshold|same in all heads"),
        ({"heads": "scores", "share": "layer"}, "must go with share: head"),
        ({"floor": 0.3}, "option 'floor' must go with heads: scores"),
        ({"scorer": "key_nrm"}, "must be a kind or a mapping .* found 'key_nrm' \\(did you mean 'key_norm'"),
        ({"scorer": {"kind": "key_nrm"}}, "no scorer of kind 'key_nrm'"),
        ({"scorer": {"kind": "key_norm", "x": 1}}, "unknown option 'x' of key_norm"),
    ],
)
def test_options_that_can_not_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe(**options)


def expected(pre: Tensor, keys: Tensor, values: Tensor, rotary: Any, future: int, sinks: int) -> Tensor:
    """What Expected Attention ranks tokens by, `[kv_heads, tokens]`, of one row in float64, by matrices."""
    kv_heads, n, dim = keys.shape
    positions = torch.arange(n, n + future)
    cos, sin = (x[0].double() for x in rotary(torch.zeros(1), positions[None]))
    swap = torch.zeros(dim, dim, dtype=torch.float64)
    for i in range(dim // 2):
        swap[i, i + dim // 2], swap[i + dim // 2, i] = -1.0, 1.0
    turn = torch.stack([torch.diag(c) + torch.diag(s) @ swap for c, s in zip(cos, sin, strict=True)]).mean(0)
    ranks = []
    for h in range(kv_heads):
        shares = []
        for query in pre.unflatten(0, (kv_heads, -1))[h]:
            own = query[sinks:].double()
            mean, spread = turn @ own.mean(0), turn @ torch.cov(own.T, correction=0) @ turn.T
            k = keys[h, sinks:].double()
            shares.append((k @ mean / dim**0.5 + torch.einsum("ni,ij,nj->n", k, spread, k) / (2 * dim)).softmax(0))
        ranks.append(torch.stack(shares).mean(0) * values[h, sinks:].double().norm(dim=-1))
    return torch.stack(ranks)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("pads", [(0, 0), (0, 23)])
def test_expected_attention_keeps_what_the_formula_keeps(family: str, pads: tuple[int, int]) -> None:
    model, tokens, prompt = tiny(family), ids(91, batch=2, seed=3), 90
    mask = torch.ones(2, 91, dtype=torch.long)
    for row, pad in enumerate(pads):
        mask[row, :pad] = 0
    places = (mask.cumsum(1) - 1).clamp(min=0)
    cache = make_cache("expected-attention:keep=0.3,future=40", model)
    with attach(model):
        for at in (slice(0, prompt), slice(prompt, 91)):
            shown = {"attention_mask": mask[:, : at.stop], "position_ids": places[:, at]}
            model(tokens[:, at], **shown, **{CACHE: cache})
    asked: list[Tensor] = []
    for layer in model.model.layers:
        last = getattr(layer.self_attn, "q_norm", layer.self_attn.q_proj)
        last.register_forward_hook(lambda _, __, out: asked.append(out))
    for row, pad in enumerate(pads):
        asked.clear()
        exact = transformers.DynamicCache(config=model.config)
        model(tokens[row : row + 1, pad:prompt], **{CACHE: exact})
        for i, own in enumerate(exact.layers):
            pre = asked[i][0].view(prompt - pad, -1, own.keys.shape[3]).transpose(0, 1)
            ranks = expected(pre, own.keys[0], own.values[0], model.model.rotary_emb, 40, 4)
            count = int(0.3 * (prompt - pad))
            for h in range(len(ranks)):
                best = {pad + 4 + j for j in ranks[h].topk(count - 4).indices.tolist()}
                positions = cache.positions(i).positions[row, h]
                assert set(positions[positions >= 0].tolist()) == {*range(pad, pad + 4), *best, prompt}


def test_queries_are_not_kept_once_the_prompt_has_ended() -> None:
    model, tokens = tiny("llama"), ids(80)
    cache = make_cache("expected-attention:keep=0.5", model)
    with attach(model):
        model(tokens[:, :30], **{CACHE: cache})
        assert "query" in cache.layers[0].tiers.pending
        cache.crop(20)
        assert cache.layers[0].tiers.pending["query"].shape[2] == 20
        model(tokens[:, 20:60], **{CACHE: cache})
        for t in range(60, 63):
            model(tokens[:, t : t + 1], **{CACHE: cache})
            assert "query" not in cache.layers[0].tiers.pending
