"""Loads recipes: bundled ones, files, mappings, and what is written on a shell."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvpolicy.errors import RecipeError
from kvpolicy.recipe.build import build
from kvpolicy.recipe.inherit import bundled_names
from kvpolicy.recipe.source import misplaced, read_source, refuse_misplaced
from kvpolicy.recipe.spec import Recipe, Tier
from kvpolicy.recipe.yaml import Document, read_file, read_mapping, read_text
from kvpolicy.words import clip, in_words, quoted

__all__ = ["Recipe", "Tier", "bundled_names", "load_recipe", "load_yaml"]


def load_recipe(source: str | os.PathLike[str] | Mapping[str, Any] | Recipe, **params: Any) -> Recipe:
    """The recipe that `source` names or is.

    Args:
        source: the name of a bundled recipe, a path to a YAML file, either of them followed by parameters as on
            the shell (`"logquant:window=64,nbits=4"`), a mapping like the YAML, or a `Recipe`.
        **params: values for parameters of the recipe.

    Returns:
        The recipe, parameters filled in.

    Raises:
        RecipeError: a line for each problem, naming file, line and path in the document, what was found and what is
            allowed.
    """
    if isinstance(source, Recipe):
        return _again(source, params)
    if isinstance(source, Mapping):
        return build(read_mapping(source), params)
    if isinstance(source, os.PathLike):
        return build(read_file(Path(source)), params)
    if not isinstance(source, str):
        raise RecipeError(f"a recipe must be a name, a path, a mapping or a Recipe, found {in_words(source)}")
    if misplaced(source):
        refuse_misplaced([source])
    document, given = read_source(source)
    twice = sorted(given.keys() & params.keys())
    if twice:
        raise RecipeError(
            f"{clip(source)}: a parameter may be given once, found {', '.join(twice)} also as an argument"
        )
    return build(document, {**given, **params})


def load_yaml(text: str, **params: Any) -> Recipe:
    """The recipe in a string of YAML."""
    return build(read_text(text, "<string>"), params)


def _again(recipe: Recipe, params: Mapping[str, Any]) -> Recipe:
    if not params:
        return recipe
    if recipe._template is None:
        name = next(iter(params))
        raise RecipeError(
            f"recipe {clip(recipe.name)}: unknown parameter {quoted(name)}; it was built in Python and has none"
        )
    return build(Document(dict(recipe._template), f"recipe {recipe.name}"), params)
