"""The comparison as a command."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from kvpolicy.cli.main import app, main


def test_on_the_shell(tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["compare", "full", "logquant:window=8,nbits=4", "-n", "2", "--tokens", "96", "--out", str(out)]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "logquant:window=8,nbits=4" in done.stdout
    assert "n = 2 samples" in done.stdout
    assert "wrote samples.jsonl" in done.stderr
    assert len((out / "samples.jsonl").read_text().splitlines()) == 4


def test_fewer_rows_are_said_once_on_the_shell(tmp_path: Path) -> None:
    file = tmp_path / "one.jsonl"
    file.write_text('{"prompt": "import os\\n", "answer": "import"}\n', encoding="utf-8")
    done = CliRunner().invoke(app, ["compare", "full", "--task", str(file), "-n", "16", "--unattached"])
    assert done.exit_code == 0, done.output
    assert done.stderr.count("holds 1 row, fewer than the 16 samples asked for") == 1
    assert done.stderr.startswith("warning: ")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["full", "-n", "0"], "at least 1, found 0"),
        (["logqant"], "did you mean 'logquant'"),
        (["full", "--model", "/nowhere"], "found no directory or file '/nowhere'"),
        (["full", "--task", "nothing.jsonl"], "must be a readable file"),
        (["full", "full"], "found 'full' twice"),
    ],
)
def test_errors_on_the_shell_are_one_line_and_status_2(
    arguments: list[str], text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["kvpolicy", "compare", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert text in error
    assert error.count("\n") == 1
