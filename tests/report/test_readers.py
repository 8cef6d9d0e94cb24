"""Rows from elsewhere, several runs as one, and the command that reads them."""

from __future__ import annotations

import csv
import io
import json
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from kvpolicy.cli.main import main
from kvpolicy.errors import CompareError
from kvpolicy.report.merging import merge
from kvpolicy.report.readers import read_csv, read_lm_eval
from kvpolicy.report.tables import Report
from kvpolicy.statistics.rows import Evidence, Row
from kvpolicy.statistics.verdicts import judge

HEAD = "arm,task,sample,score\n"
PLAIN = HEAD + "".join(f"{arm},t,{i},{score}\n" for arm, score in (("base", 1), ("b", 0)) for i in range(8))


def wrote(path: Path, text: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def run(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["kvpolicy", "report", *map(str, words)])
    with pytest.raises(SystemExit) as left:
        main()
    return int(left.value.code or 0)


def test_csv(tmp_path: Path) -> None:
    text = (
        "\ufeffsample,arm,task,score,kl,document,output,error,host\r\n"
        '1,a,t,0.5,0.1,d,"two\nlines, one comma",,x\r\n'
        "2,a,t,,,,,out of memory,1\r\n"
        "1,full,t,1e-1,,d,,,2\r\n"
    )
    found = read_csv(wrote(tmp_path / "rows.csv", text))
    assert found.baseline == "full"
    assert found.rows[0] == Row(
        "a", "t", "1", {"score": 0.5, "kl": 0.1}, "d", {"host": "x"}, output="two\nlines, one comma"
    )
    assert (found.rows[1].error, found.rows[1].metrics) == ("out of memory", {})
    assert found.rows[2].metrics == {"score": 0.1}, "a column that holds a word somewhere is no metric"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"line 1: the header must name arm, task, sample and score, each once, found an empty file; add"),
        ("arm;task;sample;score\na;t;1;2\n", r"line 1: .* found arm;task;sample;score; add the columns"),
        ("arm,task,score\na,t,1\n", r"line 1: .* found arm, task, score; add"),
        ("arm,task,sample,score,score\n", r"line 1: .*each once"),
        (HEAD, r"must have a line for each arm and sample, found none"),
        (HEAD + "a,t,1,good\n", r"line 2: score must be a finite number, found 'good'; leave it empty"),
        (HEAD + "a,t,1,0.5\na,t,2,nan\n", r"line 3: score must be a finite number, found 'nan'"),
        (HEAD + "a,t,1,1\na,t,1,0\n", r"line 3: an arm must have one row .* sample '1' in line 2, too; remove one"),
        (HEAD + "a,t,1\n", r"line 2: a line must have as many cells as the header, found more or fewer"),
        (HEAD + "a,t,1,1,1\n", r"line 2: a line must have as many cells"),
        (HEAD + ",t,1,1\n", r"line 2: arm must not be empty; fill it in"),
        (HEAD.encode() + b"a,t,\xff,1\n", r"must be CSV in UTF-8, found"),
        (HEAD + 'a,t,"1,1\n', r"must be CSV in UTF-8, found unexpected end of data"),
    ],
)
def test_a_bad_csv_is_one_error_that_names_the_line(tmp_path: Path, text: str | bytes, message: str) -> None:
    with pytest.raises(CompareError, match=message):
        read_csv(wrote(tmp_path / "rows.csv", text))


def logged(doc: int, metrics: dict[str, Any], **given: Any) -> str:
    """A line as lm_eval 0.4.13 writes it."""
    record = {
        "doc_id": doc,
        "doc": {"q": f"{doc} is", "passage": f"p{doc // 2}" * 40},
        "target": "even",
        "arguments": {"gen_args_0": {"arg_0": f"{doc} is", "arg_1": {"until": ["\n"]}}},
        "resps": [["lol"]],
        "filtered_resps": ["lol"],
        "filter": "none",
        "metrics": list(metrics),
        "doc_hash": f"hash of {doc}",
        "prompt_hash": "p",
        "target_hash": "t",
        **metrics,
        **given,
    }
    return json.dumps(record) + "\n"


