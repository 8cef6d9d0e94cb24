"""The comparison of attention: what it records, prints and draws; attaching, falling back, detaching."""

from __future__ import annotations

import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from models import COMMON, FAMILIES
from short import short
from transformers import AutoConfig, AutoModelForCausalLM
from typer.testing import CliRunner

from kvpolicy import attach
from kvpolicy.cli.main import app
from kvpolicy.errors import CacheError, CompareError, KvpolicyError
from kvpolicy.experiment.attention_error import Watcher
from kvpolicy.experiment.result import Comparison
from kvpolicy.experiment.run import Runner
from kvpolicy.experiment.store import read
from kvpolicy.hf.attach import is_attached, watching

ARMS = ["full", "logquant:window=8", "kivi-evict:residual=24"]
METRICS = ("l1", "l2", "exact_mass", "quantized_mass", "dropped_mass")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("compare") / "attention"


@pytest.fixture(scope="module")
def result(loaded: tuple[Any, Any], directory: Path) -> Comparison:
    return short(loaded, ARMS, n=2, tokens=160, out=directory)


def test_rows_hold_each_layer_and_their_mean(result: Comparison, loaded: tuple[Any, Any]) -> None:
    layers = loaded[0].config.num_hidden_layers
    for row in result.rows:
        for metric in METRICS:
            assert len(row[f"{metric}_layers"]) == layers
            assert row[metric] == pytest.approx(sum(row[f"{metric}_layers"]) / layers)
        assert row["exact_mass"] + row["quantized_mass"] + row["dropped_mass"] == pytest.approx(1)


def test_arms_differ_as_their_tiers_do(result: Comparison) -> None:
    found = {arm: {metric: result.mean(arm, metric) for metric in METRICS} for arm in ARMS}
    full, logquant, evict = ({k: v.mean for k, v in x.items() if v is not None} for x in found.values())
    assert full["l1"] < 2e-6
    assert full["exact_mass"] == 1
    assert 0.05 < logquant["l1"] < evict["l1"]
    assert logquant["quantized_mass"] > 0.1
    assert logquant["dropped_mass"] == 0 == evict["quantized_mass"]
    assert evict["dropped_mass"] > 0.1
    difference = result.difference(ARMS[2], ARMS[1], metric="l1")
    assert difference is not None
    assert difference.mean == pytest.approx(evict["l1"] - logquant["l1"])


def test_watching_changes_nothing_else(result: Comparison, loaded: tuple[Any, Any], tmp_path: Path) -> None:
    plain = short(loaded, ARMS, n=2, tokens=160, errors=False, out=tmp_path / "out")
    for row, other in zip(result.rows, plain.rows, strict=True):
        left_out = {key for key in row if key.startswith(METRICS) or key.endswith("seconds")}
        assert {k: v for k, v in row.items() if k not in left_out} == {
            k: v for k, v in other.items() if k not in left_out
        }
        assert all(other[metric] is None is other[f"{metric}_layers"] for metric in METRICS)
    assert "attention" not in str(plain)
    assert plain.mean(ARMS[1], "l1") is None
    assert not (tmp_path / "out" / "attention.png").exists()
    with pytest.raises(CompareError, match=r"found none; compare with .*errors=True"):
        plain.plot_attention(tmp_path / "attention.png")


@pytest.mark.draws
def test_files(result: Comparison, directory: Path, tmp_path: Path) -> None:
    assert (directory / "attention.png").read_bytes().startswith(b"\x89PNG")
    summary = read(directory).settings
    assert (summary["attached"], summary["errors"]) == (True, True)
    assert summary["attention"] == result.distances.to_dict()
    assert len(summary["attention"]["layers"]) == 6
    assert len(summary["attention"]["distances"]) == len(summary["attention"]["mean"])
    fit = result.distances.fit()
    assert fit is not None
    assert summary["attention"]["fit"]["alpha"] == fit.exponent
    assert result.plot_attention(tmp_path / "picture.svg").exists()
    with pytest.raises(CompareError, match="must end in one of"):
        result.plot_attention(tmp_path / "picture.txt")
    with pytest.raises(CompareError, match=r"can't be written"):
        result.plot_attention(tmp_path / "nowhere" / "picture.png")


