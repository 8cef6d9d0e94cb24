"""What a careless or unlucky user meets: gradients, interruptions, odd plugins, odd numbers, odd modes."""

from __future__ import annotations

import copy
from typing import Any, Literal

import numpy as np
import pytest
import torch
import transformers
from models import exact, ids, llama, tiny
from transformers import AutoConfig, AutoModelForCausalLM
from words import CACHE

from kvpolicy import Policy, load_recipe, make_cache
from kvpolicy.errors import CacheError, PluginError, RecipeError
from kvpolicy.hf.layer import TieredLayer
from kvpolicy.placement.planner import Placement
from kvpolicy.placement.simulate import simulate
from kvpolicy.storage.affine import AffineStore
from kvpolicy.storage.pages import Pages

VERSION = tuple(map(int, transformers.__version__.split(".")[:2]))


class ListOption(Policy):
    """Has an option that can't be hashed."""

    kind: Literal["list-option"] = "list-option"
    which: list[int] = [0, 1]  # noqa: RUF012

    def keep(self, positions: Any, seen: int) -> Any:
        return np.isin(positions, self.which)


class Careless(Policy):
    """Returns whatever it is told to."""

    kind: Literal["careless"] = "careless"

    def keep(self, positions: Any, seen: int) -> Any:
        return WRONG[0](positions)


WRONG: list[Any] = [None]


def with_policy(policy: Policy) -> Any:
    recipe = load_recipe("logquant-evict", window=8)
    tiers = (recipe.tiers[0].model_copy(update={"policy": policy}), *recipe.tiers[1:])
    return recipe.model_copy(update={"tiers": tiers})


