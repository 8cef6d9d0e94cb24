"""`kvpolicy plugins`."""

from __future__ import annotations

from typing import Any

import typer

from kvpolicy.cli.output import new_table, show_table


def plugins() -> None:
    """List the installed plugins, and what failed to load."""
    from rich.text import Text

    from kvpolicy.plugins import HOOKS, registry

    found = registry()
    table = new_table("Plugins", "type", "kind", "distribution", "version", "file", "options")
    for what in HOOKS:
        known = found.known(what)
        for kind in sorted(known):
            info = known[kind]
            options = ", ".join(_option(name, field) for name, field in info.cls.model_fields.items() if name != "kind")
            if info.missing:
                options = f"needs {info.missing}, not installed; {options}"
            cells = (what, kind, info.distribution, info.version, info.file, options)
            table.add_row(*(Text(cell) for cell in cells))
    show_table(table)
    if found.broken:
        failed = new_table("Failed to load", "plugin", "distribution", "version", "entry point", "cause")
        for bad in found.broken:
            failed.add_row(*(Text(cell) for cell in (bad.name, bad.distribution, bad.version, bad.value, bad.cause)))
        typer.echo()
        show_table(failed)


def _option(name: str, field: Any) -> str:
    return name if field.is_required() else f"{name}={[] if field.default == () else field.default}"
