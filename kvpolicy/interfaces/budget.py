"""Budgets: numbers of tokens or fractions of those seen, the same for all layers or one for each."""

from __future__ import annotations

import re
from bisect import bisect_left, insort
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, PlainSerializer, PlainValidator, WithJsonSchema

from kvpolicy.errors import RecipeError
from kvpolicy.words import in_words, quoted

__all__ = [
    "MOST",
    "Budget",
    "ByLayer",
    "LayerBudget",
    "Pyramid",
    "Window",
    "budget_tokens",
    "find_overlaps",
    "layers_named",
    "parse_selector",
]

MOST = 2**31 - 1
"""Tokens that can be counted."""
_SELECTOR = re.compile(r"(-?\d{1,9})(?:-(-?\d{1,9}))?")


def parse_selector(key: str) -> tuple[int, int]:
    """First and last layer of `"3"`, `"-1"` or `"2-5"`, negative ones as written."""
    match = _SELECTOR.fullmatch(key)
    if match is None:
        raise RecipeError(f'a layer selector is an index or a range such as "0", "-1" or "2-5", found {quoted(key)}')
    first = int(match[1])
    last = first if match[2] is None else int(match[2])
    if (first < 0) == (last < 0) and last < first:
        raise RecipeError(f"a range of layers must ascend, found {key!r}")
    return first, last


def layers_named(key: str, layers: int) -> range:
    """The layers that a selector names, of a model that has `layers` of them.

    Raises:
        RecipeError: it names others.
    """
    first, last = (i + layers if i < 0 else i for i in parse_selector(key))
    if not 0 <= first <= last < layers:
        raise RecipeError(
            f"must name layers of the model, which has {layers} (0 to {layers - 1}, or -{layers} to -1), and a range "
            f"must ascend, found {key!r}"
        )
    return range(first, last + 1)


def find_overlaps(keys: Iterable[str]) -> dict[str, str]:
    """What is wrong with layer selectors, by selector, as far as it can be told without a model."""
    problems: dict[str, str] = {}
    taken: dict[bool, list[tuple[int, int, str]]] = {False: [], True: []}
    """Ranges that don't overlap, in order: those counted from the start, and those from the end."""
    for key in keys:
        try:
            first, last = parse_selector(key)
        except RecipeError as error:
            problems[key] = str(error)
            continue
        if (first < 0) != (last < 0):
            continue
        ranges = taken[first < 0]
        place = bisect_left(ranges, first, key=lambda taken: taken[1])
        if place < len(ranges) and ranges[place][0] <= last:
            problems[key] = f"a layer may be named once, found {key!r} overlapping {ranges[place][2]!r}"
        else:
            insort(ranges, (first, last, key))
    return problems


class BudgetError(RecipeError, ValueError):
    """A budget is not valid. pydantic tells it as any `ValueError`."""


