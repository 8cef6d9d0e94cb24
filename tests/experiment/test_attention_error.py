"""Errors and masses of attention against a truth of their own; attention by distance; its power law."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from models import VOCAB, build, exact, ids, llama, tiny
from torch import Tensor
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from words import CACHE

from kvpolicy import attach, load_recipe, make_cache
from kvpolicy.experiment.attention_distance import Distances, Profile, fit_power_law
from kvpolicy.experiment.attention_error import AttentionErrors, Watcher
from kvpolicy.hf.layer import TieredLayer
from kvpolicy.layer.held import DROPPED, EXACT, QUANTIZED
from kvpolicy.layer.layer import LayerCache
from kvpolicy.placement.simulate import simulate

PROMPT, STEPS = 90, 30
SMALL = {
    "logquant": {"window": 12},
    "logquant-evict": {"window": 12},
    "kivi-evict": {"residual": 24},
    "kivi": {"residual": 32, "group_size": 16},
}
VERSION = tuple(map(int, transformers.__version__.split(".")[:2]))


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield


def watched(
    model: PreTrainedModel, recipe: Any, batch: int = 1, prompt: bool = False, **params: Any
) -> AttentionErrors:
    """What a watcher finds over 30 steps after a prompt of 90, which may count, too."""
    cache, tokens = make_cache(recipe, model, **params), ids(PROMPT + STEPS, batch=batch)
    watcher = Watcher(cache)
    with attach(model):
        for first, last in [(0, PROMPT), *((i, i + 1) for i in range(PROMPT, PROMPT + STEPS))]:
            with watcher.update(measure=prompt or first > 0) as watch, watch():
                model(tokens[:, first:last], **{CACHE: cache})
    return watcher.result()


class Truth:
    """An uncompressed cache whose layers attend in float64, in steps only to what a recipe would keep."""

    def __init__(self, model: PreTrainedModel, recipe: Any, **params: Any) -> None:
        AttentionInterface.register("truth", self.attention)
        AttentionMaskInterface.register("truth", ALL_MASK_ATTENTION_FUNCTIONS["eager"])
        self.tiers = load_recipe(recipe, **params).tiers
        self.sums: dict[int, Tensor] = {}
        self.kept: dict[int, Tensor] = {}
        model, tokens, self.step = copy.deepcopy(model), ids(PROMPT + STEPS), 0
        model.set_attn_implementation("truth")
        self.types = getattr(model.config, "layer_types", None) or ["full_attention"] * len(model.model.layers)
        cache = exact(model)
        for first, last in [(0, PROMPT), *((i, i + 1) for i in range(PROMPT, PROMPT + STEPS))]:
            self.step = first
            model(tokens[:, first:last], **{CACHE: cache})

    def attention(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
    ) -> tuple[Tensor, None]:
        groups = query.shape[1] // key.shape[1]
        key, value = (x.double().repeat_interleave(groups, 1) for x in (key, value))
        scores = query.double() @ key.transpose(2, 3) * (options.get("scaling") or query.shape[3] ** -0.5)
        if options.get("softcap"):
            scores = options["softcap"] * torch.tanh(scores / options["softcap"])
        if mask is not None:
            scores = scores + mask.double()
        whole = self.weights(scores, options.get("s_aux"))
        output = whole @ value
        if self.step and self.types[module.layer_idx] == "full_attention":
            held = torch.ones(self.step + 1, dtype=torch.bool)
            held[: self.step] = False
            *above, last = simulate(self.tiers, self.step)
            for positions in (*above, last):
                held[torch.from_numpy(positions)] = True
            part = self.weights(scores.masked_fill(~held, -torch.inf), options.get("s_aux")) @ value
            off = part - output
            sums = torch.stack(
                [
                    off.abs().sum(),
                    (off**2).sum(),
                    output.abs().sum(),
                    (output**2).sum(),
                    whole[..., held].sum(),
                    whole.sum(),
                ]
            )
            self.sums[module.layer_idx] = self.sums.get(module.layer_idx, torch.zeros(6).double()) + sums
            output = part
        return output.transpose(1, 2).to(query.dtype), None

    @staticmethod
    def weights(scores: Tensor, sinks: Tensor | None) -> Tensor:
        if sinks is None:
            return scores.softmax(-1)
        column = sinks.double().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        return torch.cat([scores, column], -1).softmax(-1)[..., :-1]


def gemma2() -> PreTrainedModel:
    options = {"num_hidden_layers": 4, "head_dim": 32, "attn_logit_softcapping": 5.0, "sliding_window": 24}
    config = AutoConfig.for_model("gemma2", vocab_size=VOCAB, hidden_size=64, intermediate_size=64, **options)
    transformers.set_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for name, weight in model.named_parameters():
        if "_proj" in name:
            weight.mul_(6)
    return model


MODELS = {
    "llama": lambda: tiny("llama"),
    "mqa": lambda: llama(32, 4, 1, torch.float32),
    "softcap": gemma2,
    "sinks": lambda: tiny("gpt_oss"),
}


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("recipe", ["logquant-evict", "kivi-evict"])
def test_errors_of_eviction_are_those_of_attention_to_the_kept_tokens(family: str, recipe: str) -> None:
    model = MODELS[family]()
    truth = Truth(model, recipe, **SMALL[recipe]).sums
    found = watched(model, recipe, **SMALL[recipe])
    assert truth.keys() == {i for i, value in enumerate(found.layers["l1"]) if value is not None}
    for layer, (l1, l2, exact_l1, exact_l2, held, mass) in ((i, x.tolist()) for i, x in truth.items()):
        assert l1 / exact_l1 > 0.02
        assert found.layers["l1"][layer] == pytest.approx(l1 / exact_l1, rel=1e-4)
        assert found.layers["l2"][layer] == pytest.approx(math.sqrt(l2 / exact_l2), rel=1e-4)
        assert found.layers["exact_mass"][layer] == pytest.approx(held / mass, rel=1e-4)
        assert found.layers["dropped_mass"][layer] == pytest.approx(1 - held / mass, rel=1e-4)
        assert found.layers["quantized_mass"][layer] == 0
    assert found.means["l1"] == pytest.approx(sum(x[0] / x[2] for x in truth.values()).item() / len(truth), rel=1e-4)


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize(("recipe", "params"), [("full", {}), ("logquant", {"window": 120})])
def test_what_is_kept_exactly_makes_no_error(family: str, recipe: str, params: dict[str, Any]) -> None:
    found = watched(MODELS[family](), recipe, **params).means
    assert found["l1"] is not None
    assert found["l1"] < 2e-6
    assert found["l2"] is not None
    assert found["l2"] < 2e-6
    assert (found["exact_mass"], found["quantized_mass"], found["dropped_mass"]) == (1, 0, 0)


def test_several_queries_at_once_are_causal() -> None:
    found = watched(tiny("llama"), "logquant", batch=2, prompt=True, window=120)
    assert found.means["l1"] is not None
    assert found.means["l1"] < 2e-6
    assert found.means["exact_mass"] == 1
    assert all(profile.queries == PROMPT + STEPS for profile in found.distances.layers.values())


@pytest.mark.parametrize("recipe", ["logquant", "kivi"])
def test_errors_of_quantization_are_those_of_decoded_tokens(recipe: str) -> None:
    """Of the first layer, whose queries, keys and values don't depend on the cache."""
    model, tokens = tiny("llama"), ids(PROMPT + STEPS)
    plain, cache = exact(model), make_cache(recipe, model, **SMALL[recipe])
    queries: list[Tensor] = []

    def spy(module: Any, query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        if module.layer_idx == 0:
            queries.append(query.double())
        return torch.zeros_like(query).transpose(1, 2), None

    AttentionInterface.register("spy", spy)
    spied = copy.deepcopy(model)
    spied.set_attn_implementation("spy")
    spied(tokens, **{CACHE: plain})
    keys, values = (x.double() for x in (plain.layers[0].keys, plain.layers[0].values))
    off = total = kept = 0.0
    model(tokens[:, :PROMPT], **{CACHE: cache})
    for i in range(PROMPT, PROMPT + STEPS):
        cache.commit()
        pairs = zip(cache.dense(0), (keys, values), strict=True)
        decoded = [torch.cat([x.double(), y[:, :, i : i + 1]], 2) for x, y in pairs]
        outputs = []
        for k, v in ((keys[:, :, : i + 1], values[:, :, : i + 1]), decoded):
            weights = (queries[0][:, :, i : i + 1] @ k.repeat_interleave(2, 1).mT * 32**-0.5).softmax(-1)
            outputs.append((weights @ v.repeat_interleave(2, 1), weights))
        exactly = torch.ones(i + 1, dtype=torch.bool)
        tiers = simulate(cache.recipe.tiers, i)
        for tier, positions in zip(cache.recipe.tiers, tiers, strict=True):
            exactly[torch.from_numpy(positions)] = tier.keys == tier.values == "full"
        off += (outputs[0][0] - outputs[1][0]).abs().sum().item()
        total += outputs[0][0].abs().sum().item()
        kept += outputs[0][1][..., exactly].sum().item() / 4
        model(tokens[:, i : i + 1], **{CACHE: cache})
    found = watched(model, recipe, **SMALL[recipe]).layers
    assert found["l1"][0] == pytest.approx(off / total, rel=1e-4)
    assert off / total > 0.01
    assert found["exact_mass"][0] == pytest.approx(kept / STEPS, rel=1e-4)
    assert found["quantized_mass"][0] == pytest.approx(1 - kept / STEPS, rel=1e-4)


@pytest.mark.parametrize("recipe", ["logquant", "kivi", "logquant-evict", "streaming-quant", "hf-quantized"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "sinks"])
def test_masses_are_shares_of_a_whole(family: str, recipe: str) -> None:
    model = MODELS.get(family, lambda: tiny(family))()
    found = watched(model, recipe, batch=2).layers
    masses = zip(*(found[f"{kept}_mass"] for kept in ("exact", "quantized", "dropped")), strict=True)
    sums = [sum(row) for row in masses if row[0] is not None]
    assert len(sums) == 2
    assert sums == pytest.approx([1.0, 1.0])


def test_layers_that_are_not_compressed_are_left_out() -> None:
    found = watched(tiny("gemma3_text"), "logquant", window=12)
    assert [value is None for value in found.layers["l1"]] == [True, False, True, False]
    assert found.means["l1"] == pytest.approx((found.layers["l1"][1] + found.layers["l1"][3]) / 2)


@pytest.mark.parametrize("prompt", [False, True])
def test_models_that_compute_on_keys_and_values_can_not_be_watched(prompt: bool) -> None:
    found = watched(tiny("deepseek_v3"), "logquant", prompt=prompt, window=12)
    assert found.layers["l1"] == [None, None]
    assert set(found.means.values()) == {None}
    assert not found.distances.layers


@pytest.mark.skipif(VERSION < (5, 20), reason="its model computes on keys and values before attention")
def test_layers_that_share_keys_and_values_are_watched_each() -> None:
    layered = {"num_hidden_layers": 4, "head_dim": 32, "sliding_window": 24, "hidden_size_per_layer_input": 8}
    layered |= {"layer_types": ["sliding_attention", "full_attention"] * 2, "vocab_size_per_layer_input": VOCAB}
    shared = {"num_kv_shared_layers": 2, "laurel_rank": 8, "activation_sparsity_pattern": [0.0] * 4}
    found = watched(build("gemma3n_text", torch.float32, **layered, **shared), "logquant-evict", window=12)
    assert [value is None for value in found.layers["l1"]] == [True, False, True, False]
    assert all(value is None or 0 < value < 2 for value in found.layers["l1"])


def test_tokens_may_be_kept_differently_by_row_and_head(monkeypatch: pytest.MonkeyPatch) -> None:
    same = watched(tiny("llama"), "full", batch=2).layers["exact_mass"]
    assert same == [1, 1]

    def exactness(self: LayerCache) -> Any:
        found = np.full((2, 2, self.seen), QUANTIZED)
        found[1, 0] = DROPPED
        return found

    monkeypatch.setattr(LayerCache, "exactness", exactness)
    found = watched(tiny("llama"), "full", batch=2).layers
    for exactly, quantized, dropped in zip(
        *(found[f"{x}_mass"] for x in ("exact", "quantized", "dropped")), strict=True
    ):
        assert 0 < exactly < 0.9  # only the step's own token
        assert exactly + quantized + dropped == pytest.approx(1)
        assert dropped == pytest.approx((1 - exactly) / 4, rel=0.3)


@pytest.mark.parametrize("recipe", ["logquant", "kivi", "kivi-evict", "partial-logquant"])
def test_exactness_goes_by_tier_and_new_tokens_are_exact(recipe: str) -> None:
    cache = make_cache(recipe, tiny("llama"))
    tiers = next(layer.tiers for layer in cache.layers if isinstance(layer, TieredLayer))
    assert tiers.exactness().shape == (1, 1, 0)
    x = torch.randn(1, 2, 300, 32)
    tiers.update(x, x)
    assert (tiers.exactness()[0, 0, -64:] == EXACT).all()
    tiers.commit()
    found = tiers.exactness()
    assert found.shape == (1, 1, 300)
    for tier, positions in zip(cache.recipe.tiers, simulate(cache.recipe.tiers, 300), strict=True):
        code = EXACT if tier.keys == tier.values == "full" else QUANTIZED
        assert (found[0, 0, positions] == code).all()
    held = np.concatenate(simulate(cache.recipe.tiers, 300))
    assert (np.delete(found[0, 0], held) == DROPPED).all()
    tiers.stage(x[:, :, :5], x[:, :, :5])
    assert (tiers.exactness()[0, 0, 300:] == [EXACT] * 5).all()


def test_attention_by_distance_of_a_known_pattern() -> None:
    profile = Profile()
    weights = np.zeros((2, 12))
    weights[0, [0, 9, 10]] = [0.2, 0.5, 0.3]  # its query is at 10: a first token, distance 1, its own
    weights[1, [4, 5, 6, 11]] = [0.05, 0.1, 0.3, 0.55]  # at 11: distances 7, 6 and 5, its own
    profile.add(weights)
    mean = profile.mean()
    assert mean[:7].tolist() == pytest.approx([0.25, 0, 0, 0, 0.15, 0.05, 0.05])
    assert np.isnan(mean[7:]).all()
    assert (profile.sinks, profile.own, profile.queries) == pytest.approx((0.2, 0.85, 2))
    distances = Distances({3: profile})
    assert distances.distances.tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert distances.shares() == pytest.approx({"first_tokens": 0.1, "own_token": 0.425})
    assert distances.fit() is None
    assert "too few tokens" in distances.sentence()


def test_distances_that_few_queries_reach_are_left_out() -> None:
    near, far = Profile(), Profile()
    near.add(np.full((1, 30), 1 / 30))
    near.add(np.full((1, 30), 1 / 30))
    far.add(np.full((1, 1000), 1 / 1000))
    near.merge(far)
    assert Distances({0: near}).distances.max() < 30
    near.merge(far)
    near.merge(far)
    assert Distances({0: near}).distances.max() > 700


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.7])
def test_the_fit_recovers_a_known_exponent(alpha: float) -> None:
    profile = Profile()
    distance = np.maximum(2000.0 - np.arange(2001), 1)
    weights = 0.03 * distance**-alpha
    weights[:4] = 0.5  # attention of the first tokens has nothing to do with their distance
    weights[-8:] = 0.4  # nor is the window part of the claim
    profile.add(weights[None])
    fit = Distances({0: profile, 1: profile}).fit()
    assert fit is not None
    assert fit.exponent == pytest.approx(alpha, abs=0.01)
    assert fit.factor == pytest.approx(0.03, rel=0.05)
    assert fit.r2 > 0.999
    assert fit.first >= 8
    assert fit(fit.last) == pytest.approx(0.03 * fit.last**-alpha, rel=0.05)


