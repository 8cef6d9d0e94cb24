"""The arms of an experiment: recipes with parameters, grids expanded, and parameters that are to be matched."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, WithJsonSchema

from kvpolicy.errors import CompareError, RecipeError
from kvpolicy.experiment.names import AGAIN, EXACT
from kvpolicy.recipe.build import build
from kvpolicy.recipe.load import Recipe, load_recipe
from kvpolicy.recipe.source import split_source
from kvpolicy.recipe.space import Range
from kvpolicy.recipe.yaml import Document, Path_, parse_scalar
from kvpolicy.words import in_words, listed, quoted, suggest

MOST_ARMS = 1000
"""Arms that grids may expand to."""
ANY = "?"
"""Stands for the value of a parameter that is to be matched."""
_BETWEEN = re.compile(r"(-?\d[\d.e]*?)\.\.(-?\d[\d.e]*)")
MATCH_IS = (
    "must name a parameter, or map one to its values, such as {window: [16, 32, 64]} or {window: {from: 8, to: 256}}"
)

Scalar = str | int | float | bool
_SCALAR = {"type": ["string", "integer", "number", "boolean", "null"]}


def _values(value: Any) -> Any:
    of = value if isinstance(value, list) else [value]
    wrong = next((x for x in of if x is not None and not isinstance(x, Scalar)), None)
    if not of or wrong is not None:
        raise ValueError(
            "the value of a parameter must be a word, a number, true, false or null, or a list of such, found "
            f"{in_words(value if wrong is None else wrong)}"
        )
    return value


Values = Annotated[
    Any,
    BeforeValidator(_values),
    WithJsonSchema({"if": {"type": "array"}, "then": {"items": _SCALAR, "minItems": 1}, "else": _SCALAR}),
]


@dataclass(frozen=True)
class Tuned:
    """The parameter of an arm that is matched, and its values."""

    parameter: str
    among: Range | tuple[Any, ...] | None = None
    """None: what suits its default."""


def _tuned(value: Any) -> Any:
    """A parameter's name, or a mapping from it to its values."""
    if value is None or isinstance(value, Tuned):
        return value
    if isinstance(value, str) and value.isidentifier():
        return Tuned(value)
    if not isinstance(value, Mapping) or len(value) != 1:
        raise ValueError(f"match {MATCH_IS}, found {in_words(value)}")
    ((name, among),) = value.items()
    if isinstance(among, list):
        values = dict.fromkeys(x for x in among if isinstance(x, Scalar))
        if not among or len(values) != len(among):
            raise ValueError(f"the values of {quoted(str(name))} must be different words or numbers in a list")
        return Tuned(str(name), tuple(values))
    try:
        return Tuned(str(name), Range.model_validate(among))
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        why = problem.get("ctx", {}).get("error") or f"{'.'.join(map(str, problem['loc']))} {problem['msg'].lower()}"
        raise ValueError(f"match {MATCH_IS}, found {in_words(among)}: {why}") from None


_NUMBER = {"type": "number"}
_RANGE = {
    "type": "object",
    "properties": {"from": _NUMBER, "to": _NUMBER, "step": _NUMBER, "log": {"type": "boolean"}},
    "required": ["from", "to"],
    "additionalProperties": False,
}
_OF = {"if": {"type": "array"}, "then": {"items": _SCALAR, "minItems": 1}, "else": _RANGE}
_MATCH = {
    "if": {"type": "string"},
    "then": {"minLength": 1},
    "else": {"type": ["object", "null"], "minProperties": 1, "maxProperties": 1, "additionalProperties": _OF},
}


