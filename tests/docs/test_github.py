"""The forms and workflows of .github: what they ask for, and that they run what .ci/run runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

ROOT = Path(__file__).parents[2]
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("[!c]*.yml"))


def read(path: Path) -> Any:
    return YAML(typ="safe").load(path.read_text(encoding="utf-8"))


def asked(form: Any) -> dict[str, bool]:
    """What a form asks for, and whether it must be answered."""
    return {part["id"]: part.get("validations", {}).get("required", False) for part in form["body"] if "id" in part}


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_forms_are_what_github_takes(path: Path) -> None:
    form = read(path)
    assert form["name"]
    assert form["description"]
    for part in form["body"]:
        assert part["type"] in ("input", "textarea", "checkboxes")
        assert part["attributes"]["label"]
        assert re.fullmatch(r"[a-z_-]+", part["id"])
        assert ("options" in part["attributes"]) == (part["type"] == "checkboxes")
    assert len(asked(form)) == len(form["body"])


def test_a_bug_comes_with_recipe_model_and_versions() -> None:
    form = read(ROOT / ".github" / "ISSUE_TEMPLATE" / "bug.yml")
    assert asked(form)["recipe"]
    assert asked(form)["model"]
    (env,) = (part for part in form["body"] if part["id"] == "env")
    assert "`kvpolicy env`" in env["attributes"]["label"]
    assert env["validations"]["required"]


def test_a_method_comes_with_its_source() -> None:
    needed = {"paper": True, "code": True, "formulas": True, "defaults": True, "exact": True, "interfaces": False}
    assert needed.items() <= asked(read(ROOT / ".github" / "ISSUE_TEMPLATE" / "method.yml")).items()


def test_workflows_run_what_ci_runs_and_nothing_else() -> None:
    (path,) = (ROOT / ".github" / "workflows").iterdir()
    (job,) = read(path)["jobs"].values()
    assert [step["run"] for step in job["steps"] if "run" in step] == [".ci/run"]
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111
    lowest = re.search(r'^requires-python = ">=([\d.]+)"', (ROOT / "pyproject.toml").read_text("utf-8"), re.MULTILINE)
    assert lowest is not None
    assert job["strategy"]["matrix"]["python"] == [lowest[1], "3.12"]
