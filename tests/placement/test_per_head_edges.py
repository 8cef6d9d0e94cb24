"""Where rows and heads differ: cases that are easily got wrong."""

from __future__ import annotations

import copy
import inspect
import itertools
import sys
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from layers import HEAD_DIM, Layer, random_tokens
from models import build, ids, tiny
from torch import Tensor
from words import CACHE

from kvpolicy import attach, load_recipe, make_cache
from kvpolicy.attention.attend import observe
from kvpolicy.errors import CacheError, RecipeError
from kvpolicy.interfaces.policy import RankPolicy, Scores
from kvpolicy.placement.planner import Placement
from kvpolicy.placement.step import Step

pytestmark = pytest.mark.filterwarnings("ignore")
WINDOW = {"kind": "recent", "window": 8}


def by_attention(*, above: dict[str, Any] | None = WINDOW, **options: Any) -> Any:
    tiers: list[dict[str, Any]] = [{"policy": above, "store": "full"}] if above else []
    tiers += [{"policy": {"kind": "attention", **options}, "store": "full"}, {"store": {"kind": "int", "nbits": 8}}]
    return load_recipe({"tiers": tiers})


def run(layer: Layer, tokens: tuple[Tensor, Tensor, Tensor], cuts: list[int], real: Tensor | None = None) -> None:
    for first, last in itertools.pairwise(cuts):
        layer(*(x[:, :, first:last] for x in tokens), None if real is None else real[:, first:last])


@pytest.mark.parametrize("every", [1, 30])
def test_a_padded_row_is_selected_from_when_it_would_be_alone(every: int) -> None:
    recipe = by_attention(
        above={"kind": "recent", "window": 0, "flush": every}, budget=0.6, score="normalised", every=every
    )
    tokens = random_tokens(200, 1, 2)
    real = torch.ones(2, 200, dtype=torch.bool)
    real[1, :37] = False
    batch, alone = Layer(recipe), Layer(recipe)
    own = tuple(x[1:, :, 37:] for x in tokens)
    with torch.no_grad():
        run(batch, tokens, [0, 100], real)
        run(alone, own, [0, 63])
        for step in range(100, 200):
            run(batch, tokens, [step, step + 1], real)
            run(alone, own, [step - 37, step - 36])
            expected = [[[i + 37 for i in tier] for tier in head] for head in alone.held()[0]]
            assert batch.held()[1] == expected


def test_scores_are_those_of_sdpa_under_eager_attention_too() -> None:
    found = []
    for implementation in ("sdpa", "eager"):
        model = tiny("llama")
        model.set_attn_implementation(implementation)
        mask = torch.ones(2, 100, dtype=torch.long)
        mask[1, :30] = 0
        cache = make_cache(by_attention(budget=200, score="normalised"), model)
        with attach(model), torch.no_grad():
            for first, last in [(0, 80), (80, 99), (99, 100)]:
                model(ids(100, 2)[:, first:last], attention_mask=mask[:, :last], **{CACHE: cache})
        cache.commit()
        table = cache.layers[0].tiers.planner.live()[0]
        order = table.positions.long().argsort(2).unsqueeze(3).expand(-1, -1, -1, 2)
        found.append(table.scores.gather(2, order))
        model.set_attn_implementation("sdpa")
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)
    assert found[0][0, 0, 0, 1] == 100
    assert found[0][0, 0, 99, 1] == 1


@pytest.mark.parametrize("name", ["balanced", "kivi-sink", "zipcache"])
def test_empty_places_widen_no_group(name: str) -> None:
    given = {"group_size": 8} if name == "kivi-sink" else {}
    query, keys, values = random_tokens(320, 2, 2)
    keys[..., 3] += 100
    errors = []
    for pad in (0, 50):
        layer = Layer(name, **given)
        real = torch.ones(2, 320, dtype=torch.bool)
        real[1, :pad] = False
        with torch.no_grad():
            run(layer, (query, keys, values), [0, 150, *range(151, 321)], real)
            held = layer.cache.dense(0)[0]
        places = torch.as_tensor(layer.cache.positions(0).positions).expand(2, 2, -1)
        exact = keys.gather(2, places.clamp(min=0).unsqueeze(3).expand(-1, -1, -1, HEAD_DIM))
        errors.append((held - exact)[places >= 0][:, 3].abs().max())
    assert errors[1] < 1.5 * errors[0]


