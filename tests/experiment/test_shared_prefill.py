"""A prompt that is computed once changes no row; batches place each row for itself."""

from __future__ import annotations

import copy
import warnings
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from models import ids, tiny
from words import CACHE

import kvpolicy
from kvpolicy.errors import KvpolicyError
from kvpolicy.experiment.names import EXACT
from kvpolicy.experiment.prefill import Prompt, can_share
from kvpolicy.experiment.run import Encoded, Run, Runner
from kvpolicy.experiment.store import Planned
from kvpolicy.experiment.together import Together
from kvpolicy.experiment.work import Finished, Item, Worker, missing, units
from kvpolicy.hf.cache import make_cache
from kvpolicy.tasks.sample import Sample

SECONDS = ("prefill_seconds", "decode_seconds", "step_seconds")
SOME = ["kivi:residual=16,group_size=16", "logquant:window=8", "key-norm"]
ATTENDING = ["h2o", "snapkv", "expected-attention", "mikv"]
MANY = [*SOME, *ATTENDING, "gear", "turboquant-prod", "kivi-evict:residual=24"]


class Words:
    """A tokenizer of numbers."""

    eos_token_id = pad_token_id = None

    def decode(self, tokens: Any, **_: Any) -> str:
        return "".join(f" {int(token)}" for token in tokens)


def items(*lengths: int, answer: int = 5) -> list[Item]:
    found = []
    for i, length in enumerate(lengths):
        prompt, reply = ids(length, seed=i)[0].tolist(), ids(answer + i, seed=90 + i)[0].tolist()
        encoded = Encoded(Sample("jsonl", "p", Words().decode(reply)), prompt, reply)
        found.append(Item(Planned("task", str(i), "p", encoded.sample.answer), encoded))
    return found