def test_tables_and_what_the_fit_found(result: Comparison) -> None:
    text = " ".join(str(result).split())
    assert "lines: attention" in text
    assert "100.0 ±0.0%" in text
    fit = result.distances.fit()
    assert fit is not None
    assert f"alpha = {fit.exponent:.2f}, R² = {fit.r2:.2f}" in text


def test_distances_are_those_of_the_exact_cache_whatever_the_arms(result: Comparison, loaded: tuple[Any, Any]) -> None:
    other = short(loaded, [ARMS[2]], n=2, tokens=160)
    assert other.distances.to_dict() == result.distances.to_dict()
    steps = sum(row["decode_steps"] for row in other.rows)
    assert all(profile.queries == steps for profile in other.distances.layers.values())


def test_unattached_there_is_nothing_to_watch(loaded: tuple[Any, Any], tmp_path: Path) -> None:
    before = Runner.run

    def run(self: Any, cache: Any, item: Any) -> Any:
        assert not is_attached(self.model)
        return before(self, cache, item)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Runner, "run", run)
        result = short(loaded, ARMS, attach=False, out=tmp_path / "out")
    assert result.settings["attached"] is False
    assert all(row[metric] is None for row in result.rows for metric in METRICS)
    assert "this one ran unattached" in str(result)
    table = str(result).partition("lines: attention")[2].splitlines()
    assert [line.split() for line in table if line.startswith(ARMS[1])] == [[ARMS[1], *"-----"]]
    assert not (tmp_path / "out" / "attention.png").exists()


def foreign(family: str, **options: Any) -> Any:
    sizes = {**COMMON, **options, "vocab_size": 3072}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes)).eval()


def test_a_model_that_can_not_be_attached_runs_unattached_and_says_why(loaded: tuple[Any, Any]) -> None:
    falcon = foreign("falcon")
    with pytest.warns(UserWarning, match="runs unattached: FalconModel does not use transformers' attention"):
        result = short((falcon, loaded[1]), ["flexgen"])
    assert result.settings["attached"] is False
    assert result.rows[0]["l1"] is None
    uneven = {"name": "uneven", "tiers": [{"store": "full"}], "layers": {"0": [
        {"policy": {"kind": "recent", "window": 8}, "store": "full"}, {"store": "evict"},
    ]}}  # fmt: skip
    with (
        pytest.warns(UserWarning, match="runs unattached"),
        pytest.raises(CacheError, match=r"arm 'uneven': .*attach"),
    ):
        short((falcon, loaded[1]), [uneven])
    assert short(loaded, [uneven]).rows[0]["l1_layers"][1] < 2e-6


def test_a_model_that_computes_on_keys_and_values_is_attached_but_not_watched(loaded: tuple[Any, Any]) -> None:
    model = foreign("deepseek_v3", **FAMILIES["deepseek_v3"])
    result = short((model, loaded[1]), ["logquant:window=8"])
    assert result.settings["attached"] is True
    assert result.rows[0]["l1"] is None
    assert result.rows[0]["kl"] is not None
    # The exact cache is read as it is, so its attention is known even here.
    assert result.distances.layers
    assert "computes on keys and values itself" in " ".join(str(result).split())


def test_a_model_attached_by_its_owner_stays_so(loaded: tuple[Any, Any]) -> None:
    with attach(loaded[0], recipe="kivi") as handle:
        result = short(loaded, ["logquant:window=8"])
        assert is_attached(loaded[0])
        assert result.settings["attached"] is True
        assert result.rows[0]["l1"] > 0
        with pytest.raises(CompareError, match="not attached, and this LlamaForCausalLM is; detach its handle"):
            short(loaded, ["full"], attach=False)
        assert is_attached(loaded[0])
    handle.detach()
    assert not is_attached(loaded[0])


