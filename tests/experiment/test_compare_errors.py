"""What goes wrong in a comparison: samples and arms that fail, directories, models, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from short import short
from transformers import LlamaConfig, LlamaForCausalLM

from kvpolicy import compare
from kvpolicy.errors import CompareError, RecipeError, TaskError
from kvpolicy.experiment.run import Runner
from kvpolicy.experiment.store import read
from kvpolicy.hf.models import BUNDLED, load_model


def failing(monkeypatch: pytest.MonkeyPatch, arm: str, samples: set[int]) -> None:
    """Let an arm fail on some of its samples."""
    run, seen = Runner.run, []

    def fail(self: Any, cache: Any, item: Any) -> Any:
        if cache.recipe.name == arm:
            seen.append(arm)
            if len(seen) - 1 in samples:
                raise RuntimeError("out of memory")
        return run(self, cache, item)

    monkeypatch.setattr(Runner, "run", fail)


def test_a_sample_that_fails_is_a_row_with_its_error_and_the_run_goes_on(
    loaded: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, "kivi", {1})
    with pytest.warns(UserWarning, match="arm 'kivi' failed.*sample 1: RuntimeError: out of memory"):
        result = short(loaded, ["kivi", "logquant"], n=3, out=tmp_path)
    rows = [row for row in read(tmp_path).rows if row.arm != "exact"]
    assert [(row.sample, row.arm) for row in rows] == [(str(i), arm) for i in range(3) for arm in ("kivi", "logquant")]
    assert {(row.sample, row.arm): row.error for row in rows if row.error} == {
        ("1", "kivi"): "RuntimeError: out of memory"
    }
    assert not rows[2].metrics
    assert result.failures == {"kivi": "sample 1: RuntimeError: out of memory"}
    assert len(result.values("kivi", "kl")) == 2
    assert "kivi (2 of 3 samples)" in str(result)
    assert "failed: kivi: sample 1" in str(result)
    again = short(loaded, ["kivi", "logquant"], n=3, out=tmp_path, retry=True)
    assert not again.failures
    assert [row for row in again.rows if row["sample"] != 1] == [row for row in result.rows if row["sample"] != 1]


def test_if_every_arm_fails_the_error_says_why_and_rows_stay(
    loaded: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, "kivi", {0, 1, 2})
    with (
        pytest.warns(UserWarning, match="arm 'kivi' failed"),
        pytest.raises(CompareError, match="every arm failed: kivi, sample 0: RuntimeError: out of memory"),
    ):
        short(loaded, ["kivi"], n=3, out=tmp_path)
    assert [(row.arm, row.error is None) for row in read(tmp_path).rows] == [("exact", True), ("kivi", False)] * 3


def test_another_experiment_is_replaced_only_on_demand(loaded: tuple[Any, Any], tmp_path: Path) -> None:
    short(loaded, ["full"], out=tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    before = (tmp_path / "run.sqlite").read_bytes()
    for arms, options, told in (
        (["kivi"], {}, "arms is 'full' there and 'kivi' here"),
        (["full"], {"n": 2}, "task lines n is 1 there and 2 here"),
        (["full"], {"seed": 1}, "task lines seeds is '0' there and '1' here"),
        (["full"], {"attach": False}, "attached is True there and False here"),
        (["full"], {"errors": False}, "metrics is "),
    ):
        with pytest.raises(CompareError, match=f"holds another experiment: {told}.*--overwrite"):
            short(loaded, arms, out=tmp_path, **options)
    with pytest.raises(RecipeError):
        short(loaded, ["nothing"], out=tmp_path, overwrite=True)
    assert (tmp_path / "run.sqlite").read_bytes() == before
    short(loaded, ["kivi"], out=tmp_path, overwrite=True)
    assert {row.arm for row in read(tmp_path).rows} == {"exact", "kivi"}
    assert (tmp_path / "notes.txt").read_text() == "mine"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "samples.jsonl").write_text("{}")
    with pytest.raises(CompareError, match=r"another version, found samples\.jsonl"):
        short(loaded, ["kivi"], out=tmp_path / "other")


def test_out_may_not_be_a_file(loaded: tuple[Any, Any], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CompareError, match="found a file"):
        short(loaded, ["full"], out=tmp_path / "file")


@pytest.mark.parametrize(
    ("arms", "options", "error", "text"),
    [
        ([], {}, CompareError, "at least one arm, found none"),
        (7, {}, CompareError, "arms must be recipes in a list"),
        (["logqant"], {}, RecipeError, "did you mean 'logquant'"),
        (["full", "full"], {}, CompareError, "found 'full' twice"),
        ({"exact": "kivi"}, {}, CompareError, "must not be named 'exact'"),
        (["full"], {"n": 0}, CompareError, "at least 1, found 0"),
        (["full"], {"n": True}, CompareError, "at least 1, found True"),
        (["full"], {"n": 1.5}, CompareError, "at least 1, found 1.5"),
        (["full"], {"task": "poems"}, TaskError, "task must be one of lines"),
        (["full"], {"tokens": 2200}, CompareError, r"max_position_embeddings, 2048, found \d+ \+ 11 tokens"),
        (["full"], {"tokenizer": None}, CompareError, "needs its tokenizer"),
        (["full"], {"model": 3}, CompareError, "must be a causal language model"),
        (["full"], {"device": "cpu"}, CompareError, "for a model given by its name"),
        (["full"], {"model": "/nowhere/at/all"}, CompareError, "found no directory or file '/nowhere/at/all'"),
        (
            [{"tiers": [{"store": {"kind": "int", "nbits": 2, "group_size": 48, "per": "token"}}]}],
            {},
            RecipeError,
            "48",
        ),
    ],
)
def test_what_can_not_be_run_is_refused_before_anything_runs(
    loaded: tuple[Any, Any], arms: Any, options: dict[str, Any], error: type[Exception], text: str
) -> None:
    model, tokenizer = loaded
    options = {"model": model, "tokenizer": tokenizer, "n": 1, "tokens": 96, **options}
    with pytest.raises(error, match=text):
        compare(arms, progress=False, **options)


def tiny() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=3072, num_key_value_heads=1, **sizes))


def test_any_local_model_directory_works(loaded: tuple[Any, Any], tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path)
    with pytest.raises(CompareError, match="the tokenizer can't be loaded"):
        compare(["full"], model=tmp_path, n=1, progress=False)
    loaded[1].save_pretrained(tmp_path)
    result = compare(["flexgen"], model=tmp_path, n=1, tokens=96, device="cpu", progress=False)
    assert result.settings["model"] == str(tmp_path)
    assert result.rows[0]["exact_bytes"] == (result.rows[0]["prompt_tokens"] + 10) * 2 * 16 * 4


def test_broken_model_directories_are_named(loaded: tuple[Any, Any], tmp_path: Path) -> None:
    with pytest.raises(CompareError, match=r"must hold config\.json"):
        load_model(tmp_path)
    tiny().save_pretrained(tmp_path)
    loaded[1].save_pretrained(tmp_path)
    from safetensors.torch import load_file, save_file

    weights = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    save_file({k: v for k, v in weights.items() if k != name}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CompareError, match=f"must be complete, found 1 missing, such as {name}"):
        load_model(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(CompareError, match="the model can't be loaded"):
        load_model(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CompareError, match="the model can't be loaded"):
        load_model(tmp_path)
    with pytest.raises(CompareError, match=r"device must be a name such as cpu.*found 'nothing'"):
        load_model(BUNDLED, "nothing")


def test_predictions_that_are_not_numbers_are_an_error(loaded: tuple[Any, Any]) -> None:
    model = tiny().eval()
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.nan)
    with pytest.raises(CompareError, match=r"the exact cache, sample 0: .*must be numbers, found nan"):
        compare(["full"], model=model, tokenizer=loaded[1], n=1, tokens=96, progress=False)
