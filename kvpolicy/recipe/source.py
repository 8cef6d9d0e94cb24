"""Finds what the name of a recipe stands for: a bundled one or a file, with parameters after a colon."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from kvpolicy.errors import RecipeError
from kvpolicy.recipe.inherit import BUNDLED, bundled_names, inherit, parameters, read_bundled
from kvpolicy.recipe.yaml import Document, parse_scalar, read_file
from kvpolicy.words import clip, listed, quoted, suggest

_PARAMS = re.compile(r"(?s)(.+?):((?:[A-Za-z_]\w*\s*=.*)?)")
_MISPLACED = re.compile(r"(?s)[A-Za-z_]\w*=.*")


def read_source(source: str) -> tuple[Document, dict[str, Any]]:
    """The document that a name or path stands for, and the parameters that are written after it.

    Raises:
        RecipeError: there is no such recipe, or the parameters are not written NAME:key=value,key=value.
    """
    name, text = split_source(source)
    given = {} if text is None else _shell_params(source, text)
    return _find(name), given


def check_sources(sources: Sequence[str]) -> None:
    """Refuse at once names, files and names of parameters that can't be right, without loading a plugin.

    Raises:
        RecipeError: what is wrong with all of them.
    """
    refuse_misplaced(sources)
    problems: dict[str, None] = {}
    for source in sources:
        try:
            document, given = read_source(source)
            document = inherit(document)
            if given and not given.keys() & document.data.get("params", {}).keys():
                parameters(document, given)
                document.check()
        except RecipeError as error:
            problems.update(dict.fromkeys(str(error).splitlines()))
    if problems:
        raise RecipeError("\n".join(problems))


def check_one(source: str, extra: Sequence[str]) -> None:
    """As `check_sources`, where one recipe is expected and other words may stand beside it."""
    refuse_misplaced([source, *extra])
    if extra:
        raise RecipeError(f"one recipe is expected, found also {clip(', '.join(map(quoted, extra)))}; leave it out")
    check_sources([source])


def misplaced(text: str) -> bool:
    """Whether this is a parameter that stands alone, such as `window=64`."""
    return _MISPLACED.fullmatch(text) is not None and not _exists(text)


def refuse_misplaced(sources: Iterable[str]) -> None:
    """Refuse parameters that are written apart from their recipe, as in `logquant window=64`."""
    groups: list[list[str]] = []
    for source in sources:
        if not misplaced(source):
            groups.append([source])
        elif groups:
            groups[-1].append(source)
        else:
            raise RecipeError(
                f"parameters follow the name of a recipe, found {quoted(source)} without one; write NAME:{clip(source)}"
            )
    wrong = [group for group in groups if len(group) > 1]
    if not wrong:
        return
    apart = ", ".join(quoted(part) for group in wrong for part in group[1:])
    raise RecipeError(f"parameters are written after a colon, found {clip(apart)}; write {_joined(wrong)}")


def _joined(groups: list[list[str]]) -> str:
    shown = []
    for name, *parts in groups:
        name = name.rstrip(",")
        mark = "" if name.endswith(":") else "," if _PARAMS.fullmatch(name) else ":"
        shown.append(f"{clip(name)}{mark}{','.join(clip(part.strip(',')) for part in parts)}")
    return " ".join(shown)


def split_source(source: str) -> tuple[str, str | None]:
    """Name or path, and parameters where there are some."""
    if source in bundled_names() or _is_file(source):
        return source, None
    match = _PARAMS.fullmatch(source)
    if match:
        return match[1], match[2]
    head, colon, tail = source.partition(":")
    if not (head in bundled_names() or _is_file(head)):
        head, colon, tail = source.rpartition(":")
    if colon and (head in bundled_names() or _is_file(head)):
        return head, tail
    return source, None


def _shell_params(source: str, text: str) -> dict[str, Any]:
    given: dict[str, Any] = {}
    for part in text.split(","):
        name, equals, value = part.partition("=")
        name = name.strip()
        if not equals or not name or not value.strip():
            raise RecipeError(f"{clip(source)}: parameters are written NAME:key=value,key=value, found {quoted(part)}")
        if name in given:
            raise RecipeError(f"{clip(source)}: a parameter may be given once, found {quoted(name)} twice")
        given[name] = parse_scalar(value)
    return given


def _find(name: str) -> Document:
    names = bundled_names()
    if name in names:
        return read_bundled(BUNDLED / f"{name}.yaml")
    stem = name.removesuffix(".yml").removesuffix(".yaml")
    if os.sep in name or "/" in name or stem != name or name in (".", "..") or (name and _exists(name)):
        if "/" not in name and stem != name and not _exists(name):
            hint = f"; the bundled recipe is {stem.lower()!r}" if stem.lower() in names else ""
            raise RecipeError(f"{clip(name)}: no such file{hint}")
        return read_file(Path(name))
    raise RecipeError(
        f"no recipe {quoted(name)}{suggest(name, names)}; give a path to a YAML file, or a bundled recipe, which "
        f"kvpolicy recipes lists: {listed(names, 8)}"
    )


def _is_file(source: str) -> bool:
    try:
        return Path(source).is_file()
    except (OSError, ValueError):
        return False


def _exists(name: str) -> bool:
    try:
        return Path(name).exists()
    except (OSError, ValueError):
        return False
