"""`kvpolicy import`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def import_preset(
    method: Annotated[str, typer.Argument(metavar="METHOD", help="Whose preset it is: kvtuner.")],
    preset: Annotated[Path, typer.Argument(metavar="FILE", help="The preset, as its project publishes it.")],
    groups: Annotated[
        str | None,
        typer.Option(
            metavar="channel|token",
            help="channel: keys per channel, values per token, as KIVI; token: one group per token and head. "
            "Default: as the file's name says.",
        ),
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the recipe; default: made from the file's.")] = None,
) -> None:
    """Print a preset of another project as a recipe: kvpolicy import kvtuner FILE > mine.yaml."""
    from kvpolicy.errors import RecipeError
    from kvpolicy.recipe.presets import GROUPS, Groups, kvtuner_recipe
    from kvpolicy.words import quoted, suggest

    if method != "kvtuner":
        raise RecipeError(f"METHOD must be kvtuner, found {quoted(method)}{suggest(method, ['kvtuner'])}")
    if groups is not None and groups not in GROUPS:
        raise RecipeError(f"--groups must be channel or token, found {quoted(groups)}{suggest(groups, GROUPS)}")
    chosen: Groups | None = None if groups is None else "channel" if groups == "channel" else "token"
    typer.echo(kvtuner_recipe(preset, chosen, name), nl=False)