def caches(model: Any, recipes: list[str], attached: bool) -> dict[str, Any]:
    found = {EXACT: make_cache("full", model)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for recipe in recipes:
            try:
                cache = make_cache(recipe, model)
                if not attached:
                    for layer in cache.layers:
                        getattr(layer, "check_attached", lambda: None)()
            except KvpolicyError:  # does not fit this model, or needs a calibration
                continue
            found[recipe] = cache
    return found


def rows(model: Any, recipes: list[str], unit: list[Item], *, attached: bool, share: bool) -> dict[str, list[Finished]]:
    """Rows by arm."""
    with kvpolicy.attach(model) if attached else nullcontext():
        runner = Runner(model, Words(), attached and len(unit) == 1, share=share)
        empty = caches(model, recipes, attached)
        worker = Worker(runner, empty, lambda text: None)
        found: dict[str, list[Finished]] = {}
        with runner.ready():
            for made in worker.run(unit, missing(unit, list(empty), set()), lambda *_: None):
                found.setdefault(made.row.arm, []).append(made)
        assert runner.prompt is None
    return found


def plain(made: Finished) -> dict[str, Any]:
    """A row without what the clock says, and whether its prompt was shared."""
    kept = {name: value for name, value in made.row.metrics.items() if name not in SECONDS}
    facts = {name: value for name, value in made.row.facts.items() if name != "shared_prefill"}
    return {**kept, **facts, "output": made.row.output, "error": made.row.error, "attention": made.attention}


@pytest.mark.parametrize(
    ("family", "attached", "recipes"),
    [
        ("llama", True, MANY),
        ("mistral", True, SOME[:1]),
        ("gemma3_text", True, SOME),
        ("gpt_oss", False, SOME[:2]),
        ("deepseek_v3", True, SOME[:2]),
    ],
)
def test_rows_are_the_same_to_the_bit_with_and_without_sharing(family: str, attached: bool, recipes: list[str]) -> None:
    model, unit = tiny(family), items(60, answer=3)
    together, alone = (rows(model, recipes, unit, attached=attached, share=share) for share in (True, False))
    assert list(together) == list(alone)
    for arm in together:
        assert together[arm][0].row.error is None
        assert list(map(plain, together[arm])) == list(map(plain, alone[arm])), arm
        assert not alone[arm][0].row.facts["shared_prefill"]
        shows_more = arm in ATTENDING or arm == EXACT
        assert together[arm][0].row.facts["shared_prefill"] is not shows_more


def test_the_model_reads_a_prompt_once_for_all_arms_that_can_share_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model, unit, lengths = tiny("llama"), items(60, answer=3), []
    step = Runner._step

    def counted(self: Any, tokens: Any, *rest: Any, **named: Any) -> Any:
        lengths.append(len(tokens))
        return step(self, tokens, *rest, **named)

    monkeypatch.setattr(Runner, "_step", counted)
    rows(model, ["logquant", "quarot", "h2o"], unit, attached=True, share=True)
    assert lengths.count(60) == 2  # the exact cache's, and that of h2o, which ranks by attention


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_rows_of_a_batch_are_those_of_each_sample_alone(family: str) -> None:
    model, unit = tiny(family), items(60, 41, 58, answer=3)
    recipes = ["logquant:window=8", *(["kivi-evict:residual=24", "h2o"] if family == "llama" else [])]
    batch = rows(model, recipes, unit, attached=True, share=True)
    own = rows(model, recipes, unit, attached=True, share=False)
    for i, item in enumerate(unit):
        alone = rows(model, recipes, [item], attached=True, share=True)
        for arm, (one,) in alone.items():
            for many in (batch[arm][i].row, own[arm][i].row):
                assert many.error is None
                assert many.sample == one.row.sample
                assert many.facts["nll_steps"] == pytest.approx(one.row.facts["nll_steps"], abs=2e-3)
                assert many.output == one.row.output
                if family == "llama":  # windows don't grow with padding
                    assert many.metrics["exact_bytes"] == pytest.approx(one.row.metrics["exact_bytes"], rel=0.02)


def test_a_batch_shares_its_prompt_as_a_sample_does(monkeypatch: pytest.MonkeyPatch) -> None:
    filled: list[int] = []
    fill = Prompt.fill
    monkeypatch.setattr(Prompt, "fill", lambda self, cache, attached: filled.append(1) or fill(self, cache, attached))
    model, unit = tiny("llama"), items(40, 31)
    together, alone = (rows(model, ["logquant:window=8"], unit, attached=True, share=share) for share in (True, False))
    assert filled == [1]
    for arm in together:
        assert list(map(plain, together[arm])) == list(map(plain, alone[arm]))


@pytest.mark.parametrize("failing", [EXACT, "logquant:window=8"])
def test_the_samples_of_a_batch_that_fails_run_one_by_one(monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    model, unit = tiny("llama"), items(40, 31, 36, answer=3)
    alone = [rows(model, ["logquant:window=8", "kivi"], [item], attached=True, share=True) for item in unit]
    together, run = Together.run, Runner.run
    fails = {EXACT: "full"}.get(failing, "logquant")

    def no_room(self: Together, cache: Any, encoded: Any) -> list[Run]:
        if cache.recipe.name == fails:
            raise RuntimeError("out of memory")
        return together(self, cache, encoded)

    def at_fault(self: Runner, cache: Any, encoded: Encoded) -> Run:
        if encoded is unit[1].encoded and cache.recipe.name == fails:
            raise RuntimeError("a fault of its own")
        return run(self, cache, encoded)

    monkeypatch.setattr(Together, "run", no_room)
    monkeypatch.setattr(Runner, "run", at_fault)
    found = rows(model, ["logquant:window=8", "kivi"], unit, attached=True, share=True)
    for arm, made in found.items():
        assert [x.row.sample for x in made] == ["0", "1", "2"]
        wrong = ["1"] if failing in (EXACT, arm) else []
        assert [x.row.sample for x in made if x.row.error and "a fault of its own" in x.row.error] == wrong
        for i, x in enumerate(made):
            if x.row.sample not in wrong:
                expected = alone[i][arm][0].row
                assert x.row.facts["nll_steps"] == pytest.approx(expected.facts["nll_steps"], abs=2e-3)


def test_the_turns_of_a_prompt_are_read_one_after_another() -> None:
    model, (item,) = tiny("llama"), items(60, answer=3)
    encoded = replace(item.encoded, turns=(40, 12, 8))
    assert [token for part in encoded.parts for token in part] == encoded.prompt
    expected = make_cache("logquant:window=8", model)
    with torch.inference_mode():
        for part in (*encoded.parts, *([token] for token in encoded.answer[:-1])):
            logits = model(torch.tensor([part]), **{CACHE: expected}).logits[0, -1]
            expected.commit()
    for share in (True, False):
        runner = Runner(model, Words(), share=share)
        with runner.ready():
            runner.run(make_cache("full", model), encoded)
            found = runner.run(make_cache("logquant:window=8", model), encoded)
        assert found.shared is share
        assert torch.allclose(found.log_probs[-1], logits.log_softmax(-1), atol=1e-5)
    assert [len(x) for x in units([*items(9, 8), replace(item, encoded=encoded), *items(7)], 4)] == [2, 1, 1]


def test_without_generation_the_rest_is_the_same() -> None:
    model, (item,) = tiny("llama"), items(40)
    runs: list[Run] = []
    for generate in (True, False):
        runner = Runner(model, Words(), generate=generate)
        with runner.ready():
            runs.append(runner.run(copy.deepcopy(make_cache("logquant:window=8", model)), item.encoded))
    assert runs[0].score is not None
    assert (runs[1].score, runs[1].text, runs[1].generated) == (None, None, None)
    assert torch.equal(runs[0].log_probs, runs[1].log_probs)
    assert runs[0].final_bytes == runs[1].final_bytes


def test_what_is_told_more_than_keys_and_values_computes_its_own_prompt() -> None:
    model = tiny("llama")
    for recipe in MANY:
        assert can_share(make_cache(recipe, model)) is (recipe not in ATTENDING), recipe


@pytest.mark.parametrize("lengths", [(60,), (60, 41)])
def test_recipes_that_read_less_or_have_the_prompt_read_again_are_run(lengths: tuple[int, ...]) -> None:
    model, unit = tiny("llama"), items(*lengths)
    if len(lengths) == 1:  # of several turns the first is what is read again
        unit = [replace(unit[0], encoded=replace(unit[0].encoded, turns=(40, 20)))]
    told = ["kvzip:threshold=0.0,chunk=16", "kvzip:threshold=0.5,chunk=16"]
    quest = {"name": "quest", "tiers": [{"store": "full", "read": {"kind": "quest", "budget": 12, "page": 4}}]}
    with kvpolicy.attach(model):
        runner = Runner(model, Words())
        empty = {**caches(model, told, True), "quest": make_cache(quest, model)}
        assert len(empty) == 4
        worker, wanted = Worker(runner, empty, lambda text: None), missing(unit, list(empty), set())
        with runner.ready():
            found = list(worker.run(unit, wanted, lambda *_: None))
    for made in found:
        row = made.row
        assert row.error is None, row
        assert (row.metrics["kl"] < 1e-5) is (row.arm in (EXACT, told[0])), row
        assert (row.metrics["final_bytes"] < 0.9 * row.metrics["exact_bytes"]) is (row.arm == told[1])
