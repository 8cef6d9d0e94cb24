"""A space of recipes: a page whose `$name` stand for choices and ranges, one of which a search draws."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from kvpolicy.errors import KvpolicyError, RecipeError
from kvpolicy.recipe.build import build
from kvpolicy.recipe.inherit import REFERENCE, TOP_KEYS, inherit
from kvpolicy.recipe.spec import Recipe
from kvpolicy.recipe.yaml import BAD, Document, Path_, path_text, read_file, read_mapping
from kvpolicy.words import clip, in_words, listed, quoted, suggest

IS = "a space is a mapping with the keys recipe and search"
TOP = ("recipe", "search")
TRIES = 30
"""Combinations in which a choice is tried before it is refused."""
_OUT = object()
"""Stands where a choice of null leaves out a key, or an item of a list."""
_Scalar = str | int | float | bool

Drawn = dict[str, int | float]
"""What a search drew: for each parameter that the recipe uses the place of the choice in its list, or the number."""
Pick = Callable[[str, "Choices | Range"], int | float]


def _number(value: Any) -> int | float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= 2.0**53:
        raise ValueError(f"must be a number, found {in_words(value)}")
    return value


Number = Annotated[Any, BeforeValidator(_number)]


class Range(BaseModel):
    """Numbers between two ends, both included: integers if all that is given is."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    low: Number = Field(alias="from", description="The least number.")
    high: Number = Field(alias="to", description="The greatest number.")
    step: Number = Field(default=None, validate_default=False, description="Distance of neighbours; of integers 1.")
    log: bool = Field(default=False, description="Draw the logarithm evenly, as suits numbers of several magnitudes.")

    @model_validator(mode="after")
    def _check(self) -> Range:
        if not self.low < self.high:
            raise ValueError(f"from must be below to, found from {self.low} to {self.high}")
        if self.log and (self.low <= 0 or self.step is not None):
            found = f"step {self.step}" if self.step is not None else f"from {self.low}"
            raise ValueError(f"log must go with numbers above 0 and without step, found {found}")
        if self.step is None:
            return self
        steps = (self.high - self.low) / self.step if self.step > 0 else 0.5
        if abs(steps - round(steps)) > 1e-9 * max(1.0, steps):
            raise ValueError(
                f"step must be above 0 and lead from {self.low} to {self.high} in whole steps, found {self.step}"
            )
        return self

    @property
    def whole(self) -> bool:
        """Whether the numbers are integers."""
        return all(isinstance(x, int) for x in (self.low, self.high, 1 if self.step is None else self.step))

    def some(self, rng: random.Random) -> int | float:
        """A number of the range; the ends more often than others."""
        if self.whole:
            places = (self.high - self.low) // (self.step or 1)
            return int(self.low + (self.step or 1) * rng.choice([0, places, rng.randint(0, places)]))
        return float(rng.choice([self.low, self.high]))


@dataclass(frozen=True)
class Choices:
    """Values of any kind: numbers, words, stores, policies, lists. None leaves out what the parameter stands for."""

    values: tuple[Any, ...]


