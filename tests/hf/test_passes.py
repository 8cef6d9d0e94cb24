"""How models are hooked: passes are told from each other, and copies, threads and interruptions do no harm."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import threading
from typing import Any

import pytest
import torch
from models import ids, tiny
from transformers import PreTrainedModel
from words import CACHE, cache_of

from kvpolicy import CompressedCache, attach, make_cache
from kvpolicy.errors import CacheError
from kvpolicy.hf import attach as attention
from kvpolicy.hf.calls import Call, names_of
from kvpolicy.hf.transaction import Guard

GREEDY: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
QUANTIZED = {
    "tiers": [
        {"policy": {"kind": "recent", "window": 8}, "store": "full"},
        {"store": {"kind": "int", "nbits": 4, "group_size": 16}},
    ]
}


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield
    assert attention._reading.get() is None


@pytest.fixture
def model() -> PreTrainedModel:
    return copy.deepcopy(tiny("llama"))


def word(model: PreTrainedModel) -> str:
    found = Call(names_of(model), (), {}).word
    assert found is not None
    return found


def hooks(model: PreTrainedModel) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def given(model: PreTrainedModel, cache: Any, n: int = 40) -> torch.Tensor:
    """Logits of a prompt and two steps."""
    cuts = [(0, n), (n, n + 1), (n + 1, n + 2)]
    return torch.cat([model(ids(n + 2)[:, a:b], **{word(model): cache}).logits for a, b in cuts], dim=1)


def boom(error: BaseException) -> Any:
    def hook(*_: Any) -> None:
        raise error

    return hook


class TestCopies:
    @staticmethod
    def blank(model: PreTrainedModel) -> PreTrainedModel:
        for weight in model.parameters():
            weight.zero_()  # can only predict token 0
        return model

    def test_a_deepcopy_generates_with_its_own_weights(self, model: PreTrainedModel) -> None:
        with attach(model, recipe="balanced"):
            twin = self.blank(copy.deepcopy(model))
            during = twin.generate(ids(60), **GREEDY, return_dict_in_generate=True)
        assert during.sequences[0, -8:].tolist() == [0] * 8
        assert type(cache_of(during)).__name__ == "DynamicCache"
        assert not attention.is_attached(twin)
        with attach(twin, recipe="logquant"):
            after = twin.generate(ids(60), **GREEDY, return_dict_in_generate=True)
            assert cache_of(after).recipe.name == "logquant"
        assert after.sequences[0, -8:].tolist() == [0] * 8
        assert "generate" not in twin.__dict__

    @pytest.mark.parametrize("how", ["pickle", "torch"])
    def test_pickles(self, model: PreTrainedModel, how: str) -> None:
        expected = model(ids(30)).logits
        with attach(model, recipe="balanced"):
            file = io.BytesIO()
            pickle.dump(model, file) if how == "pickle" else torch.save(model, file)
            file.seek(0)
        twin = pickle.load(file) if how == "pickle" else torch.load(file, weights_only=False)
        assert torch.equal(twin(ids(30)).logits, expected)
        assert not attention.is_attached(twin)
        self.blank(twin)
        assert twin.generate(ids(60), **GREEDY)[0, -8:].tolist() == [0] * 8
        with attach(twin):
            twin.generate(ids(60), **{CACHE: make_cache("logquant", twin)}, **GREEDY)

    def test_a_model_of_an_attached_models_config(self, model: PreTrainedModel) -> None:
        with attach(model, recipe="balanced"):
            other = type(model)(model.config).eval()
            assert not attention.is_attached(other)
            with attach(other):
                other.generate(ids(60), **{CACHE: make_cache("logquant", other)}, **GREEDY)
        with attach(other):
            pass

    def test_a_generate_of_the_users_own_stays(self, model: PreTrainedModel) -> None:
        seen: list[Any] = []

        def own(*args: Any, **kwargs: Any) -> Any:
            seen.append(kwargs.get(word(model)))
            return type(model).generate(model, *args, **kwargs)

        model.__dict__["generate"] = own
        with attach(model, recipe="balanced"):
            model.generate(ids(60), **GREEDY)
        assert seen[0].recipe.name == "balanced"
        assert model.__dict__.pop("generate") is own


class TestOtherRuns:
    def test_an_attached_model_within_another(self, model: PreTrainedModel) -> None:
        other = tiny("qwen3")
        expected = given(model, make_cache(QUANTIZED, model)), given(other, make_cache(QUANTIZED, other))
        mine, its = make_cache(QUANTIZED, model), make_cache(QUANTIZED, other)
        found: list[torch.Tensor] = []
        with attach(model), attach(other):

            def inner(*_: Any) -> None:
                found.append(given(other, its))
                found.append(other(ids(20), use_cache=False).logits)
                assert attention._reading.get() is mine
                hook.remove()

            hook = model.model.layers[0].register_forward_hook(inner)
            outer = given(model, mine)
        torch.testing.assert_close(outer, expected[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found[0], expected[1], rtol=1e-4, atol=1e-4)

    def test_a_model_within_itself(self, model: PreTrainedModel) -> None:
        plain, expected = model(ids(25, seed=3), use_cache=False).logits, given(model, make_cache(QUANTIZED, model))
        mine, found = make_cache(QUANTIZED, model), []
        with attach(model):

            def inner(*_: Any) -> None:
                hook.remove()
                found.append(model(ids(25, seed=3), use_cache=False).logits)
                found.append(given(model, make_cache(QUANTIZED, model)))

            hook = model.model.layers[1].register_forward_hook(inner)
            outer = given(model, mine)
        assert torch.equal(found[0], plain)
        for x in (outer, found[1]):
            torch.testing.assert_close(x, expected, rtol=1e-4, atol=1e-4)

    def test_an_unattached_model_within_an_attached_one(self, model: PreTrainedModel) -> None:
        other = copy.deepcopy(model)
        expected, found = given(other, make_cache(QUANTIZED, other.config)), []
        with attach(model):

            def inner(*_: Any) -> None:
                hook.remove()
                found.append(given(other, make_cache(QUANTIZED, other.config)))

            hook = model.model.layers[0].register_forward_hook(inner)
            given(model, make_cache(QUANTIZED, model))
        assert torch.equal(found[0], expected)

    def test_threads(self, model: PreTrainedModel) -> None:
        recipes = ["balanced", "streaming-llm", "h2o", "full"]
        with attach(model):
            expected = [model.generate(ids(90), **{CACHE: make_cache(r, model)}, **GREEDY) for r in recipes]
            found: dict[int, list[torch.Tensor]] = {}

            @torch.no_grad()
            def work(i: int) -> None:
                for _ in range(3):
                    cache = make_cache(recipes[i], model)
                    found.setdefault(i, []).append(model.generate(ids(90), **{CACHE: cache}, **GREEDY))

            threads = [threading.Thread(target=work, args=(i,)) for i in range(len(recipes))]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        for i, x in enumerate(expected):
            assert len(found[i]) == 3
            assert all(torch.equal(x, y) for y in found[i])


class TestInterruptions:
    @pytest.mark.parametrize("where", ["owner", "decoder", "layer"])
    @pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
    def test_nothing_is_left(self, model: PreTrainedModel, where: str, error: type[BaseException]) -> None:
        cache = make_cache(QUANTIZED, model)
        place = {"owner": model.lm_head, "decoder": model.model.norm, "layer": model.model.layers[1].mlp}[where]
        before = model(ids(20), use_cache=False).logits
        handle = attach(model)
        model(ids(30), **{word(model): cache})
        hook = place.register_forward_pre_hook(boom(error()))
        with pytest.raises(error):
            model(ids(1), **{word(model): cache})
        hook.remove()
        assert attention._reading.get() is None
        assert not any(layer.attached for layer in cache.layers)
        assert torch.equal(model(ids(20), use_cache=False).logits, before)
        given(model, make_cache(QUANTIZED, model))
        handle.detach()
        del cache, hook
        gc.collect()
        assert hooks(model) == 0

    def test_detaching_ends_what_was_interrupted(self, model: PreTrainedModel) -> None:
        cache = make_cache(QUANTIZED, model)
        handle = attach(model)
        hook = model.model.layers[1].mlp.register_forward_pre_hook(boom(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            model(ids(30), **{word(model): cache})
        hook.remove()
        handle.detach()
        assert not any(layer.attached for layer in cache.layers)

    def test_the_decoder_alone_after_ctrl_c_within_its_owner(self, model: PreTrainedModel) -> None:
        expected = model.model(ids(30), **{word(model): make_cache(QUANTIZED, model)})[0]
        cache = make_cache(QUANTIZED, model)
        with attach(model):
            hook = model.model.register_forward_pre_hook(boom(KeyboardInterrupt()), prepend=True)
            with pytest.raises(KeyboardInterrupt):
                model(ids(30), **{word(model): cache})
            hook.remove()
            found = model.model(ids(30), **{word(model): cache})[0]
            assert not any(layer.attached for layer in cache.layers)
        assert torch.equal(found, expected)


class TestArguments:
    def test_both_words_and_positions(self, model: PreTrainedModel) -> None:
        expected = given(model, make_cache(QUANTIZED, model))
        at = names_of(model).index(word(model))
        with attach(model):
            for call in (
                lambda x, c: model(x, **{CACHE: c}),
                lambda x, c: model(x, **{word(model): c}),
                lambda x, c: model(x, *[None] * (at - 1), c),
            ):
                cache = make_cache(QUANTIZED, model)
                found = torch.cat([call(ids(42)[:, a:b], cache).logits for a, b in ((0, 40), (40, 41), (41, 42))], 1)
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
                assert cache.scratch.bytes == 0

    def test_an_argument_of_any_name(self, model: PreTrainedModel) -> None:
        decoder = model.model
        original, seen = type(decoder).forward, word(model)

        class Renamed(type(decoder)):  # type: ignore[misc]
            def forward(self, input_ids: Any, memory: Any = None, **kwargs: Any) -> Any:
                return original(self, input_ids, **{seen: memory}, **kwargs)

        decoder.__class__ = Renamed
        with attach(decoder):
            cache = make_cache("h2o", decoder)
            decoder(ids(100), memory=cache)
            decoder(ids(1), cache)
        assert cache.get_seq_length() == 101

    def test_a_cache_that_no_hook_has_seen_is_refused(self, model: PreTrainedModel) -> None:
        hidden: list[Any] = []
        decoder, original, seen = model.model, type(model.model).forward, word(model)

        class Hiding(type(decoder)):  # type: ignore[misc]
            def forward(self, input_ids: Any, **kwargs: Any) -> Any:
                return original(self, input_ids, **{seen: hidden[0]})

        decoder.__class__ = Hiding
        for made_for in (model, model.config):
            hidden[:] = [make_cache(QUANTIZED, made_for)]
            decoder(ids(30))
            hidden[:] = [make_cache(QUANTIZED, made_for)]
            with attach(decoder), pytest.raises(CacheError, match="as an argument of its own, found an update outside"):
                decoder(ids(30))
            assert hidden[0].get_seq_length() == 0

    def test_an_update_by_hand_is_refused_while_the_model_is_attached(self, model: PreTrainedModel) -> None:
        cache, new = make_cache(QUANTIZED, model), torch.zeros(1, 2, 3, 32)
        with attach(model), pytest.raises(CacheError, match="outside any forward pass"):
            cache.update(new, new, 0)
        cache.update(new, new, 0)


class TestUnattachedHooks:
    def test_they_go_with_the_last_cache(self, model: PreTrainedModel) -> None:
        one = make_cache("balanced", model)
        assert hooks(model) == 4
        copied = copy.deepcopy(one)
        other = make_cache("full", model)
        del one, other
        gc.collect()
        assert hooks(model) == 4
        handle = attach(model)
        del copied
        gc.collect()
        assert hooks(model) == 4
        handle.detach()
        assert hooks(model) == 0
        make_cache("balanced", model.config)
        assert hooks(model) == 0

    def test_passes_are_announced_with_their_mask_and_end(
        self, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seen: list[Any] = []
        monkeypatch.setattr(
            CompressedCache, "begin", lambda c, n, mask, attached: seen.append((n, mask is not None, attached))
        )
        monkeypatch.setattr(CompressedCache, "finish", lambda c, failed: seen.append(failed))
        cache, mask = make_cache("balanced", model), torch.ones(1, 20, dtype=torch.long)
        model(ids(20), attention_mask=mask, **{CACHE: cache})
        model.model(ids(1), **{CACHE: cache})
        hook = model.model.norm.register_forward_pre_hook(boom(ZeroDivisionError()))
        with pytest.raises(ZeroDivisionError):
            model(ids(1), **{CACHE: cache})
        hook.remove()
        assert seen == [(20, True, False), False, (1, False, False), False, (1, False, False), True]

    def test_a_cache_can_be_pickled(self, model: PreTrainedModel) -> None:
        assert pickle.loads(pickle.dumps(make_cache("balanced", model))).lease is None


def test_one_call_with_a_recipe_begins_one_pass(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    count: list[int] = []
    told = Guard._padding_with  # asked once by each pass that begins
    monkeypatch.setattr(Guard, "_padding_with", lambda g, mask, n, *more: (count.append(n), told(g, mask, n, *more))[1])
    with attach(model, recipe="logquant"):
        assert cache_of(model(ids(30))).recipe.name == "logquant"
    assert count == [30]


def test_a_mask_of_tokens_that_were_dropped_is_refused_by_name() -> None:
    model = tiny("llama")
    with torch.no_grad():
        cache = make_cache("streaming-llm", model, window=8)
        model(ids(40), **{CACHE: cache})
        with pytest.raises(CacheError, match=r"column for each of the 13 tokens .* found 41; attach the model: its"):
            model(ids(1), attention_mask=torch.zeros(1, 1, 1, 41), **{CACHE: cache})
        model(ids(1), attention_mask=torch.zeros(1, 1, 1, 13), **{CACHE: cache})
    assert cache.get_seq_length() == 41


def test_the_summary_says_where_another_model_than_its_own_runs_with_a_cache() -> None:
    model = tiny("llama")
    with torch.no_grad():
        cache = make_cache("streaming-llm", model, window=8)
        copy.deepcopy(model)(ids(40), **{CACHE: cache})
        assert "can't be told apart" in str(cache.summary())
        cache.reset()
        model(ids(40), **{CACHE: cache})
        assert "can't be told apart" not in str(cache.summary())
