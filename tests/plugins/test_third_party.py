"""Plugins of other distributions, really installed with pip, work like the built-in ones."""

from __future__ import annotations

import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import forked
import pytest

import kvpolicy

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "tests" / "third_party" / "kvpolicy_example"
RECIPE = """
name: strided
params: {n: 4, nbits: 4}
tiers:
  - {policy: {kind: recent, window: 16}, store: full}
  - {policy: {kind: stride, n: $n}, store: full}
  - {store: {kind: median, nbits: $nbits}}
"""
PYPROJECT = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"
[project]
name = "{name}"
version = "1.2.3"
[project.entry-points.kvpolicy]
{entry} = "{module}"
[tool.hatch.build.targets.wheel]
include = ["{module}.py"]
"""


def install(source: Path, target: Path) -> None:
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--no-index", "--quiet"]
    result = subprocess.run([*command, "--target", target, source], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def python(site: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return forked.python(*arguments, cwd=site, env={"PYTHONPATH": str(site), "COLUMNS": "300"}, site=site)


def distribution(folder: Path, name: str, entry: str, module: str, text: str) -> Path:
    folder.mkdir()
    (folder / "pyproject.toml").write_text(PYPROJECT.format(name=name, entry=entry, module=module))
    (folder / f"{module}.py").write_text(text)
    return folder


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the example installed, built from a copy so that nothing is left in the repository."""
    copy = tmp_path_factory.mktemp("source") / "kvpolicy_example"
    shutil.copytree(EXAMPLE, copy)
    target = tmp_path_factory.mktemp("site")
    install(copy, target)
    return target


def test_the_example_has_at_most_thirty_lines_a_plugin() -> None:
    files = sorted(EXAMPLE.glob("kvpolicy_*.py"))
    assert [file.stem for file in files] == ["kvpolicy_median", "kvpolicy_stride"]
    assert all(len(file.read_text().splitlines()) <= 30 for file in files)


def test_an_installed_policy_and_quantizer_work_in_a_recipe(site: Path) -> None:
    (site / "strided.yaml").write_text(RECIPE)
    code = """
        import torch
        from kvpolicy import load_recipe
        from kvpolicy.placement.simulate import simulate
        from kvpolicy.recipe.load import load_yaml
        from kvpolicy.storage.make import make_store
        recipe = load_recipe("./strided.yaml:n=5")
        print([part.tolist() for part in simulate(recipe.tiers, 40)][1])
        store = make_store(recipe.tiers[-1].keys, 64)
        x = torch.randn(1, 2, 10, 64, generator=torch.Generator().manual_seed(0))
        store.append(x)
        out = torch.empty_like(x)
        store.write(out, 0)
        assert (out - x).abs().max() < 0.4 and store.bytes()["codes"] == 2 * 10 * 32
        assert load_recipe(recipe) == load_yaml(recipe.to_yaml())
    """
    result = python(site, "-c", textwrap.dedent(code))
    assert result.returncode == 0, result.stderr
    assert result.stdout == "[0, 5, 10, 15, 20]\n"


def test_installed_plugins_are_listed_with_their_distribution(site: Path) -> None:
    result = python(site, "-m", "kvpolicy", "plugins")
    assert result.returncode == 0, result.stderr
    for kind, option in (("stride", "n=8"), ("median", "group_size=auto")):
        (line,) = (line for line in result.stdout.splitlines() if f" {kind} " in line)
        assert "kvpolicy-example" in line
        assert "0.3.0" in line
        assert option in result.stdout


def test_installed_plugins_are_in_the_schema(site: Path) -> None:
    result = python(site, "-m", "kvpolicy", "schema")
    assert '"policy-stride"' in result.stdout
    assert '"quantizer-median"' in result.stdout


def test_the_contract_suite_covers_installed_plugins(site: Path) -> None:
    suites = ["kvpolicy.contracts.test_policies", "kvpolicy.contracts.test_quantizers"]
    options = ["-q", "-k", "stride or median", "-p", "no:cacheprovider"]
    result = python(site, "-m", "pytest", "--pyargs", *suites, *options)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr
    assert " passed" in result.stdout
    assert "failed" not in result.stdout


def test_the_contract_suite_finds_a_plugin_that_breaks_its_contract(tmp_path: Path) -> None:
    text = (EXAMPLE / "kvpolicy_stride.py").read_text().replace("== 0", "== seen % 2")
    text = text.replace("stride", "fickle")
    source = distribution(tmp_path / "source", "kvpolicy-fickle", "fickle", "kvpolicy_fickle", text)
    install(source, tmp_path / "site")
    arguments = ["-m", "pytest", "--pyargs", "kvpolicy.contracts.test_policies", "-q", "-k", "fickle"]
    result = python(tmp_path / "site", *arguments)
    assert result.returncode == 1
    assert "FAILED" in result.stdout


def test_a_copy_of_the_log_policy_is_a_plugin_of_its_own(tmp_path: Path) -> None:
    text = (ROOT / "policies" / "kvpolicy_log.py").read_text()
    text = text.replace('Literal["log"] = "log"', 'Literal["mylog"] = "mylog"')
    source = distribution(tmp_path / "source", "my-log", "mylog", "my_log", text)
    install(source, tmp_path / "site")
    code = """
        import numpy as np
        from kvpolicy import load_recipe
        from kvpolicy.placement.simulate import simulate
        from kvpolicy.recipe.load import load_yaml
        recipe = load_recipe("logquant").to_yaml()
        mine = load_yaml(recipe.replace("kind: log", "kind: mylog"))
        assert mine.tiers[1].policy.kind == "mylog"
        pairs = zip(simulate(mine.tiers, 999), simulate(load_recipe("logquant").tiers, 999), strict=True)
        assert all(np.array_equal(a, b) for a, b in pairs)
    """
    result = python(tmp_path / "site", "-c", textwrap.dedent(code))
    assert result.returncode == 0, result.stderr


def test_a_copy_with_the_same_kind_is_refused_naming_both_distributions(tmp_path: Path) -> None:
    text = (ROOT / "policies" / "kvpolicy_log.py").read_text()
    source = distribution(tmp_path / "source", "my-log", "mylog", "my_log", text)
    install(source, tmp_path / "site")
    result = python(tmp_path / "site", "-m", "kvpolicy", "recipes")
    assert result.returncode == 2
    assert f"kind 'log' in both kvpolicy {kvpolicy.__version__}" in result.stderr
    assert "my-log 1.2.3" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_broken_distribution_is_named_and_stops_nothing_else(tmp_path: Path) -> None:
    source = distribution(tmp_path / "source", "bad-dist", "crash", "bad_plugin", "import nothing_of_that_name\n")
    install(source, tmp_path / "site")
    shown = python(tmp_path / "site", "-m", "kvpolicy", "show", "logquant")
    assert shown.returncode == 0, shown.stderr
    listed = python(tmp_path / "site", "-m", "kvpolicy", "plugins")
    (line,) = (line for line in listed.stdout.splitlines() if "crash" in line)
    assert "bad-dist" in line
    assert "nothing_of_that_name" in line
    (tmp_path / "site" / "r.yaml").write_text("tiers:\n  - {store: {kind: crash}}\n")
    used = python(tmp_path / "site", "-m", "kvpolicy", "validate", "r.yaml")
    assert used.returncode == 2
    assert "r.yaml:2: tiers[0].store.kind" in used.stderr
    assert "bad-dist 1.2.3 failed to load: ModuleNotFoundError" in used.stderr
