"""Every example of the documentation runs, and nothing public goes undocumented."""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import inspect
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
from forked import kvpolicy as kvpolicy_command
from packaging.version import Version
from words import CACHE

import kvpolicy
from kvpolicy import hookspecs
from kvpolicy.plugins import HOOKS, registry
from kvpolicy.recipe.load import bundled_names

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
_BLOCK = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)
_SNIPPET = re.compile(r'^--8<-- "([^"]+)"\n', re.MULTILINE)


class Block(NamedTuple):
    language: str
    title: str
    text: str
    line: int


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(match[1], match[2] or "", _SNIPPET.sub(included, match[3]), text.count("\n", 0, match.start()) + 1)
        for match in _BLOCK.finditer(text)
    ]


def included(match: re.Match[str]) -> str:
    """The file that stands in the place of a snippet's mark, as the site has it."""
    return (ROOT / match[1]).read_text(encoding="utf-8")


def of_this_release(text: str) -> str:
    """The pages are written for the newest transformers; releases before 5.24 have another word for the cache."""
    return text.replace("cache=cache", f"{CACHE}=cache").replace("output.cache", f"output.{CACHE}")


def runnable(block: Block) -> bool:
    return block.language == "python" or (block.language == "bash" and block.text.startswith("kvpolicy "))


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def shell(command: str, cwd: Path, site: Path) -> None:
    """Run one line; `kvpolicy` is that of this environment, and a redirection goes to a file."""
    command, _, target = command.partition(" > ")
    _, *arguments = shlex.split(command)
    done = kvpolicy_command(*arguments, cwd=cwd, site=site)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    if target:
        (cwd / target.strip()).write_text(done.stdout, encoding="utf-8")


def install(source: Path, site: Path) -> None:
    """What `pip install .` does, into a directory that is put on the path."""
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--no-index", "--quiet"]
    done = subprocess.run([*command, "--target", site, source], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def forget(modules: set[str], site: Path) -> None:
    """Leave nothing of a page's plugins behind."""
    registry.cache_clear()
    for added in set(sys.modules) - modules:
        if str(getattr(sys.modules[added], "__file__", "")).startswith(str(site)):
            del sys.modules[added]


@pytest.mark.parametrize("page", [page for page in PAGES if any(map(runnable, blocks(page)))], ids=name)
def test_examples_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cwd, site = tmp_path / "page", tmp_path / "site"
    cwd.mkdir()
    site.mkdir()
    monkeypatch.chdir(cwd)
    monkeypatch.setattr("torch.utils.collect_env.get_pretty_env_info", str)  # lm-evaluation-harness asks for seconds
    modules = set(sys.modules)
    namespace: dict[str, Any] = {"__name__": "__main__"}
    with contextlib.ExitStack() as stack:
        stack.callback(forget, modules, site)
        for block in blocks(page):
            if block.title:
                (cwd / block.title).write_text(block.text, encoding="utf-8")
            if block.language == "python":
                code = compile("\n" * block.line + of_this_release(block.text), name(page), "exec")
                exec(code, namespace)
            elif block.text.strip() == "pip install .":
                install(cwd, site)
                monkeypatch.syspath_prepend(str(site))
                registry.cache_clear()
            elif runnable(block):
                for command in block.text.strip().splitlines():
                    shell(command, cwd, site)


def test_readme_example_is_ten_lines() -> None:
    first = next(block for block in blocks(ROOT / "README.md") if block.language == "python")
    assert len([line for line in first.text.splitlines() if line]) == 10


def test_shell_blocks_are_of_one_kind() -> None:
    """A block that mixes `kvpolicy` with other commands would not be run."""
    for page in PAGES:
        for block in blocks(page):
            if block.language == "bash" and "kvpolicy " in block.text.replace("--pyargs kvpolicy", ""):
                lines = block.text.strip().splitlines()
                assert all(line.startswith("kvpolicy ") for line in lines) or lines[0].startswith("pip "), (
                    f"{name(page)}, line {block.line}: split this block, so that its kvpolicy commands are run"
                )


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    """The mkdocs hook that fills in the generated parts."""
    spec = importlib.util.spec_from_file_location("docs_reference", DOCS / "_hooks" / "reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rendered(reference: ModuleType, page: str) -> str:
    text: str = reference.render((DOCS / page).read_text(encoding="utf-8"))
    return text


def test_every_generated_part_is_used(reference: ModuleType) -> None:
    marks = {mark for page in PAGES for mark in re.findall(r"<!-- generated: (.+?) -->", page.read_text("utf-8"))}
    assert marks == set(reference.GENERATED)


def test_pages_that_the_site_fills_in_say_so_to_readers_of_the_repository(reference: ModuleType) -> None:
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        if "<!-- generated: " not in text and "\n::: " not in text:
            continue
        note = text.partition("<!-- in the repository -->")[2].partition("<!-- /in the repository -->")[0]
        built = page.relative_to(DOCS).with_suffix("") / "index.html"
        assert "`make docs`" in note, f"{name(page)} must say how its missing parts are made"
        assert f"`site/{built}`" in note
        assert text.index(note) < min(text.find(mark) for mark in ("<!-- generated: ", "\n::: ") if mark in text)
        site = reference.render(text)
        assert "make docs" not in site
        assert "in the repository -->" not in site


def test_the_sample_of_the_comparison_is_what_the_model_would_say(tmp_path: Path) -> None:
    (sample,) = (block for block in blocks(DOCS / "howto" / "compare.md") if block.title == "samples.jsonl")
    file = tmp_path / sample.title
    file.write_text(sample.text, encoding="utf-8")
    result = kvpolicy.compare(["full"], task=file, n=1, progress=False, errors=False, attach=False)
    assert max(result.rows[0]["nll_first"], *result.rows[0]["nll_steps"]) < 1


def test_every_command_is_documented(reference: ModuleType) -> None:
    import typer

    from kvpolicy.cli.main import app

    text = rendered(reference, "reference/cli.md")
    root: Any = typer.main.get_command(app)
    for command in root.commands.values():
        assert f"\n## {command.name}\n" in text
        for parameter in command.params:
            if parameter.param_type_name == "option" and parameter.name != "help":
                assert f"`{', '.join(parameter.opts)}`" in text
                assert parameter.help, f"kvpolicy {command.name}: {parameter.name} must have a help text"


def test_the_command_line_says_what_is_required(reference: ModuleType) -> None:
    text = rendered(reference, "reference/cli.md")
    assert "kvpolicy generate --recipe RECIPE --prompt TEXT|- [OPTIONS]" in text
    assert "| `--recipe` | `RECIPE` | required |" in text
    assert "| `--overwrite` |  |  |" in text
    assert "&lt;" not in text


def test_every_recipe_key_and_option_is_documented(reference: ModuleType) -> None:
    from kvpolicy.recipe.schema import recipe_schema

    text = rendered(reference, "reference/recipe.md")
    schema = recipe_schema()
    for key in [*schema["properties"], *schema["$defs"]["tier"]["properties"]]:
        assert f"| `{key}` |" in text
    for kind, info in [item for what in HOOKS for item in registry().known(what).items()]:
        if info.distribution != "kvpolicy":
            continue
        section = text.partition(f"\n### {kind}\n")[2].partition("\n### ")[0]
        for option, field in info.cls.model_fields.items():
            if option != "kind":
                assert f"| `{option}` |" in section, f"{kind}: {option}"
                assert field.description


def test_every_bundled_recipe_has_a_section() -> None:
    pages = sorted((DOCS / "explanation").glob("recipes*.md"))
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for recipe in bundled_names():
        section = text.partition(f"\n## {recipe}\n")[2].partition("\n## ")[0]
        assert f'"kvpolicy/recipe/bundled/{recipe}.yaml"' in section, (
            f"a page docs/explanation/recipes*.md must explain {recipe}"
        )
        assert f"`{recipe}`" in readme, f"the table of README.md must name {recipe}"


def test_every_hook_is_documented() -> None:
    text = (DOCS / "reference" / "plugins.md").read_text(encoding="utf-8")
    for hook in hookspecs.__all__:
        if hook.startswith("kvpolicy_"):
            assert f"::: kvpolicy.hookspecs.{hook}" in text, f"docs/reference/plugins.md must document {hook}"
            assert inspect.getdoc(getattr(hookspecs, hook))


def test_every_public_name_is_documented() -> None:
    text = "".join((DOCS / "reference" / page).read_text(encoding="utf-8") for page in ("python.md", "plugins.md"))
    for public in kvpolicy.__all__:
        if public != "__version__":
            assert re.search(rf"^::: kvpolicy\.(\w+\.)*{public}$|`kvpolicy\.{public}`", text, re.MULTILINE), public


FILES = [path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "kvpolicy").rglob("*.py"))]


