"""The command `kvpolicy`."""

from __future__ import annotations

import atexit
import gc
import sys
from importlib.metadata import version as version_of
from typing import Annotated

import typer

from kvpolicy.cli.calibrate import calibrate
from kvpolicy.cli.check import check
from kvpolicy.cli.compare import compare
from kvpolicy.cli.env import env
from kvpolicy.cli.generate import generate
from kvpolicy.cli.importing import import_preset
from kvpolicy.cli.lm_eval import lm_eval
from kvpolicy.cli.output import show_error
from kvpolicy.cli.plan import plan
from kvpolicy.cli.plugins import plugins
from kvpolicy.cli.recipes import recipes
from kvpolicy.cli.report import report
from kvpolicy.cli.schema import schema
from kvpolicy.cli.show import show
from kvpolicy.cli.tune import tune
from kvpolicy.cli.validate import validate
from kvpolicy.errors import KvpolicyError
from kvpolicy.words import clip

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


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"kvpolicy {version_of('kvpolicy')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Version.")] = False,
) -> None:
    pass


TAKES_RECIPES = ("show", "validate", "plan", "compare", "generate", "lm-eval")
COMMANDS = (recipes, show, validate, schema, plugins, plan, check, compare, report, tune, generate, calibrate, env)
for command in COMMANDS:
    # Words too many reach the command, which says how parameters are written.
    spare = {"allow_extra_args": command in (show, generate)}
    app.command(context_settings=spare)(command)
app.command("import")(import_preset)
app.command("lm-eval")(lm_eval)


def main() -> None:
    """Run the command; an error that kvpolicy raises on purpose is a line per problem and exit status 2."""
    atexit.register(gc.freeze)  # else all of torch is searched for garbage at the end, for a third of a second
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        status = app(prog_name="kvpolicy", standalone_mode=False)
        if sys.stdout is not None:
            sys.stdout.flush()
    except KvpolicyError as error:
        show_error(str(error))
        status = 2
    except BrokenPipeError:
        sys.stderr.close()
        status = 141
    except (KeyboardInterrupt, typer.Abort):
        typer.echo("interrupted", err=True)
        status = 130
    except OSError as error:  # such as a full disk behind stdout
        show_error(f"can't be written or read: {error.filename or 'the output'}: {error.strerror or error}")
        status = 1
    except Exception as error:
        status = _usage(error)
    sys.exit(status or 0)


def _usage(error: Exception) -> int:
    """Say what is wrong with the words on the command line; whatever else was raised goes on."""
    say = getattr(error, "format_message", None)
    if say is None:
        raise error
    status = int(getattr(error, "exit_code", 2))
    message, context = str(say()).strip(), getattr(error, "ctx", None)
    if not message or type(error).__name__ == "NoArgsIsHelpError":  # the help was asked for, or is shown already
        typer.echo(message, err=True, nl=bool(message))
        return status
    path = getattr(context, "command_path", None) or "kvpolicy"
    hints = [clip(message[0].lower() + message[1:].rstrip("."), 400)]
    if type(error).__name__ == "NoSuchOption" and path.split()[-1] in TAKES_RECIPES:
        hints.append("a recipe's parameters are written NAME:key=value")
    show_error("; ".join([*hints, f"see {path} --help"]))
    return status
