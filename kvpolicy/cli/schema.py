"""`kvpolicy schema`."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from kvpolicy.errors import CompareError
from kvpolicy.words import quoted, suggest

KINDS = ("recipe", "experiment")


def schema(kind: Annotated[str, typer.Argument(help="Of what: recipe or experiment.")] = "recipe") -> None:
    """Print the JSON schema of recipes, or of experiments, for editors."""
    if kind not in KINDS:
        raise CompareError(f"a schema is one of {' or '.join(KINDS)}, found {quoted(kind)}{suggest(kind, KINDS)}")
    if kind == "experiment":
        from kvpolicy.experiment.schema import experiment_schema as made
    else:
        from kvpolicy.recipe.schema import recipe_schema as made
    typer.echo(json.dumps(made(), indent=2))
