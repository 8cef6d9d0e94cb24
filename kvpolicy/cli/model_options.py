"""The options of commands that take a model."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer

MODEL = "model"
OPTIONS: dict[str, tuple[Any, Any]] = {
    MODEL: (
        Annotated[
            str | None,
            typer.Option(
                metavar="DIR|ID|GGUF",
                help="A directory, an id of the Hugging Face hub, or a GGUF file; default: the bundled model.",
            ),
        ],
        None,
    ),
    "tokenizer": (
        Annotated[
            str | None, typer.Option(metavar="DIR|ID", help="Where the tokenizer comes from; default: with the model.")
        ],
        None,
    ),
    "revision": (Annotated[str | None, typer.Option(help="A branch, tag or commit of a model of the hub.")], None),
    "dtype": (Annotated[str | None, typer.Option(help="bfloat16, float16, float32 or auto: the weights' own.")], None),
    "device": (Annotated[str | None, typer.Option(help="Such as cpu or cuda:1; default: CUDA if there is one.")], None),
    "device_map": (
        Annotated[
            str | None, typer.Option(metavar="NAME", help="Spread the model over devices: auto, balanced, sequential.")
        ],
        None,
    ),
    "trust_remote_code": (
        Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")],
        False,
    ),
}
"""Type and default of each option, by its name in `ModelSource`."""


def takes_model(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command these options in the place of its parameter `model`, which gets a `ModelSource`.

    It is checked before the command begins: names, and what does not go together. A parameter that is
    declared an argument stays one.
    """

    @functools.wraps(command)
    def run(*args: Any, **given: Any) -> Any:
        from kvpolicy.hf.source import ModelSource

        chosen = {name: given.pop(name) for name in OPTIONS}
        source = ModelSource(chosen.pop(MODEL), **chosen)
        source.place()
        return command(*args, **{MODEL: source}, **given)

    added = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)
        for name, (kind, default) in OPTIONS.items()
    ]
    own = inspect.signature(command, eval_str=True)
    if own.parameters[MODEL].annotation is not Any:
        added[0] = own.parameters[MODEL].replace(kind=inspect.Parameter.KEYWORD_ONLY)
    kept = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for name, p in own.parameters.items() if name != MODEL]
    place = list(own.parameters).index(MODEL)
    run.__signature__ = own.replace(parameters=[*kept[:place], *added, *kept[place:]])  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in (*kept, *added)}
    del run.__wrapped__  # typer would read the command's own signature
    return run
