"""Backends: who is asked, what is merged, and what a layer's attention is then."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import pytest
import torch
from models import ids, tiny
from torch import Tensor
from words import CACHE

from kvpolicy import AttentionOptions, AttentionSpec, Backend, Part, attach, make_cache
from kvpolicy.attention import backend as backends
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
