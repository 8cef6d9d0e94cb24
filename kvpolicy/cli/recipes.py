"""`kvpolicy recipes`."""

from __future__ import annotations

from kvpolicy.cli.output import new_table, show_table


def recipes() -> None:
    """List the bundled recipes."""
    from rich.text import Text

    from kvpolicy.recipe.load import bundled_names, load_recipe

    table = new_table("Bundled recipes", "name", "parameters", "summary")
    for name in bundled_names():
        recipe = load_recipe(name)
        params = ",".join(f"{key}={value}" for key, value in recipe.params.items())
        table.add_row(Text(name), Text(params), Text(recipe.summary))
    show_table(table)
