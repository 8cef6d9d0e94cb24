"""`kvpolicy report`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvpolicy.cli.output import new_table, show_table
from kvpolicy.errors import CompareError
from kvpolicy.words import in_line, in_words, listed, quoted, suggest

if TYPE_CHECKING:
    from kvpolicy.statistics.rows import Evidence

FORMATS = ("html", "md", "csv", "latex", "json")


def report(
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN...",
            help="Directories of kvpolicy compare, files or directories of lm_eval --log_samples, or CSV files with "
            "arm, task, sample and score; NAME=PATH names the arm of lm-eval's.",
        ),
    ],
    out: Annotated[str | None, typer.Option(metavar="DIR", help="Write the report here.")] = None,
    formats: Annotated[
        str, typer.Option("--format", metavar="LIST", help=f"What --out gets, of {', '.join(FORMATS)}.")
    ] = "html,md",
    baseline: Annotated[
        str | None, typer.Option(metavar="ARM", help="Compared with; default: exact, or the first.")
    ] = None,
    arm: Annotated[
        list[str] | None, typer.Option(help="Judge this arm alone, and others named so; default: all.")
    ] = None,
    metric: Annotated[
        str | None, typer.Option(help="What all tasks are judged by; default: score, else nll, kl or the first.")
    ] = None,
    margin: Annotated[
        list[str] | None,
        typer.Option(metavar="[[TASK:]METRIC=]X", help="Differences within X count as none; default: 0.01 of scores."),
    ] = None,
    alpha: Annotated[float, typer.Option(help="Probability that any arm is wrongly called better or worse.")] = 0.05,
    document: Annotated[
        str | None,
        typer.Option(metavar="FIELD", help="The field of lm-eval's docs that names the document which samples share."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier report in --out.")] = False,
) -> None:
    """Judge arms against a baseline: better, worse, equivalent or undecided, and why."""
    wanted, margins = _formats(formats), _margins(margin or [])
    named = [_named(run) for run in runs]
    from kvpolicy.report.merging import merge, of_arms
    from kvpolicy.report.tables import Report, printed
    from kvpolicy.report.write import check_directory, write_report
    from kvpolicy.statistics.verdicts import judge

    if out is not None:
        check_directory(Path(out), wanted, overwrite)
    evidence = merge([(name or path.name, _read(name, path, document)) for name, path in named])
    if arm:
        evidence = of_arms(evidence, arm, baseline)
    verdicts = judge(evidence, metric=metric, margins=margins, baseline=baseline, alpha=alpha)
    found = Report.of(evidence, verdicts)
    from rich.text import Text

    for title, columns, cells in printed(found):
        table = new_table(title, *columns)
        for line in cells:
            table.add_row(*(Text(cell) for cell in line))
        show_table(table)
    for line in [*evidence.settings.get("notes", ()), *(f"partial: {text}" for text in found.partial())]:
        typer.echo(line, err=True)
    if not verdicts.found:
        typer.echo(f"nothing is compared: the only arm is {in_line(verdicts.baseline)}", err=True)
    if out is not None:
        written = write_report(found, Path(out), wanted)
        typer.echo(f"wrote {', '.join(path.name for path in written)} into {in_line(out)}", err=True)


def _formats(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    unknown = [name for name in names if name not in FORMATS]
    if unknown or not names:
        found = quoted(unknown[0]) + suggest(unknown[0], FORMATS) if unknown else "nothing"
        raise CompareError(f"--format must be of {', '.join(FORMATS)}, separated by commas, found {found}")
    return names


def _margins(given: list[str]) -> Any:
    """A number for all metrics, or one for each; tasks may have their own."""
    found: dict[str, Any] = {}
    own: dict[str, dict[str, float]] = {}
    for text in given:
        name, _, number = text.rpartition("=")
        task, colon, metric = name.rpartition(":")
        try:
            value = float(number)
        except ValueError:
            raise CompareError(
                f"--margin must be X, METRIC=X or TASK:METRIC=X with a number X, found {in_words(text)}"
            ) from None
        if colon:
            own.setdefault(task, {})[metric] = value
        else:
            found[name] = value
    if not own and set(found) == {""}:
        return found[""]
    if "" in found:
        raise CompareError("--margin must be one number, or METRIC=X for each metric, found both; name all metrics")
    return {**found, **({"tasks": own} if own else {})} or None


def _named(run: str) -> tuple[str | None, Path]:
    """NAME=PATH or PATH; a path that exists as it is written is one."""
    name, equals, path = run.partition("=")
    if not run or (equals and not (name and path) and not Path(run).exists()):
        raise CompareError(f"a run must be PATH or NAME=PATH, found {in_words(run)}")
    if equals and not Path(run).exists():
        return name, Path(path)
    return None, Path(run)


def _read(name: str | None, path: Path, document: str | None) -> Evidence:
    from kvpolicy.report.readers import is_lm_eval, read_csv, read_lm_eval

    if not path.exists():
        raise CompareError(f"{in_line(path)}: there is no such run; give a directory of kvpolicy compare, or a file")
    if is_lm_eval(path):
        return read_lm_eval(path, name or _arm_of(path), document)
    if path.is_dir():
        from kvpolicy.experiment.store import read

        return read(path)
    if path.name.lower().endswith((".csv", ".csv.gz")):
        return read_csv(path)
    endings = listed([".csv", ".csv.gz", "samples_<task>_<date>.jsonl of lm_eval --log_samples"])
    raise CompareError(f"{in_line(path)}: a file must be one of {endings}, found {in_words(path.suffix or path.name)}")


def _arm_of(path: Path) -> str:
    """A run's directory names its arm."""
    resolved = path.resolve()
    return resolved.name if path.is_dir() else resolved.parent.name
