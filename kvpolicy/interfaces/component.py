"""What policies and quantizers have in common: a frozen pydantic model, told apart by its `kind`."""

from __future__ import annotations

from collections.abc import Iterator
from numbers import Number
from typing import Annotated, Any, ClassVar, Literal, get_args, get_origin

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    SerializationInfo,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
)

from kvpolicy.errors import KvpolicyError, PluginError

__all__ = ["LIST", "MOST", "TRY", "Budget", "Component", "Window", "budget_tokens", "call", "in_brief", "list_of"]

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

    A subclass declares `kind: Literal["name"] = "name"`, by which recipes name it. Options are strict, in Python as in
    YAML: true and false are no numbers, `2.0` is no integer, and `"2"` is no number.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, validate_default=True, allow_inf_nan=False)

    _role: ClassVar[str] = "plugin"
    """What errors call it."""

    kind: str

    @field_validator("*", mode="before")
    @classmethod
    def _strict_choice(cls, value: Any, info: ValidationInfo) -> Any:
        """Literals are compared by `==`, for which 1, 1.0 and true are one."""
        annotation = cls.model_fields[info.field_name].annotation if info.field_name else None
        parts = list(_parts(annotation))
        choices = [choice for part in parts if get_origin(part) is Literal for choice in get_args(part)]
        equal = [choice for choice in choices if _equal(choice, value)]
        if equal and type(value) not in {*map(type, equal), *parts}:
            *first, last = map(str, dict.fromkeys(choices))
            allowed = f"{', '.join(first)} or {last}" if first else last
            raise ValueError(f"must be {allowed}, found {value!r}, a {type(value).__name__}")
        return value


def in_brief(value: Any) -> str:
    """The value of an option in words; of other plugins their kinds and the options that differ from their defaults."""
    if isinstance(value, tuple):
        return "+".join(map(in_brief, value)) or "none"
    if not isinstance(value, Component):
        return str(value)
    fields = type(value).model_fields
    options = ", ".join(f"{k} {in_brief(v)}" for k, v in value if k != "kind" and v != fields[k].default)
    return f"{value.kind}({options})" if options else value.kind


def list_of(base: type[Component]) -> PlainValidator:
    """Validates an option that is a list of plugins: instances of `base`, kept as a tuple.

    A recipe names them by kind, which takes the plugins that are installed: whoever builds a recipe makes the instances
    first and hands them over as context, by the name of the option.
    """

    def check(value: Any, info: ValidationInfo) -> tuple[Any, ...]:
        given = (info.context or {}).get(info.field_name, value)
        if not isinstance(given, list | tuple) or not all(isinstance(x, base) for x in given):
            shown = [type(x).__name__ for x in given] if isinstance(given, list | tuple) else type(given).__name__
            raise ValueError(f"must be a list of instances of {base.__name__}, found {shown}")
        return tuple(given)

    return PlainValidator(check)


def _write_list(members: tuple[Component, ...], info: SerializationInfo) -> list[dict[str, Any]]:
    return [member.model_dump(mode=info.mode) for member in members]


LIST = PlainSerializer(_write_list), WithJsonSchema({"type": "array"})
"""How such an option is written, and its schema as far as no plugins are known."""


def _parts(annotation: Any) -> Iterator[Any]:
    """The literals and types that a union, or what is annotated, consists of."""
    if get_origin(annotation) is Literal or not get_args(annotation):
        yield annotation
        return
    for part in get_args(annotation):
        yield from _parts(part)


def _equal(choice: Any, value: Any) -> bool:
    # NumPy's numbers are such, too, and its booleans are not.
    numeric = isinstance(value, Number) or type(value).__name__ in ("bool_", "bool")
    return numeric and isinstance(choice, int | float) and bool(choice == value)


TRY = "Its contract tests tell more: pytest --pyargs kvpolicy.contracts"
"""The remedy where a plugin misbehaves."""


def call(component: Component, method: str, *args: Any) -> Any:
    """Call a method of a plugin.

    Raises:
        PluginError: it raised an error that is not kvpolicy's own. An interrupt, an exit and memory that runs out
            pass as they are.
    """
    try:
        return getattr(component, method)(*args)
    except KvpolicyError:
        raise
    except Exception as error:
        if _out_of_memory(error):
            raise
        reason = f"{type(error).__name__}: {error}"
        raise PluginError(
            f"{component._role} {component.kind!r}: {method} must not fail, found {reason[:300]}. {TRY}"
        ) from error


def _out_of_memory(error: Exception) -> bool:
    if isinstance(error, MemoryError) or any(cls.__name__ == "OutOfMemoryError" for cls in type(error).__mro__):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
