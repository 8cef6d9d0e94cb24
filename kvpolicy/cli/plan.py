"""`kvpolicy plan`."""

from __future__ import annotations

import gc
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from kvpolicy.cli.output import show_error, silence_transformers


def plan(
    recipes: Annotated[list[str], typer.Argument(metavar="RECIPE...", help="Recipes, NAME:key=value,...")],
    model: Annotated[
        str,
        typer.Option(metavar="CONFIG|DIR|ID", help="A config.json, its directory, or an id of the Hugging Face hub."),
    ],
    tokens: Annotated[list[int] | None, typer.Option(help="Tokens seen; may be repeated; default: 8192.")] = None,
    batch: Annotated[int, typer.Option(help="Rows.")] = 1,
    generated: Annotated[
        int | None,
        typer.Option(help="Tokens that came one by one; default: none, 1 for recipes that select as the prompt ends."),
    ] = None,
    memory: Annotated[str | None, typer.Option(metavar="SIZE", help="Of the device, such as 80GiB: what fits?")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, float16 or bfloat16; default: as the config says.")
    ] = None,
    device: Annotated[str, typer.Option(help="Type of the device: cuda, cpu and so on.")] = "cuda",
    unattached: Annotated[
        bool, typer.Option("--unattached", help="Decode the stores for the model's own attention at each step.")
    ] = False,
    prefill_chunk: Annotated[
        int | None, typer.Option(metavar="TOKENS", help="Tokens of a pass of the prefill at most; default: all.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw memory against the context, into this file.")
    ] = None,
) -> None:
    """Say what recipes take on a model: bytes by part, peaks, and what fits. Needs no weights and no GPU."""
    silence_transformers()
    tokens = tokens or [8192]
    if plot is not None:
        from kvpolicy.arguments import check_picture

        check_picture(plot)
    from kvpolicy.planning.sizes import check_sizes, memory_bytes
    from kvpolicy.recipe.source import check_sources

    check_sizes(tokens, batch, generated, prefill_chunk, device)
    check_sources(recipes)
    if memory is not None:
        memory_bytes(memory)
    collects = gc.isenabled()
    gc.disable()  # a tenth of the time of the imports, which leave no garbage
    try:
        from kvpolicy.planning.sooner import import_torch

        import_torch()
        from kvpolicy.planning.plan import plan as run
    finally:
        if collects:
            gc.enable()
    planned = partial(
        run, recipes, model, batch=batch, generated=generated, dtype=dtype, device=device, chunk=prefill_chunk,
        attach=not unattached,
    )  # fmt: skip
    found = planned(tokens=tokens, memory=memory)
    if json:
        from json import dumps

        typer.echo(dumps(found.to_dict(), indent=2))
    else:
        from kvpolicy.cli.output import show_result

        show_result(found)
    if plot is not None:
        from kvpolicy.planning.plot import lengths_to, plot_plan

        curve = planned(tokens=lengths_to(max(tokens)))
        typer.echo(f"wrote {plot_plan(curve, plot, found.limit)}", err=True)
    unfit = found.unfit()
    if unfit:
        show_error("\n".join(unfit))
        raise typer.Exit(2)
