"""`kvpolicy lm-eval`."""

from __future__ import annotations

import warnings
from typing import Annotated, Any

import typer

from kvpolicy.cli.model_options import takes_model
from kvpolicy.cli.output import warner


@takes_model
def lm_eval(
    recipe: Annotated[str, typer.Option(metavar="RECIPE", help="A bundled name or a file, NAME:key=value,...")],
    arguments: Annotated[
        list[str], typer.Argument(metavar="-- ARGUMENTS...", help="Those of lm_eval: --tasks, --batch_size, and so on.")
    ],
    model: Any,
) -> None:
    """Run lm-evaluation-harness through a compressed cache. Needs it: the extra `lm-eval` brings it."""
    from kvpolicy.arguments import check_lm_eval
    from kvpolicy.recipe.source import check_sources

    check_lm_eval()
    check_sources([recipe])
    from kvpolicy.harness.command import evaluate

    with warnings.catch_warnings():
        warnings.showwarning = warner()
        evaluate(recipe, model, arguments)