@pytest.mark.parametrize("name", ["logquant", "kivi", "balanced", "streaming-quant"])
def test_padded_batches_of_models_that_compute_on_keys(name: str) -> None:
    model = tiny("deepseek_v3")
    tokens, mask = ids(150, batch=2), torch.ones(2, 150, dtype=torch.long)
    mask[1, :60] = 0
    given = {"nbits": 8, **({"group_size": 16} if name == "kivi" else {})}
    with attach(model), torch.no_grad():
        cache = make_cache(name, model, **given)
        alone = make_cache(name, model, **given)
        found = [model(tokens[:, :100], attention_mask=mask[:, :100], **{CACHE: cache}).logits[1, -1]]
        expected = [model(tokens[1:, 60:100], **{CACHE: alone}).logits[0, -1]]
        for i in range(100, 150):
            step = tokens[:, i : i + 1]
            found.append(model(step, attention_mask=mask[:, : i + 1], **{CACHE: cache}).logits[1, -1])
            expected.append(model(step[1:], **{CACHE: alone}).logits[0, -1])
    torch.testing.assert_close(torch.stack(found), torch.stack(expected), rtol=0.05, atol=0.05)
    assert all("dense" in row.type for row in cache.summary().layers)


def test_an_update_of_padding_alone_leaves_the_scores_of_a_row() -> None:
    layer = Layer(by_attention(budget=50, score="last"))
    tokens = random_tokens(102, 3, 2)
    real = torch.ones(2, 102, dtype=torch.bool)
    real[1, 101] = False
    with torch.no_grad():
        run(layer, tokens, [0, 100, 101], real)
        layer.cache.commit()
        before = layer.tiers.planner.live()[0].scores[1].sum()
        run(layer, tokens, [101, 102], real)
        layer.cache.commit()
    assert layer.tiers.planner.live()[0].scores[1].sum() == before > 0


def test_a_crop_into_the_prompt_makes_what_follows_part_of_it() -> None:
    tokens = random_tokens(330, 4)
    again, fresh = Layer("h2o"), Layer("h2o")
    with torch.no_grad():
        run(again, tokens, [0, 30, 31, 32])
        again.cache.crop(1)
        run(again, tokens, [1, 330])
        run(fresh, tokens, [0, 1, 330])
    assert again.tiers.step.prompt is None, "the prompt goes on"
    assert len(again.held()[0][0][1]) == 33


def test_the_first_update_has_gradients_attached_as_unattached() -> None:
    model = tiny("llama")
    grads = []
    for name, attached in (("logquant", False), ("logquant", True), ("h2o", True)):
        embedded = model.get_input_embeddings()(ids(90)).detach().requires_grad_()
        handle = attach(model) if attached else None
        model(inputs_embeds=embedded, **{CACHE: make_cache(name, model)}).logits.sum().backward()
        if handle is not None:
            handle.detach()
        grads.append(embedded.grad)
    for grad in grads[1:]:
        torch.testing.assert_close(grad, grads[0])


def test_a_refused_model_leaves_the_cache_empty() -> None:
    model = tiny("deepseek_v3")
    cache = make_cache("h2o", model)
    with attach(model), pytest.raises(CacheError, match="must see attention"), torch.no_grad():
        model(ids(100), **{CACHE: cache})
    assert [layer.get_seq_length() for layer in cache.layers] == [0, 0]


def test_masks_and_caches_may_be_given_by_place() -> None:
    model = tiny("llama")
    tokens, mask = ids(60, batch=2), torch.ones(2, 60, dtype=torch.long)
    mask[1, :20] = 0
    names = list(inspect.signature(model.model.forward).parameters)
    assert names[:4] == ["input_ids", "attention_mask", "position_ids", CACHE]
    cache = make_cache("h2o", model)
    with attach(model), torch.no_grad():
        model.model(tokens, mask, None, cache)
        cache.commit()
    places = cache.positions(0).positions
    assert not (set(range(20)) & set(places[1].flatten().tolist()))


def test_padding_that_was_taken_for_tokens_is_refused() -> None:
    model = copy.deepcopy(tiny("llama"))  # no other cache lets it tell of its passes
    tokens, mask = ids(60, batch=2), torch.ones(2, 61, dtype=torch.long)
    mask[1, :20] = 0
    cache = make_cache("streaming-llm", model.config)  # which no model tells of padding
    with torch.no_grad():
        model(tokens, attention_mask=mask[:, :60], **{CACHE: cache})
        with attach(model), pytest.raises(CacheError, match="must be told padding when it comes"):
            model(tokens[:, :1], attention_mask=mask, **{CACHE: cache})


