"""`kvpolicy compare`."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Annotated

import typer

from kvpolicy.cli.output import show_result, silence_transformers, warner


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
    silence_transformers()
    with warnings.catch_warnings():
        warnings.showwarning = warner()
        _check_comparison(arms, model, task, n, seed, tokens, out, overwrite, device)
        from kvpolicy.experiment.comparison import compare as run

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
    show_result(result)
    if out is not None:
        from kvpolicy.arguments import RESULTS

        *most, last = [name for name in RESULTS if (Path(out) / name).exists()]
        typer.echo(f"wrote {', '.join(most)} and {last} into {out}", err=True)
    if result.failures:
        raise typer.Exit(1)


def _check_comparison(
    arms: list[str],
    model: Path | None,
    task: str,
    n: int,
    seed: int,
    tokens: int | None,
    out: str | None,
    overwrite: bool,
    device: str | None,
) -> None:
    """Refuse what can't be right before torch is loaded, which takes seconds."""
    from kvpolicy.arguments import check_comparison, check_device, check_results, check_room
    from kvpolicy.hf.models import check_model
    from kvpolicy.recipe.source import check_sources
    from kvpolicy.tasks.load import check_task

    check_comparison(n, seed, tokens, task, out)
    check_sources(arms)
    check_task(task, n, tokens)
    check_device(device)
    check_room(tokens, check_model(model))
    if out is not None:
        check_results(Path(out), overwrite)


def _kept(out: str | None) -> str:
    try:
        rows = 0 if out is None else (Path(out) / "samples.jsonl").read_bytes().count(b"\n")
    except OSError:
        rows = 0
    return f"; finished rows in {out}/samples.jsonl: {rows}" if rows else ""
