"""`kvpolicy env`."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import PackageNotFoundError, entry_points, version
from typing import Annotated, Any

import typer

from kvpolicy.cli.output import silence_transformers
from kvpolicy.words import clip


def env(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Print versions, cards and installed plugins, for a report of a bug."""
    found = _found()
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    for name, lines in _text(found):
        for i, line in enumerate(lines):
            typer.echo(f"{'' if i else name:<14}{line}")


def _found() -> dict[str, Any]:
    """What is installed. A library that can't be imported is an entry like any other, with its error."""
    silence_transformers()
    torch, about_torch = _library("torch")
    return {
        "kvpolicy": _version("kvpolicy"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": about_torch,
        "transformers": _library("transformers")[1],
        "cuda": _cuda(torch),
        "plugins": sorted(_plugins(), key=lambda plugin: (plugin["distribution"], plugin["name"])),
    }


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _library(name: str) -> tuple[Any, dict[str, str | None]]:
    """A module if it can be imported, its version, and why it can't be; neither if it is not installed."""
    installed = _version(name)
    try:
        module = import_module(name)
    except Exception as error:  # whatever a broken installation raises
        missing = installed is None and isinstance(error, ModuleNotFoundError) and error.name == name
        return None, {"version": installed, "error": None if missing else _cause(error)}
    return module, {"version": installed or getattr(module, "__version__", None), "error": None}


def _cause(error: Exception) -> str:
    return clip(f"{type(error).__name__}: {error}", 300)


def _cuda(torch: Any) -> dict[str, Any]:
    """The version of CUDA, or ROCm, that torch was built with, and the cards that it sees."""
    found: dict[str, Any] = {"version": None, "cards": [], "error": None}
    if torch is None:
        return found
    try:
        found["version"] = torch.version.cuda or torch.version.hip
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        found["cards"] = [torch.cuda.get_device_name(i) for i in range(count)]
    except Exception as error:  # a driver that is missing or too old
        found["error"] = _cause(error)
    return found


def _plugins() -> Iterator[dict[str, str | None]]:
    """The entry points; nothing is loaded, since plugins import torch. `kvpolicy plugins` loads them."""
    for point in entry_points(group="kvpolicy"):
        named = (None, None) if point.dist is None else (point.dist.metadata["Name"], point.dist.version)
        distribution, version = named[0] or "an unknown distribution", named[1]
        yield {"name": point.name, "module": point.value, "distribution": distribution, "version": version}


def _text(found: dict[str, Any]) -> Iterator[tuple[str, list[str]]]:
    yield "kvpolicy", [found["kvpolicy"] or "not installed"]
    yield "Python", [found["python"]]
    yield "platform", [found["platform"]]
    for name in ("torch", "transformers"):
        library = found[name]
        known, error = library["version"], library["error"]
        yield name, [f"{known or 'version unknown'}; can't be imported: {error}" if error else known or "not installed"]
    cuda = found["cuda"]
    yield "CUDA", [cuda["version"] or "none"]
    yield "cards", [cuda["error"]] if cuda["error"] else cuda["cards"] or ["none"]
    homes: dict[str, list[str]] = {}
    for plugin in found["plugins"]:
        home = f"{plugin['distribution']} {plugin['version'] or ''}".strip()
        homes.setdefault(home, []).append(plugin["name"])
    yield "plugins", [f"{home}: {', '.join(names)}" for home, names in homes.items()] or ["none"]
