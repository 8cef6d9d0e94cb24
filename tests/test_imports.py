"""Imports inside kvpolicy run one way: from room to room in the order that CONTRIBUTING.md gives, and in no circle.

All imports count: those for type checkers and those within functions, too.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import lru_cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "kvpolicy"
HEADING = "## Rooms, and the order of imports"
FREE = ("", "__main__")
"""The public face, which names what lies in any room, and `python -m kvpolicy`."""

Sources = dict[str, str]
"""The text of each file, by its path below the repository."""
Graph = dict[str, set[str]]
"""For each module, by its full name, those of kvpolicy that it imports."""


def sources() -> Sources:
    return {path.relative_to(ROOT).as_posix(): path.read_text() for path in sorted(PACKAGE.rglob("*.py"))}


def name_of(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def room(module: str) -> str:
    return [*module.split("."), ""][1]


def order() -> list[str]:
    """The rooms and modules of the list in CONTRIBUTING.md, the lowest first."""
    section = (ROOT / "CONTRIBUTING.md").read_text().split(HEADING)[1].split("\n## ")[0]
    return re.findall(r"^\d+\. `(\w+)", section, re.MULTILINE)


@lru_cache(maxsize=1024)
def said(text: str) -> list[ast.AST]:
    """The nodes of a file that may import."""
    return [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Import | ast.ImportFrom | ast.Call)]


def imported(path: str, text: str, known: set[str]) -> Iterator[str]:
    """What a file imports: of `from a import b` it is b, if that is one of the `known` modules, else a."""
    package = path.split("/")[:-1]
    for node in said(text):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*above, *filter(None, [node.module])])
            inner = [f"{module}.{alias.name}" for alias in node.names]
            yield from (name if name in known else module for name in inner)
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) == "import_module":
            yield from (a.value for a in node.args[:1] if isinstance(a, ast.Constant) and isinstance(a.value, str))


def imports(found: Sources) -> Graph:
    known = {name_of(path) for path in found}
    return {name_of(path): set(imported(path, text, known)) & known - {name_of(path)} for path, text in found.items()}


def upward(graph: Graph, rooms: list[str]) -> list[str]:
    """Imports of a room that stands above, or of the public face. The last room may import anything."""
    place = {name: i for i, name in enumerate(rooms)}
    return [
        f"{module} imports {target}"
        for module, targets in sorted(graph.items())
        for target in sorted(targets)
        if room(module) not in (*FREE, rooms[-1])
        and (room(target) in FREE or place[room(target)] > place[room(module)])
    ]


def circle(graph: Graph) -> list[str]:
    """The modules of a circle, if there is one."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


@pytest.fixture(scope="module")
def graph() -> Graph:
    return imports(sources())


def test_every_room_has_a_place_in_the_order(graph: Graph) -> None:
    assert len(order()) == len(set(order()))
    assert set(order()) == {room(module) for module in graph} - set(FREE)


def test_imports_run_one_way(graph: Graph) -> None:
    assert upward(graph, order()) == []


def test_no_circle(graph: Graph) -> None:
    assert circle(graph) == []


def test_only_hf_and_what_stands_above_it_know_transformers() -> None:
    above = order()[order().index("hf") :]
    for path, text in sources().items():
        named = {name.split(".")[0] for name in imported(path, text, set())}
        assert "transformers" not in named or room(name_of(path)) in above, path


def test_rooms_have_a_readme_and_a_docstring() -> None:
    for name in order():
        if (PACKAGE / name).is_dir():
            assert (PACKAGE / name / "README.md").read_text().startswith(f"# {name}\n"), name
            docstring = ast.get_docstring(ast.parse((PACKAGE / name / "__init__.py").read_text()))
            assert docstring, name


LAZY = "def f():\n    from kvpolicy.hf.cache import make_cache\n"
TYPED = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from kvpolicy.hf.cache import make_cache\n"


@pytest.mark.parametrize(
    "text",
    [
        LAZY,
        TYPED,
        "import kvpolicy.hf.cache",
        "from kvpolicy.hf import cache",
        "from ..hf import cache",
        "from ..hf.cache import make_cache",
        "from importlib import import_module\nimport_module('kvpolicy.hf.cache')",
        "import kvpolicy",
        "from kvpolicy import make_cache",
    ],
)
def test_an_import_from_above_is_found(text: str) -> None:
    assert upward(imports({**sources(), "kvpolicy/layer/view.py": text}), order())


def test_a_circle_is_found() -> None:
    text = "def f():\n    from kvpolicy.layer.layer import LayerCache\n"
    assert set(circle(imports({**sources(), "kvpolicy/layer/view.py": text}))) >= {
        "kvpolicy.layer.view",
        "kvpolicy.layer.layer",
    }
