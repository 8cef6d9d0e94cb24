"""`kvpolicy compare`."""

from __future__ import annotations

import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from kvpolicy.cli.model_options import takes_model
from kvpolicy.cli.output import show_result, silence_transformers, warner
from kvpolicy.errors import KvpolicyError
from kvpolicy.words import in_line


@takes_model
def compare(
    arms: Annotated[
        list[str],
        typer.Argument(
            metavar="ARM...", help="Recipes, NAME:key=value,...; `full` is exact. Or the YAML file of an experiment."
        ),
    ],
    model: Any,
    task: Annotated[
        list[str] | None,
        typer.Option(
            help="A task, maybe with options (needle:depth=0.5), or a .jsonl file whose rows carry prompt and answer; "
            "may be repeated. Default: lines."
        ),
    ] = None,
    n: Annotated[
        int | None, typer.Option("-n", "--samples", help="Samples, the same for every arm; default: 16.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the samples; default: 0.")] = None,
    tokens: Annotated[int | None, typer.Option(help="Approximate length of a generated sample.")] = None,
    metric: Annotated[
        list[str] | None, typer.Option(help="What is measured; may be repeated. Without score nothing is generated.")
    ] = None,
    match: Annotated[
        str | None,
        typer.Option(
            metavar="bits[=X]",
            help="Choose what arms leave open (logquant:window=?, kivi:residual=32..256) so that their effective bits "
            "agree within 2%, or come to X.",
        ),
    ] = None,
    batch: Annotated[int | None, typer.Option(help="Samples that run together; default: 1.")] = None,
    aa: Annotated[
        bool, typer.Option("--aa", help="Run the exact cache again in another batch: the noise floor.")
    ] = False,
    out: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Keep every row here, from which the same command goes on; and a report."),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace what is in --out, once there is a first row.")
    ] = False,
    retry: Annotated[bool, typer.Option("--retry", help="Run samples in --out again that failed.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would run, how long, and what so many samples can show.")
    ] = False,
    engine: Annotated[
        str | None,
        typer.Option(
            metavar="local|ray",
            help="Let workers run the samples: processes here, one for each device, or actors of a Ray cluster.",
        ),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(help="Workers of the engine; default: one for each device, or what Ray has room for.")
    ] = None,
    cpus: Annotated[int | None, typer.Option(help="CPUs, and threads on the CPU, of a worker; default: 1.")] = None,
    gpus: Annotated[
        int | None, typer.Option(help="GPUs that Ray gives a worker; default: 1 where the device is cuda.")
    ] = None,
    address: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Of a Ray cluster; default: RAY_ADDRESS, or one of its own.")
    ] = None,
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
        _check_comparison(arms, model, task, n, seed, tokens, out)
        given: dict[str, Any] = {
            "model": model, "tasks": task, "n": n, "seed": seed, "tokens": tokens, "metrics": metric, "match": match,
            "batch": batch, "aa": aa or None, "attach": False if unattached else None, "errors": not no_errors,
            "engine": _engine(engine, workers=workers, cpus=cpus, gpus=gpus, address=address),
        }  # fmt: skip
        source: Any = arms[0] if len(arms) == 1 else arms
        if dry_run:
            from kvpolicy.experiment.dry_run import dry_run as foresee

            show_result(foresee(source, **given))
            return
        result = _run(source, given, out, overwrite, retry)
    show_result(result)
    if out is not None:
        _show_files(out)
    if result.failures:
        raise typer.Exit(1)


def _engine(name: str | None, **given: Any) -> dict[str, Any] | None:
    """The options of an engine as the file of an experiment has them."""
    given = {key: value for key, value in given.items() if value is not None}
    if name is None and given:
        from kvpolicy.errors import CompareError

        key = next(iter(given))
        raise CompareError(f"{key} (--{key}) is of an engine, found none; name it (--engine local or --engine ray)")
    if name == "ray":
        from kvpolicy.arguments import check_ray

        check_ray()
    return None if name is None else {"name": name, **given}


def _run(source: Any, given: dict[str, Any], out: str | None, overwrite: bool, retry: bool) -> Any:
    """The comparison. If it ends early, what is finished is shown before the command ends."""
    from kvpolicy.experiment.comparison import compare as run

    try:
        with _terminable():
            return run(source, **given, out=out, overwrite=overwrite, retry=retry, command=_command())
    except KeyboardInterrupt as error:
        _show_partial(error, out)
        ended = isinstance(error, _Terminated)
        typer.echo("terminated" if ended else "interrupted", err=True)
        raise typer.Exit(143 if ended else 130) from None
    except KvpolicyError as error:
        _show_partial(error, out)
        raise


def _show_partial(error: BaseException, out: str | None) -> None:
    partial = getattr(error, "partial", None)
    if partial is None or not partial.evidence.rows:
        return
    show_result(partial)
    if out is not None:
        typer.echo(f"finished rows in {in_line(out)}: {len(partial.evidence.rows)}; the same command goes on", err=True)


class _Terminated(KeyboardInterrupt):
    """SIGTERM, which ends a run as Ctrl-C does."""


@contextmanager
def _terminable() -> Iterator[None]:
    """Until the end SIGTERM ends what runs in order."""

    def stop(*_: Any) -> None:
        raise _Terminated

    try:
        before = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not in the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _command() -> str:
    import shlex
    import sys

    return shlex.join(["kvpolicy", *sys.argv[1:]])


def _show_files(out: str) -> None:
    from kvpolicy.arguments import RESULTS

    *most, last = [name for name in RESULTS if (Path(out) / name).exists()]
    listed = f"{', '.join(most)} and {last}" if most else last
    typer.echo(f"wrote {listed} into {in_line(out)}", err=True)


def _check_comparison(
    arms: list[str],
    model: Any,
    tasks: list[str] | None,
    n: int | None,
    seed: int | None,
    tokens: int | None,
    out: str | None,
) -> None:
    """Refuse what can't be right before torch is loaded, which takes seconds."""
    from kvpolicy.arguments import check_comparison, check_directory, check_room
    from kvpolicy.hf.source import check_model
    from kvpolicy.recipe.source import check_sources

    n, seed = 16 if n is None else n, 0 if seed is None else seed
    check_comparison(n, seed, tokens, "lines", out)
    if out is not None:
        check_directory(Path(out))
    files = [arm for arm in arms if arm.endswith((".yaml", ".yml")) and _is_experiment(arm)]
    if files and len(arms) > 1:
        from kvpolicy.errors import CompareError
        from kvpolicy.words import quoted

        raise CompareError(
            f"an experiment is given alone, found {quoted(files[0])} beside others; add them to its arms"
        )
    if files:
        return
    check_sources(arms)
    limit = check_model(model)
    from kvpolicy.tasks.load import check_task

    for task in tasks or ["lines"]:
        check_task(task, n, tokens)
        check_room(tokens, limit)


def _is_experiment(path: str) -> bool:
    from kvpolicy.experiment.experiment import is_experiment

    return is_experiment(path)