def choices(doc: int, right: float) -> str:
    arguments = {f"gen_args_{i}": {"arg_0": "q", "arg_1": f" {i}"} for i in range(2)}
    resps = [[["-0.61", "False"]], [["-0.65", "False"]]]
    return logged(doc, {"acc": right, "acc_norm": right}, arguments=arguments, resps=resps, target="0")


def harness(directory: Path, right: float, n: int = 12) -> Path:
    """A directory of `--log_samples`: choices, generation under two filters, a rolling task, an older file."""
    place = directory / "org__model"
    date = "2026-11-26T22-09-16.953025"
    wrote(place / f"samples_arc easy_{date}.jsonl", "".join(choices(i, right) for i in range(n)))
    wrote(place / "samples_arc easy_2025-01-01T00-00-00.000001.jsonl", choices(0, 0.5))
    both = ("strict-match", 0.0), ("flexible-extract", right)
    gsm = [logged(i, {"exact_match": score}, filter=name) for name, score in both for i in range(n)]
    wrote(place / f"samples_gsm8k_{date}.jsonl", "".join(gsm))
    rolling = {"arguments": {"gen_args_0": {"arg_0": "text"}}, "resps": [["-6.0"]]}
    words = [
        logged(i, {"word_perplexity": [-6.0 - right, 3], "bits_per_byte": [-6.0, 12]}, **rolling) for i in range(n)
    ]
    wrote(place / f"samples_wiki_{date}.jsonl", "".join(words))
    wrote(place / f"results_{date}.json", json.dumps({"config": {"model": "hf", "limit": 12}, "results": {}}))
    return directory


def test_samples_of_lm_eval(tmp_path: Path) -> None:
    found = read_lm_eval(harness(tmp_path, 1.0), "exact", "passage")
    first = {row.task: row for row in found.rows if row.sample == "0"}
    assert first["arc easy"].metrics == {"acc": 1.0, "acc_norm": 1.0}, "the newest file counts"
    assert first["arc easy"].output is None
    assert first["gsm8k"].metrics == {"exact_match,strict-match": 0.0, "exact_match,flexible-extract": 1.0}
    assert (first["gsm8k"].output, first["gsm8k"].answer, first["gsm8k"].prompt) == ("lol", "even", "0 is")
    assert first["wiki"].metrics["word_nll"] == pytest.approx(7 / 3)
    assert first["wiki"].metrics["bits_per_byte"] == pytest.approx(0.5 / 0.6931472)
    assert first["wiki"].output is None
    assert len({row.document for row in found.rows if row.task == "wiki"}) == 6
    assert found.settings["config"] == {"model": "hf", "limit": 12}
    with pytest.raises(CompareError, match=r"line 1: --document must be a field of each doc, found 'book'; it has q"):
        read_lm_eval(tmp_path, "exact", "book")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must have a line for each sample, found none; was the run cut short"),
        (
            logged(0, {"acc": 1.0}) + '{"doc_id": 1, "met',
            "line 2: each line must be a JSON object, found .*remove the line",
        ),
        ("[1]\n", "line 1: each line must be an object with doc_id and metrics"),
        (logged(0, {"bleu": ["a", "b"]}), "line 1: a sample must have a metric that is a finite number, found bleu"),
        (
            logged(0, {"acc": 1.0}) * 2,
            "line 2: a sample must have one line for each filter, found acc of doc_id 0 twice",
        ),
    ],
)
def test_bad_samples_are_one_error_that_names_the_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(CompareError, match=message):
        read_lm_eval(wrote(tmp_path / "samples_t_2026-11-26T22-09-16.jsonl", text), "a")


def of(arm: str, score: float, prompt: str = "p", **given: Any) -> Evidence:
    return Evidence(
        (Row(arm, "t", "0", {"score": score, "step_seconds": score}, prompt=prompt, **given),), {arm: "r"}, arm
    )


