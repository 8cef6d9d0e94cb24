"""What a recipe's document says as a whole: keys, `extends`, parameters. No plugin is loaded for it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from kvpolicy.errors import RecipeError
from kvpolicy.recipe.yaml import BAD, SPEC_VERSION, Document, read_file
from kvpolicy.words import clip, in_words, listed, quoted, suggest

BUNDLED = Path(__file__).parent / "bundled"
TOP_KEYS = (
    "version", "name", "summary", "source", "extends", "calibration", "params", "model_layers", "tiers", "layers",
)  # fmt: skip
PLACEMENT = (
    "placement must be removed, a key of version 0.1: tokens are placed as if fed one by one. Where it was update, "
    "give the first tier policy: {kind: residual, length: 128}, as recipe hf-quantized does"
)
REFERENCE = re.compile(r"\$([A-Za-z_]\w*)")
MAX_CHAIN = 20
"""Recipes that may extend one another in a row."""
_NAME = re.compile(r"[A-Za-z_]\w*")


@lru_cache(maxsize=1)
def _bundled_names() -> tuple[str, ...]:
    return tuple(sorted(path.stem for path in BUNDLED.glob("*.yaml")))


def bundled_names() -> list[str]:
    """The recipes that kvpolicy brings along."""
    return list(_bundled_names())


@cache
def _bundled(path: Path) -> Document:
    return read_file(path)


def read_bundled(path: Path) -> Document:
    """The document in one of kvpolicy's own files, which is parsed once; the caller's to change."""
    own = _bundled(path)
    return replace(own, data=deepcopy(own.data), marks=dict(own.marks), problems=dict(own.problems))


def inherit(document: Document) -> Document:
    """`extends` resolved: keys of the child win, `params` are merged. What is wrong is noted in the result.

    Raises:
        RecipeError: `extends` leads nowhere, so that nothing else can be told.
    """
    root = document.base or Path.cwd().resolve()
    chain = [document]
    paths = [Path(document.file).resolve()] if document.base else []
    while True:
        current = chain[-1]
        _check_top(current)
        path = _parent(current, root)
        if path is None:
            break
        if path in paths:
            names = " -> ".join(quoted(p.name)[1:-1] for p in [*paths, path])
            current.fail(("extends",), f"a recipe must not extend itself, found {names}")
        paths.append(path)
        if len(chain) == MAX_CHAIN:
            current.fail(("extends",), f"at most {MAX_CHAIN} recipes may extend one another, found more")
        chain.append(_read(current, path))
    merged = chain.pop()
    _start(merged)
    while chain:
        merged = _merge(chain.pop(), merged)
    return merged


def _read(child: Document, path: Path) -> Document:
    try:
        parent = read_bundled(path) if path.parent == BUNDLED else read_file(path)
    except RecipeError as error:
        for problem in str(error).splitlines():
            child.add(problem, str(path), None)
        child.check()
        raise
    parent.problems = child.problems | parent.problems
    if parent.base is not None and parent.base != BUNDLED:
        _anchor(parent, parent.base)
    return parent


def _anchor(document: Document, folder: Path) -> None:
    """The calibration that a file names lies beside that file, whatever extends it."""
    written, params = document.data.get("calibration"), document.data.get("params")
    if not isinstance(written, str) or not written:
        return
    name = written.removeprefix("$")
    if name == written:
        document.data = {**document.data, "calibration": str(folder / written)}
    elif isinstance(params, dict) and isinstance(params.get(name), str):
        document.data = {**document.data, "params": {**params, name: str(folder / params[name])}}


def _parent(document: Document, root: Path) -> Path | None:
    """The file that a document extends, which is a bundled recipe or lies below `root`."""
    name = document.data.get("extends")
    if name is None:
        return None
    if name is BAD:
        document.check()
    if not isinstance(name, str) or not name:
        document.fail(("extends",), f"extends must name a bundled recipe or a file, found {in_words(name)}")
    if name in bundled_names():
        return BUNDLED / f"{name}.yaml"
    path = _below(root, document.base or root, name)
    if path is None:
        document.fail(
            ("extends",),
            "extends must name a bundled recipe or a file in the folder of the recipe that was loaded, or below it, "
            f"found {quoted(name)}, which {'is an absolute path' if Path(name).is_absolute() else 'leads out of it'}",
        )
    if not _is_file(path):
        names = bundled_names()
        bare = name.partition(":")[0]
        hint = "; parameters stand in params" if bare in names else suggest(name, names)
        document.fail(
            ("extends",),
            f"extends must name a bundled recipe or a file relative to this one, found {quoted(name)}"
            f"{hint}; kvpolicy recipes lists those bundled: {listed(names, 8)}",
        )
    return path


def _below(root: Path, base: Path, name: str) -> Path | None:
    """The file that `name` means, links resolved; None if it lies outside `root`."""
    if Path(name).is_absolute():
        return None
    try:
        path = (base / name).resolve()
    except (OSError, RuntimeError, ValueError):  # too long, a link to itself, a zero byte: no file
        return base / name
    return path if path.is_relative_to(root) else None


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def _default_name(document: Document) -> str | None:
    return Path(document.file).stem if document.base else None


def _start(document: Document) -> None:
    """The recipe that extends no other."""
    data = document.data
    data.setdefault("name", _default_name(document) or "custom")
    if "tiers" not in data:
        if not document.problems:  # a key that can't be read may have been tiers
            document.note((), "a recipe must have tiers (or extends), found neither")
        data["tiers"] = BAD


def _merge(child: Document, parent: Document) -> Document:
    data = dict(child.data)
    data.pop("extends")
    name = _default_name(child)
    if name is not None:
        data.setdefault("name", name)
    marks = {p: mark for p, mark in parent.marks.items() if p[:1] == ("params",) or p[0] not in data}
    marks.update(child.marks)
    merged = {**parent.data, **data}
    params, inherited = (dict(d.get("params") or {}) for d in (child.data, parent.data))
    used = _references(merged)
    merged["params"] = {**{k: v for k, v in inherited.items() if k not in params and k in used}, **params}
    return Document(merged, child.file, child.base, marks, {**child.problems, **parent.problems})


def _check_top(document: Document) -> None:
    data = document.data = dict(document.data)
    version = data.get("version", SPEC_VERSION)
    if type(version) is int and version > SPEC_VERSION:
        document.problems.clear()  # what they say holds for this version
        document.fail(
            ("version",),
            f"this kvpolicy reads recipes of version {SPEC_VERSION}, found version {in_words(version)}; "
            "upgrade kvpolicy",
        )
    if version is not BAD and (type(version) is not int or version < 1):
        document.note(("version",), f"version must be {SPEC_VERSION}, found {in_words(version)}")
    for key in data:
        if key == "placement":
            document.note((key,), PLACEMENT)
        elif key not in TOP_KEYS:
            tier = "; it belongs to a tier, in the list tiers" if key in ("policy", "store", "keys", "values") else ""
            message = f"unknown key {quoted(key)}{tier or suggest(key, TOP_KEYS)}; allowed: {', '.join(TOP_KEYS)}"
            document.note((key,), message)
    params = data.get("params")
    if params is None:
        return
    if not isinstance(params, dict):
        if params is not BAD:
            document.note(("params",), f"params must be a mapping of names to values, found {in_words(params)}")
        data["params"] = {}
        return
    for name in params:
        if not _NAME.fullmatch(name):
            message = f"a parameter's name has letters, digits and _ only, found {quoted(name)}"
            document.note(("params", name), message)
    data["params"] = {name: _checked(document, name, value) for name, value in params.items()}


def _checked(document: Document, name: str, value: Any, given: bool = False) -> Any:
    """The value of a parameter, or BAD."""
    plain = value is None or value is BAD or isinstance(value, str | int | float)
    if plain and not (isinstance(value, str) and REFERENCE.fullmatch(value)):
        return value
    what = "the value given" if given else "its default"
    message = f"parameter {quoted(name)}: {what} must be a number, a word or true/false, found {in_words(value)}"
    document.note(() if given else ("params", name), message)
    return BAD


def _references(data: Mapping[str, Any]) -> set[str]:
    """Names of the parameters used."""
    names: set[str] = set()

    def walk(value: Any) -> None:
        if isinstance(value, dict):
            for item in value.values():
                walk(item)
        elif isinstance(value, list):
            for item in value:
                walk(item)
        elif isinstance(value, str) and (match := REFERENCE.fullmatch(value)):
            names.add(match[1])

    walk({key: value for key, value in data.items() if key != "params"})
    return names


def parameters(document: Document, given: Mapping[str, Any]) -> dict[str, Any]:
    """Values of all parameters, None where one was neither given nor has a default. What is wrong is noted."""
    declared: dict[str, Any] = dict(document.data.get("params") or {})
    names = listed(declared) or "none"
    values = dict(declared)
    for name, value in given.items():
        if name not in declared:
            message = f"unknown parameter {quoted(name)}{suggest(name, declared)}; this recipe has: {names}"
            document.note((), message)
            continue
        values[name] = _checked(document, name, value, given=True)
    used = _references(document.data)
    for name in declared:
        if name not in used and _NAME.fullmatch(name) and document.data["tiers"] is not BAD:
            hint = suggest(name, sorted(used))
            message = (
                f"parameter {quoted(name)} must be used as ${clip(name, 40)} somewhere, the whole value of a key, "
                f"found nowhere{hint}"
            )
            document.note(("params", name), message)
    return values
