"""`kvpolicy calibrate`."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from kvpolicy.cli.model_options import takes_model
from kvpolicy.cli.output import silence_transformers, warner
from kvpolicy.words import in_line


@takes_model
def calibrate(
    method: Annotated[str, typer.Argument(metavar="METHOD", help="A calibrator, NAME:key=value,...")],
    text: Annotated[Path, typer.Option(metavar="FILE", help="A text in UTF-8, such as the model was trained on.")],
    model: Any,
    samples: Annotated[int, typer.Option(help="Pieces of the text, evenly spaced.")] = 16,
    tokens: Annotated[int, typer.Option(help="Tokens of each.")] = 2048,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Default: METHOD.safetensors.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file if there is one.")] = False,
) -> None:
    """Find out what a method needs to know of a model, for recipes that name the file as their calibration.

    Interrupted, it goes on when it is started again with the same words.
    """
    silence_transformers()
    target = _check(method, text, model, samples, tokens, out, overwrite)
    with warnings.catch_warnings():
        warnings.showwarning = warner()
        from kvpolicy.experiment.calibration import calibrate as run

        bar = _Bar()
        try:
            with bar:
                run(
                    method,
                    text=text,
                    model=model,
                    samples=samples,
                    tokens=tokens,
                    out=target,
                    overwrite=overwrite,
                    tell=bar.tell,
                )
        except KeyboardInterrupt:
            typer.echo("interrupted; started again with the same words, it goes on", err=True)
            raise typer.Exit(130) from None
    if bar.said:
        typer.echo(bar.said)
    typer.echo(f"wrote {in_line(target)}", err=True)


def _check(
    method: str,
    text: Path,
    model: Any,
    samples: int,
    tokens: int,
    out: Path | None,
    overwrite: bool,
) -> Path:
    """Refuse what can't be right before torch is loaded, which takes seconds; the file that is to be written."""
    from kvpolicy.arguments import check_calibration, check_room
    from kvpolicy.hf.source import check_model

    target = Path(f"{method.partition(':')[0]}.safetensors") if out is None else out
    check_calibration(samples, tokens, text, target, overwrite)
    check_room(tokens, check_model(model))
    return target


class _Bar:
    """A bar on stderr, which shows the samples done."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self.progress = Progress(*columns, console=Console(stderr=True), transient=True)
        self.said = ""
        """What was told last."""
        self.task = self.progress.add_task("loading", total=None)

    def __enter__(self) -> None:
        self.progress.start()

    def __exit__(self, *_: Any) -> None:
        self.progress.stop()

    def tell(self, done: int, of: int, what: str) -> None:
        """So many samples are done, and what goes on; in the end what there is to say of what was found."""
        self.said = what
        self.progress.update(self.task, completed=done, total=of, description=what if done < of else "writing")
