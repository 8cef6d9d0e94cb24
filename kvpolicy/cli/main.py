"""The command `kvpolicy`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvpolicy.cli.run import register
from kvpolicy.errors import KvpolicyError

if TYPE_CHECKING:
    from kvpolicy.recipe.load import Recipe

__all__ = ["app", "main"]

app = typer.Typer(
    name="kvpolicy",
    help="KV-cache compression as recipes. A RECIPE is a bundled name or a YAML file, with parameters after a colon: "
    "logquant:window=64,nbits=4.",
    epilog="Exit status: 0 fine, 1 an arm of a comparison failed, 2 bad input, 130 interrupted.",
    context_settings={"help_option_names": ["-h", "--help"]},
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
RecipeArgument = Annotated[str, typer.Argument(metavar="RECIPE", help="A bundled name or a file, NAME:key=value,...")]


def _version(wanted: bool) -> None:
    if wanted:
        import kvpolicy

        typer.echo(f"kvpolicy {kvpolicy.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Version.")] = False,
) -> None:
    pass


def _print(table: Any, err: bool = False) -> None:
    from rich.console import Console

    console = Console(stderr=err)
    if not console.is_terminal:  # for grep: a row a line
        console = Console(stderr=err, width=4096)
    console.print(table)


def _table(title: str, *columns: str) -> Any:
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


@app.command()
def recipes() -> None:
    """List the bundled recipes."""
    from rich.text import Text

    from kvpolicy.recipe.load import bundled_names, load_recipe

    table = _table("Bundled recipes", "name", "parameters", "summary")
    for name in bundled_names():
        recipe = load_recipe(name)
        params = ",".join(f"{key}={value}" for key, value in recipe.params.items())
        table.add_row(Text(name), Text(params), Text(recipe.summary))
    _print(table)


@app.command(context_settings={"allow_extra_args": True})
def show(
    context: typer.Context,
    recipe: RecipeArgument,
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
    fed = "a prompt of " if loaded.placement == "update" else ""
    _print(_tiers_table(f"LayerCache after {fed}{tokens} tokens", loaded, loaded.tiers, tokens), err=True)
    for key, own in loaded.layers.items():
        if own != "full":
            _print(_tiers_table(f"Tiers of layers {key}", loaded, own, tokens), err=True)
        else:
            typer.echo(f"Layers {key}: full", err=True)


def _tiers_table(title: str, recipe: Recipe, tiers: Any, tokens: int) -> Any:
    from rich.text import Text

    from kvpolicy.interfaces.policy import RankPolicy
    from kvpolicy.placement.simulate import simulate
    from kvpolicy.recipe.plot import describe_policy, describe_store

    table = _table(title, "tier", "policy", "keys", "values", "tokens", "positions")
    chosen = False
    for i, (tier, held) in enumerate(zip(tiers, simulate(tiers, tokens, recipe.placement), strict=True)):
        policy = "takes the rest" if tier.policy is None else describe_policy(tier.policy)
        chosen = chosen or isinstance(tier.policy, RankPolicy)
        keys, values = describe_store(tier.keys), describe_store(tier.values)
        span = "none" if not len(held) else "by attention" if chosen else f"{held[0]} to {held[-1]}"
        table.add_row(*(Text(cell) for cell in (str(i), policy, keys, values, str(len(held)), span)))
    return table


@app.command()
def validate(
    sources: Annotated[list[str], typer.Argument(metavar="RECIPE...", help="Bundled names or files.")],
) -> None:
    """Check recipes; exit status 2 if one is not valid."""
    from kvpolicy.recipe.source import check_sources, refuse_misplaced
    from kvpolicy.words import clip

    refuse_misplaced(sources)
    failed = False
    for source in sources:
        try:
            check_sources([source])
            from kvpolicy.recipe.load import load_recipe

            loaded = load_recipe(source)
        except KvpolicyError as error:
            _error(str(error))
            failed = True
        else:
            typer.echo(f"{clip(source, 300)}: valid ({clip(loaded.name)}, tiers: {len(loaded.tiers)})")
    if failed:
        raise typer.Exit(2)


@app.command()
def schema() -> None:
    """Print the JSON schema of recipes, for editors."""
    import json

    from kvpolicy.recipe.schema import recipe_schema

    typer.echo(json.dumps(recipe_schema(), indent=2))


@app.command()
def plugins() -> None:
    """List the installed plugins, and what failed to load."""
    from rich.text import Text

    from kvpolicy.plugins import HOOKS, registry

    found = registry()
    table = _table("Plugins", "type", "kind", "distribution", "version", "file", "options")
    for what in HOOKS:
        known = found.known(what)
        for kind in sorted(known):
            info = known[kind]
            options = ", ".join(_option(name, field) for name, field in info.cls.model_fields.items() if name != "kind")
            if info.missing:
                options = f"needs {info.missing}, not installed; {options}"
            cells = (what, kind, info.distribution, info.version, info.file, options)
            table.add_row(*(Text(cell) for cell in cells))
    _print(table)
    if found.broken:
        failed = _table("Failed to load", "plugin", "distribution", "version", "entry point", "cause")
        for bad in found.broken:
            failed.add_row(*(Text(cell) for cell in (bad.name, bad.distribution, bad.version, bad.value, bad.cause)))
        typer.echo()
        _print(failed)


def _option(name: str, field: Any) -> str:
    return name if field.is_required() else f"{name}={[] if field.default == () else field.default}"


register(app)


def main() -> None:
    """Run the command; an error that kvpolicy raises on purpose is a line per problem and exit status 2."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        status = app(prog_name="kvpolicy", standalone_mode=False)
        if sys.stdout is not None:
            sys.stdout.flush()
    except KvpolicyError as error:
        _error(str(error))
        status = 2
    except BrokenPipeError:
        sys.stderr.close()
        status = 141
    except (KeyboardInterrupt, typer.Abort):
        typer.echo("interrupted", err=True)
        status = 130
    except OSError as error:  # such as a full disk behind stdout
        _error(f"can't be written or read: {error.filename or 'the output'}: {error.strerror or error}")
        status = 1
    except Exception as error:
        status = _usage(error)
    sys.exit(status or 0)


def _error(text: str) -> None:
    """A line for each problem."""
    for line in text.splitlines():
        typer.echo(f"error: {line}", err=True)


def _usage(error: Exception) -> int:
    """Say what is wrong with the words on the command line; whatever else was raised goes on."""
    say = getattr(error, "format_message", None)
    if say is None:
        raise error
    from kvpolicy.words import clip

    status = int(getattr(error, "exit_code", 2))
    message, context = str(say()).strip(), getattr(error, "ctx", None)
    if not message or type(error).__name__ == "NoArgsIsHelpError":  # the help was asked for, or is shown already
        typer.echo(message, err=True, nl=bool(message))
        return status
    path = getattr(context, "command_path", None) or "kvpolicy"
    hints = [clip(message[0].lower() + message[1:].rstrip("."), 400)]
    if type(error).__name__ == "NoSuchOption" and path.split()[-1] in ("show", "validate", "generate", "compare"):
        hints.append("a recipe's parameters are written NAME:key=value")
    _error("; ".join([*hints, f"see {path} --help"]))
    return status
