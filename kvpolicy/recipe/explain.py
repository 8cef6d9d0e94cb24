"""What is wrong with the options of a plugin, in words."""

from __future__ import annotations

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
            yield (name,) if name in options else (), _message(info, name, by_option[name], options)


def _message(info: PluginInfo[Any], name: str, problems: list[Any], options: Mapping[str, Any]) -> str:
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
        reason = str(raw) if raw is not None else problem["msg"].replace("Input should be", "must be")
        reasons[clip(reason, 300)] = None
    message = " or ".join(reasons)
    if "found" not in message and name:
        message += f", found {in_words(options.get(name, 'the default'))}"
    return message
