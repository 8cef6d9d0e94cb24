"""Models attached with a recipe: calls that bring no cache get one, and what a call asks for itself is done."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from models import exact, ids, tiny
from transformers import GenerationConfig, LlamaForCausalLM, PreTrainedModel
from words import CACHE

from kvpolicy import attach, load_recipe
from kvpolicy.errors import CacheError

GREEDY: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True}


@pytest.fixture
def model() -> PreTrainedModel:
    found: PreTrainedModel = tiny.__wrapped__("llama")  # caches of other tests may keep hooks on the one they share
    return found


def used(output: Any) -> str:
    """The name of the recipe of the cache that a call used, or the cache's class."""
    cache = output.cache if hasattr(output, "cache") else output.past_key_values
    return cache.recipe.name if hasattr(cache, "recipe") else type(cache).__name__


@pytest.mark.parametrize("kind", [None, "hybrid", "dynamic", "static", "quantized", "offloaded"])
def test_a_cache_implementation_of_the_checkpoint_gives_way(model: PreTrainedModel, kind: str | None) -> None:
    model.generation_config.cache_implementation = kind
    with attach(model, recipe="logquant"):
        assert used(model.generate(ids(60), **GREEDY)) == "logquant"
        assert used(model.generate(ids(60), generation_config=model.generation_config, **GREEDY)) == "logquant"
        assert used(model.generate(ids(60), GenerationConfig(**GREEDY))) == "logquant"
    assert model.generation_config.cache_implementation == kind


@pytest.mark.parametrize("how", ["keyword", "positional", "option"])
@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [("use_cache", False, "NoneType"), ("cache_implementation", "static", "StaticCache")],
)
def test_what_the_call_asks_for_is_done_and_told_once(
    model: PreTrainedModel, how: str, option: str, value: Any, expected: str
) -> None:
    config = GenerationConfig(**GREEDY, **{option: value})

    def run() -> Any:
        if how == "option":
            return model.generate(ids(60), **GREEDY, **{option: value})
        if how == "positional":
            return model.generate(ids(60), config)
        return model.generate(ids(60), generation_config=config)

    with attach(model, recipe="logquant"):
        with pytest.warns(UserWarning, match=f"{option}={value!r} is followed.*'logquant'.*attached"):
            assert used(run()) == expected
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            assert used(run()) == expected


def test_a_cache_of_the_callers_own_is_used(model: PreTrainedModel) -> None:
    with attach(model, recipe="logquant"):
        mine = exact(model)
        assert used(model.generate(ids(60), **{CACHE: mine}, **GREEDY)) == "DynamicCache"
        assert mine.get_seq_length() == 63
        assert used(model.generate(ids(60), GenerationConfig(**GREEDY), use_cache=True)) == "logquant"


def test_wrong_arguments_are_refused_by_generate_itself(model: PreTrainedModel) -> None:
    with attach(model, recipe="logquant"), pytest.raises(TypeError, match="multiple values"):
        model.generate(ids(60), inputs=ids(60), **GREEDY)


def test_layers_that_keep_different_numbers_of_tokens(model: PreTrainedModel) -> None:
    recent = {"policy": {"kind": "recent", "window": 30}, "store": "full"}
    uneven = load_recipe({"name": "uneven", "tiers": [recent, {"store": "evict"}], "layers": {"0": "full"}})
    with attach(model, recipe=uneven), torch.no_grad():
        assert used(model.generate(ids(60), **GREEDY)) == "uneven"
        assert used(model(ids(60))) == "uneven"


def test_a_recipe_that_does_not_fit_leaves_the_model_alone(model: PreTrainedModel) -> None:
    from kvpolicy.errors import RecipeError
    from kvpolicy.hf.attach import is_attached

    before = {k: repr(v) for k, v in vars(model).items()}
    with pytest.raises(RecipeError):
        attach(model, recipe={"tiers": [{"store": "full"}], "layers": {"7": "full"}})
    assert not is_attached(model)
    assert {k: repr(v) for k, v in vars(model).items()} == before


