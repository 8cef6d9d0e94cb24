"""Plugins are found, duplicates refused, broken ones named and isolated, misspelt hooks loud."""

from __future__ import annotations

import sys
import textwrap
from importlib.metadata import distributions
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from kvpolicy.errors import PluginError, RecipeError
from kvpolicy.plugins import HOOKS, Registry, registry, suggest

ROOT = Path(__file__).parents[2]
POLICY = """
from typing import Literal
import kvpolicy

class {name}(kvpolicy.Policy):
    kind: Literal["{kind}"] = "{kind}"
    def keep(self, positions, seen):
        return positions >= 0

@kvpolicy.hookimpl
def kvpolicy_policies():
    return [{name}]
"""


class Site:
    """A directory of distributions, as pip leaves them."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def add(self, distribution: str, entry: str, module: str, text: str) -> None:
        (self.path / f"{module}.py").write_text(textwrap.dedent(text))
        info = self.path / f"{distribution.replace('-', '_')}-1.5.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.5\n")
        (info / "entry_points.txt").write_text(f"[kvpolicy]\n{entry} = {module}\n")

    def load(self) -> Registry:
        found = [
            point
            for dist in distributions(path=[str(self.path)])
            for point in dist.entry_points
            if point.group == "kvpolicy"
        ]
        return Registry.load(found)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("kvp_a", "kvp_b"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return Site(tmp_path)


def test_entry_points_name_every_file_in_the_plugin_folders() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["kvpolicy"]
    files = {path.stem for folder in ("policies", "quantizers") for path in (ROOT / folder).glob("kvpolicy_*")}
    missing = sorted(files - set(declared.values()))
    backends = {"kvpolicy.attention.reference", "kvpolicy.attention.cuda.backend"}
    extra = sorted(set(declared.values()) - files - backends)
    assert not missing, f"declare these in pyproject.toml [project.entry-points.kvpolicy]: {missing}"
    assert not extra, f"pyproject.toml declares plugins without a file: {extra}"


def test_entry_points_are_installed() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["kvpolicy"]
    found = registry()
    installed = {i.entry_point for what in HOOKS for i in found.known(what).values()}
    installed |= {broken.name for broken in found.broken}
    missing = sorted(set(declared) - installed)
    assert not missing, f"these entry points are new: install the package again (pip install -e .): {missing}"


def test_built_in_plugins_are_found_by_entry_points() -> None:
    found = registry()
    assert found.broken == []
    assert {"recent", "sink", "log"} <= set(found.policies)
    assert {"int", "quanto", "hqq"} <= set(found.quantizers)
    assert found.policies["log"].distribution == "kvpolicy"
    assert found.policies["log"].file.endswith("kvpolicy_log.py")


def test_a_plugin_is_known_by_its_distribution(site: Site) -> None:
    site.add("dist-a", "a", "kvp_a", POLICY.format(name="A", kind="first"))
    info = site.load().policies["first"]
    assert (info.distribution, info.version, info.entry_point) == ("dist-a", "1.5", "a")


def test_the_same_entry_point_name_is_refused_naming_both_distributions(site: Site) -> None:
    site.add("dist-a", "same", "kvp_a", POLICY.format(name="A", kind="first"))
    site.add("dist-b", "same", "kvp_b", POLICY.format(name="B", kind="second"))
    with pytest.raises(PluginError, match=r"'same' in both dist-a 1\.5 \(kvp_a\) and dist-b 1\.5 \(kvp_b\); uninstall"):
        site.load()


def test_the_same_kind_is_refused_naming_both_distributions(site: Site) -> None:
    site.add("dist-a", "a", "kvp_a", POLICY.format(name="A", kind="same"))
    site.add("dist-b", "b", "kvp_b", POLICY.format(name="B", kind="same"))
    with pytest.raises(PluginError, match=r"kind 'same' in both dist-a 1\.5 \(plugin 'a'\) and dist-b 1\.5"):
        site.load()


def test_a_misspelt_hook_is_loud(site: Site) -> None:
    site.add("dist-a", "a", "kvp_a", POLICY.format(name="A", kind="x").replace("kvpolicy_policies", "kvpolicy_policys"))
    with pytest.raises(
        PluginError, match=r"'a' of dist-a 1\.5: .*'kvpolicy_policys' \(did you mean 'kvpolicy_policies"
    ):
        site.load()


BROKEN = {
    "import": ("import nothing_of_that_name", "ModuleNotFoundError: No module named 'nothing_of_that_name'"),
    "syntax": ("def (", "SyntaxError"),
    "raises": ("raise RuntimeError('at import')", "RuntimeError: at import"),
    "exits": ("raise SystemExit(3)", "SystemExit: 3"),
    "no hook": (
        "x = 1",
        "it gives no policy and no scorer and no reader and no merger and no quantizer and no transform and no extra",
    ),
    "hook raises": (
        "import kvpolicy\n@kvpolicy.hookimpl\ndef kvpolicy_policies():\n    return 1 / 0",
        "ZeroDivisionError",
    ),
    "no list": (
        "import kvpolicy\n@kvpolicy.hookimpl\ndef kvpolicy_policies():\n    return 3",
        "kvpolicy_policies must return a list of classes, found 3",
    ),
    "no class": (
        "import kvpolicy\n@kvpolicy.hookimpl\ndef kvpolicy_policies():\n    return [int]",
        "must return subclasses of kvpolicy.Policy, found <class 'int'>",
    ),
    "abstract": (
        POLICY.format(name="A", kind="x").replace("def keep", "def kept"),
        "class A must define keep",
    ),
    "no kind": (
        POLICY.format(name="A", kind="x").replace('kind: Literal["x"] = "x"', 'kind: str = "x"'),
        "class A must declare its name as",
    ),
    "bare quantizer": (
        POLICY.format(name="A", kind="x").replace(".Policy", ".Quantizer").replace("_policies", "_quantizers"),
        "must be a subclass of AffineQuantizer or of TensorQuantizer",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_plugin_is_named_and_isolated(site: Site, case: str) -> None:
    text, cause = BROKEN[case]
    site.add("dist-a", "a", "kvp_a", text)
    site.add("dist-b", "b", "kvp_b", POLICY.format(name="B", kind="works"))
    found = site.load()
    assert list(found.policies) == ["works"]
    (broken,) = found.broken
    assert (broken.name, broken.distribution, broken.version, broken.value) == ("a", "dist-a", "1.5", "kvp_a")
    assert cause in broken.cause


def test_only_a_recipe_that_uses_a_broken_plugin_fails_and_says_why(site: Site) -> None:
    site.add("dist-a", "crash", "kvp_a", "import nothing_of_that_name")
    found = site.load()
    with pytest.raises(RecipeError, match=r"'crash' \(kvp_a\) of dist-a 1\.5 failed to load: ModuleNotFoundError"):
        found.policy("crash")
    with pytest.raises(RecipeError, match=r"no policy of kind 'other'; installed: none; plugins that failed.*: crash"):
        found.policy("other")


def test_a_suggestion_ignores_case() -> None:
    assert suggest("LOGQUANT", ["kivi", "logquant"]) == " (did you mean 'logquant'?)"
    assert suggest("zzz", ["kivi"]) == ""


QUANTIZER = """
from typing import ClassVar, Literal
import kvpolicy

class {name}(kvpolicy.AffineQuantizer):
    kind: Literal["{kind}"] = "{kind}"
    requires: ClassVar[str | None] = {requires!r}
    def calibrate(self, groups):
        raise NotImplementedError

@kvpolicy.hookimpl
def kvpolicy_quantizers():
    return [{name}]
"""


def test_a_missing_library_is_named_without_importing_it(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site.add("dist-a", "a", "kvp_a", QUANTIZER.format(name="A", kind="a", requires="nothing_of_that_name"))
    site.add("dist-b", "b", "kvp_b", QUANTIZER.format(name="B", kind="b", requires="numpy"))
    found = site.load()
    assert found.quantizers["a"].missing == "nothing_of_that_name"
    assert found.quantizers["b"].missing is None
    assert registry().quantizers["int"].missing is None
    assert registry().policies["recent"].missing is None
    monkeypatch.setattr("kvpolicy.plugins._installed", lambda library: False)
    assert registry().quantizers["quanto"].missing == "optimum-quanto"
    assert registry().quantizers["hqq"].missing == "hqq"