class Space:
    """A page of a recipe with the values that its parameters may take. Made by `load_space`."""

    def __init__(self, document: Document, search: dict[str, Choices | Range], name: str) -> None:
        self.document, self.search, self.name = document, search, name

    def draw(self, pick: Pick) -> Drawn:
        """One combination. `pick` is asked, in a fixed order, for the parameters that this combination uses."""
        drawn: Drawn = {}
        waiting = list(_references(self._page()))
        while waiting:
            name = waiting.pop(0)
            if name in drawn or name not in self.search:
                continue
            drawn[name] = pick(name, self.search[name])
            waiting = [*_references(self.value(name, drawn)), *waiting]
        return drawn

    def first(self) -> Drawn:
        """Of each parameter the first choice, or the least number."""
        return self.draw(lambda name, among: 0 if isinstance(among, Choices) else among.low)

    def value(self, name: str, drawn: Drawn) -> Any:
        """What stands for a parameter."""
        among, at = self.search[name], drawn[name]
        return among.values[int(at)] if isinstance(among, Choices) else at

    def values(self, drawn: Drawn) -> dict[str, Any]:
        """What stands for each parameter, by its name."""
        return {name: self.value(name, drawn) for name in drawn}

    def recipe(self, drawn: Drawn, name: str | None = None) -> Recipe:
        """The recipe of a combination: numbers and words stay its parameters, anything else stands in its place.

        Args:
            drawn: the combination.
            name: of the recipe; by default that of the page.

        Raises:
            RecipeError: it is no valid recipe.
        """
        marks = dict(self.document.marks)
        page = self._put(self._page(), (), drawn, marks)
        values = {**self.document.data.get("params", {}), **self.values(drawn)}
        used = set(_references(page))
        data = {**page, "params": {key: value for key, value in values.items() if key in used}}
        if name is not None:
            data["name"] = name
        return build(Document(data, self.document.file, self.document.base, marks), {})

    def plain(self) -> dict[str, Any]:
        """As data of JSON, the same for the same space."""
        search = {
            name: list(among.values) if isinstance(among, Choices) else among.model_dump(by_alias=True)
            for name, among in self.search.items()
        }
        return {"recipe": self.document.data, "search": search}

    def _page(self) -> dict[str, Any]:
        return {key: value for key, value in self.document.data.items() if key != "params"}

    def _put(self, value: Any, path: Path_, drawn: Drawn, marks: dict[Path_, Any]) -> Any:
        """`value` with the choices in it that are no plain word or number."""
        if isinstance(value, dict):
            made = {key: self._put(item, (*path, key), drawn, marks) for key, item in value.items()}
            return {key: item for key, item in made.items() if item is not _OUT}
        if isinstance(value, list):
            items = [self._put(item, (*path, i), drawn, marks) for i, item in enumerate(value)]
            return [item for item in items if item is not _OUT]
        match = REFERENCE.fullmatch(value) if isinstance(value, str) else None
        if match is None or match[1] not in drawn:
            return value
        name = match[1]
        chosen = self.value(name, drawn)
        if chosen is None:
            return _OUT
        if isinstance(chosen, _Scalar) and not (isinstance(chosen, str) and REFERENCE.fullmatch(chosen)):
            return value
        place = ("search", name, int(drawn[name]))
        for at, mark in self.document.marks.items():
            if at[: len(place)] == place:
                marks[(*path, *at[len(place) :])] = mark
        return self._put(chosen, path, drawn, marks)


def load_space(source: str | os.PathLike[str] | Mapping[str, Any] | Space) -> Space:
    """The space that `source` names or is.

    Args:
        source: a path to a YAML file, a mapping like the YAML, or a `Space`.

    Raises:
        RecipeError: a line for each problem: of the recipe's page, of a range, or of a choice that fits no recipe.
    """
    if isinstance(source, Space):
        return source
    if isinstance(source, Mapping):
        document, name = read_mapping(source), "space"
    elif isinstance(source, str | os.PathLike) and os.fspath(source):
        document, name = read_file(Path(source), IS), Path(source).stem
    else:
        raise RecipeError(f"a space must be the path of a YAML file or a mapping, found {in_words(source)}")
    _check_top(document)
    page = _page(document, name)
    search = {key: _among(document, key, value) for key, value in document.data["search"].items()}
    document.check()
    page.marks.update(document.marks)
    space = Space(page, {key: value for key, value in search.items() if value is not None}, name)
    _check_names(space, document)
    document.check()
    _check_choices(space)
    return space


def _check_top(document: Document) -> None:
    data = document.data
    if not set(TOP) & set(data) and set(TOP_KEYS) & set(data):
        document.fail((), f"{IS}, found a recipe; put it below recipe, and choices for its parameters below search")
    for key in data:
        if key not in TOP:
            more = "; a recipe's keys stand below recipe" if key in TOP_KEYS else suggest(key, TOP)
            document.note((key,), f"unknown key {quoted(key)}{more}; {IS}")
    for key in TOP:
        if key not in data:
            document.note((), f"{IS}, found no {key}")
    search = data.get("search", BAD)
    if search is not BAD and (not isinstance(search, dict) or not search):
        document.note(
            ("search",), f"search must be a mapping of parameters to lists or ranges, found {in_words(search)}"
        )
    document.check()


def _page(document: Document, name: str) -> Document:
    """The recipe's page, `extends` resolved."""
    recipe = document.data["recipe"]
    if isinstance(recipe, str) and recipe:
        recipe = {"extends": recipe}
    if not isinstance(recipe, dict):
        document.fail(("recipe",), f"recipe must be the page of a recipe or the name of one, found {in_words(recipe)}")
    marks = {path[1:]: mark for path, mark in document.marks.items() if path[:1] == ("recipe",) and len(path) > 1}
    page = Document({"name": name, **recipe}, document.file, document.base, marks)
    found = inherit(page)
    found.check()
    return found


