"""What policies and quantizers have in common: a frozen pydantic model, told apart by its `kind`."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema

__all__ = ["MOST", "Budget", "Component", "Window", "budget_tokens"]

MOST = 2**31 - 1
"""Tokens that can be counted."""


def _budget(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError("a budget is a number of tokens (an integer) or a fraction of the tokens seen in (0, 1)")
    if isinstance(value, float):
        if not 0.0 < value < 1.0:
            raise ValueError(
                f"a budget given as a float is a fraction of the tokens seen and must lie in (0, 1), found {value}; "
                "write an integer for a number of tokens"
            )
    elif value < 1:
        raise ValueError(f"a budget in tokens must be at least 1, found {value}")
    elif value > MOST:
        raise ValueError(f"a budget in tokens must be at most {MOST}, found {value}")
    return value


def _described(least: int) -> WithJsonSchema:
    fraction = {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1}
    return WithJsonSchema({"anyOf": [{"type": "integer", "minimum": least}, fraction]})


Budget = Annotated[int | float, Field(union_mode="left_to_right"), BeforeValidator(_budget), _described(1)]
"""A count of tokens (an integer >= 1) or a fraction of the tokens seen (a float in (0, 1))."""


def _window(value: Any) -> Any:
    return 0 if type(value) is int and value == 0 else _budget(value)


Window = Annotated[int | float, Field(union_mode="left_to_right"), BeforeValidator(_window), _described(0)]
"""A `Budget` that may also be 0."""


def budget_tokens(budget: int | float, seen: int) -> int:
    """Tokens that `budget` allows after `seen` tokens: itself, or the floored fraction of `seen`, at least 1."""
    return budget if isinstance(budget, int) else max(1, int(budget * seen))


class Component(BaseModel):
    """A plugin class. Its fields are its options in YAML; each has a description.

    A subclass declares `kind: Literal["name"] = "name"`, by which recipes name it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)

    kind: str
