"""Generated parts of the reference, filled in when the pages are built: `<!-- generated: NAME -->`.

Everything comes from the code itself (the recipe models, the installed plugins, the command line), so that no page
can be out of date.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

__all__ = ["GENERATED", "on_page_markdown", "render"]

_MARK = re.compile(r"<!-- generated: ([a-z-]+) -->")


def _cell(text: Any) -> str:
    return " ".join(str(text).split()).replace("|", "\\|").replace("<", "&lt;")


def _table(head: tuple[str, ...], rows: Iterable[tuple[Any, ...]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(map(_cell, row)) + " |" for row in rows)])


def _type(schema: dict[str, Any]) -> str:
    """A JSON schema in words."""
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


def _fields(properties: dict[str, Any]) -> str:
    return _table(
        ("Key", "Type", "Meaning"),
        ((f"`{key}`", _type(s), s.get("description", "")) for key, s in properties.items()),
    )


def recipe_fields() -> str:
    """The keys of a recipe."""
    from kvpolicy.schema import recipe_schema

    return _fields(recipe_schema()["properties"])


def tier_fields() -> str:
    """The keys of a tier."""
    from kvpolicy.schema import recipe_schema

    return _fields(recipe_schema()["$defs"]["tier"]["properties"])


def _options(what: str) -> str:
    from kvpolicy.plugins import registry
    from kvpolicy.schema import recipe_schema

    definitions = recipe_schema()["$defs"]
    parts = []
    infos = registry().policies if what == "policy" else registry().quantizers
    for kind, info in sorted(infos.items()):
        if info.distribution != "kvpolicy":
            continue
        described = definitions[f"{what}-{kind}"]["properties"]
        rows = [
            (f"`{name}`", _type(described[name]), _default(field), field.description)
            for name, field in info.cls.model_fields.items()
            if name != "kind"
        ]
        doc = re.sub(r"\n[ \t]+", "\n", (info.cls.__doc__ or "").strip())
        parts.append(f"### {kind}\n\n{doc}\n\n{_table(('Option', 'Type', 'Default', 'Meaning'), rows)}")
    return "\n\n".join(parts)


def _default(field: Any) -> str:
    return "required" if field.is_required() else f"`{str(field.default).lower()}`"


def policies() -> str:
    """The built-in policies and their options."""
    return _options("policy")


def quantizers() -> str:
    """The built-in quantizers and their options."""
    return _options("quantizer")


def bundled() -> str:
    """The bundled recipes."""
    from kvpolicy.recipe import bundled_names, load_recipe

    loaded = [load_recipe(name) for name in bundled_names()]
    return _table(
        ("Recipe", "Parameters", "What it does"),
        (
            (f"[{r.name}](recipes.md#{r.name})", ", ".join(f"`{k}={v}`" for k, v in r.params.items()), r.summary)
            for r in loaded
        ),
    )


def cli() -> str:
    """Every command with its arguments and options."""
    import typer

    from kvpolicy.cli import app

    root: Any = typer.main.get_command(app)
    parts = []
    for name, command in root.commands.items():
        context = type(root).context_class(command, info_name=f"kvpolicy {name}")
        shown = [p for p in command.params if p.name != "help"]
        rows = [_parameter(p, context) for p in shown]
        arguments = [row[0].strip("`") for row in rows if not row[0].startswith("`-")]
        options = ["[OPTIONS]"] if len(arguments) < len(rows) else []
        usage = " ".join(["kvpolicy", name, *arguments, *options])
        doc = re.sub(r"\n[ \t]+", "\n", (command.help or "").strip())
        table = f"\n\n{_table(('Argument or option', 'Default', 'Meaning'), rows)}" if rows else ""
        parts.append(f"## {name}\n\n{doc}\n\n```text\n{usage}\n```{table}")
    return "\n\n".join(parts)


def _parameter(parameter: Any, context: Any) -> tuple[str, str, str]:
    names = ", ".join(parameter.opts) if parameter.param_type_name == "option" else parameter.metavar
    names = names or parameter.name.upper()
    default = parameter.get_default(context)
    empty = default is None or default is False or default in ([], (), "") or parameter.required
    return f"`{names}`", "" if empty else f"`{default}`", getattr(parameter, "help", "") or ""


GENERATED: dict[str, Callable[[], str]] = {
    "recipe-fields": recipe_fields,
    "tier-fields": tier_fields,
    "policies": policies,
    "quantizers": quantizers,
    "bundled": bundled,
    "cli": cli,
}


def render(markdown: str) -> str:
    """`markdown` with every mark replaced by what it names."""
    return _MARK.sub(lambda match: GENERATED[match[1]](), markdown)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """The hook that mkdocs calls for each page."""
    return render(markdown)
