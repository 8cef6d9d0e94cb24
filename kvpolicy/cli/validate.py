"""`kvpolicy validate`."""

from __future__ import annotations

from typing import Annotated

import typer

from kvpolicy.cli.output import show_error
from kvpolicy.errors import KvpolicyError


def validate(
    sources: Annotated[list[str], typer.Argument(metavar="RECIPE...", help="Bundled names or files.")],
) -> None:
    """Check recipes; exit status 2 if one is not valid."""
    from kvpolicy.recipe.source import check_sources, refuse_misplaced
    from kvpolicy.words import clip

    refuse_misplaced(sources)
    failed = False
    for source in sources:
        try:
            check_sources([source])
            from kvpolicy.recipe.load import load_recipe

            loaded = load_recipe(source)
        except KvpolicyError as error:
            show_error(str(error))
            failed = True
        else:
            typer.echo(f"{clip(source, 300)}: valid ({clip(loaded.name)}, tiers: {len(loaded.tiers)})")
    if failed:
        raise typer.Exit(2)