@pytest.mark.parametrize("where", ["arm", "everything", "recipe"])
def test_the_model_is_detached_whatever_happens(
    loaded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    before, during = loaded[0].config._attn_implementation, []

    def fail(self: Any, cache: Any, item: Any) -> Any:
        during.append(is_attached(loaded[0]))
        raise KeyboardInterrupt if where == "everything" else RuntimeError("out of memory")

    if where != "recipe":
        monkeypatch.setattr(Runner, "run", fail)
    arm = "kivi:group_size=48" if where == "recipe" else "kivi"
    with pytest.raises((KvpolicyError, KeyboardInterrupt)):
        short(loaded, [arm])
    assert during == ([] if where == "recipe" else [True])
    assert not is_attached(loaded[0])
    assert loaded[0].config._attn_implementation == before
    assert watching.get() is None


def test_a_step_that_fails_leaves_no_watcher_behind(loaded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Any, *seen: Any) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(Watcher, "_note", fail)
    with pytest.raises(CompareError, match="broken"):
        short(loaded, ["kivi"])
    assert watching.get() is None


@pytest.mark.parametrize("what", ["_note", "_measure", "_exactness"])
def test_times_leave_out_the_watching(loaded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    before, clock, slow = getattr(Watcher, what), [0.0], []

    def now() -> float:
        clock[0] += 1e-6
        return clock[0]

    def late(self: Any, *given: Any) -> Any:
        clock[0] += 50.0
        slow.append(50.0)
        return before(self, *given)

    monkeypatch.setattr(time, "perf_counter", now)
    monkeypatch.setattr(Watcher, what, late)
    row = short(loaded, ["logquant:window=8"]).rows[0]
    assert sum(slow) > 500
    assert 0 < row["decode_seconds"] < 0.1


def test_greedy_decoding_is_not_watched(loaded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[int] = []
    greedy = Runner._greedy

    def watched(self: Any, best: Any, item: Any, cache: Any) -> Any:
        tokens = greedy(self, [(token + 1) % 3072 for token in best], item, cache)
        counts.append(len(tokens))
        return tokens

    monkeypatch.setattr(Runner, "_greedy", watched)
    result = short(loaded, ["kivi"])
    assert max(counts) > 1
    assert all(p.queries == result.rows[0]["decode_steps"] for p in result.distances.layers.values())


def test_a_single_sample_of_one_token_says_nothing_of_attention(loaded: tuple[Any, Any], tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text('{"prompt": "import os\\n", "answer": "import"}\n', encoding="utf-8")
    result = short(loaded, ["kivi"], task=file, tokens=None, out=tmp_path / "out")
    assert result.rows[0]["l1"] is None
    assert "attention could not be watched" in str(result)
    assert "attention" not in read(tmp_path / "out").settings


def test_on_the_shell(tmp_path: Path) -> None:
    def run(*arguments: str) -> Any:
        done = CliRunner().invoke(app, ["compare", "logquant:window=8", "-n", "1", "--tokens", "96", *arguments])
        assert done.exit_code == 0, done.output
        return done

    done = run("--out", str(tmp_path / "a"))
    assert "lines: attention" in done.stdout
    assert "alpha = " in done.stdout
    assert "run.sqlite, report.html, report.md, comparison.png and attention.png into" in done.stderr
    assert read(tmp_path / "a").settings["attached"] is True
    done = run("--out", str(tmp_path / "b"), "--unattached")
    assert "run.sqlite, report.html, report.md and comparison.png into" in done.stderr
    assert read(tmp_path / "b").settings["attached"] is False
    done = run("--out", str(tmp_path / "c"), "--no-errors")
    assert "attention" not in done.stdout
    settings = read(tmp_path / "c").settings
    assert (settings["attached"], settings["errors"], "attention" in settings) == (True, False, False)


def test_no_warning_where_the_model_can_be_attached(loaded: tuple[Any, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        short(loaded, ["kivi"])