named = pytest.mark.skipif(CACHE != "cache", reason="before transformers 5.24 generate has another word")


class PassesOn(LlamaForCausalLM):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


class ByName(LlamaForCausalLM):
    def forward(self, input_ids: Any = None, *, cache: Any = None, **kwargs: Any) -> Any:
        return super().forward(input_ids, cache=cache, **kwargs)


class StarsAndName(LlamaForCausalLM):
    def forward(self, *args: Any, cache: Any = None, **kwargs: Any) -> Any:
        return super().forward(*args, cache=cache, **kwargs)


class NamesLittle(LlamaForCausalLM):
    def forward(self, input_ids: Any, **kwargs: Any) -> Any:
        return super().forward(input_ids, **kwargs)


class Closed(LlamaForCausalLM):
    def forward(self, input_ids: Any, attention_mask: Any = None) -> Any:
        return super().forward(input_ids, attention_mask)


@torch.no_grad()
@pytest.mark.parametrize(
    "kind", [PassesOn, pytest.param(ByName, marks=named), pytest.param(StarsAndName, marks=named), NamesLittle]
)
def test_any_form_of_forward_that_takes_a_cache(model: PreTrainedModel, kind: type[Any]) -> None:
    model.__class__ = kind
    mask = torch.ones(1, 60, dtype=torch.long)
    with attach(model, recipe="logquant"):
        assert used(model.generate(ids(60), **GREEDY)) == "logquant"
        assert used(model(ids(60))) == "logquant"
        assert used(model(ids(60), attention_mask=mask)) == "logquant"
        assert used(model(input_ids=ids(60))) == "logquant"
        mine = exact(model)
        assert used(model.generate(ids(60), **{CACHE: mine}, **GREEDY)) == "DynamicCache"
        assert used(model(ids(60), **{CACHE: exact(model)})) == "DynamicCache"
    assert used(model.generate(ids(60), **GREEDY)) == "DynamicCache"


@torch.no_grad()
def test_places_after_stars_are_those_of_the_forward_that_they_go_on_to(model: PreTrainedModel) -> None:
    model.__class__ = PassesOn
    with attach(model, recipe="logquant"):
        assert used(model(ids(60), torch.ones(1, 60, dtype=torch.long), None, None)) == "logquant"


def test_a_forward_that_can_take_no_cache_is_refused(model: PreTrainedModel) -> None:
    model.__class__ = Closed
    with pytest.raises(CacheError, match=r"argument 'cache' or 'past_key_values', found none in that of Closed; give"):
        attach(model, recipe="logquant")
    assert not model._forward_pre_hooks
    assert "generate" not in vars(model)
    attach(model).detach()


@torch.no_grad()
def test_a_cache_that_a_model_around_made_is_told_once(model: PreTrainedModel) -> None:
    with attach(model.model, recipe="logquant"):
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            assert used(model(ids(60))) == "logquant"
            mine = exact(model)
            assert used(model.generate(ids(60), **{CACHE: mine}, **GREEDY)) == "DynamicCache"
            model.model(ids(60), **{CACHE: exact(model)})
        with pytest.warns(UserWarning, match="DynamicCache that a model around LlamaModel made is used.*'logquant'"):
            assert used(model.generate(ids(60), **GREEDY)) == "DynamicCache"
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            assert used(model.generate(ids(60), **GREEDY)) == "DynamicCache"


@torch.no_grad()
@pytest.mark.parametrize("family", ["qwen2", "gemma3_text"])
def test_another_eager_model_compiles_as_one_graph(model: PreTrainedModel, family: str) -> None:
    other = copy.deepcopy(tiny(family))
    for eager in (model, other):
        eager.set_attn_implementation("eager")
    expected = other(ids(20), use_cache=False).logits
    torch._dynamo.reset()
    with attach(model):
        compiled = torch.compile(other, fullgraph=True, backend="eager")
        assert torch.equal(compiled(ids(20), use_cache=False).logits, expected)