def test_least_squares_and_how_good_it_is() -> None:
    x = np.array([1.0, 2, 4, 8, 16, 32])
    fit = fit_power_law(x, 3 * x**-1.25)
    assert fit is not None
    assert (fit.exponent, fit.factor, fit.r2) == pytest.approx((1.25, 3, 1))
    assert fit_power_law(x[:4], x[:4]) is None
    assert fit_power_law(x, [1, 2, 3, 4, 0, 0]) is None
    zigzag = fit_power_law(x, [1, 9, 1, 9, 1, 9])
    assert zigzag is not None
    assert zigzag.r2 < 0.3


@pytest.mark.parametrize(
    ("alpha", "noise", "text"),
    [(1.05, 0, "as log spacing"), (0.4, 0, "slower than"), (2, 0, "faster than"), (1.0, 3, "no power law")],
)
def test_the_sentence_says_what_was_found(alpha: float, noise: float, text: str) -> None:
    profile = Profile()
    distance = np.maximum(500.0 - np.arange(501), 1)
    profile.add((0.1 * distance**-alpha * np.exp(noise * np.sin(4 * np.log(distance))))[None])
    sentence = Distances({0: profile}).sentence()
    assert text in sentence
    assert noise or f"alpha = {alpha:.2f}" in sentence


def test_exact_attention_by_distance_is_that_of_the_model() -> None:
    model, tokens = copy.deepcopy(tiny("llama")), ids(PROMPT + STEPS)
    found = watched(model, "full").distances
    model.set_attn_implementation("eager")
    weights = model(tokens, output_attentions=True).attentions
    for layer in range(2):
        profile = Profile()
        for i in range(PROMPT, PROMPT + STEPS):
            profile.add(weights[layer][0, :, i, : i + 1].mean(0).double().numpy()[None])
        np.testing.assert_allclose(found.curves()[layer], profile.mean()[np.isfinite(profile.mean())], rtol=1e-4)
