"""The programs of docs/examples run as they are, and print what they say."""

from __future__ import annotations

import csv
import importlib.util
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import forked
import pytest
from words import CACHE

from kvpolicy.plugins import registry

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "docs" / "examples"
PROGRAMS = {"own_recipe", "compare_with_pandas", "serve_with_threads", "prompt_on_disk"}


def run(program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """What a program prints when it is started in an empty directory. The installed transformers has the word for the
    cache that the programs are written with, or another one."""
    file = EXAMPLES / f"{program}.py"
    monkeypatch.chdir(tmp_path)
    text = file.read_text(encoding="utf-8").replace("cache=cache", f"{CACHE}=cache")
    namespace: dict[str, Any] = {"__name__": "__main__", "__file__": str(file)}
    capsys.readouterr()
    exec(compile(text, str(file), "exec"), namespace)
    return capsys.readouterr().out


def test_every_program_is_tested_and_listed() -> None:
    assert {file.stem for file in EXAMPLES.glob("*.py")} == PROGRAMS
    page = (EXAMPLES / "index.md").read_text(encoding="utf-8")
    for program in PROGRAMS:
        assert f"({program}.py)" in page
        assert f"    python docs/examples/{program}.py\n" in (EXAMPLES / f"{program}.py").read_text(encoding="utf-8")
        assert f"\npython docs/examples/{program}.py\n" in page


def test_a_recipe_of_ones_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told = run("own_recipe", tmp_path, monkeypatch, capsys)
    assert "unknown parameter 'windw' (did you mean 'window'?)" in told
    # The window is let go in blocks of 16: of 300 tokens 32 + (300 - 32) % 16 stay, and 64 + (300 - 64) % 16.
    assert "window=32: 44 newest, 4 sinks, 252 quantized\n" in told
    assert "window=64: 76 newest, 4 sinks, 220 quantized\n" in told
    assert "<k17> <v17>\n<k5> <v5>\n<k59> <v59>\n<k3> <v3>" in told
    assert re.search(r"^[\d,]+ bytes, [\d.]+ bits per value", told, re.MULTILINE)


def test_a_comparison_with_pandas(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("pandas", reason="the extra `examples`")
    told = run("compare_with_pandas", tmp_path, monkeypatch, capsys)
    with open(tmp_path / "rows.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["sample"], row["arm"]) for row in rows] == [
        (str(sample), arm) for sample in range(3) for arm in ("exact", "2 bits", "4 bits")
    ]
    nll = {(row["arm"], row["sample"]): float(row["nll"]) for row in rows}
    mean = sum(nll["2 bits", str(i)] - nll["4 bits", str(i)] for i in range(3)) / 3
    found = re.search(r"confidence interval: (-?[\d.]+) ±", told)
    assert found is not None
    assert float(found[1]) == pytest.approx(mean, abs=6e-4)


def test_a_server_with_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told = run("serve_with_threads", tmp_path, monkeypatch, capsys)
    replies = dict(line.split(": ", 1) for line in told.splitlines())
    assert list(replies) == ["full", "balanced", "h2o", "smallest"]
    assert "<k7> <v7>\\n<k0> <v0>\\n<k50> <v50>\\n<k1> <v1>" in replies["full"]
    sizes = [int(re.findall(r"'bytes': (\d+)", replies[name])[0]) for name in ("full", "balanced", "h2o")]
    assert sizes == sorted(sizes, reverse=True)
    assert replies["smallest"] == "{'error': 'recipe must be one of full, balanced, h2o, found smallest'}"


def test_a_prompt_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    first = run("prompt_on_disk", tmp_path, monkeypatch, capsys)
    written = (tmp_path / "prompt.safetensors").stat()
    assert run("prompt_on_disk", tmp_path, monkeypatch, capsys) == first
    assert (tmp_path / "prompt.safetensors").stat().st_mtime_ns == written.st_mtime_ns
    for key in (7, 8, 9, 10, 50, 3, 99, 1):
        assert f"<k{key}> <v{key}>" in first
    sizes = re.search(r"([\d,]+) bytes in the file, ([\d,]+) in an exact cache", first)
    assert sizes is not None
    assert int(sizes[1].replace(",", "")) == written.st_size < int(sizes[2].replace(",", ""))


def in_a_fork(site: Path, command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
    assert command[0] == sys.executable
    return forked.python(*command[1:], site=site)


def test_a_policy_plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Built and installed as a distribution, from a copy; its own tests pass, the contract suite among them."""
    source, site = tmp_path / "policy_plugin", tmp_path / "site"
    shutil.copytree(EXAMPLES / "policy_plugin", source, ignore=shutil.ignore_patterns("__pycache__", "build"))
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--no-index", "--quiet"]
    done = subprocess.run([*command, "--target", site, source], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    monkeypatch.syspath_prepend(str(site))
    spec = importlib.util.spec_from_file_location("test_every", source / "test_every.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    registry.cache_clear()
    try:
        assert registry().policies["every"].distribution == "kvpolicy-every"
        tests = [getattr(module, name) for name in dir(module) if name.startswith("test_")]
        assert len(tests) == 3
        monkeypatch.setattr(module, "subprocess", SimpleNamespace(run=partial(in_a_fork, site)))
        for test in tests:
            test()
    finally:
        registry.cache_clear()
        sys.modules.pop("kvpolicy_every", None)
