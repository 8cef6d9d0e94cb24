"""Verdicts as a table for a terminal."""

from __future__ import annotations

from typing import Any

from rich.table import Table
from rich.text import Text

from kvpolicy.report.tables import difference, name_of
from kvpolicy.statistics.verdicts import Verdicts

COLOURS = {"better": "green", "worse": "red", "equivalent": "cyan", "undecided": "dim"}


def verdict_table(verdicts: Verdicts, complete: bool) -> Any:
    """A line for each arm and task: the verdict, the difference with its interval, and why.

    Args:
        verdicts: what was judged.
        complete: whether the run is; a partial one says so.
    """
    metrics = ", ".join(dict.fromkeys(name for name in verdicts.metrics.values() if name))
    several = len({verdict.task for verdict in verdicts.found}) > 1
    partial = "" if complete else " (of a partial run)"
    table = Table(
        title=f"verdicts{partial}: {metrics or 'nothing measured'} against {verdicts.baseline}",
        title_justify="left",
        box=None,
        pad_edge=False,
        padding=(0, 2, 0, 0),
    )
    table.add_column("arm", overflow="fold", min_width=8)
    if several:
        table.add_column("task", overflow="fold", min_width=6)
    table.add_column("verdict", no_wrap=True)
    table.add_column("difference\n[95%]", overflow="fold", min_width=8)
    table.add_column("why", overflow="fold", min_width=16, max_width=60)
    for v in verdicts.found:
        cells = [Text(v.arm + (" (A/A)" if v.noise else ""))]
        cells += [Text(name_of(v.task))] if several else []
        cells += [Text(v.verdict, style=COLOURS.get(v.verdict, "")), Text(difference(v)), Text(v.reason)]
        table.add_row(*cells)
    return table
