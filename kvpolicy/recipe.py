"""Loads recipes: bundled ones, files, mappings, and what is written on a shell."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvpolicy.errors import RecipeError
from kvpolicy.plugins import suggest
from kvpolicy.recipe_build import build, bundled, bundled_names
from kvpolicy.recipe_spec import SPEC_VERSION, Recipe, Tier
from kvpolicy.recipe_yaml import Document, parse_scalar, read_file, read_mapping, read_text

__all__ = ["SPEC_VERSION", "Recipe", "Tier", "bundled_names", "load_recipe", "load_yaml"]

_PARAMS = re.compile(r"(?s)(.+?):((?:[A-Za-z_]\w*=.*)?)")


def load_recipe(source: str | os.PathLike[str] | Mapping[str, Any] | Recipe, **params: Any) -> Recipe:
    """The recipe that `source` names or is.

    Args:
        source: the name of a bundled recipe, a path to a YAML file, either of them followed by parameters as on
            the shell (`"logquant:window=64,nbits=4"`), a mapping like the YAML, or a `Recipe`.
        **params: values for parameters of the recipe.

    Returns:
        The recipe, parameters filled in.

    Raises:
        RecipeError: naming file, line and path in the document, what was found and what is allowed.
    """
    if isinstance(source, Recipe):
        return _again(source, params)
    if isinstance(source, Mapping):
        return build(read_mapping(source), params)
    if isinstance(source, os.PathLike):
        return build(read_file(Path(source)), params)
    if not isinstance(source, str):
        raise RecipeError(f"a recipe must be a name, a path, a mapping or a Recipe, found {source!r}")
    name, text = _split(source)
    given = _shell_params(source, text)
    twice = sorted(given.keys() & params.keys())
    if twice:
        raise RecipeError(f"{source}: a parameter may be given once, found {', '.join(twice)} also as an argument")
    return build(_find(name), {**given, **params})


def load_yaml(text: str, **params: Any) -> Recipe:
    """The recipe in a string of YAML."""
    return build(read_text(text, "<string>"), params)


def _again(recipe: Recipe, params: Mapping[str, Any]) -> Recipe:
    if not params:
        return recipe
    if recipe._template is None:
        name = next(iter(params))
        raise RecipeError(f"recipe {recipe.name}: unknown parameter {name!r}; it was built in Python and has none")
    return build(Document(dict(recipe._template), f"recipe {recipe.name}"), params)


def _split(source: str) -> tuple[str, str | None]:
    """Name or path, and parameters where there are some."""
    if source in bundled_names() or _is_file(source):
        return source, None
    match = _PARAMS.fullmatch(source)
    if match:
        return match[1], match[2]
    head, colon, tail = source.rpartition(":")
    if colon and (head in bundled_names() or _is_file(head)):
        return head, tail
    return source, None


def _is_file(source: str) -> bool:
    try:
        return Path(source).is_file()
    except (OSError, ValueError):
        return False


def _shell_params(source: str, text: str | None) -> dict[str, Any]:
    given: dict[str, Any] = {}
    if text is None:
        return given
    for part in text.split(","):
        name, equals, value = part.partition("=")
        name = name.strip()
        if not equals or not name or not value.strip():
            raise RecipeError(f"{source}: parameters are written NAME:key=value,key=value, found {part!r}")
        if name in given:
            raise RecipeError(f"{source}: a parameter may be given once, found {name!r} twice")
        given[name] = parse_scalar(value)
    return given


def _find(name: str) -> Document:
    names = bundled_names()
    if name in names:
        return bundled(name)
    if _is_file(name) or os.sep in name or "/" in name or name.endswith((".yaml", ".yml")) or name in (".", ".."):
        return read_file(Path(name))
    if name and _exists(name):
        return read_file(Path(name))
    shown = name if len(name) <= 80 else name[:77] + "..."
    raise RecipeError(
        f"no recipe {shown!r}{suggest(name[:80], names)}; give a path to a YAML file, or one of {', '.join(names)}"
    )


def _exists(name: str) -> bool:
    try:
        return Path(name).exists()
    except (OSError, ValueError):
        return False
