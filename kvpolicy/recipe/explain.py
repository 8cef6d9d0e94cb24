"""What is wrong with the options of a plugin, in words."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from pydantic import ValidationError

from kvpolicy.plugins import PluginInfo
from kvpolicy.recipe.yaml import Path_
from kvpolicy.words import clip, in_words, listed, quoted, suggest


def explain(
    info: PluginInfo[Any], error: ValidationError, options: Mapping[str, Any], spoilt: Collection[str] = ()
) -> Iterator[tuple[Path_, str]]:
    """Where options are wrong, and how: each option once.

    Args:
        info: the plugin.
        error: what pydantic says.
        options: the options that were validated.
        spoilt: names of other options, whose errors are reported already.
    """
    by_option: dict[str, list[Any]] = {}
    for problem in error.errors(include_url=False):
        by_option.setdefault(str(problem["loc"][0]) if problem["loc"] else "", []).append(problem)
    order = {name: place for place, name in enumerate(options)}
    for name in sorted(by_option, key=lambda name: order.get(name, len(order))):
        if name not in spoilt and (name or not spoilt):
            raised = by_option[name][0].get("ctx", {}).get("error")
            place = (name, *getattr(raised, "place", ())) if name in options else ()
            yield place, _message(info, place, name, by_option[name], options)


def _message(info: PluginInfo[Any], place: Path_, name: str, problems: list[Any], options: Mapping[str, Any]) -> str:
    allowed = [option for option in info.cls.model_fields if option != "kind"]
    known = f"; options of {info.kind}: {listed(allowed) or 'none'}"
    first = problems[0]["type"]
    if first == "extra_forbidden":
        return f"unknown option {quoted(name)} of {info.kind}{suggest(name, allowed)}{known}"
    if first == "missing":
        return f"option {quoted(name)} of {info.kind} has no default and must be given, found nothing{known}"
    reasons: dict[str, None] = {}
    for problem in problems:
        raw = problem.get("ctx", {}).get("error")
        reason = str(raw) if raw is not None else _plainly(problem["msg"])
        reasons[clip(reason, 300)] = None
    message = " or ".join(reasons)
    if "found" not in message and name:
        message += f", found {in_words(options.get(name, 'the default'))}"
    return message + _remedy(info, message, name, place, options)


def _plainly(message: str) -> str:
    return message.replace("Input should be", "must be").replace("a valid boolean", "true or false")


def _remedy(info: PluginInfo[Any], message: str, name: str, place: Path_, options: Mapping[str, Any]) -> str:
    """What to write where a number was written as a text, or nothing at all."""
    value: Any = options if place else None
    for step in place:
        value = value[step]
    if value is None and place == (name,) and not info.cls.model_fields[name].is_required():
        return "; leave it out for its default"
    if not isinstance(value, str) or not re.search(r"number|integer|\d", message.partition(", found")[0]):
        return ""
    if re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)", value):
        return f"; write {value} without quotes"
    share = re.fullmatch(r"(\d+(?:\.\d+)?)\s*%", value)
    return f"; write {float(share[1]) / 100:g}" if share and "fraction" in message else ""
