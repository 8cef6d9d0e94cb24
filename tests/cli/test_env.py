"""`kvpolicy env`: what a report of a bug says of an installation, whole or broken."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from importlib import import_module
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from kvpolicy.cli import env as module
from kvpolicy.cli.main import app

BROKEN = "raise OSError('libtorch.so: cannot open shared object file')"


def run(*arguments: str, first: Path | None = None) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(filter(None, [str(first) if first else "", os.environ.get("PYTHONPATH", "")]))
    command = [sys.executable, "-m", "kvpolicy", "env", *arguments]
    environment = {**os.environ, "PYTHONPATH": path}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def found(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["env", *arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_text_and_json_say_the_same() -> None:
    data = json.loads(found("--json"))
    assert data["python"] == platform.python_version()
    assert data["platform"] == platform.platform()
    assert data["kvpolicy"] == version("kvpolicy")
    for name in ("torch", "transformers"):
        assert data[name] == {"version": version(name), "error": None}
    assert {"name": "int", "module": "kvpolicy_int", "distribution": "kvpolicy", "version": data["kvpolicy"]} in data[
        "plugins"
    ]
    assert len(data["plugins"]) == len(entry_points(group="kvpolicy"))
    lines = found().splitlines()
    for name, text in (("kvpolicy", data["kvpolicy"]), ("torch", data["torch"]["version"]), ("Python", data["python"])):
        assert next(line for line in lines if line.startswith(name)).split() == [name, text]
    assert any(f"kvpolicy {data['kvpolicy']}: attention, " in line for line in lines)


@pytest.mark.parametrize("package", ["torch", "transformers"])
def test_a_broken_library_is_named_with_its_error(tmp_path: Path, package: str) -> None:
    (tmp_path / package).mkdir()
    (tmp_path / package / "__init__.py").write_text(BROKEN)
    result = run(first=tmp_path)
    assert result.returncode == 0, result.stderr
    line = next(line for line in result.stdout.splitlines() if line.startswith(package))
    assert f"{version(package)}; can't be imported: OSError: libtorch.so" in line
    assert "int" in result.stdout
    data = json.loads(run("--json", first=tmp_path).stdout)
    assert data[package]["error"].startswith("OSError: libtorch.so")


def test_nothing_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_version(name: str) -> str:
        raise PackageNotFoundError(name)

    def no_module(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(module, "version", no_version)
    monkeypatch.setattr(module, "import_module", no_module)
    monkeypatch.setattr(module, "entry_points", lambda group: ())
    words = [line.split(maxsplit=1) for line in found().splitlines()]
    named = dict(words)
    assert named["torch"] == named["transformers"] == named["kvpolicy"] == "not installed"
    assert named["CUDA"] == named["cards"] == named["plugins"] == "none"
    data = json.loads(found("--json"))
    assert data["torch"] == {"version": None, "error": None}


def test_a_library_that_lacks_another_is_broken_and_not_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def lacks(name: str) -> Any:
        raise ModuleNotFoundError("No module named 'regex'", name="regex")

    monkeypatch.setattr(module, "import_module", lacks)
    assert "can't be imported: ModuleNotFoundError: No module named 'regex'" in found()


class _Cuda:
    def __init__(self, cards: list[str], error: Exception | None = None) -> None:
        self.cards, self.error = cards, error

    def is_available(self) -> bool:
        return bool(self.cards)

    def device_count(self) -> int:
        if self.error is not None:
            raise self.error
        return len(self.cards)

    def get_device_name(self, i: int) -> str:
        return self.cards[i]


def with_torch(monkeypatch: pytest.MonkeyPatch, cuda: str | None, hip: str | None, cards: _Cuda) -> None:
    torch = SimpleNamespace(version=SimpleNamespace(cuda=cuda, hip=hip), cuda=cards, __version__="9.9")
    monkeypatch.setattr(module, "import_module", lambda name: torch if name == "torch" else import_module(name))


def test_each_card_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with_torch(monkeypatch, "12.8", None, _Cuda(["NVIDIA H100", "NVIDIA A100"]))
    lines = [" ".join(line.split()) for line in found().splitlines()]
    at = lines.index("cards NVIDIA H100")
    assert lines[at - 1] == "CUDA 12.8"
    assert lines[at + 1] == "NVIDIA A100"
    assert json.loads(found("--json"))["cuda"] == {
        "version": "12.8",
        "cards": ["NVIDIA H100", "NVIDIA A100"],
        "error": None,
    }


def test_rocm_and_a_driver_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    with_torch(monkeypatch, None, "6.2", _Cuda(["a card"], RuntimeError("driver too old")))
    data = json.loads(found("--json"))["cuda"]
    assert data == {"version": "6.2", "cards": [], "error": "RuntimeError: driver too old"}
    assert "RuntimeError: driver too old" in found()
