"""`kvpolicy generate`."""

from __future__ import annotations

import sys
import warnings
from typing import Annotated, Any

import typer

from kvpolicy.cli.model_options import takes_model
from kvpolicy.cli.output import silence_transformers, warner


@takes_model
def generate(
    context: typer.Context,
    recipe: Annotated[str, typer.Option(metavar="RECIPE", help="A bundled name or a file, NAME:key=value,...")],
    prompt: Annotated[str, typer.Option(metavar="TEXT|-", help="The prompt; - reads it from stdin.")],
    model: Any,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate at most.")] = 128,
    unattached: Annotated[
        bool, typer.Option("--unattached", help="Decode the stores for the model's own attention at each step.")
    ] = False,
) -> None:
    """Continue a prompt greedily: the text on stdout, what the cache takes on stderr."""
    silence_transformers()
    from kvpolicy.arguments import check_generation
    from kvpolicy.hf.source import check_model
    from kvpolicy.recipe.source import check_one

    check_one(recipe, context.args)
    limit = check_model(model)
    text = _read_stdin() if prompt == "-" else prompt
    check_generation(text, max_new_tokens, limit)
    from kvpolicy.hf.generation import generate_text

    with warnings.catch_warnings():
        warnings.showwarning = warner()
        try:
            memory = generate_text(text, recipe, model, max_new_tokens, None, sys.stdout, attach=not unattached)
        except KeyboardInterrupt:
            typer.echo("\ninterrupted", err=True)
            raise typer.Exit(130) from None
    typer.echo(memory, err=True)


def _read_stdin() -> str:
    from kvpolicy.arguments import MAX_PROMPT
    from kvpolicy.errors import CompareError

    if sys.stdin is None:
        raise CompareError("the prompt comes from stdin, which is closed; pipe a text into the command")
    raw = sys.stdin.buffer.read(4 * MAX_PROMPT + 1)
    if len(raw) > 4 * MAX_PROMPT:
        raise CompareError(f"the prompt on stdin must have at most {4 * MAX_PROMPT:,} bytes, found more; shorten it")
    if not raw:
        raise CompareError("the prompt from stdin must not be empty; pipe a text into the command")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        message = f"the prompt on stdin must be UTF-8 text, found {error.reason} at byte {error.start}"
        raise CompareError(message) from error
