"""What policies and quantizers have in common: a frozen pydantic model, told apart by its `kind`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from numbers import Number
from typing import Any, ClassVar, Literal, get_args, get_origin

from pydantic import (
    BaseModel,
    ConfigDict,
    PlainSerializer,
    PlainValidator,
    SerializationInfo,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
)

from kvpolicy.errors import KvpolicyError, PluginError
from kvpolicy.interfaces.budget import MOST, Budget, ByLayer, LayerBudget, Pyramid, Window, budget_tokens

__all__ = [
    "LIST",
    "MOST",
    "TRY",
    "Budget",
    "ByLayer",
    "Component",
    "LayerBudget",
    "Pyramid",
    "Window",
    "budget_tokens",
    "call",
    "check_answer",
    "guarded",
    "in_brief",
    "list_of",
]


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
    return guarded(component, method, lambda: getattr(component, method)(*args))


def guarded(component: Component, what: str, function: Callable[[], Any]) -> Any:
    """What a plugin's function gives; errors as by `call`, which say `what` it is."""
    try:
        return function()
    except KvpolicyError:
        raise
    except Exception as error:
        if _out_of_memory(error):
            raise
        reason = f"{type(error).__name__}: {error}"
        raise PluginError(
            f"{component._role} {component.kind!r}: {what} must not fail, found {reason[:300]}. {TRY}"
        ) from error


def check_answer(component: Component, method: str, *args: Any) -> None:
    """Ask a plugin whether its options fit, by one of its methods whose names begin with `check`.

    Raises:
        RecipeError: they don't.
        PluginError: it answers otherwise than by an error.
    """
    answer = call(component, method, *args)
    if answer is not None:
        raise PluginError(
            f"{component._role} {component.kind!r} must refuse by a RecipeError and return None from {method}, found "
            f"{answer!r:.80}. {TRY}"
        )


def _out_of_memory(error: Exception) -> bool:
    if isinstance(error, MemoryError) or any(cls.__name__ == "OutOfMemoryError" for cls in type(error).__mro__):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
