"""`kvpolicy schema`."""

from __future__ import annotations

import json

import typer


def schema() -> None:
    """Print the JSON schema of recipes, for editors."""
    from kvpolicy.recipe.schema import recipe_schema

    typer.echo(json.dumps(recipe_schema(), indent=2))
