"""`kvpolicy tune`."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from kvpolicy.cli.model_options import takes_model
from kvpolicy.cli.output import show_result, silence_transformers, warner
from kvpolicy.words import in_line


@takes_model
def tune(
    space: Annotated[
        str, typer.Argument(metavar="SPACE.yaml", help="A recipe's page, and choices or ranges for its parameters.")
    ],
    text: Annotated[list[str], typer.Option(metavar="FILE", help="A text to cut samples from; may be repeated.")],
    model: Any,
    bits: Annotated[
        float | None, typer.Option(help="Find the best within so many effective bits per value; default: the front.")
    ] = None,
    trials: Annotated[int, typer.Option(help="Combinations that are tried, earlier runs included.")] = 100,
    samples: Annotated[int, typer.Option("-n", "--samples", help="Samples cut from the texts.")] = 16,
    tokens: Annotated[int, typer.Option(help="Tokens of a prompt; 64 more are predicted.")] = 1024,
    held_out: Annotated[float, typer.Option(help="Share of samples that only the report sees.")] = 0.5,
    seed: Annotated[int, typer.Option(help="Seed of the search.")] = 0,
    out: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="The study and its results; default: SPACE-tuned. The same command goes on."),
    ] = None,
    unattached: Annotated[
        bool, typer.Option("--unattached", help="Decode the stores for the model's own attention at each step.")
    ] = False,
) -> None:
    """Search a space of recipes for little KL at few bits. Needs Optuna, which the extra `tune` brings.

    Interrupted, it goes on when it is started again with the same words.
    """
    silence_transformers()
    directory = f"{Path(space).stem}-tuned" if out is None else out
    options: dict[str, Any] = {
        "text": text,
        "model": model,
        "bits": bits,
        "trials": trials,
        "samples": samples,
        "tokens": tokens,
        "held_out": held_out,
        "seed": seed,
        "out": directory,
    }
    with warnings.catch_warnings():
        warnings.showwarning = warner()
        found = _check(space, options)
        from kvpolicy.experiment.tune import tune as run

        try:
            result = run(found, **options, attach=not unattached)
        except KeyboardInterrupt:
            kept = f"; finished trials are kept in {in_line(directory)}, the same command goes on"
            typer.echo(f"interrupted{kept if Path(directory, 'study.journal').exists() else ''}", err=True)
            raise typer.Exit(130) from None
    show_result(result)
    recipes = ", ".join(f"{found.label}.yaml" for found in result.found[:3])
    more = f" and {len(result.found) - 3} more" if len(result.found) > 3 else ""
    typer.echo(f"wrote {recipes}{more}, result.json and front.png into {in_line(directory)}", err=True)


def _check(space: str, options: dict[str, Any]) -> Any:
    """Refuse what can't be right before a model is loaded, which takes seconds. The space, checked."""
    from kvpolicy.arguments import check_directory, check_optuna, check_room, check_search
    from kvpolicy.hf.source import check_model
    from kvpolicy.tasks.texts import text_files

    check_search(options)
    check_optuna()
    text_files(options["text"])
    check_room(options["tokens"], check_model(options["model"]))
    check_directory(Path(options["out"]))
    from kvpolicy.recipe.space import load_space  # loads torch

    return load_space(space)
