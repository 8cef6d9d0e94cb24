"""What commands share in writing: tables, warnings and errors, each a line."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import typer


def show_table(table: Any, err: bool = False) -> None:
    """Print a table; where no terminal reads it, a row is a line."""
    from rich.console import Console

    console = Console(stderr=err)
    if not console.is_terminal:
        console = Console(stderr=err, width=4096)
    console.print(table)


def new_table(title: str, *columns: str) -> Any:
    """A table without rows."""
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def show_result(result: Any) -> None:
    """Print the tables of a comparison or a search, and how they are to be read."""
    from rich.console import Console
    from rich.text import Text

    console = Console()
    if not console.is_terminal:
        console = Console(width=result.width)
    for table in result.tables():
        console.print(table)
        console.print()
    console.print(Text(result.notes()), width=min(console.width, 120))


def show_error(text: str) -> None:
    """Write a line for each problem to stderr."""
    for line in text.splitlines():
        typer.echo(f"error: {line}", err=True)


def silence_transformers() -> None:
    """Keep advice of transformers out of the output; what goes wrong is raised."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


def warner() -> Callable[..., None]:
    """For `warnings.showwarning`: a line a warning, each once. Early checks are repeated when the model is loaded."""
    shown: set[str] = set()

    def warn(message: Warning | str, *_: Any, **__: Any) -> None:
        if str(message) not in shown:
            shown.add(str(message))
            typer.echo(f"warning: {message}", err=True)

    return warn
