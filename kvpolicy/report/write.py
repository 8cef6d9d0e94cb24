"""Writes a report into a directory."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from kvpolicy.arguments import unwritable
from kvpolicy.errors import CompareError
from kvpolicy.report.tables import Report
from kvpolicy.statistics.margins import Given
from kvpolicy.statistics.rows import Evidence
from kvpolicy.statistics.verdicts import judge
from kvpolicy.words import in_line

FILES = {
    "html": ("report.html",),
    "md": ("report.md",),
    "csv": ("verdicts.csv", "means.csv"),
    "latex": ("verdicts.tex",),
    "json": ("report.json",),
}


def write(
    evidence: Evidence,
    directory: str | os.PathLike[str],
    *,
    formats: Sequence[str] = ("html", "md"),
    metric: str | None = None,
    margins: Given = None,
    baseline: str | None = None,
    alpha: float = 0.05,
) -> list[Path]:
    """Judge the rows, and write the report into a directory; files of an earlier report are replaced.

    Args:
        evidence: rows of experiments.
        directory: made where it is missing.
        formats: of `html`, `md`, `csv`, `latex` and `json`.
        metric: as `judge` takes it, and so are the others.
        margins: differences that don't matter.
        baseline: the arm that others are compared with.
        alpha: probability that any arm is wrongly called better or worse.

    Returns:
        The files written.

    Raises:
        CompareError: an argument is not valid, or a file can't be written.
    """
    verdicts = judge(evidence, metric=metric, margins=margins, baseline=baseline, alpha=alpha)
    return write_report(Report.of(evidence, verdicts), Path(directory), formats)


def check_directory(directory: Path, formats: Sequence[str], overwrite: bool) -> None:
    """Refuse a directory that can't be one, or that holds a report already.

    Raises:
        CompareError: naming it.
    """
    try:
        if directory.exists() and not directory.is_dir():
            raise CompareError(f"{in_line(directory)}: --out must be a directory, found a file; choose another")
        why = unwritable(directory)
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or str(error)
    if why is not None:
        raise CompareError(f"{in_line(directory)}: the report can't be written there: {why}; choose another --out")
    there = [name for kind in formats for name in FILES[kind] if (directory / name).exists()]
    if there and not overwrite:
        raise CompareError(
            f"{in_line(directory)}: --out must not hold a report, found {there[0]}; choose another directory, "
            "or --overwrite"
        )


def write_report(report: Report, directory: Path, formats: Sequence[str] = ("html", "md")) -> list[Path]:
    """Write a report that is already judged. Each file is replaced at once, or stays as it was."""
    texts: dict[str, Callable[[], Sequence[str]]] = {
        "html": lambda: [_page(report)],
        "md": lambda: [_markdown(report)],
        "csv": lambda: [report.to_pandas().to_csv(index=False), report.means_to_pandas().to_csv(index=False)],
        "latex": lambda: [report.to_latex()],
        "json": lambda: [report.to_json()],
    }
    written = []
    for kind in formats:
        for name, text in zip(FILES[kind], texts[kind](), strict=True):
            written.append(_replace(directory / name, text))
    return written


def _page(report: Report) -> str:
    from kvpolicy.report.page import page

    return page(report)


def _markdown(report: Report) -> str:
    from kvpolicy.report.markdown import markdown

    return markdown(report)


def _replace(path: Path, text: str) -> Path:
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            beside.write_text(text, encoding="utf-8", errors="replace")
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)
    except OSError as error:
        raise CompareError(
            f"{in_line(path)}: the report can't be written: {error.strerror or error}; choose another --out"
        ) from None
    return path
