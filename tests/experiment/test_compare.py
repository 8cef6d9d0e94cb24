"""The comparison: records, statistics, files, errors; on the bundled model with short contexts."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from short import short
from transformers import DynamicCache
from words import CACHE

from kvpolicy import compare, load_recipe, make_cache
from kvpolicy.errors import CompareError
from kvpolicy.experiment.experiment import load_experiment
from kvpolicy.experiment.records import records
from kvpolicy.experiment.result import Comparison, estimate
from kvpolicy.experiment.run import Runner
from kvpolicy.experiment.store import read
from kvpolicy.tasks.load import load_task
from kvpolicy.tasks.scorers import score

ARMS = ["full", "logquant:window=8", "kivi-evict:residual=24"]
FIELDS = {
    "sample", "arm", "task", "prompt_tokens", "answer_tokens", "score", "exact_score", "nll", "exact_nll", "nll_first",
    "nll_steps", "kl", "kl_steps", "top1", "first_divergence", "bits", "peak_bytes", "final_bytes", "exact_bytes",
    "prefill_seconds", "decode_seconds", "decode_steps", "answer", "generated", "l1", "l2", "exact_mass",
    "quantized_mass", "dropped_mass", "l1_layers", "l2_layers", "exact_mass_layers", "quantized_mass_layers",
    "dropped_mass_layers", "error",
}  # fmt: skip


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("compare") / "made" / "here"


@pytest.fixture(scope="module")
def result(loaded: tuple[Any, Any], directory: Path) -> Comparison:
    model, tokenizer = loaded
    return compare(ARMS, model=model, tokenizer=tokenizer, n=3, seed=5, tokens=160, out=directory, progress=False)


def test_one_complete_row_per_arm_and_sample_in_order(result: Comparison, directory: Path) -> None:
    assert [(row["sample"], row["arm"]) for row in result.rows] == [(i, arm) for i in range(3) for arm in ARMS]
    assert all(set(row) == FIELDS for row in result.rows)
    evidence = read(directory)
    assert evidence.rows == result.evidence.rows
    assert [(row.sample, row.arm) for row in evidence.rows] == [(str(i), a) for i in range(3) for a in ("exact", *ARMS)]
    assert records(evidence, ARMS) == result.rows


def test_every_arm_sees_the_samples_of_the_task(result: Comparison, loaded: tuple[Any, Any]) -> None:
    answers = [sample.answer for sample in load_task("lines", 3, 5, 160, loaded[1])]
    for arm in ARMS:
        assert [row["answer"] for row in result.rows if row["arm"] == arm] == answers


def test_the_exact_arm_differs_in_nothing_and_eviction_in_much(result: Comparison) -> None:
    full = [row for row in result.rows if row["arm"] == "full"]
    assert all(row["score"] == 1 and row["kl"] == 0 and row["top1"] == 1 for row in full)
    assert all(row["first_divergence"] is None and row["nll"] == row["exact_nll"] for row in full)
    evict = result.mean(ARMS[2], "kl")
    assert evict is not None
    assert evict.mean > 0.1
    assert result.diverged(ARMS[2])[0] > 0
    bits = [result.mean(arm, "bits") for arm in ARMS]
    means = [found.mean for found in bits if found is not None]
    assert means == sorted(means, reverse=True)
    assert means[0] > 32 > means[1]


@pytest.mark.parametrize("arm", ARMS[1:])
def test_likelihood_and_divergence_are_those_of_plain_decoding(
    result: Comparison, loaded: tuple[Any, Any], arm: str
) -> None:
    model, tokenizer = loaded
    sample = load_task("lines", 3, 5, 160, tokenizer)[1]
    prompt = tokenizer(sample.prompt, return_tensors="pt").input_ids
    answer = tokenizer(sample.answer).input_ids

    def decode(cache: Any) -> torch.Tensor:
        rows = [model(prompt, **{CACHE: cache}).logits[0, -1]]
        rows += [model(torch.tensor([[token]]), **{CACHE: cache}).logits[0, -1] for token in answer[:-1]]
        return torch.stack(rows).log_softmax(-1)

    with torch.inference_mode():
        exact, other = decode(DynamicCache(config=model.config)), decode(make_cache(arm, model))
    row = result.rows[3 + ARMS.index(arm)]
    nll = [-other[i, token].item() for i, token in enumerate(answer)]
    assert row["nll_first"] == pytest.approx(nll[0], abs=1e-5)
    assert row["nll_steps"] == pytest.approx(nll[1:], rel=1e-3, abs=1e-5)
    assert row["nll"] == pytest.approx(sum(nll[1:]) / len(nll[1:]), rel=1e-3, abs=1e-5)
    kl = (exact.exp() * (exact - other)).sum(-1)
    assert row["kl_steps"] == pytest.approx(kl[1:].tolist(), rel=1e-2, abs=1e-5)
    assert row["decode_steps"] == row["answer_tokens"] - 1 == len(answer) - 1


@pytest.mark.parametrize("arm", ARMS)
def test_greedy_text_is_that_of_generate(result: Comparison, loaded: tuple[Any, Any], arm: str) -> None:
    model, tokenizer = loaded
    for number, sample in enumerate(load_task("lines", 3, 5, 160, tokenizer)):
        prompt = tokenizer(sample.prompt, return_tensors="pt").input_ids
        new = len(tokenizer(sample.answer).input_ids)
        cache = make_cache(arm, model)
        output = model.generate(prompt, **{CACHE: cache}, max_new_tokens=new, do_sample=False)
        row = result.rows[3 * number + ARMS.index(arm)]
        assert row["generated"] == tokenizer.decode(output[0, prompt.shape[1] :], skip_special_tokens=True)
        assert row["score"] == score(sample, row["generated"])


def test_bytes_are_those_of_the_cache_and_the_peak_is_no_less(result: Comparison) -> None:
    for row in result.rows:
        tokens = row["prompt_tokens"] + row["answer_tokens"] - 1
        assert row["exact_bytes"] == tokens * 6 * 2 * 2 * 64 * 4
        assert 0 < row["final_bytes"] <= row["peak_bytes"]
        assert row["bits"] == pytest.approx(32 * row["final_bytes"] / row["exact_bytes"])
        assert row["prefill_seconds"] > 0
        assert row["decode_seconds"] > 0


def test_what_is_needed_to_run_it_again_and_the_picture_are_written(result: Comparison, directory: Path) -> None:
    evidence = read(directory)
    assert list(evidence.arms) == ["exact", *ARMS]
    assert evidence.planned == {"lines": 3}
    assert evidence.baseline == "exact"
    assert load_recipe_text(str(evidence.arms[ARMS[1]])).tiers == load_recipe(ARMS[1]).tiers
    settings = evidence.settings
    assert (settings["n"], settings["seed"], settings["tokens"], settings["attached"]) == (3, 5, 160, True)
    assert set(settings["versions"]) == {"kvpolicy", "torch", "transformers"}
    assert set(settings["digests"]) == {"config", "weights", "tokenizer", "tasks"}
    assert load_experiment(load_yaml_text(settings["experiment"]))[1] == {
        arm: load_recipe_text(str(evidence.arms[arm])) for arm in ARMS
    }
    assert (directory / "comparison.png").read_bytes().startswith(b"\x89PNG")


def load_yaml_text(text: str) -> Any:
    from kvpolicy.recipe.yaml import read_text

    return read_text(text, "experiment").data


def load_recipe_text(text: str) -> Any:
    from kvpolicy.recipe.load import load_yaml

    return load_yaml(text)


def test_printed_tables_state_n_and_every_arm(result: Comparison) -> None:
    text = str(result)
    assert "n = 3 samples" in text
    assert all(text.count(arm) == 4 for arm in ARMS[1:])  # verdicts, quality, cost, attention
    assert "without reading a stored token" in " ".join(text.split())


def test_differences_are_paired(result: Comparison) -> None:
    nll = {row["sample"]: row["nll"] - row["exact_nll"] for row in result.rows if row["arm"] == ARMS[2]}
    assert result.difference(ARMS[2], metric="nll") == estimate(list(nll.values()))
    assert result.difference(ARMS[1], ARMS[1]) == estimate([0.0] * 3)
    with pytest.raises(CompareError, match="arm must be one of full"):
        result.mean("kivi", "nll")
    with pytest.raises(CompareError, match="metric must be one of score"):
        result.mean("full", "speed")
    assert result.difference("full", metric="kl") == estimate([0.0] * 3)


def test_estimates_are_those_of_student() -> None:
    found = estimate([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    assert found is not None
    assert found.half_width is not None
    assert found.mean == 3.5
    assert found.half_width == pytest.approx(2.5706 * math.sqrt(3.5) / math.sqrt(6), rel=2e-3)
    one = estimate([2.0])
    assert one is not None
    assert (one.mean, one.half_width, str(one)) == (2.0, None, "2.000")
    assert estimate([]) is None


def test_the_exact_cache_runs_once_per_sample(loaded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[str] = []
    run = Runner.run
    monkeypatch.setattr(
        Runner, "run", lambda self, cache, item: runs.append(cache.recipe.name) or run(self, cache, item)
    )
    short(loaded, ["kivi", "full"], n=2)
    assert runs == ["full", "kivi"] * 2
    runs.clear()
    short(loaded, ["kivi"], n=2)
    assert runs == ["full", "kivi"] * 2


def test_training_mode_and_threads_are_restored(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    model.train()
    model.model.layers[0].eval()
    before = {name: module.training for name, module in model.named_modules()}
    threads = torch.get_num_threads()
    try:
        result = compare(["kivi"], model=model, tokenizer=tokenizer, n=1, tokens=96, progress=False)
        assert {name: module.training for name, module in model.named_modules()} == before
    finally:
        model.eval()
    assert torch.get_num_threads() == threads
    assert result.settings["n"] == 1


def test_arms_may_be_recipes_mappings_and_have_names_of_their_own(loaded: tuple[Any, Any]) -> None:
    recipe = {"name": "mine", "tiers": [{"store": {"kind": "int", "nbits": 4, "per": "token"}}]}
    result = short(loaded, [recipe, load_recipe("kivi", residual=32)])
    assert list(result.arms) == ["mine", "kivi"]
    named = short(loaded, {"a": recipe, "b": recipe})
    assert list(named.arms) == ["a", "b"]
    assert named.rows[0]["nll"] == named.rows[1]["nll"]
    assert list(short(loaded, "full").arms) == ["full"]


@pytest.mark.draws
def test_answers_of_one_token_are_said_to_be_out_of_reach(loaded: tuple[Any, Any], tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text('{"prompt": "import os\\n", "answer": "import"}\n', encoding="utf-8")
    result = short(loaded, ["kivi"], task=file, tokens=None, out=tmp_path / "out")
    row = result.rows[0]
    assert (row["answer_tokens"], row["nll"], row["kl"], row["top1"], row["decode_steps"]) == (1, None, None, None, 0)
    assert row["nll_first"] > 0
    assert "answers of a single token: 1" in result.notes()
    assert (tmp_path / "out" / "comparison.png").exists()


@pytest.mark.draws
def test_many_labels_do_not_overlap(result: Comparison, tmp_path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from kvpolicy.experiment.plot import Point, _draw, _extent, _label, _overlap

    figure = Figure(figsize=(6, 5), dpi=144)
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_ylim(0, 1.1)
    points = [Point(f"a-longer-name-{i}", 4 + i / 8, 1.0 - i % 2 / 50, 0.9, 1.0, i % 3 == 0) for i in range(9)]
    _draw(axes, points)
    canvas.draw()
    _label(axes, points, canvas.get_renderer())
    boxes = [_extent(text, canvas.get_renderer(), 0) for text in axes.texts]
    assert len(boxes) == 9
    assert all(_overlap(a, b) == 0 for i, a in enumerate(boxes) for b in boxes[:i])
    with pytest.raises(CompareError, match="must end in one of"):
        result.plot(tmp_path / "picture.txt")
