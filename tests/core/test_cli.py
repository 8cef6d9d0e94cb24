"""The command: what it prints, and that every error is one message with exit status 2."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kvpolicy.cli import main
from kvpolicy.recipe import bundled_names, load_recipe, load_yaml


def run(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "COLUMNS": "200"}
    command = [sys.executable, "-m", "kvpolicy", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd, env=environment)


def test_help_is_quick_and_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom kvpolicy import cli\n"
        "heavy = {'torch', 'transformers', 'matplotlib', 'pydantic', 'numpy', 'ruamel'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    start = time.perf_counter()
    assert run("--help").returncode == 0
    assert time.perf_counter() - start < 2


def test_recipes_lists_every_bundled_recipe() -> None:
    result = run("recipes")
    assert result.returncode == 0, result.stderr
    for name in bundled_names():
        assert any(line.startswith(f"{name} ") for line in result.stdout.splitlines())


def test_show_prints_yaml_that_loads_and_a_table() -> None:
    result = run("show", "logquant:window=64,nbits=4", "--tokens", "1000")
    assert result.returncode == 0, result.stderr
    assert load_yaml(result.stdout).tiers == load_recipe("logquant", window=64, nbits=4).tiers
    assert "Tiers after 1000 tokens" in result.stderr
    assert "recent(window=64, flush=64)" in result.stderr
    assert "takes the rest" in result.stderr


def test_show_says_how_tokens_came_and_what_other_layers_have(tmp_path: Path) -> None:
    assert "Tiers after a prompt of 300 tokens" in run("show", "hf-quantized", "--tokens", "300").stderr
    file = tmp_path / "layers.yaml"
    file.write_text('extends: logquant\nlayers: {"0": full, "1-2": [{store: {kind: int, nbits: 8}}]}\n')
    shown = run("show", str(file)).stderr
    assert "Layers 0: full" in shown
    assert "Tiers of layers 1-2" in shown
    assert "int(nbits=8" in shown


@pytest.mark.parametrize(
    "arguments", [("compare", "full", "-n", "1"), ("generate", "--recipe", "full", "--prompt", "ß")]
)
def test_a_terminal_that_knows_ascii_alone_is_served(arguments: tuple[str, ...]) -> None:
    command = [sys.executable, "-m", "kvpolicy", *arguments]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr


def test_prompts_that_are_no_text_and_tasks_that_are_no_files() -> None:
    generate = [sys.executable, "-m", "kvpolicy", "generate", "--recipe", "full", "--prompt"]
    bad = subprocess.run([*generate, b"\xff\xfe"], capture_output=True, text=True, check=False)
    assert (bad.returncode, "no UTF-8" in bad.stderr) == (2, True), bad.stderr
    shell = f"{sys.executable} -m kvpolicy generate --recipe full --prompt - <&-"
    closed = subprocess.run(["sh", "-c", shell], capture_output=True, text=True, check=False)
    assert (closed.returncode, "stdin, which is closed" in closed.stderr) == (2, True), closed.stderr
    device = run("compare", "full", "--task", "/dev/zero.jsonl" if not Path("/dev/zero").exists() else "/dev/zero")
    assert device.returncode == 2
    assert "Traceback" not in device.stderr


def test_show_draws_a_picture(tmp_path: Path) -> None:
    result = run("show", "partial-logquant", "--tokens", "300", "--plot", str(tmp_path / "out.png"))
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    assert "wrote" in result.stderr


@pytest.mark.parametrize("name", ["out.xyz", "missing/out.png"])
def test_a_picture_that_can_not_be_written_is_an_error(tmp_path: Path, name: str) -> None:
    result = run("show", "full", "--tokens", "10", "--plot", str(tmp_path / name))
    assert result.returncode == 2
    assert name in result.stderr
    assert "Traceback" not in result.stderr


def test_validate_reports_each_file_and_fails_if_one_is_bad(tmp_path: Path) -> None:
    (tmp_path / "good.yaml").write_text("tiers: [{store: full}]\n")
    (tmp_path / "bad.yaml").write_text("tiers:\n  - {stor: full}\n")
    result = run("validate", "good.yaml", "bad.yaml", "kivi", cwd=tmp_path)
    assert result.returncode == 2
    assert result.stdout.splitlines() == ["good.yaml: valid (good, tiers: 1)", "kivi: valid (kivi, tiers: 3)"]
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: bad.yaml:2: tiers[0].stor: unknown key 'stor' of a tier (did you mean 'store'?)")
    assert run("validate", "good.yaml", cwd=tmp_path).returncode == 0


def test_schema_is_json() -> None:
    result = run("schema")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["title"] == "kvpolicy recipe"


def test_plugins_lists_kind_distribution_version_file_and_options() -> None:
    result = run("plugins")
    assert result.returncode == 0, result.stderr
    (line,) = (line for line in result.stdout.splitlines() if " log " in line)
    for part in ("policy", "kvpolicy", "0.1.0", "kvpolicy_log.py", "budget=42"):
        assert part in line


BAD = [
    ("show", "logqant"),
    ("show", "logquant:window=0"),
    ("show", "logquant:windw=3"),
    ("show", "logquant:window"),
    ("show", "logquant:window=[1"),
    ("show", "logquant:window=!!python/name:os.system"),
    ("show", "missing.yaml"),
    ("show", "."),
    ("show", "a" * 5000),
    ("show", ""),
    ("validate", "logquant:nbits=7"),
    ("show", "full", "--tokens", "9999", "--plot", "x.png"),
    ("show", "full", "--tokens", "-1"),
    ("nonsense",),
    ("compare", "h2o", "--unattached"),
    ("generate", "--recipe", "zipcache", "--prompt", "import os", "--unattached"),
]


@pytest.mark.parametrize("arguments", BAD, ids=[" ".join(a)[:40] for a in BAD])
def test_bad_input_is_exit_status_2_and_one_message(
    arguments: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["kvpolicy", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.strip()


def test_an_error_has_no_traceback(tmp_path: Path) -> None:
    result = run("show", "logqant", cwd=tmp_path)
    assert result.returncode == 2
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: no recipe 'logqant' (did you mean 'logquant'?)")


def test_what_attention_chooses_is_not_shown_as_known(tmp_path: Path) -> None:
    result = run("show", "h2o", "--tokens", "300", "--plot", str(tmp_path / "h2o.png"), cwd=tmp_path)
    assert result.returncode == 0
    rows = [line for line in result.stderr.splitlines() if line.startswith(("0 ", "1 "))]
    assert rows[0].rstrip().endswith("270 to 299")
    assert rows[1].rstrip().endswith("by attention")
    assert (tmp_path / "h2o.png").stat().st_size > 1000
