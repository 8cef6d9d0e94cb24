"""Searches: what is measured, what is found, what is written, and how a search goes on."""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("optuna")

import torch
from searched import SMALL, SPACE, text
from transformers import DynamicCache
from typer.testing import CliRunner
from words import CACHE

import kvpolicy
import kvpolicy.experiment.search as searching
import kvpolicy.experiment.tune as tuning
import kvpolicy.tasks.texts as texts
from kvpolicy.cli.main import app
from kvpolicy.errors import CompareError
from kvpolicy.experiment.tuning import Tuning
from kvpolicy.hf.models import load_model

STEPS = 8
Given = dict[str, Any]


@pytest.fixture(scope="module")
def bundled() -> tuple[Any, Any]:
    return load_model(device="cpu")


@pytest.fixture
def given(bundled: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Given:
    """Arguments of a small search, of answers that are short."""
    for module in (texts, tuning):
        monkeypatch.setattr(module, "ANSWER", STEPS)
    model, tokenizer = bundled
    return {"text": text(tmp_path), "model": model, "tokenizer": tokenizer, **SMALL}


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The recipes that are run on samples, one entry a sample."""
    runs: list[Any] = []
    scores = tuning.Texts.scores

    def counting(self: Any, recipe: Any, spans: Any) -> Iterator[Any]:
        for score in scores(self, recipe, spans):
            runs.append(recipe)
            yield score

    monkeypatch.setattr(tuning.Texts, "scores", counting)
    return runs


def every(result: Tuning) -> dict[str, tuple[float, float]]:
    """Mean bits and KL of the finished trials, by what was drawn."""
    return {
        json.dumps(trial.drawn): (trial.mean_bits, trial.mean_kl)
        for trial in result.trials
        if trial.state == "complete"
    }


def test_the_front_is_what_no_other_combination_beats(given: Given, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(searching, "MARGIN", math.inf)  # nothing is given up, so that all are known
    result = kvpolicy.tune(SPACE, **given)
    points = every(result)
    assert len(points) == 6
    front = {
        key
        for key, (bits, kl) in points.items()
        if not any((b <= bits and k < kl) or (b < bits and k <= kl) for b, k in points.values())
    }
    assert {json.dumps(found.trial.drawn) for found in result.found} == front
    widths = [found.trial.mean_bits for found in result.found]
    assert widths == sorted(widths)
    assert [found.label for found in result.found] == [f"front-{i + 1}" for i in range(len(front))]


def test_the_numbers_are_those_of_the_models_own_loop(given: Given) -> None:
    """KL in float64 between the model with DynamicCache and with the recipe's cache, on the samples held out."""
    model, tokenizer = given["model"], given["tokenizer"]
    space = {**SPACE, "search": {**SPACE["search"], "nbits": [2, 8]}}
    result = kvpolicy.tune(space, **{**given, "trials": 1}, attach=False)
    (found,) = result.found
    ids = tokenizer(given["text"].read_text(), add_special_tokens=False)["input_ids"]
    whole = [ids[i : i + 96 + STEPS] for i in range(0, len(ids) - 96 - STEPS + 1, 96 + STEPS)]
    spans = [whole[i * len(whole) // 4] for i in (1, 3)]  # of four samples the second and the last are held out

    def predicted(cache: Any, span: list[int]) -> torch.Tensor:
        rows = [model(torch.tensor([span[:96]]), **{CACHE: cache}, use_cache=True).logits[0, -1]]
        for token in span[96:-1]:
            rows.append(model(torch.tensor([[token]]), **{CACHE: cache}, use_cache=True).logits[0, -1])
        return torch.stack(rows).double().log_softmax(-1)

    kl, bits, same = [], [], []
    with torch.no_grad():
        for span in spans:
            cache = kvpolicy.make_cache(found.recipe, model)
            exact, ours = predicted(DynamicCache(config=model.config), span)[1:], predicted(cache, span)[1:]
            kl.append(float((exact.exp() * (exact - ours)).sum(-1).mean()))
            same.append(float((exact.argmax(-1) == ours.argmax(-1)).double().mean()))
            bits.append(cache.memory().bits_per_value)
    assert found.kl.mean == pytest.approx(sum(kl) / 2, rel=1e-3)
    assert found.kl.n == 2
    half = 12.7062 * abs(kl[0] - kl[1]) / 2
    assert found.kl.half_width == pytest.approx(half, rel=1e-2)
    assert found.top1.mean == pytest.approx(sum(same) / 2)
    assert found.bits.mean == pytest.approx(sum(bits) / 2)


@pytest.mark.draws
def test_the_best_keeps_the_budget(given: Given, tmp_path: Path, counted: list[Any]) -> None:
    out = tmp_path / "out"
    result = kvpolicy.tune(SPACE, **given, bits=20, out=out)
    points = every(result)
    assert len(points) + sum(trial.state != "complete" for trial in result.trials) == 6
    (found,) = result.found
    assert found.trial.mean_kl == min(kl for _, kl in points.values())
    assert all(bits <= 20 for bits, _ in points.values())
    over = [trial for trial in result.trials if trial.state == "over"]
    assert over  # a window of 64 of 104 tokens
    assert all(len(trial.kl) == 1 and trial.mean_bits > 20 for trial in over)
    assert kvpolicy.load_recipe(out / "best.yaml") == found.recipe == result.best
    summary = json.loads((out / "result.json").read_text())
    assert summary["found"][0]["held_out"]["kl"]["mean"] == found.kl.mean
    assert summary["bits"] == 20
    assert (out / "front.png").stat().st_size > 1000
    before = len(counted)
    again = kvpolicy.tune(SPACE, **given, bits=20, out=out)
    assert len(counted) == before  # nothing was left to run
    assert str(again) == str(result)


def test_no_recipe_within_the_budget(given: Given, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(
        CompareError, match=r"found within 0.5 bits per value, the least has \d+\.\d\d; ask for more bits"
    ):
        kvpolicy.tune(SPACE, **{**given, "samples": 2}, bits=0.5, out=out)
    assert not (out / "best.yaml").exists()


def test_a_search_that_was_killed_goes_on(given: Given, tmp_path: Path, counted: list[Any]) -> None:
    """Killed within the third trial: a running trial is left behind; besides half a line and a lock."""
    from optuna import load_study
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    out = tmp_path / "out"
    child = os.fork()
    if child == 0:
        tuned = tuning.Texts.tuned

        def killing(self: Any, drawn: Any) -> Iterator[Any]:
            for score in tuned(self, drawn):
                if len(counted) == 5:
                    os.kill(os.getpid(), signal.SIGKILL)
                yield score

        tuning.Texts.tuned = killing  # type: ignore[method-assign]
        try:
            kvpolicy.tune(SPACE, **given, out=out)
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    journal = out / "study.journal"
    with journal.open("ab") as file:
        file.write(b'{"op_code": 5, "half')
    (out / "study.journal.lock").touch()
    result = kvpolicy.tune(SPACE, **given, out=out)
    finished = sum(len(trial.kl) for trial in result.trials)
    held = 2 * len(result.found)
    assert len(result.trials) == 6
    assert len(counted) == finished - 4 + held  # the two trials that were finished before were not run again
    assert len({json.dumps(trial.drawn) for trial in result.trials}) == 6
    study = load_study(study_name="tune", storage=JournalStorage(JournalFileBackend(str(journal))))
    states = [trial.state.name for trial in study.get_trials(deepcopy=False)]
    assert states.count("FAIL") == 1
    assert "RUNNING" not in states
    assert not list(out.glob("*.part"))


def test_a_search_that_is_interrupted_goes_on(given: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, tuned, calls = tmp_path / "out", tuning.Texts.tuned, []

    def interrupted(self: Any, drawn: Any) -> Iterator[Any]:
        calls.append(drawn)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return tuned(self, drawn)

    monkeypatch.setattr(tuning.Texts, "tuned", interrupted)
    with pytest.raises(KeyboardInterrupt):
        kvpolicy.tune(SPACE, **{**given, "samples": 2}, out=out)
    assert sorted(file.name for file in out.iterdir()) == ["study.journal", "study.json"]
    result = kvpolicy.tune(SPACE, **{**given, "samples": 2}, out=out)
    assert len(result.trials) == 6
    assert len(calls) == 7  # the third once more


def test_another_search_in_the_same_directory_is_refused(given: Given, tmp_path: Path) -> None:
    out = tmp_path / "out"
    few = {**given, "trials": 1, "samples": 2}
    kvpolicy.tune(SPACE, **few, out=out)
    search = {**SPACE["search"], "nbits": [8, 4], "window": [8, 32]}
    changes: list[tuple[Given, str]] = [
        ({"space": {**SPACE, "search": search}}, r"the space differs at search.window\[1\], search.nbits\[1\];"),
        ({"bits": 4}, "bits is not given there and 4 here"),
        ({"tokens": 80}, "another search: tokens is 96 there and 80 here; choose another"),
        ({"held_out": 0.25}, "held_out is 0.5 there and 0.25 here"),
        ({"attach": False}, "attached is True there and False here"),
        ({"text": text_of(tmp_path / "other.txt", given)}, "another search: the texts are others;"),
    ]
    for change, message in changes:
        with pytest.raises(CompareError, match=message):
            kvpolicy.tune(**{"space": SPACE, **few, "out": out, **change})
    weight = given["model"].model.layers[0].self_attn.k_proj.weight
    kept = weight.data.clone()
    try:
        weight.data += 1
        with pytest.raises(CompareError, match="another search: another model: its weights are others"):
            kvpolicy.tune(SPACE, **few, out=out)
    finally:
        weight.data.copy_(kept)
    assert len(kvpolicy.tune(SPACE, **{**few, "trials": 2, "seed": 1 << 40}, out=out).trials) == 2


def text_of(file: Path, given: Given) -> Path:
    file.write_text(given["text"].read_text()[100:])
    return file


def test_a_directory_in_use_or_damaged_is_refused(given: Given, tmp_path: Path) -> None:
    import fcntl

    out = tmp_path / "out"
    few = {**given, "trials": 1, "samples": 2, "out": out}
    kvpolicy.tune(SPACE, **few)
    handle = os.open(out, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with pytest.raises(CompareError, match="a search is running there"):
        kvpolicy.tune(SPACE, **few)
    os.close(handle)
    kept = (out / "study.journal").read_bytes()
    (out / "study.journal").write_bytes(b"nothing\n" + kept)
    with pytest.raises(CompareError, match=r"study.journal can't be read: .*; choose another directory"):
        kvpolicy.tune(SPACE, **few)
    (out / "study.json").write_text("{}")
    with pytest.raises(CompareError, match=r"study.json can't be read: KeyError"):
        kvpolicy.tune(SPACE, **few)
    (out / "study.json").unlink()
    with pytest.raises(CompareError, match=r"holds study.journal without study.json"):
        kvpolicy.tune(SPACE, **few)


def test_a_trial_that_another_beats_is_given_up(given: Given, monkeypatch: pytest.MonkeyPatch) -> None:
    """On four samples that are tuned on; the second of two equals in bits is ten times as bad."""

    def made(self: Any, drawn: Any) -> Iterator[tuple[float, float]]:
        for _ in range(4):
            yield (1.0 if drawn["window"] else 0.1), 4.0

    monkeypatch.setattr(tuning.Texts, "tuned", made)
    space = {"recipe": {"tiers": [SPACE["recipe"]["tiers"][0], {"store": "evict"}]}, "search": {"window": [8, 64]}}
    for bits in (None, 5):
        result = kvpolicy.tune(space, **{**given, "samples": 8, "trials": 2}, bits=bits)
        worse = next(trial for trial in result.trials if trial.drawn["window"])
        assert (worse.state, len(worse.kl)) == (("pruned", 2) if bits is None else ("complete", 4))
        assert len(result.found) == 1


def test_combinations_that_fail_are_told(given: Given, monkeypatch: pytest.MonkeyPatch) -> None:
    stores = [SPACE["search"]["store"][0], {"kind": "int", "group_size": 48}]
    space = {**SPACE, "search": {**SPACE["search"], "store": stores}}
    result = kvpolicy.tune(space, **{**given, "samples": 2})
    states = [trial.state for trial in result.trials]
    assert states.count("refused") == 2
    assert "2 refused" in str(result)
    assert "group_size must divide head_dim" in str(result)

    def failing(self: Any, drawn: Any) -> Iterator[tuple[float, float]]:
        raise RuntimeError("out of luck")

    monkeypatch.setattr(tuning.Texts, "tuned", failing)
    with pytest.raises(CompareError, match="no combination could be run: RuntimeError: out of luck; mend the space"):
        kvpolicy.tune(SPACE, **given)
    many = {**SPACE, "search": {**SPACE["search"], "window": {"from": 8, "to": 64}}}
    with pytest.raises(CompareError, match="none of 20 combinations could be run: RuntimeError: out of luck"):
        kvpolicy.tune(many, **{**given, "trials": 100})


def test_on_the_shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (texts, tuning):
        monkeypatch.setattr(module, "ANSWER", STEPS)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.yaml").write_text("recipe: kivi\nsearch: {nbits: [2, 8]}\n", encoding="utf-8")
    arguments = ["tune", "own.yaml", "--text", str(text(tmp_path)), "--trials", "2", "-n", "2", "--tokens", "160"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "own: the front, on held-out samples" in done.stdout
    assert "n = 1 held-out sample, which no trial saw" in done.stdout
    assert "result.json and front.png into own-tuned" in done.stderr
    found = json.loads((tmp_path / "own-tuned" / "result.json").read_text())["found"]
    assert len(found) == len(list((tmp_path / "own-tuned").glob("front-*.yaml")))
    loaded = kvpolicy.load_recipe(tmp_path / "own-tuned" / "front-1.yaml")
    assert loaded.tiers == kvpolicy.load_recipe("kivi", nbits=found[0]["params"]["nbits"]).tiers
    assert loaded.name == "own-front-1"
