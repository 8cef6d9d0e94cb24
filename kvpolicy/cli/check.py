"""`kvpolicy check`."""

from __future__ import annotations

import warnings
from typing import Annotated

import typer

from kvpolicy.cli.model_options import takes_model
from kvpolicy.cli.output import show_result, silence_transformers, warner


@takes_model
def check(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="A directory, an id of the Hugging Face hub, or a GGUF file; default: the bundled model.",
        ),
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="A text such as the model is to read; default: Python's own library."),
    ] = None,
    tokens: Annotated[int, typer.Option(help="Tokens of it that are used.")] = 512,
    limit: Annotated[float, typer.Option(help="KL in nats per token up to which a width counts as safe.")] = 0.05,
    json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Say what to fear of a model before its cache is compressed, and propose a recipe."""
    silence_transformers()
    from kvpolicy.hf.source import check_model
    from kvpolicy.planning.sizes import check_probe

    check_probe(tokens, limit)
    check_model(model)
    with warnings.catch_warnings():
        warnings.showwarning = warner()
        from kvpolicy.planning.check import check as run

        found = run(model, text=text, tokens=tokens, limit=limit)
    if json:
        from json import dumps

        typer.echo(dumps(found.to_dict(), indent=2))
        return
    show_result(found)