class Declared(BaseModel):
    """What a page declares."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, arbitrary_types_allowed=True)


class Arm(Declared):
    """A recipe with parameters. A list of values makes an arm of each; several lists, of each combination."""

    recipe: Any = Field(description="A bundled name, a file, or a recipe written here.")
    params: dict[str, Values] = Field(
        default={}, description="Values of its parameters. A list is a grid: an arm for each of its values."
    )
    match: Annotated[Any, BeforeValidator(_tuned), WithJsonSchema(_MATCH)] = Field(
        default=None, description="The parameter that is chosen so that bits match, maybe with its values or range."
    )
    name: str | None = Field(default=None, min_length=1, description="What the arm is called; by default its recipe.")


@dataclass(frozen=True)
class Open:
    """An arm whose parameter is still to be chosen."""

    label: str
    tuned: Tuned
    make: Callable[[Any], Recipe]
    """The recipe with a value. Raises RecipeError for a value that makes none."""
    default: Any
    """The value that the recipe has by itself."""


@dataclass(frozen=True)
class Matched:
    """The value that was chosen for an open arm."""

    label: str
    """The arm as it was declared, `logquant:window=?`."""
    parameter: str
    value: Any
    bits: float
    """Effective bits as planned: a mean over tasks of the mean over samples."""
    at_most: bool = False
    """Whether attention decides how much is kept, so that the bits are a bound."""

    @property
    def arm(self) -> str:
        """The name that the arm has now."""
        return self.label.replace(f"{self.parameter}={ANY}", f"{self.parameter}={self.value}")


@dataclass(frozen=True)
class Matching:
    """How arms were matched."""

    bits: float
    """What they were to come to."""
    arms: tuple[Matched, ...]

    def __str__(self) -> str:
        return "\n".join(
            f"matched: {x.arm}: {'at most ' if x.at_most else ''}{x.bits:.3f} bits planned, {self.bits:.3f} wanted"
            for x in self.arms
        )

    def plain(self) -> dict[str, Any]:
        """As data of JSON."""
        arms = {
            x.arm: {"parameter": x.parameter, "value": x.value, "planned_bits": x.bits, "at_most": x.at_most}
            for x in self.arms
        }
        return {"bits": self.bits, "arms": arms}


Choose = Callable[[list[Open], dict[str, Recipe]], list[Any]]
"""Chooses a value for each open arm; the other arms stand beside them."""


def recipes_of(arms: Iterable[Arm], document: Document | None, choose: Choose | None) -> dict[str, Recipe]:
    """Every arm's recipe, grids expanded, in the order of the file.

    Args:
        arms: as they were declared.
        document: the page that they come from, which names lines in errors.
        choose: chooses the values of open arms; None: there must be no such arm.
    """
    every: list[tuple[Path_, Arm, dict[str, Any], Recipe | Open]] = []
    for place, arm in enumerate(arms):
        path: Path_ = ("arms", place)
        for params in _grid(arm):
            try:
                opened = _opened(arm)
                make = _recipe if opened.match is None else _open
                every.append((path, opened, params, make(opened, params, path, document)))
            except RecipeError as error:
                if document is None:
                    raise
                _note(document, path, error)
        if len(every) > MOST_ARMS:
            raise CompareError(f"grids must expand to at most {MOST_ARMS} arms, found more; leave some values out")
    if document is not None:
        document.check()
    waiting = [made for *_, made in every if isinstance(made, Open)]
    if waiting and choose is None:
        raise CompareError(
            f"arm {quoted(waiting[0].label)} leaves {waiting[0].tuned.parameter} to be matched, and nothing says to "
            "what; give match: bits, or match: {bits: 3.0} (--match bits=3.0)"
        )
    found: dict[str, Recipe] = {}
    values: Iterator[Any] = iter(())
    if choose is not None and every:
        beside = {_name(arm, made, params): made for _, arm, params, made in every if isinstance(made, Recipe)}
        values = iter(choose(waiting, beside))
    for path, arm, params, made in every:
        if isinstance(made, Open):
            value = next(values)
            params, made = {**params, made.tuned.parameter: value}, made.make(value)
        _add(found, _name(arm, made, params), made, path, document)
    if document is not None:
        document.check()
    return found


def _add(found: dict[str, Recipe], name: str, recipe: Recipe, path: Path_, document: Document | None) -> None:
    problem = _name_problem(name, recipe, found)
    if problem and document is None:
        raise CompareError(problem)
    if problem and document is not None:
        document.note(path, problem)
    found[name] = recipe


def _opened(arm: Arm) -> Arm:
    """The same with what its recipe leaves open on the shell, `logquant:window=?`, as its `match`."""
    if not isinstance(arm.recipe, str):
        return arm
    name, text = split_source(arm.recipe)
    kept: list[str] = []
    tuned: list[Tuned] = []
    for part in (text or "").split(","):
        key, _, value = (piece.strip() for piece in part.partition("="))
        between = _BETWEEN.fullmatch(value)
        if value == ANY:
            tuned.append(Tuned(key))
        elif between is not None:
            ends = {"from": parse_scalar(between[1]), "to": parse_scalar(between[2])}
            try:
                tuned.append(Tuned(key, Range.model_validate(ends)))
            except ValidationError:
                raise RecipeError(
                    f"{arm.recipe}: a range must be written from..to with two numbers, the lesser first, found "
                    f"{quoted(value)}"
                ) from None
        else:
            kept.append(part)
    if not tuned:
        return arm
    if len(tuned) > 1 or arm.match is not None:
        raise RecipeError(f"{arm.recipe}: one parameter of an arm is matched, found several; give the others values")
    source = f"{name}:{','.join(kept)}" if kept else name
    return arm.model_copy(update={"recipe": source, "match": tuned[0]})


def _open(arm: Arm, params: dict[str, Any], path: Path_, document: Document | None) -> Open:
    name = arm.match.parameter
    if name in params:
        raise RecipeError(f"parameter {quoted(name)} is to be matched, found a value of it in params, too")

    def make(value: Any) -> Recipe:
        page = None if document is None else Document(document.data, document.file, document.base, document.marks)
        return _recipe(arm, {**params, name: value}, path, page)

    among = arm.match.among
    try:
        own = _recipe(arm, params, path, document)
    except RecipeError:
        if among is None:
            raise
        own = make(among.low if isinstance(among, Range) else among[0])  # it has no default
    if name not in own.params:
        raise RecipeError(
            f"unknown parameter {quoted(name)} to be matched{suggest(name, own.params)}; this recipe has: "
            f"{listed(own.params) or 'none'}"
        )
    return Open(_name(arm, own, {**params, name: ANY}), arm.match, make, own.params[name])


def _grid(arm: Arm) -> Iterable[dict[str, Any]]:
    values = [value if isinstance(value, list) else [value] for value in arm.params.values()]
    return (dict(zip(arm.params, chosen, strict=True)) for chosen in product(*values))


def _recipe(arm: Arm, params: dict[str, Any], path: Path_, document: Document | None) -> Recipe:
    source, base = arm.recipe, None if document is None else document.base
    if document is None or base is None:
        return load_recipe(source, **params)
    if isinstance(source, str):
        return load_recipe(_anchored(source, base), **params)
    if not isinstance(source, dict):
        raise RecipeError(f"recipe must be a name, a file or a recipe written here, found {in_words(source)}")
    inner = (*path, "recipe") if (*path, "recipe") in document.marks else path
    marks = {at[len(inner) :]: mark for at, mark in document.marks.items() if at[: len(inner)] == inner}
    name = {"name": arm.name or f"arm {path[1]}"} if "name" not in source else {}
    return build(Document({**name, **source}, document.file, base, marks), params)


def _anchored(source: str, home: Path) -> str:
    """A file of a recipe, relative to the experiment's."""
    head, colon, tail = source.partition(":")
    is_file = "/" in head or head.endswith((".yaml", ".yml"))
    return f"{home / head}{colon}{tail}" if is_file and not Path(head).is_absolute() else source


