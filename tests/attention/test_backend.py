"""Backends: who is asked, what is merged, and what a layer's attention is then."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, ClassVar, Literal

import pytest
import torch
from honest import GoodBackend
from models import build, ids, tiny
from torch import Tensor
from words import CACHE

from kvpolicy import AttentionOptions, AttentionSpec, Backend, Part, attach, make_cache
from kvpolicy.attention import backend as backends
from kvpolicy.contracts import test_backends as contract
from kvpolicy.errors import PluginError


class Decoding(Backend):
    """Decodes one pair of stores and calls PyTorch."""

    kind: Literal["decoding"] = "decoding"
    priority: ClassVar[int] = 1
    served: ClassVar[list[AttentionSpec]] = []

    def refuses(self, spec: AttentionSpec) -> str | None:
        if len(spec.keys) != 1 or len(spec.values) != 1 or spec.masked or spec.by_head or spec.sinks or spec.softcap:
            return "it reads one store a side, without masks"
        return "it is not for exact tokens" if spec.keys == ("exact",) else None

    def attend(
        self, query: Tensor, part: Part, mask: Tensor | None, options: AttentionOptions
    ) -> tuple[Tensor, Tensor]:
        assert part.new is None
        type(self).served.append(backends.spec_of(query, part, mask, options, False))
        keys, values = (
            torch.cat([x for _, x in side[0].store.decoded(64, torch.float32)], dim=2)
            for side in (part.keys, part.values)
        )
        scores = query.float().unflatten(1, (part.kv_heads, -1)) @ keys.unsqueeze(2).transpose(3, 4) * options.scaling
        return (scores.softmax(-1) @ values.unsqueeze(2)).flatten(1, 2), scores.logsumexp(-1).flatten(1, 2)


@pytest.fixture
def decoding(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Decoding]]:
    Decoding.served = []
    monkeypatch.setattr(backends, "others", lambda: (Decoding(),))
    backends.chosen.cache_clear()
    yield Decoding
    backends.chosen.cache_clear()


def steps(model: Any, cache: Any, mask: Tensor | None = None, batch: int = 1) -> Tensor:
    with torch.no_grad(), attach(model):
        given = {} if mask is None else {"attention_mask": mask}
        model(ids(300, batch), **{CACHE: cache}, **given)
        return torch.stack([model(ids(1, batch, seed=t), **{CACHE: cache}).logits for t in range(30)])


@pytest.mark.parametrize("name", ["logquant", "kivi", "balanced", "partial-logquant", "streaming-llm"])
def test_two_backends_give_what_one_does(name: str, decoding: type[Decoding], monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    found = steps(model, mixed := make_cache(name, model))
    served = len(decoding.served)
    monkeypatch.setattr(backends, "others", tuple)
    backends.chosen.cache_clear()
    expected = steps(model, make_cache(name, model))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    direct = name in (
        "logquant",
        "balanced",
    )  # of the others keys and values of a token lie in stores with other borders
    assert (served > 0) == direct
    assert ("attention by reference and decoding" in str(mixed.summary())) == direct


def test_padded_rows_and_watched_attention_are_for_the_reference(decoding: type[Decoding]) -> None:
    model = tiny("llama")
    mask = torch.ones(2, 300, dtype=torch.long)
    mask[1, :90] = 0
    steps(model, make_cache("logquant", model), mask, 2)
    steps(model, cache := make_cache("h2o", model))
    assert not decoding.served
    assert "attention by reference" in str(cache.summary())


def test_an_answer_that_is_no_reason_is_refused(decoding: type[Decoding], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "refuses", lambda self, spec: 3)
    model = tiny("llama")
    cache = make_cache("logquant", model)
    with pytest.raises(PluginError, match="refuses must return a reason or None, found 3"):
        steps(model, cache)


def test_copies_name_who_computed_their_attention() -> None:
    model = tiny("llama")
    steps(model, cache := make_cache("logquant", model))
    assert "attention by reference" in str(copy.deepcopy(cache).summary())
    cache.reset()
    assert "attention by" not in str(cache.summary())


LIES: dict[str, Any] = {
    "raises": lambda out, lse: 1 / 0,
    "nothing": lambda out, lse: None,
    "a channel less": lambda out, lse: (out[..., 1:], lse),
    "one head": lambda out, lse: (out[:, :1], lse),
    "half": lambda out, lse: (out.half(), lse),
    "half sums": lambda out, lse: (out, lse.half()),
    "more sums": lambda out, lse: (out, lse.unsqueeze(-1)),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_backend_that_lies_is_named(lie: str, decoding: type[Decoding], monkeypatch: pytest.MonkeyPatch) -> None:
    honest = Decoding.attend
    monkeypatch.setattr(decoding, "attend", lambda self, *given: LIES[lie](*honest(self, *given)))
    model = tiny("llama")
    with pytest.raises(PluginError, match="backend 'decoding': attend"):
        steps(model, make_cache("logquant", model))


def test_a_backend_that_writes_to_the_query_is_named(decoding: type[Decoding], monkeypatch: pytest.MonkeyPatch) -> None:
    honest = Decoding.attend

    def writes(self: Decoding, query: Tensor, *given: Any) -> Any:
        found = honest(self, query, *given)
        query.mul_(2)
        return found

    monkeypatch.setattr(decoding, "attend", writes)
    model = tiny("llama")
    with pytest.raises(PluginError, match="must leave the query as it is"):
        steps(model, make_cache("logquant", model))


def told(lie: Any) -> type[GoodBackend]:
    """A backend that tells an observer something else, and of what it says that it did."""

    class Told(GoodBackend):
        def observe(self, query: Tensor, keys: Tensor, mask: Tensor | None, options: Any) -> Any:
            return lie(options.observer, lambda: GoodBackend.observe(self, query, keys, mask, options), query)

    return Told


class Wrong:
    """An observer that is told other weights."""

    def __init__(self, observer: Any, change: Any) -> None:
        self.observer, self.change = observer, change
        self.sums, self.counted = observer.sums, observer.counted

    def add_sums(self, k: int, weights: Tensor, seen: Tensor, heads: int) -> None:
        self.observer.add_sums(k, *self.change(weights, seen), heads)


def changed(change: Any) -> type[GoodBackend]:
    class Changed(GoodBackend):
        def observe(self, query: Tensor, keys: Tensor, mask: Tensor | None, options: Any) -> bool:
            wrong = replace(options, observer=Wrong(options.observer, change))
            return super().observe(query, keys, mask, wrong)

    return Changed


OBSERVING: dict[str, type[GoodBackend]] = {
    "no bool": told(lambda observer, honest, query: honest() and 1),
    "raises": told(lambda observer, honest, query: 1 / 0),
    "told, and says not": told(lambda observer, honest, query: honest() and False),
    "not told, and says so": told(lambda observer, honest, query: True),
    "writes to the query": told(lambda observer, honest, query: query.mul_(2) is query and honest()),
    "other weights": changed(lambda weights, seen: (weights * 1.1, seen)),
    "other counts": changed(lambda weights, seen: (weights, seen + 1)),
    "heads exchanged": changed(lambda weights, seen: (weights.flip(1), seen)),
}


def observing(backend: Backend) -> None:
    for kinds in contract.KINDS:
        for padded in (False, True):
            contract.test_what_it_observes_is_the_attention_of_the_queries_that_count(
                backend, kinds, padded, torch.float32, "cpu"
            )


@pytest.mark.parametrize("lie", OBSERVING)
def test_the_contract_notices_a_backend_that_observes_otherwise(lie: str) -> None:
    with pytest.raises((AssertionError, PluginError)):
        observing(OBSERVING[lie]())


class Encodes(GoodBackend):
    """Codes otherwise than `encode` of a subclass says."""

    def encode(self, encoding: Any, pieces: Any) -> None:
        super().encode(encoding, pieces)
        for piece in pieces:
            self.spoil(*piece)

    def spoil(self, x: Tensor, codes: Tensor, params: Tensor) -> None: ...


def spoiled(how: Any) -> type[GoodBackend]:
    return type("Spoiled", (Encodes,), {"spoil": lambda self, *piece: how(*piece), "__module__": __name__})


class Declared(GoodBackend):
    encode = Backend.encode


class Silent(GoodBackend):
    def encodes(self, encoding: Any) -> Any:
        return None


class Undivided(GoodBackend):
    def encodes(self, encoding: Any) -> bool:
        return super().encodes(encoding._replace(divided=False))

    def encode(self, encoding: Any, pieces: Any) -> None:
        super().encode(encoding, [piece[:3] for piece in pieces])


class All(GoodBackend):
    def encodes(self, encoding: Any) -> bool:
        return True


CODING: dict[str, type[GoodBackend]] = {
    "a bit of a code": spoiled(lambda x, codes, params: codes[0, 0, 5].bitwise_xor_(1)),
    "a scale": spoiled(lambda x, codes, params: params[1, 1, 7, 0].mul_(1.01)),
    "a token after the last": spoiled(
        lambda x, codes, params: codes.as_strided((1,), (1,), codes[0, 0, -1, -1].storage_offset() + 1).zero_()
    ),
    "the tokens": spoiled(lambda x, codes, params: x[0, 0, 9].zero_()),
    "no encode": Declared,
    "no answer": Silent,
    "what it can't": All,
    "no divisors": Undivided,
}


def coding(backend: Backend) -> None:
    for options in contract.CODED:
        contract.test_what_it_codes_is_what_pytorch_codes_to_the_bit(backend, options, torch.bfloat16, "cpu")


@pytest.mark.parametrize("lie", CODING)
def test_the_contract_notices_a_backend_that_codes_otherwise(lie: str) -> None:
    with pytest.raises((AssertionError, PluginError)):
        coding(CODING[lie]())


def test_honest_backends_pass_the_contract_and_so_do_those_that_decline(decoding: type[Decoding]) -> None:
    for backend in (GoodBackend(), decoding()):
        observing(backend)
        coding(backend)


class Sure(Backend):
    """Serves all parts with the reference, and was asked beforehand what it is asked to do."""

    kind: Literal["sure"] = "sure"
    asked: ClassVar[list[tuple[Part, AttentionOptions]]] = []
    served: ClassVar[list[bool]] = []

    def refuses(self, spec: AttentionSpec) -> None:
        return None

    def declines(self, query: Tensor, part: Part, mask: Tensor | None, options: AttentionOptions) -> None:
        type(self).asked.append((part, options))

    def attend(
        self, query: Tensor, part: Part, mask: Tensor | None, options: AttentionOptions
    ) -> tuple[Tensor, Tensor]:
        type(self).served.append(any(own is part and known.alone == options.alone for own, known in type(self).asked))
        out, lse = backends.REFERENCE.attend(query, part, mask, options)
        return out.to(query.dtype) if options.alone else out, lse


@pytest.mark.parametrize("recipe", ["logquant", "partial-logquant", "quest"])
def test_a_backend_is_asked_for_what_it_then_does(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a reader's pages are merged with what it gives."""
    params = {"quest": {"budget": 64}}.get(recipe, {})
    model = build("llama", torch.bfloat16, num_hidden_layers=3)
    expected = steps(model, make_cache(recipe, model, **params))
    monkeypatch.setattr(backends, "others", lambda: (Sure(),))
    backends.chosen.cache_clear()
    monkeypatch.setattr(Sure, "served", [])
    monkeypatch.setattr(Sure, "asked", [])
    found = steps(model, make_cache(recipe, model, **params))
    backends.chosen.cache_clear()
    assert Sure.served
    assert all(Sure.served)
    assert (found - expected).float().norm() < 2e-2 * expected.float().norm()
