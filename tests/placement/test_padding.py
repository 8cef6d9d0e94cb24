"""Padded batches: no padding is ever attended or kept, and each row is placed as if it were alone."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import Layer, random_tokens
from models import FAMILIES, ids, tiny
from recipes import BY_POSITION, DISTINCT
from torch import Tensor
from words import CACHE

from kvpolicy import Recipe, attach, load_recipe, make_cache
from kvpolicy.errors import CacheError, RecipeError
from kvpolicy.placement.simulate import simulate

pytestmark = pytest.mark.filterwarnings("ignore")
PADS = (0, 37, 90)
PROMPT = 150


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield


def small(name: str, **more: Any) -> Recipe:
    """A bundled recipe that acts on short texts."""
    recipe = load_recipe(name)
    wanted = {"group_size": 16, "window": 20, "residual": 32, "period": 30, "capacity": 40, "budget": 30, **more}
    fits = {k: v for k, v in wanted.items() if k in recipe.params and not isinstance(recipe.params[k], float)}
    return load_recipe(name, **fits)


def stores(recipe: Recipe) -> list[Any]:
    return [store for tier in recipe.tiers for store in (tier.keys, tier.values) if not isinstance(store, str)]


def precise(name: str) -> Recipe:
    """A bundled recipe in 8 bits, where it can be."""
    try:
        return small(name, nbits=8, high=8, low=8)
    except RecipeError:
        return small(name)


def near(recipe: Recipe, x: Tensor, exact: Tensor) -> Tensor:
    """Whether each token is the one that it should be; those of few bits are nearer to it than others are."""
    if all(store.kind == "int" and store.nbits == 8 and store.clip == 1 for store in stores(recipe)):
        return (x - exact).abs().amax(3) < 0.05
    return (x - exact).norm(dim=3) < 0.9 * exact.norm(dim=3)


def tolerance(recipe: Recipe) -> float:
    """Of logits; rounding may put a code on the other side of a boundary."""
    return 0.03 if stores(recipe) else 1e-4


BY_TOKEN = [n for n in DISTINCT if all(getattr(store, "per", "token") == "token" for store in stores(small(n)))]


def padded(side: str) -> tuple[Tensor, Tensor]:
    """Token ids and mask of three prompts of unequal length."""
    tokens, mask = ids(PROMPT, batch=3, seed=1), torch.ones(3, PROMPT, dtype=torch.long)
    for row, pad in enumerate(PADS):
        if side == "left":
            mask[row, :pad] = 0
        elif pad:
            mask[row, -pad:] = 0
    return tokens, mask


ELSEWHERE = [n for n in BY_TOKEN if n in ("full", "logquant", "logquant-evict", "h2o", "snapkv")]
"""Recipes for models other than Llama: a kind each, since generating takes time."""


@pytest.mark.parametrize(
    ("name", "family"),
    [*((n, "llama") for n in BY_TOKEN), *itertools.product(ELSEWHERE, ("qwen3", "gpt_oss"))],
)
def test_each_row_of_a_left_padded_batch_equals_that_row_alone(name: str, family: str) -> None:
    model, recipe = tiny(family), small(name)
    tokens, mask = padded("left")
    options = {"max_new_tokens": 36, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    with attach(model):
        found = model.generate(tokens, attention_mask=mask, **{CACHE: make_cache(recipe, model)}, **options)
        for row, pad in enumerate(PADS):
            alone = model.generate(
                tokens[row : row + 1, pad:],
                attention_mask=mask[row : row + 1, pad:],
                **{CACHE: make_cache(recipe, model)},
                **options,
            )
            assert torch.equal(found.sequences[row, PROMPT:], alone.sequences[0, PROMPT - pad :])
            assert len(found.logits) == len(alone.logits)
            ours, theirs = torch.stack(found.logits)[:, row], torch.stack(alone.logits)[:, 0]
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=tolerance(recipe))


@pytest.mark.parametrize("name", [n for n in BY_TOKEN if n != "turboquant-2.5"])  # it goes by the first tokens
def test_each_row_of_a_right_padded_batch_equals_that_row_alone(name: str) -> None:
    model, recipe = tiny("llama"), small(name)
    tokens, mask = padded("right")
    more = ids(40, batch=3, seed=7)
    cache = make_cache(recipe, model)
    with attach(model):
        positions = mask.cumsum(1) - 1
        model(tokens, attention_mask=mask, position_ids=positions.clamp(min=0), **{CACHE: cache})
        rows: list[list[Tensor]] = [[], [], []]
        for step in range(40):
            mask = torch.cat([mask, torch.ones(3, 1, dtype=torch.long)], dim=1)
            at = mask.sum(1, keepdim=True) - 1
            step_ids = more[:, step : step + 1]
            logits = model(step_ids, attention_mask=mask, position_ids=at, **{CACHE: cache}).logits[:, -1]
            for row in range(3):
                rows[row].append(logits[row])
        for row, pad in enumerate(PADS):
            alone = make_cache(recipe, model)
            model(tokens[row : row + 1, : PROMPT - pad], **{CACHE: alone})
            for step in range(40):
                expected = model(more[row : row + 1, step : step + 1], **{CACHE: alone}).logits[0, -1]
                torch.testing.assert_close(rows[row][step], expected, rtol=1e-3, atol=tolerance(recipe))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", DISTINCT)
def test_no_padding_is_held_and_sinks_are_the_first_real_tokens(name: str, side: str) -> None:
    model, recipe = tiny("llama"), small(name)
    mask = padded(side)[1]
    cache = make_cache(recipe, model)
    sinks = [i for i, tier in enumerate(recipe.tiers) if tier.policy is not None and tier.policy.kind == "sink"]
    with attach(model):
        for n in (70, 80, 40):
            given_mask = torch.cat([mask, torch.ones(3, 190, dtype=torch.long)], dim=1)
            seen = cache.get_seq_length()
            model(ids(190, batch=3)[:, seen : seen + n], attention_mask=given_mask[:, : seen + n], **{CACHE: cache})
            if name == "full":
                continue
            found = cache.positions(0)
            for row in range(3):
                held = found.positions[row][found.positions[row] >= 0]
                assert given_mask[row, held].all()
                if sinks:
                    own = given_mask[row, : seen + n].nonzero()[:4, 0].tolist()
                    kept = found.positions[row][(found.tiers[row] == sinks[0]) & (found.positions[row] >= 0)]
                    window = found.positions[row][(found.tiers[row] < sinks[0]) & (found.positions[row] >= 0)]
                    assert set(own) <= {*kept.tolist(), *window.tolist()}


@pytest.mark.parametrize("pads", [None, PADS], ids=["even", "padded"])
@pytest.mark.parametrize("name", [n for n in DISTINCT if n != "full"])
def test_attention_is_that_over_what_is_held_over_300_steps(name: str, pads: tuple[int, ...] | None) -> None:
    batch, total = 3, PROMPT + 300
    query, keys, values = random_tokens(total, 5, batch)
    recipe = precise(name)
    layer = Layer(recipe)
    real = torch.ones(batch, total, dtype=torch.bool)
    for row, pad in enumerate(pads or ()):
        real[row, :pad] = False
    cuts = [0, PROMPT, PROMPT + 20, *range(PROMPT + 21, total + 1)]
    for first, last in itertools.pairwise(cuts):
        layer.cache.guard.commit(last - first)
        looked_at = first and (last - first > 1 or first % 4 == 0)  # decoding all that is held takes time
        dense, places = (layer.cache.dense(0), layer.cache.positions(0).positions) if looked_at else (None, None)
        now = slice(first, last)
        out = layer(query[:, :, now], keys[:, :, now], values[:, :, now], real[:, now] if pads else None)
        if dense is None or places is None:
            continue
        at = (
            torch.as_tensor(places).expand(batch, -1, -1)
            if places.ndim == 3
            else torch.as_tensor(places).expand(batch, 1, -1)
        )
        at = at.expand(-1, 2, -1)
        for x, original in zip(dense, (keys, values), strict=True):
            exact = original.gather(2, at.clamp(min=0).unsqueeze(3).expand(-1, -1, -1, x.shape[3]))
            assert near(recipe, x, exact)[at >= 0].all()
            assert (x[at < 0] == 0).all()
        held = [torch.cat([x, y[:, :, now]], dim=2).double() for x, y in zip(dense, (keys, values), strict=True)]
        new = torch.arange(first, last).expand(batch, 2, -1)
        shown = torch.cat([at >= 0, real[:, None, now].expand(-1, 2, -1)], dim=2)
        causal = torch.cat([at, new], dim=2)[:, :, None] <= torch.arange(first, last)[:, None]
        scores = query[:, :, now].double().unflatten(1, (2, 2)) @ held[0].unsqueeze(2).transpose(3, 4) * 0.25
        scores = scores.masked_fill(~(shown[:, :, None] & causal).unsqueeze(2), -torch.inf)
        expected = (scores.softmax(-1).nan_to_num() @ held[1].unsqueeze(2)).flatten(1, 2).transpose(1, 2)
        torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-4)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_every_row_is_placed_as_if_alone_however_the_batch_is_cut_and_padded(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from([n for n in BY_POSITION if n not in ("full", "hf-quantized", "gear")]))
    recipe = small(name)
    total = data.draw(st.integers(1, 260))
    draw = st.lists(st.booleans(), min_size=total, max_size=total)
    kinds = st.sampled_from(["left", "right", "anywhere", "none"])
    real = torch.ones(3, total, dtype=torch.bool)
    for row in range(3):
        kind, pad = data.draw(kinds), data.draw(st.integers(0, total))
        if kind == "anywhere":
            real[row] = torch.tensor(data.draw(draw))
        elif kind != "none":
            real[row, slice(0, pad) if kind == "left" else slice(total - pad, total)] = False
    cuts = sorted({0, total, *data.draw(st.lists(st.integers(1, total), max_size=5))})
    query, keys, values = random_tokens(total, 6, 3)
    layer = Layer(recipe)
    for first, last in itertools.pairwise(cuts):
        now = slice(first, last)
        layer(query[:, :, now], keys[:, :, now], values[:, :, now], real[:, now])
    held = layer.held()
    for row in range(3):
        slots = real[row].nonzero()[:, 0].numpy() if layer.tiers.step.by_head else range(total)
        expected = simulate(recipe.tiers, len(slots))
        for tier, positions in enumerate(expected):
            assert held[row % len(held)][0][tier] == [int(slots[i]) for i in positions]


@pytest.mark.parametrize("name", ["streaming-llm", "logquant", "kivi", "h2o", "zipcache", "partial-logquant"])
def test_rows_follow_selection_and_crop(name: str) -> None:
    query, keys, values = random_tokens(260, 8, 3)
    real = torch.ones(3, 260, dtype=torch.bool)
    real[1, :50] = real[2, :110] = False
    rows = torch.tensor([2, 0, 2, 1])

    def run(selected: bool, early: bool) -> tuple[Tensor, Any]:
        layer = Layer(small(name))
        index = rows if selected and early else torch.arange(3)
        for first, last in [(0, 120), (120, 200), (200, 201), (201, 206)]:
            now = slice(first, last)
            layer(query[index][:, :, now], keys[index][:, :, now], values[index][:, :, now], real[index][:, now])
        layer.cache.crop(-3)
        if selected and not early:
            layer.cache.batch_select_indices(rows)
            index = rows
        for first, last in [(203, 204), (204, 230), (230, 260)]:
            now = slice(first, last)
            out = layer(query[index][:, :, now], keys[index][:, :, now], values[index][:, :, now], real[index][:, now])
        return out, layer.held()

    out, held = run(True, False)
    expected, alike = run(True, True)
    assert held == alike
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["streaming-llm", "logquant", "kivi", "h2o"])
def test_a_crop_of_pending_tokens_is_an_exact_rollback(name: str) -> None:
    query, keys, values = random_tokens(200, 9, 2)
    real = torch.ones(2, 200, dtype=torch.bool)
    real[1, :60] = False

    def run(extra: int) -> tuple[Tensor, Any]:
        layer = Layer(small(name))
        for first, last in [(0, 150), (150, 151), (151, 160 + extra)]:
            now = slice(first, last)
            layer(query[:, :, now], keys[:, :, now], values[:, :, now], real[:, now])
        layer.cache.crop(-extra if extra else 0)
        held = layer.held()
        now = slice(160, 161)
        return layer(query[:, :, now], keys[:, :, now], values[:, :, now], real[:, now]), held

    (out, held), (expected, alike) = run(7), run(0)
    assert held == alike
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_with_an_evicting_recipe(family: str) -> None:
    model = tiny(family)
    tokens, mask = padded("left")
    with attach(model):
        for name in ("streaming-llm", "logquant-evict"):
            options = {"max_new_tokens": 12, "do_sample": False}
            cache = make_cache(small(name), model)
            found = model.generate(tokens, attention_mask=mask, **{CACHE: cache}, **options)
            for row, pad in enumerate(PADS):
                given_mask = mask[row : row + 1, pad:]
                alone = make_cache(small(name), model)
                expected = model.generate(
                    tokens[row : row + 1, pad:], attention_mask=given_mask, **{CACHE: alone}, **options
                )
                assert torch.equal(found[row, PROMPT:], expected[0, PROMPT - pad :])


def test_a_padded_cache_goes_on_attached_only() -> None:
    model = tiny("llama")
    tokens, mask = padded("left")
    cache = make_cache(small("streaming-llm"), model)
    with attach(model):
        model(tokens, attention_mask=mask, **{CACHE: cache})
        model(tokens[:, :1], **{CACHE: cache})
    with pytest.raises(CacheError, match=r"\(padded batches, .*\) must go on with an attached model"):
        model(tokens[:, :1], **{CACHE: cache})
    assert cache.get_seq_length() == PROMPT + 1


def test_padding_that_comes_later_is_not_held_either() -> None:
    model = tiny("llama")
    cache = make_cache(small("streaming-llm"), model)
    tokens = ids(120, batch=2)
    mask = torch.ones(2, 120, dtype=torch.long)
    mask[1, 80:95] = 0
    with attach(model):
        model(tokens[:, :80], attention_mask=mask[:, :80], **{CACHE: cache})
        assert cache.positions(0).positions.ndim == 1
        model(tokens[:, 80:], attention_mask=mask, **{CACHE: cache})
    cache.commit()
    places = cache.positions(0).positions
    assert places[0, 0].tolist() == [*range(4), *range(100, 120)]
    assert places[1, 0].tolist() == [*range(4), *range(100, 120)]
    assert not (set(range(80, 95)) & set(places[1, 0].tolist()))


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("side", ["left", "right"])
def test_unattached_a_padded_batch_is_refused_where_tokens_are_dropped(batch: int, side: str) -> None:
    model, tokens = tiny("llama"), ids(40, batch=batch)
    mask = torch.ones_like(tokens)
    mask[0, slice(0, 6) if side == "left" else slice(-6, None)] = 0
    for name in ("streaming-llm", "kivi-evict"):
        cache = make_cache(name, model)
        with pytest.raises(CacheError, match=r"found a padded batch. Attach the model"):
            model(tokens, attention_mask=mask, **{CACHE: cache})
        with pytest.raises(CacheError, match=r"found a padded batch. Attach the model"):
            model.generate(tokens, attention_mask=mask, max_new_tokens=2, **{CACHE: cache})
        assert cache.get_seq_length() == 0
        model(tokens, attention_mask=torch.ones_like(tokens), **{CACHE: cache})
        assert not cache.summary().notes
        more = torch.ones(batch, 47, dtype=torch.long)
        more[0, -3:] = 0
        with pytest.raises(CacheError, match="padded batch"):
            model(tokens[:, :7], attention_mask=more, **{CACHE: cache})
        assert cache.get_seq_length() == 40
    model(tokens, attention_mask=mask, **{CACHE: make_cache("logquant", model)})


def test_a_cache_made_from_a_config_says_that_it_sees_no_padding() -> None:
    config = tiny("llama").config
    assert "padded rows can't be told apart" in str(make_cache("streaming-llm", config).summary())
    assert not make_cache("logquant", config).summary().notes