@pytest.mark.parametrize("file", FILES)
def test_every_public_name_has_a_docstring(file: str) -> None:
    module = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    assert ast.get_docstring(module)
    for item in module.body:
        public = isinstance(item, ast.ClassDef | ast.FunctionDef) and not item.name.startswith(("_", "test_"))
        if public:
            assert ast.get_docstring(item), f"{file}: {item.name} must have a docstring"


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{name(page)}: no {target}"


def test_readme_names_the_tested_releases_of_transformers() -> None:
    oldest, newest = (
        re.search(r"^transformers==(\S+)", (ROOT / pins).read_text(encoding="utf-8"), re.MULTILINE)
        for pins in ("constraints-oldest.txt", "constraints.txt")
    )
    assert oldest is not None
    assert newest is not None
    assert f"Tested with transformers {oldest[1]} and {newest[1]}" in (ROOT / "README.md").read_text(encoding="utf-8")
    lowest = re.search(r'"transformers>=([\d.]+)', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert lowest is not None
    assert Version(lowest[1]) == Version(oldest[1])


def test_changelog_names_the_version() -> None:
    version = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    assert version is not None
    heading = rf"^## \[{re.escape(version[1])}\] - \d{{4}}-\d\d-\d\d$"
    assert re.search(heading, (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)


def test_the_upgrade_table_leads_to_names_that_exist() -> None:
    """Each full name of its second column is a module, or something in one."""
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").partition("### Upgrading from 0.1.0")[2]
    rows = [line.split(" | ")[1] for line in text.partition("\n## ")[0].splitlines() if line.startswith("| ")]
    names = [name for row in rows for name in re.findall(r"`(kvpolicy(?:\.\w+)+)`", row)]
    assert len(names) > 20
    for found in names:
        home, _, last = found.rpartition(".")
        module = importlib.import_module(home)
        assert hasattr(module, last) or importlib.util.find_spec(found), found
