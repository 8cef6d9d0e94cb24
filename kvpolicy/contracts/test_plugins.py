"""Plugins as such: they load, and say what their options are."""

from __future__ import annotations

from typing import Any

import pytest

from kvpolicy.contracts.samples import required_options
from kvpolicy.plugins import HOOKS, PluginInfo, registry

INFOS: list[PluginInfo[Any]] = [info for what in HOOKS for info in registry().known(what).values()]
EVERY = pytest.mark.parametrize("info", INFOS, ids=[info.kind for info in INFOS])


def test_no_plugin_failed_to_load() -> None:
    failed = [f"{b.name} of {b.distribution} {b.version}: {b.cause}" for b in registry().broken]
    assert not failed, "\n".join(failed)


@EVERY
def test_every_option_is_described(info: PluginInfo[Any]) -> None:
    bare = [name for name, field in info.cls.model_fields.items() if name != "kind" and not field.description]
    assert not bare, f"{info.kind}: give these options a description: {', '.join(bare)}"


@EVERY
def test_the_class_is_frozen_and_refuses_unknown_options(info: PluginInfo[Any]) -> None:
    assert info.cls.model_config.get("frozen"), f"{info.kind} must stay frozen"
    assert info.cls.model_config.get("extra") == "forbid", f"{info.kind} must forbid unknown options"


@EVERY
def test_required_options_have_examples(info: PluginInfo[Any]) -> None:
    bare = [name for name, field in info.cls.model_fields.items() if field.is_required() and not field.examples]
    assert not bare, f"{info.kind}: give these required options `examples`, for this suite: {', '.join(bare)}"


@EVERY
def test_the_class_has_a_summary(info: PluginInfo[Any]) -> None:
    assert (info.cls.__doc__ or "").strip(), f"{info.kind}: write a docstring that says what it does"


@EVERY
def test_the_defaults_are_accepted(info: PluginInfo[Any]) -> None:
    made = info.cls.model_validate(required_options(info.cls))
    again = info.cls.model_validate_json(made.model_dump_json())
    assert again == made, f"{info.kind} must be the same after it was written and read"


@EVERY
def test_options_have_a_schema(info: PluginInfo[Any]) -> None:
    assert info.cls.model_json_schema()["properties"].keys() == info.cls.model_fields.keys()