@pytest.mark.parametrize("heads", [(4, 4), (4, 2)], ids=["MHA", "GQA"])
def test_gradients_reach_the_new_tokens_as_with_the_exact_cache(heads: tuple[int, int]) -> None:
    model = copy.deepcopy(llama(32, *heads, torch.float32))
    found = []
    for cache in (make_cache("full", model), exact(model)):
        with torch.no_grad():
            model(ids(50), **{CACHE: cache})
        model.zero_grad()
        model(ids(7, seed=1), **{CACHE: cache}).logits.square().mean().backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(found[0]) > 10
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_an_interrupted_update_is_not_continued_silently(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = tiny("llama"), [0]
    cache = make_cache("atom", model)
    encode = AffineStore._append_codes

    def interrupted(self: AffineStore, *args: Any) -> None:
        calls[0] += 1
        if calls[0] == 2:
            raise KeyboardInterrupt
        encode(self, *args)

    with torch.no_grad():
        model(ids(40), **{CACHE: cache})
        monkeypatch.setattr(AffineStore, "_append_codes", interrupted)
        with pytest.raises(KeyboardInterrupt):
            model(ids(1), **{CACHE: cache})
        monkeypatch.undo()
        for use in (lambda: model(ids(1), **{CACHE: cache}), cache.dense, cache.memory, lambda: cache.save("x")):
            with pytest.raises(CacheError, match=r"interrupted after .* reset\(\) the cache"):
                use()
        cache.reset()
        model(ids(40), **{CACHE: cache})
        assert len(cache.positions().positions) == 40


@pytest.mark.parametrize("name", ["full", "kivi", "logquant"])
def test_a_copy_made_in_inference_mode_goes_on_outside(name: str) -> None:
    model = tiny("llama")
    cache = make_cache(name, model)
    with torch.inference_mode():
        model(ids(70), **{CACHE: cache})
        copied = copy.deepcopy(cache)
    with torch.no_grad():
        for t in range(3):
            a, b = (model(ids(60, seed=t), **{CACHE: c}).logits for c in (copied, cache))
            assert torch.equal(a, b)


@pytest.mark.skipif(VERSION < (5, 20), reason="its config has one shape for all layers")
def test_layers_of_different_shape() -> None:
    config = AutoConfig.for_model("gemma4_text")
    assert config.is_heterogeneous
    kept = [x for x in make_cache("logquant", config).layers if isinstance(x, TieredLayer)]
    assert kept
    small = AutoConfig.for_model(
        "gemma4_text",
        vocab_size=97,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        global_head_dim=64,
        sliding_window=24,
        vocab_size_per_layer_input=97,
        hidden_size_per_layer_input=16,
        num_kv_shared_layers=0,
        layer_types=["sliding_attention", "full_attention"] * 2,
    )
    model = AutoModelForCausalLM.from_config(small).eval()
    with torch.no_grad():
        ours, theirs = make_cache("full", model), exact(model)
        for cut in (70, 20, 1, 1):
            a, b = (model(ids(cut), **{CACHE: c}).logits for c in (ours, theirs))
            assert torch.equal(a, b)
        assert model(ids(150), **{CACHE: make_cache("balanced", model)}).logits.isfinite().all()


@pytest.mark.parametrize("key", ["0", "0-0", "-2"])
def test_an_override_of_a_layer_that_is_not_compressed_is_refused(key: str) -> None:
    recipe = {"extends": "logquant", "layers": {key: [{"store": {"kind": "int", "nbits": 8}}]}}
    with pytest.raises(RecipeError, match=r"which are \[1, 3\]; layer . is a DynamicSlidingWindowLayer"):
        make_cache(recipe, tiny("gemma3_text"))
    make_cache({"extends": "logquant", "layers": {"0-1": "full", "-1": "full"}}, tiny("gemma3_text"))
    with pytest.raises(RecipeError, match="must name layers of the model"):
        make_cache({"extends": "logquant", "layers": {"99": "full"}}, tiny("mistral"))


def test_options_need_not_be_hashable() -> None:
    cache = make_cache(with_policy(ListOption()), tiny("llama"))
    assert cache.layers[0].tiers.placement is cache.layers[1].tiers.placement


@pytest.mark.parametrize(
    "wrong",
    [
        lambda p: np.zeros(len(p), dtype=np.int64),
        lambda p: [True] * len(p),
        lambda p: torch.ones(len(p), dtype=torch.bool),
        lambda p: np.ones(len(p) + 1, dtype=np.bool_),
        lambda p: None,
    ],
)
def test_a_policy_that_returns_no_mask_is_named(wrong: Any) -> None:
    WRONG[0] = wrong
    with pytest.raises(PluginError, match="policy 'careless': keep must return a NumPy array of bool"):
        simulate(with_policy(Careless()).tiers, 20)


@pytest.mark.parametrize(
    "option", ["window: 100000000000000000000", "window: 5, flush: 100000000000000000000", "window: 2147483648"]
)
def test_numbers_beyond_counting_are_refused(option: str, tmp_path: Any) -> None:
    file = tmp_path / "big.yaml"
    file.write_text(f"tiers: [{{policy: {{kind: recent, {option}}}, store: full}}, {{store: evict}}]")
    with pytest.raises(RecipeError, match="2147483647"):
        load_recipe(file)


def test_groups_by_arrival_need_arrivals_of_several_tokens() -> None:
    recipe = {"tiers": [{"store": {"kind": "int", "per": "channel", "group_size": "arrival"}}]}
    with pytest.raises(RecipeError, match="group_size: arrival must stand below a tier"):
        make_cache(recipe, tiny("llama"))


@pytest.mark.parametrize("window", [4, 16, 42])
def test_small_budgets_are_placed_without_looking_at_every_token_each_time(
    window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The work of placing is the tokens that a tier holds, not those of the context."""
    import kvpolicy.interfaces.policy

    looked = [0]
    kept = Policy._kept

    def counting(self: Policy, positions: Any, seen: int, prompt: int | None) -> Any:
        looked[0] += len(positions)
        return kept(self, positions, seen, prompt)

    monkeypatch.setattr(kvpolicy.interfaces.policy.Policy, "_kept", counting)
    Placement(load_recipe("logquant", window=window).tiers).advance(
        Placement(load_recipe("logquant", window=window).tiers).start(), 20_000
    )
    assert 0 < looked[0] < 4 * 20_000


def test_a_sink_in_front_of_a_window_does_not_make_the_window_move() -> None:
    pages = Pages()
    pages.append(torch.arange(500.0).view(1, 1, 500, 1))
    behind = pages.pages[0][0, 0, 450:500].data_ptr()
    pages.drop(np.array([4, 5]))
    assert pages.slice(448, 498).data_ptr() == behind
    assert pages.slice(0, 498).flatten().tolist() == [*range(4), *range(6, 500)]


def test_rows_may_be_counted_from_the_end() -> None:
    model = tiny("llama")
    ours, theirs = make_cache("full", model), exact(model)
    with torch.no_grad():
        for cache in (ours, theirs):
            model(ids(30, batch=3), **{CACHE: cache})
            cache.batch_select_indices(torch.tensor([-1, 0]))
        a, b = (model(ids(1, batch=2), **{CACHE: c}).logits for c in (ours, theirs))
    assert torch.equal(a, b)


def test_a_range_that_float16_holds_stays_finite() -> None:
    cache = make_cache({"tiers": [{"store": {"kind": "int", "nbits": 1}}]}, tiny("llama"))
    x = torch.full((1, 2, 5, 32), 60_000.0, dtype=torch.float16)
    x[..., ::2] *= -1
    cache.update(x, x, 0)
    cache.commit()
    assert cache.dense(0)[0].isfinite().all()
