"""`kvpolicy check`."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Annotated

import typer

from kvpolicy.cli.output import show_result, silence_transformers, warner


def check(
    model: Annotated[
        Path | None,
        typer.Argument(metavar="MODEL", help="A local Hugging Face model directory; default: the bundled one."),
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="A text such as the model is to read; default: Python's own library."),
    ] = None,
    tokens: Annotated[int, typer.Option(help="Tokens of it that are used.")] = 512,
    limit: Annotated[float, typer.Option(help="KL in nats per token up to which a width counts as safe.")] = 0.05,
    device: Annotated[str | None, typer.Option(help="Such as cpu or cuda:1; default: CUDA if there is one.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Say what to fear of a model before its cache is compressed, and propose a recipe."""
    silence_transformers()
    from kvpolicy.arguments import check_device
    from kvpolicy.hf.models import check_model
    from kvpolicy.planning.sizes import check_probe

    check_probe(tokens, limit)
    check_device(device)
    check_model(model)
    with warnings.catch_warnings():
        warnings.showwarning = warner()
        from kvpolicy.planning.check import check as run

        found = run(model, text=text, tokens=tokens, limit=limit, device=device)
    if json:
        from json import dumps

        typer.echo(dumps(found.to_dict(), indent=2))
        return
    show_result(found)
