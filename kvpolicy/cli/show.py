"""`kvpolicy show`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from kvpolicy.cli.output import new_table, show_table


def show(
    context: typer.Context,
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A bundled name or a file, NAME:key=value,...")],
    tokens: Annotated[int, typer.Option(min=1, max=1 << 20, help="Tokens of the placement shown.")] = 512,
    plot: Annotated[Path | None, typer.Option(help="Draw which tier holds each position, into this file.")] = None,
) -> None:
    """Print a recipe with everything filled in, and how many tokens each tier holds."""
    from kvpolicy.recipe.source import check_one

    check_one(recipe, context.args)
    if plot is not None:
        from kvpolicy.arguments import check_picture

        check_picture(plot)
    from kvpolicy.recipe.load import load_recipe

    loaded = load_recipe(recipe)
    if plot is not None:
        from kvpolicy.recipe.plot import plot_placement

        typer.echo(f"wrote {plot_placement(loaded, tokens, plot)}", err=True)
    if loaded.params:
        typer.echo("# " + ", ".join(f"{name}={value}" for name, value in loaded.params.items()))
    typer.echo(loaded.to_yaml(resolved=True))
    from kvpolicy.recipe.plot import asks_for_prompt

    fed = "a prompt of " if asks_for_prompt(loaded) else ""
    show_table(_tiers_table(f"Tiers after {fed}{tokens} tokens", loaded.tiers, tokens), err=True)
    for key, own in loaded.layers.items():
        if own != "full":
            show_table(_tiers_table(f"Tiers of layers {key}", own, tokens), err=True)
        else:
            typer.echo(f"Layers {key}: full", err=True)


def _tiers_table(title: str, tiers: Any, tokens: int) -> Any:
    from rich.text import Text

    from kvpolicy.interfaces.policy import RankPolicy
    from kvpolicy.placement.simulate import simulate
    from kvpolicy.recipe.plot import describe_policy, describe_store

    table = new_table(title, "tier", "policy", "keys", "values", "tokens", "positions")
    chosen = False
    for i, (tier, held) in enumerate(zip(tiers, simulate(tiers, tokens), strict=True)):
        policy = "takes the rest" if tier.policy is None else describe_policy(tier.policy)
        chosen = chosen or isinstance(tier.policy, RankPolicy)
        keys, values = describe_store(tier.keys), describe_store(tier.values)
        span = "none" if not len(held) else "by attention" if chosen else f"{held[0]} to {held[-1]}"
        table.add_row(*(Text(cell) for cell in (str(i), policy, keys, values, str(len(held)), span)))
    return table