def _among(document: Document, name: str, value: Any) -> Choices | Range | None:
    """The values of a parameter; None if they are not valid, which is noted."""
    path = ("search", name)
    if REFERENCE.fullmatch(f"${name}") is None:
        document.note(path, f"a parameter's name has letters, digits and _ only, found {quoted(name)}")
    if isinstance(value, dict):
        try:
            return Range.model_validate(value)
        except ValidationError as error:
            for problem in error.errors(include_url=False):
                _note_range(document, path, problem)
            return None
    if not isinstance(value, list) or not value:
        document.note(
            path,
            f"must be a list of choices or a range such as {{from: 16, to: 64, step: 16}}, found {in_words(value)}",
        )
        return None
    seen: set[str] = set()
    for i, choice in enumerate(value):
        try:
            text = json.dumps(choice, sort_keys=True, allow_nan=False)
        except (TypeError, ValueError):
            document.note((*path, i), f"a choice must be plain data, found {in_words(choice)}")
            continue
        if text in seen:
            document.note((*path, i), f"choices must differ, found {in_words(choice)} twice")
        seen.add(text)
    return Choices(tuple(value))


def _note_range(document: Document, path: Path_, problem: Any) -> None:
    keys = [str(field.alias or key) for key, field in Range.model_fields.items()]
    at, raw = tuple(problem["loc"]), problem.get("ctx", {}).get("error")
    allowed = f"; a range has {', '.join(keys)}"
    if problem["type"] == "extra_forbidden":
        document.note((*path, *at), f"unknown key {quoted(str(at[0]))}{suggest(str(at[0]), keys)}{allowed}")
    elif problem["type"] == "missing":
        document.note(path, f"a range must have from and to, found no {at[0]}{allowed}")
    elif raw is not None:
        document.note((*path, *at), clip(str(raw), 300))
    else:
        document.note((*path, *at), f"must be true or false, found {in_words(problem.get('input'))}")


def _check_names(space: Space, document: Document) -> None:
    """Every parameter is used, by the page or by a choice, and none contains itself."""
    below = {
        name: set(_references(list(among.values))) if isinstance(among, Choices) else set()
        for name, among in space.search.items()
    }
    used = set(_references(space._page())).union(*below.values())
    declared = list(dict.fromkeys([*space.search, *space.document.data.get("params", {})]))
    for name in declared:
        if name not in used:
            place = ("search", name) if name in space.search else ("recipe", "params", name)
            document.note(
                place,
                f"parameter {quoted(name)} must be used as ${clip(name, 40)} somewhere, the whole value of a key, "
                f"found nowhere{suggest(name, sorted(used))}",
            )
    for name in sorted(used - set(declared)):
        users = next((("search", key) for key in below if name in below[key]), ("recipe",))
        hint = suggest(name, declared)
        document.note(
            users,
            f"${clip(name, 40)} must stand in search, or in params of the recipe{hint}; there: {listed(declared)}",
        )
    for name in space.search:
        reached, waiting = set(), set(below[name])
        while waiting:
            reached |= waiting
            waiting = {further for key in waiting for further in below.get(key, ())} - reached
        if name in reached:
            document.note(("search", name), f"a choice must not contain its own parameter, found ${clip(name, 40)}")


def _check_choices(space: Space) -> None:
    """Refuse a choice that makes no valid recipe, whatever is chosen beside it; one that makes some may stay."""
    rng = random.Random(0)
    problems: dict[str, None] = {}
    if all(_refused(space, drawn) for drawn in _tries(space, rng, None, 0)):
        raise RecipeError(str(_refused(space, space.first())))
    for name, among in space.search.items():
        ends = range(len(among.values)) if isinstance(among, Choices) else (among.low, among.high)
        for at in ends:
            refusal = ""
            for drawn in _tries(space, rng, name, at):
                found = _refused(space, drawn)
                if found is None:
                    refusal = ""
                    break
                refusal = refusal or found
            shown = path_text(("search", name, int(at))) if isinstance(among, Choices) else f"search.{name}, {at}"
            for line in refusal.splitlines():
                problems.setdefault(f"{line} (with {shown}, and whatever else was tried beside it)")
    if problems:
        raise RecipeError("\n".join(problems))


def _tries(space: Space, rng: random.Random, forced: str | None, at: int | float) -> Iterator[Drawn]:
    """The first combination and others, with one value of one parameter where they use it."""

    def some(name: str, among: Choices | Range) -> int | float:
        if name == forced:
            return at
        return rng.randrange(len(among.values)) if isinstance(among, Choices) else among.some(rng)

    def first(name: str, among: Choices | Range) -> int | float:
        return at if name == forced else 0 if isinstance(among, Choices) else among.low

    for number in range(TRIES):
        drawn = space.draw(some if number else first)
        if forced is None or forced in drawn:
            yield drawn


def _refused(space: Space, drawn: Drawn) -> str | None:
    try:
        space.recipe(drawn)
    except KvpolicyError as error:
        return str(error)
    return None


def _references(value: Any) -> Iterator[str]:
    """Names of the parameters used, in the order of the page."""
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _references(item)
    elif isinstance(value, str) and (match := REFERENCE.fullmatch(value)):
        yield match[1]
