"""The commands that run a model: `kvpolicy compare` and `kvpolicy generate`."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = ["compare", "generate", "register"]


def register(app: typer.Typer) -> None:
    """Add the commands to an app."""
    app.command()(compare)
    app.command()(generate)


def compare(
    arms: Annotated[list[str], typer.Argument(metavar="ARM...", help="Recipes, NAME:key=value,...; `full` is exact.")],
    model: Annotated[
        Path | None, typer.Option(metavar="DIR", help="A local Hugging Face model directory; default: the bundled one.")
    ] = None,
    task: Annotated[
        str, typer.Option(help="lines, arithmetic, code, or a .jsonl file whose rows carry prompt and answer.")
    ] = "lines",
    n: Annotated[int, typer.Option("-n", "--samples", help="Samples, the same for every arm.")] = 16,
    seed: Annotated[int, typer.Option(help="Seed of the samples.")] = 0,
    tokens: Annotated[int | None, typer.Option(help="Approximate length of a generated sample.")] = None,
    out: Annotated[
        str | None, typer.Option(metavar="DIR", help="Write samples.jsonl, summary.json and pictures here.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier comparison in --out.")] = False,
    device: Annotated[str | None, typer.Option(help="Such as cpu or cuda:1; default: CUDA if there is one.")] = None,
    unattached: Annotated[
        bool, typer.Option("--unattached", help="Decode the stores for the model's own attention at each step.")
    ] = False,
    no_errors: Annotated[
        bool, typer.Option("--no-errors", help="Don't watch attention, which keeps an exact copy of the cache.")
    ] = False,
) -> None:
    """Compare recipes on the same samples, each against the exact cache."""
    _quiet()
    from kvpolicy.comparison import FILES
    from kvpolicy.comparison import compare as run

    with warnings.catch_warnings():
        warnings.showwarning = _warn
        try:
            result = run(
                arms,
                model=model,
                task=task,
                n=n,
                seed=seed,
                tokens=tokens,
                out=out,
                overwrite=overwrite,
                device=device,
                attach=not unattached,
                errors=not no_errors,
            )
        except KeyboardInterrupt:
            typer.echo(f"interrupted{_kept(out)}", err=True)
            raise typer.Exit(130) from None
    _print(result)
    if out is not None:
        *most, last = [name for name in FILES if (Path(out) / name).exists()]
        typer.echo(f"wrote {', '.join(most)} and {last} into {out}", err=True)
    if result.failures:
        raise typer.Exit(1)


def generate(
    recipe: Annotated[str, typer.Option(metavar="RECIPE", help="A bundled name or a file, NAME:key=value,...")],
    prompt: Annotated[str, typer.Option(metavar="TEXT|-", help="The prompt; - reads it from stdin.")],
    model: Annotated[
        Path | None, typer.Option(metavar="DIR", help="A local Hugging Face model directory; default: the bundled one.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate at most.")] = 128,
    device: Annotated[str | None, typer.Option(help="Such as cpu or cuda:1; default: CUDA if there is one.")] = None,
    unattached: Annotated[
        bool, typer.Option("--unattached", help="Decode the stores for the model's own attention at each step.")
    ] = False,
) -> None:
    """Continue a prompt greedily: the text on stdout, what the cache takes on stderr."""
    _quiet()
    from kvpolicy.errors import CompareError
    from kvpolicy.generation import generate_text

    text = _read_stdin() if prompt == "-" else prompt
    if not text and prompt == "-":
        raise CompareError("the prompt from stdin must not be empty; pipe a text into the command")
    with warnings.catch_warnings():
        warnings.showwarning = _warn
        try:
            memory = generate_text(text, recipe, model, max_new_tokens, device, sys.stdout, attach=not unattached)
        except KeyboardInterrupt:
            typer.echo("\ninterrupted", err=True)
            raise typer.Exit(130) from None
    typer.echo(memory, err=True)


def _kept(out: str | None) -> str:
    try:
        rows = 0 if out is None else (Path(out) / "samples.jsonl").read_bytes().count(b"\n")
    except OSError:
        rows = 0
    return f"; finished rows in {out}/samples.jsonl: {rows}" if rows else ""


def _read_stdin() -> str:
    from kvpolicy.errors import CompareError

    if sys.stdin is None:
        raise CompareError("the prompt comes from stdin, which is closed; pipe a text into the command")
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise CompareError(f"the prompt on stdin must be UTF-8 text, found {error.reason} at byte {error.start}") from (
            error
        )


def _quiet() -> None:
    """No advice of transformers between the lines; what goes wrong is raised."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


def _warn(message: Warning | str, *_: Any, **__: Any) -> None:
    typer.echo(f"warning: {message}", err=True)


def _print(result: Any) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console()
    if not console.is_terminal:
        console = Console(width=result.width)
    for table in result.tables():
        console.print(table)
        console.print()
    console.print(Text(result.notes()), width=min(console.width, 120))