def test_runs_are_merged() -> None:
    same = merge([("one", of("exact", 1.0)), ("two", of("a", 0.0)), ("three", of("exact", 1.0))])
    assert (list(same.arms), same.baseline, len(same.rows)) == (["exact", "a"], "exact", 2)
    apart = merge([("one", of("exact", 1.0)), ("two", of("exact", 0.0))])
    assert list(apart.arms) == ["exact", "exact (two)"]
    assert judge(apart).found[0].noise, "the same recipe with other results is the noise"
    with pytest.raises(
        CompareError, match="must be of the same sample, found answer 'x' of arm 'a' and 'y' of arm 'b'"
    ):
        merge([("one", of("a", 1.0, answer="x")), ("two", of("b", 0.0, answer="y"))])
    notes = merge([("one", of("a", 1.0, "long")), ("two", of("b", 0.0, "short"))]).settings["notes"]
    assert "prompts of 1 rows differ from those of other arms (such as b and a)" in notes[0]


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """lm-eval's samples and a CSV in; all formats out, which read back."""
    exact, quant = harness(tmp_path / "e", 1.0), harness(tmp_path / "q", 0.0)
    out = tmp_path / "out"
    words = (f"exact={exact}", f"quant={quant}", "--margin", "0.05", "--format", "md,csv,latex,json", "--out", out)
    assert run(monkeypatch, *words) == 0
    printed = capsys.readouterr()
    lines = [line for line in printed.out.splitlines() if line.startswith("quant")]
    assert [line.split()[1] for line in lines] == ["arc", "gsm8k", "wiki"]
    assert "worse" in lines[0]
    frame = pd.read_csv(out / "verdicts.csv")
    assert frame.verdict.tolist() == [v["verdict"] for v in json.loads((out / "report.json").read_text())["verdicts"]]
    assert frame.verdict.tolist()[0] == "worse"
    assert r"quant & arc easy & 12 & 1.000 & 0.000 & -1.000 [" in (out / "verdicts.tex").read_text()
    assert "| quant | arc easy | **worse** | 12 |" in (out / "report.md").read_text()
    assert run(monkeypatch, *words) == 2
    assert (
        "must not hold a report, found report.md; choose another directory, or --overwrite" in capsys.readouterr().err
    )
    assert run(monkeypatch, *words, "--overwrite") == 0


def test_what_the_command_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = wrote(tmp_path / "plain.csv", PLAIN)
    other, dangling = wrote(tmp_path / "rows.parquet", "x"), tmp_path / "dangling"
    dangling.symlink_to("nowhere")
    for words, message in (
        (
            (plain, "--format", "pdf"),
            "--format must be of html, md, csv, latex, json, separated by commas, found 'pdf'",
        ),
        ((plain, "--margin", "wide"), "--margin must be X, METRIC=X or TASK:METRIC=X with a number X, found 'wide'"),
        ((plain, "--margin", "nowhere:score=1"), "a margin must be of a task among"),
        ((plain, "--margin", "1", "--margin", "kl=1"), "found both; name all metrics"),
        (
            (plain, "--baseline", "bass"),
            "the baseline must be one of the arms, base, b, found 'bass' (did you mean 'base'?)",
        ),
        ((plain, "--metric", "acc"), "metric must be one of score, found 'acc'"),
        ((tmp_path / "gone.csv",), "gone.csv: there is no such run"),
        ((other,), "rows.parquet: a file must be one of .csv, .csv.gz, samples_<task>_<date>.jsonl"),
        ((plain, "--out", plain), "--out must be a directory, found a file"),
        ((plain, "--out", dangling), "dangling is a link to nothing"),
        (("=x",), "a run must be PATH or NAME=PATH, found '=x'"),
    ):
        assert run(monkeypatch, *words) == 2, words
        error = capsys.readouterr().err
        assert message in error, error
        assert len(error.splitlines()) == 1, error


def test_evidence_and_tables_of_pandas(tmp_path: Path) -> None:
    found = read_csv(wrote(tmp_path / "plain.csv", PLAIN))
    frame = found.to_pandas()
    assert frame.groupby("arm").score.mean().to_dict() == {"b": 0.0, "base": 1.0}
    report = Report.of(found, judge(found))
    assert report.to_pandas().loc[0, ["arm", "verdict", "n"]].tolist() == ["b", "worse", 8]
    assert next(csv.DictReader(io.StringIO(report.means_to_pandas().to_csv(index=False))))["mean"] == "1.0"