@pytest.mark.parametrize("attached", [False, True])
def test_another_number_of_rows_is_refused(attached: bool) -> None:
    model = tiny("llama")
    cache = make_cache("logquant", model)
    with torch.no_grad():
        model(ids(80, batch=2), **{CACHE: cache})
        handle = attach(model) if attached else None
        with pytest.raises(CacheError, match="must have the rows of the cache, 2, found 3"):
            model(ids(1, batch=3), **{CACHE: cache})
        if handle is not None:
            handle.detach()
    assert cache.get_seq_length() == 80


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"newest": 0.2}, "option 'newest' must go with queries: probe, found newest: 0.2 without; remove it"),
        ({"count": "causal"}, "option 'count' must go with score: normalised"),
    ],
)
def test_options_that_would_do_nothing_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        by_attention(budget=10, **options)


def test_scores_of_a_long_prompt_take_a_few_megabytes() -> None:
    """Probes of 16,384 tokens: a matrix of them would take 215 MB."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
    from memory import peak

    tokens = 16384
    layer = Layer("zipcache", heads=2, kv_heads=1)
    query, keys, values = (x.bfloat16() for x in random_tokens(tokens, 5, heads=2, kv_heads=1))
    with torch.no_grad():
        layer.cache.update(keys, values, 0)
        observer = layer.tiers.observe()
        assert len(observer.queries) == 2 * int(0.05 * tokens)
        assert peak(lambda: observe(query, keys, observer), "cpu") < 8e6


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("recipe", ["zipcache", "adakv"])
def test_rows_are_taken_after_steps_in_which_tokens_only_came(recipe: str, layers: int) -> None:
    model = build("llama", torch.float32, head_dim=32, num_hidden_layers=layers)
    cache, alone = make_cache(recipe, model), make_cache(recipe, model)
    with torch.no_grad(), attach(model):
        for seed, tokens in enumerate((40, 1, 1, 1)):
            model(ids(tokens, seed=seed), **{CACHE: cache})
            model(ids(tokens, seed=seed).repeat(2, 1), **{CACHE: alone})
        cache.batch_repeat_interleave(2)
        found, expected = (model(ids(1, 2, seed=4), **{CACHE: own}).logits for own in (cache, alone))
    torch.testing.assert_close(found, expected)


class Nothing(RankPolicy):
    """Lets no token stay as it selects."""

    kind: Literal["nothing"] = "nothing"
    every: int = 3

    def scores(self) -> Scores:
        return Scores()

    def budget_tokens(self, seen: int, prompt: int) -> int:
        return 0


def test_a_policy_that_keeps_nothing_waits_for_its_turn() -> None:
    first, last = load_recipe({"tiers": [{"policy": WINDOW, "store": "full"}, {"store": "evict"}]}).tiers
    step = Step.first(Placement([first, first.model_copy(update={"policy": Nothing()}), last])).scattered()
    counts, judged = (np.zeros((3, 1, 1), dtype=np.int64) for _ in range(2))
    held = []
    for _ in range(14):
        step = step.advance(1, None)
        _, counts, judged, *_ = step.counts(counts, judged)
        held.append(counts[1].item())
    assert held == [0] * 9 + [1, 2, 0, 1, 2]


def test_policies_that_ask_for_the_same_share_their_scores() -> None:
    same = {"kind": "attention", "score": "normalised"}
    tiers = [{"policy": {**same, "budget": n}, "store": "full"} for n in (5, 10)]
    other = {"policy": {**same, "budget": 20, "heads": "max"}, "store": "full"}
    for more, kinds in (([], 1), ([other], 2)):
        layer = Layer(load_recipe({"tiers": [*tiers, *more, {"store": "evict"}]}))
        with torch.no_grad():
            layer(*random_tokens(80, 6))
        assert len(layer.tiers.placement.kinds) == kinds
        assert layer.tiers.planner.live()[0].scores.shape[3] == 2 * kinds


def test_gradient_checkpointing_while_training_is_refused() -> None:
    model = copy.deepcopy(tiny("llama"))
    model.gradient_checkpointing_enable()
    cache = make_cache("logquant", model)
    with attach(model):
        with pytest.raises(CacheError, match=r"model.eval\(\)"):
            model.train()(ids(80), **{CACHE: cache})
        model.eval()(ids(80), **{CACHE: cache})
    assert cache.get_seq_length() == 80