def _note(document: Document, path: Path_, error: RecipeError) -> None:
    """Note the problems of an arm; those that don't say where they are, in the line of the arm."""
    file, line = document.where(path)
    for text in str(error).splitlines():
        if text.startswith(f"{file}:"):
            document.add(text, file, line)
        else:
            document.note(path, text)


def _name(arm: Arm, recipe: Recipe, params: dict[str, Any]) -> str:
    own = os.fspath(arm.recipe) if isinstance(arm.recipe, str | os.PathLike) else recipe.name
    shown = ",".join(
        f"{key}={value}" for key, value in params.items() if arm.name is None or isinstance(arm.params.get(key), list)
    )
    name = arm.name or own
    return f"{name}{',' if ':' in name else ':'}{shown}" if shown else name


def _name_problem(name: str, recipe: Recipe, known: Mapping[str, Recipe]) -> str:
    if name in known:
        return (
            f"arms must have different names, found {quoted(name)} twice; leave one out (from Python, a mapping "
            "gives them names)"
        )
    if name == AGAIN or (name == EXACT and not is_exact(recipe)):
        return f"an arm must not be named {name!r}, which stands for the exact cache; rename it"
    return ""


def is_exact(recipe: Any) -> bool:
    """Whether a recipe keeps every token of every layer exactly, and every query reads all of them."""
    lists = [recipe.tiers, *recipe.layers.values()]
    return all(tiers == "full" or all(map(_plainly_kept, tiers)) for tiers in lists)


def _plainly_kept(tier: Any) -> bool:
    return tier.keys == "full" and tier.values == "full" and tier.read is None