def _budget(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BudgetError(
            "a budget is a number of tokens (an integer) or a fraction of the tokens seen in (0, 1), found "
            f"{in_words(value)}"
        )
    if isinstance(value, float):
        if not 0.0 < value < 1.0:
            raise BudgetError(
                f"a budget given as a float is a fraction of the tokens seen and must lie in (0, 1), found {value}; "
                "write an integer for a number of tokens"
            )
    elif value < 1:
        raise BudgetError(f"a budget in tokens must be at least 1, found {value}")
    elif value > MOST:
        raise BudgetError(f"a budget in tokens must be at most {MOST}, found {value}")
    return value


def _schema(least: int) -> list[dict[str, Any]]:
    return [{"type": "integer", "minimum": least}, {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1}]


Budget = Annotated[
    int | float, Field(union_mode="left_to_right"), BeforeValidator(_budget), WithJsonSchema({"anyOf": _schema(1)})
]
"""A count of tokens (an integer >= 1) or a fraction of the tokens seen (a float in (0, 1))."""


def _window(value: Any) -> Any:
    return 0 if type(value) is int and value == 0 else _budget(value)


Window = Annotated[
    int | float, Field(union_mode="left_to_right"), BeforeValidator(_window), WithJsonSchema({"anyOf": _schema(0)})
]
"""A `Budget` that may also be 0."""


@dataclass(frozen=True)
class ByLayer:
    """A budget for each layer of a model."""

    budgets: tuple[int | float, ...]
    layers: tuple[str, ...] = ()
    """The layers that each is for, as selectors; without any, one budget for each layer in turn."""

    def of(self, layer: int, layers: int) -> int | float:
        """The budget of a layer of a model that has `layers` of them.

        Raises:
            RecipeError: that layer has none, or several.
        """
        if not self.layers:
            if len(self.budgets) != layers:
                raise RecipeError(
                    f"a list of budgets must have one for each layer of the model, which has {layers}, found "
                    f"{len(self.budgets)}"
                )
            return self.budgets[layer]
        found: dict[str, int | float] = {}
        for key, budget in zip(self.layers, self.budgets, strict=True):
            try:
                if layer in layers_named(key, layers):
                    found[key] = budget
            except RecipeError as error:
                raise RecipeError(f"budgets by layer {error}").at(key) from None
        if len(found) > 1:
            first, second, *_ = found
            raise RecipeError(
                f"budgets by layer must name a layer once, found layer {layer} of {layers} in both {first!r} and "
                f"{second!r}"
            ).at(second)
        if not found:
            raise RecipeError(
                f"budgets by layer must name every layer that is kept so, found none for layer {layer} of {layers}; "
                f"named are {', '.join(self.layers)}"
            )
        return next(iter(found.values()))

    def plain(self) -> list[int | float] | dict[str, int | float]:
        """As YAML writes it."""
        return dict(zip(self.layers, self.budgets, strict=True)) if self.layers else list(self.budgets)

    def __str__(self) -> str:
        return str(self.plain())


@dataclass(frozen=True)
class Pyramid:
    """Budgets that fall from layer to layer in even steps, the same on average as if all layers had `tokens`.

    The last layer has `(tokens - window) / beta + window`. A layer has no more than the prompt; what the first layers
    can't use goes to the last. A prompt of less than twice as many tokens has even budgets.
    """

    tokens: int
    """Tokens that stay on average, the window included."""
    window: int = 0
    """Tokens that each layer has for certain."""
    beta: int = 20
    layer: int | None = None
    layers: int = 1

    def of(self, layer: int, layers: int) -> Pyramid:
        """The same, of a layer of a model that has `layers` of them."""
        return replace(self, layer=layer, layers=layers)

    def of_prompt(self, prompt: int) -> int:
        """Tokens that stay of so many; without a layer, on average."""
        mean, rest = self.tokens - self.window, prompt - self.window
        if self.layer is None or self.layers == 1 or prompt < 2 * mean:
            return self.tokens
        least = mean // self.beta
        most = 2 * mean - least
        if most >= rest:
            least, most = 2 * mean - rest, rest
        return most - self.layer * ((most - least) // (self.layers - 1)) + self.window

    def plain(self) -> dict[str, Any]:
        """As YAML writes it."""
        return {"kind": "pyramid", "tokens": self.tokens, "window": self.window, "beta": self.beta}

    def __str__(self) -> str:
        return str(self.plain())


def _pyramid(value: Mapping[Any, Any]) -> Pyramid:
    options = {"window": 0, "beta": 20, **value}
    del options["kind"]
    if value["kind"] != "pyramid":
        raise BudgetError(f"a budget with a kind must be of kind pyramid, found {in_words(value['kind'])}").at("kind")
    if set(options) != {"tokens", "window", "beta"}:
        raise BudgetError(
            "a budget of kind pyramid must have tokens, and may have window and beta, found "
            f"{', '.join(map(str, value))}"
        )
    for name, least in (("tokens", 1), ("window", 0), ("beta", 1)):
        if type(found := options[name]) is not int or not least <= found <= MOST:
            raise BudgetError(f"{name} of a pyramid must be an integer from {least} to {MOST}, found {found!r:.40}").at(
                name
            )
    if options["window"] >= options["tokens"]:
        raise BudgetError(
            f"the window of a pyramid must be smaller than its tokens, {options['tokens']}, found {options['window']}"
        ).at("window")
    return Pyramid(**options)


def _by_layer(value: Any) -> Any:
    if isinstance(value, ByLayer | Pyramid):
        return value
    if isinstance(value, Mapping) and "kind" in value:
        return _pyramid(value)
    if isinstance(value, list | tuple):
        if not value:
            raise BudgetError("a list of budgets must have one for each layer, found none")
        return ByLayer(tuple(_member(i, item) for i, item in enumerate(value)))
    if isinstance(value, Mapping):
        if not value:
            raise BudgetError("budgets by layer must name each layer, found none")
        for key, problem in find_overlaps(map(str, value)).items():
            raise BudgetError(problem).at(key)
        return ByLayer(tuple(_member(str(key), item) for key, item in value.items()), tuple(map(str, value)))
    return _budget(value)


def _member(place: str | int, value: Any) -> Any:
    try:
        return _budget(value)
    except BudgetError as error:
        raise error.at(place) from None


def _plain(value: Any) -> Any:
    return value.plain() if isinstance(value, ByLayer | Pyramid) else value


_ONE = {"anyOf": _schema(1)}
_COUNT = {"type": "integer", "minimum": 1}
LayerBudget = Annotated[
    int | float | ByLayer | Pyramid,
    PlainValidator(_by_layer),
    PlainSerializer(_plain),
    WithJsonSchema(
        {
            "anyOf": [
                *_schema(1),
                {"type": "array", "minItems": 1, "items": _ONE},
                {"type": "object", "minProperties": 1, "additionalProperties": _ONE},
                {
                    "type": "object",
                    "properties": {
                        "kind": {"const": "pyramid"},
                        "tokens": _COUNT,
                        "window": {**_COUNT, "minimum": 0},
                        "beta": _COUNT,
                    },
                    "required": ["kind", "tokens"],
                    "additionalProperties": False,
                },
            ]
        }
    ),
]
"""A `Budget`, a list of one for each layer, a mapping of layers (`"0"`, `"-1"`, `"2-5"`) to budgets, or a `Pyramid`:
`{kind: pyramid, tokens: 2048, window: 32, beta: 20}`."""


def budget_tokens(budget: int | float | ByLayer | Pyramid, seen: int) -> int:
    """Tokens that `budget` allows after `seen` tokens: itself, or the floored fraction of `seen`, at least 1.

    Of budgets by layer it is the first, for pictures; a cache asks `Policy.of_layer` first.
    """
    if isinstance(budget, Pyramid):
        return budget.of_prompt(seen)
    if isinstance(budget, ByLayer):
        budget = budget.budgets[0]
    return budget if isinstance(budget, int) else max(1, int(budget * seen))
