"""Generated parts of the reference, filled in when the pages are built: `<!-- generated: NAME -->`.

Everything comes from the code itself (the recipe models, the installed plugins, the command line), so that no page
can be out of date.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

__all__ = ["GENERATED", "on_page_markdown", "render"]

EXPLANATION = Path(__file__).parents[1] / "explanation"
_MARK = re.compile(r"<!-- generated: ([a-z-]+) -->")
_NOTE = re.compile(r"<!-- in the repository -->\n.*?<!-- /in the repository -->\n+", re.DOTALL)
"""For readers of the pages as they lie in the repository; the site needs it not."""


def _cell(text: Any) -> str:
    return " ".join(str(text).split()).replace("|", "\\|").replace("<", "&lt;")


def _table(head: tuple[str, ...], rows: Iterable[tuple[Any, ...]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(map(_cell, row)) + " |" for row in rows)])


def _type(schema: dict[str, Any]) -> str:
    """A JSON schema in words."""
    if "else" in schema:
        named = [part for part in (schema["then"], schema["else"]) if part and "parameter" not in part.get("$ref", "")]
        if schema["then"] == {}:  # of the type that is asked for, such as null
            return _type(schema["else"])
        return " or ".join(map(_type, named))
    if "const" in schema:
        return f"`{schema['const']}`"
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(_type(s) for s in schema["anyOf"] if "parameter" not in s.get("$ref", "")))
    if "$ref" in schema:
        return str(schema["$ref"].rsplit("/", 1)[1])
    if schema.get("type") == "array":
        return f"list of {_type(schema['items'])}"
    known = {"object": "mapping", "number": "fraction"}
    kinds = schema.get("type", "anything")
    words = " or ".join(known.get(k, k) for k in ([kinds] if isinstance(kinds, str) else kinds))
    return f"{words} >= {schema['minimum']}" if "minimum" in schema else words


def _fields(properties: dict[str, Any], required: dict[str, str]) -> str:
    return _table(
        ("Key", "Type", "Required", "Meaning"),
        ((f"`{key}`", _type(s), required.get(key, "no"), s.get("description", "")) for key, s in properties.items()),
    )


def recipe_fields() -> str:
    """The keys of a recipe."""
    from kvpolicy.recipe.schema import recipe_schema

    schema = recipe_schema()
    one_of = [*schema["else"]["required"], *schema["if"]["required"]]
    words = "one of " + ", ".join(f"`{key}`" for key in one_of)
    return _fields(schema["properties"], dict.fromkeys(one_of, words))


def tier_fields() -> str:
    """The keys of a tier."""
    from kvpolicy.recipe.schema import recipe_schema

    both = "yes, unless `store` is given"
    required = {"policy": "in all tiers but the last", "store": "yes, unless `keys` and `values` are given"}
    return _fields(recipe_schema()["$defs"]["tier"]["properties"], {**required, "keys": both, "values": both})


def _options(what: str) -> str:
    from kvpolicy.plugins import registry
    from kvpolicy.recipe.schema import recipe_schema

    definitions = recipe_schema()["$defs"]
    parts = []
    for kind, info in sorted(registry().known(what).items()):
        if info.distribution != "kvpolicy":
            continue
        described = definitions.get(f"{what}-{kind}", info.cls.model_json_schema())["properties"]
        rows = [
            (f"`{name}`", _type(described[name]), _default(field), field.description)
            for name, field in info.cls.model_fields.items()
            if name != "kind"
        ]
        doc = re.sub(r"\n[ \t]+", "\n", (info.cls.__doc__ or "").strip())
        table = f"\n\n{_table(('Option', 'Type', 'Default', 'Meaning'), rows)}" if rows else ""
        parts.append(f"### {kind}\n\n{doc}{table}")
    return "\n\n".join(parts)


def _default(field: Any) -> str:
    default = [] if field.default == () else field.default
    return "required" if field.is_required() else f"`{str(default).lower()}`"


def policies() -> str:
    """The built-in policies and their options."""
    return _options("policy")


def scorers() -> str:
    """The built-in scorers and their options."""
    return _options("scorer")


def readers() -> str:
    """The built-in readers and their options."""
    return _options("reader")


def mergers() -> str:
    """The built-in mergers and their options."""
    return _options("merger")


def quantizers() -> str:
    """The built-in quantizers and their options."""
    return _options("quantizer")


def transforms() -> str:
    """The built-in transforms and their options."""
    return _options("transform")


def extras() -> str:
    """The built-in extras and their options."""
    return _options("extra")


def calibrators() -> str:
    """The built-in calibrators and their options."""
    return _options("calibrator")


def tasks() -> str:
    """The built-in tasks and their options: its own first."""
    from kvpolicy.tasks.load import BUILT_IN

    parts = []
    for task in BUILT_IN:
        described = task.model_json_schema()["properties"]
        own = [name for name in task.model_fields if name in task.__annotations__]
        rows = [
            (f"`{name}`", _type(described[name]), _default(field), field.description)
            for name, field in sorted(task.model_fields.items(), key=lambda item: item[0] not in own)
        ]
        doc = re.sub(r"\n[ \t]+", "\n", (task.__doc__ or "").strip())
        table = _table(("Option", "Type", "Default", "Meaning"), rows)
        parts.append(f"### {task.name}\n\n{doc}\n\n{table}")
    return "\n\n".join(parts)


def bundled() -> str:
    """The bundled recipes."""
    from kvpolicy.recipe.load import bundled_names, load_recipe

    pages = {page.name: page.read_text(encoding="utf-8") for page in EXPLANATION.glob("recipes*.md")}

    def page(recipe: str) -> str:
        return next(name for name, text in pages.items() if f"\n## {recipe}\n" in text)

    loaded = [load_recipe(name) for name in bundled_names()]
    return _table(
        ("Recipe", "Parameters", "What it does"),
        (
            (f"[{r.name}]({page(r.name)}#{r.name})", ", ".join(f"`{k}={v}`" for k, v in r.params.items()), r.summary)
            for r in loaded
        ),
    )


def cli() -> str:
    """Every command with its arguments and options."""
    import typer

    from kvpolicy.cli.main import app

    root: Any = typer.main.get_command(app)
    parts = []
    for name, command in root.commands.items():
        context = type(root).context_class(command, info_name=f"kvpolicy {name}")
        shown = [p for p in command.params if p.name != "help"]
        rows = [_parameter(p, context) for p in shown]
        given = [_usage(p, context) for p in shown if p.required or p.param_type_name == "argument"]
        options = ["[OPTIONS]"] if len(given) < len(shown) else []
        usage = " ".join(["kvpolicy", name, *given, *options])
        doc = re.sub(r"\n[ \t]+", "\n", (command.help or "").strip())
        table = f"\n\n{_table(('Argument or option', 'Value', 'Default', 'Meaning'), rows)}" if rows else ""
        parts.append(f"## {name}\n\n{doc}\n\n```text\n{usage}\n```{table}")
    return "\n\n".join(parts)


def _metavar(parameter: Any, context: Any) -> str:
    if getattr(parameter, "is_flag", False):
        return ""
    if parameter.metavar or parameter.param_type_name == "argument":
        return str(parameter.metavar or parameter.name.upper())
    # typer's own option classes, or click's of earlier versions
    named = getattr(parameter, "display_type", None) or parameter.make_metavar
    return str(named(context)).split()[0].strip("<>").upper()


def _usage(parameter: Any, context: Any) -> str:
    return " ".join(
        [*([] if parameter.param_type_name == "argument" else parameter.opts[:1]), _metavar(parameter, context)]
    )


def _parameter(parameter: Any, context: Any) -> tuple[str, str, str, str]:
    metavar, value = _metavar(parameter, context), ""
    names = metavar
    if parameter.param_type_name == "option":
        names = ", ".join(parameter.opts)
        value = " or ".join(f"`{word}`" for word in metavar.split("|") if word)
    default = parameter.get_default(context)
    empty = default is None or default is False or default in ([], (), "")
    shown = "required" if parameter.required else "" if empty else f"`{default}`"
    return f"`{names}`", value, shown, getattr(parameter, "help", "") or ""


GENERATED: dict[str, Callable[[], str]] = {
    "recipe-fields": recipe_fields,
    "tier-fields": tier_fields,
    "policies": policies,
    "scorers": scorers,
    "readers": readers,
    "mergers": mergers,
    "quantizers": quantizers,
    "transforms": transforms,
    "extras": extras,
    "calibrators": calibrators,
    "tasks": tasks,
    "bundled": bundled,
    "cli": cli,
}


def render(markdown: str) -> str:
    """`markdown` with every mark replaced by what it names, and without what is said to readers of the repository."""
    return _MARK.sub(lambda match: GENERATED[match[1]](), _NOTE.sub("", markdown))


def on_page_markdown(markdown: str, **_: Any) -> str:
    """The hook that mkdocs calls for each page."""
    return render(markdown)
