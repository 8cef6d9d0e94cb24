"""The JSON schema of recipes, from the recipe model and the plugins installed."""

from __future__ import annotations

from typing import Any

from kvpolicy.interfaces.component import Component
from kvpolicy.plugins import PluginInfo, Registry, registry
from kvpolicy.recipe.build import LISTS, ONE
from kvpolicy.recipe.spec import MOST_LAYERS, Recipe, Tier
from kvpolicy.recipe.yaml import SPEC_VERSION

_PARAMETER = {"type": "string", "pattern": r"^\$[A-Za-z_]\w*$", "description": "The value of a parameter."}
_TIERS = {"type": "array", "minItems": 1, "items": {"$ref": "#/$defs/tier"}}
_SIMPLE = {"string", "integer", "number", "boolean", "null"}


def recipe_schema(plugins: Registry | None = None) -> dict[str, Any]:
    """A JSON schema (draft 2020-12) that editors can use, with every installed kind and its options."""
    plugins = registry() if plugins is None else plugins
    definitions: dict[str, Any] = {"parameter": _PARAMETER}
    for what in ("scorer", "transform", "extra", "reader", "merger"):
        known = plugins.known(what)
        kinds = _word_or_parameter(sorted(known))
        definitions[what] = _by_type("object", _union(what, known, definitions), kinds)
    definitions["policy"] = _union("policy", plugins.policies, definitions)
    definitions["quantizer"] = _union("quantizer", plugins.quantizers, definitions)
    words = _word_or_parameter(["full", "evict"])
    definitions["store"] = {
        **_by_type("object", {"$ref": "#/$defs/quantizer"}, words),
        "examples": words["examples"],
    }
    definitions["tier"] = _tier()
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "kvpolicy recipe",
        "description": "A KV cache as an ordered list of tiers, through which tokens descend.",
        "type": "object",
        "properties": _top(),
        "additionalProperties": False,
        **_unless("extends", {"required": ["tiers"]}),
        "$defs": definitions,
    }


def _top() -> dict[str, Any]:
    own: dict[str, Any] = {
        "version": {"const": SPEC_VERSION},
        "name": {"type": "string", "minLength": 1},
        "summary": {"type": "string"},
        "source": {"type": "string"},
        "calibration": {"type": "string"},
        "params": {
            "type": "object",
            "propertyNames": {"pattern": r"^[A-Za-z_]\w*$"},
            "additionalProperties": {"type": sorted(_SIMPLE)},
        },
        "model_layers": {"type": "integer", "minimum": 1, "maximum": MOST_LAYERS},
        "tiers": _TIERS,
        "layers": {
            "type": "object",
            "patternProperties": {r"^-?\d+(--?\d+|-\d+)?$": _by_type("array", _TIERS, {"const": "full"})},
            "additionalProperties": False,
        },
    }
    described = {k: {**v, "description": Recipe.model_fields[k].description} for k, v in own.items()}
    extends = "A bundled recipe, or a file relative to this one: keys here win, params are merged."
    return {**described, "extends": {"type": "string", "minLength": 1, "description": extends}}


def _tier() -> dict[str, Any]:
    policy = _by_type("null", {}, {"$ref": "#/$defs/policy"})
    sides = {
        side: {"$ref": "#/$defs/store", "description": Tier.model_fields[side].description}
        for side in ("keys", "values")
    }
    never = {"not": {}, "description": "Not beside store, which stands for keys and values."}
    both = {"$ref": "#/$defs/store", "description": "How keys and values are stored: full, evict, or a quantizer."}
    return {
        "type": "object",
        "properties": {
            "policy": {**policy, "description": Tier.model_fields["policy"].description},
            "store": both,
            **sides,
            "read": {"$ref": "#/$defs/reader", "description": Tier.model_fields["read"].description},
            "merge": {"$ref": "#/$defs/merger", "description": Tier.model_fields["merge"].description},
        },
        "additionalProperties": False,
        **_unless("store", {"required": ["keys", "values"]}, {"properties": {"keys": never, "values": never}}),
    }


def _unless(key: str, without: dict[str, Any], given: dict[str, Any] | None = None) -> dict[str, Any]:
    """What must hold without a key, and with it. Not `anyOf`, whose errors name no branch."""
    return {"if": {"required": [key]}, **({} if given is None else {"then": given}), "else": without}


def _by_type(kind: str, then: dict[str, Any], otherwise: dict[str, Any]) -> dict[str, Any]:
    """A schema for values of one type and one for all others: an error points into the branch that was meant."""
    return {"if": {"type": kind}, "then": then, "else": otherwise}


def _word_or_parameter(words: list[str]) -> dict[str, Any]:
    """One of some words, which editors offer as examples, or `$name`."""
    reference = {"type": "string", "pattern": r"^\$"}
    return {"if": reference, "then": {"$ref": "#/$defs/parameter"}, "else": {"enum": words}, "examples": words}


def _union(what: str, known: dict[str, PluginInfo[Any]], definitions: dict[str, Any]) -> dict[str, Any]:
    """One mapping told apart by its kind; where the kind is a parameter its options stay open."""
    branches: list[dict[str, Any]] = []
    for kind in sorted(known):
        name = f"{what}-{kind}"
        definitions[name] = _component(known[kind].cls, kind, name, definitions)
        chosen = {"properties": {"kind": {"const": kind}}, "required": ["kind"]}
        branches.append({"if": chosen, "then": {"$ref": f"#/$defs/{name}"}})
    schema: dict[str, Any] = {
        "type": "object",
        "properties": {"kind": _word_or_parameter(sorted(known))},
        "required": ["kind"],
    }
    return {**schema, "allOf": branches} if branches else schema


def _component(cls: type[Component], kind: str, name: str, definitions: dict[str, Any]) -> dict[str, Any]:
    schema = cls.model_json_schema(ref_template=f"#/$defs/{name}.{{model}}")
    for nested, definition in schema.pop("$defs", {}).items():
        definitions[f"{name}.{nested}"] = definition
    for option, described in schema["properties"].items():
        if option in LISTS:
            described["items"] = {"$ref": f"#/$defs/{LISTS[option]._role}"}
        elif option in ONE:
            shown = {k: described[k] for k in ("title", "description") if k in described}
            schema["properties"][option] = {**shown, "$ref": f"#/$defs/{ONE[option]._role}"}
        elif option != "kind":
            schema["properties"][option] = _or_parameter(described)
    return {**schema, "title": kind}


def _or_parameter(described: dict[str, Any]) -> dict[str, Any]:
    """The schema of an option, which may also be written `$name`."""
    outer: dict[str, Any] = {k: described[k] for k in ("title", "description", "default") if k in described}
    inner = {key: value for key, value in described.items() if key not in outer}
    variants = inner["anyOf"] if set(inner) == {"anyOf"} else [inner]
    return {**outer, "anyOf": [*map(_parameters_within, variants), {"$ref": "#/$defs/parameter"}]}


def _parameters_within(described: dict[str, Any]) -> dict[str, Any]:
    """The schema of a value whose members may be written `$name`, where it has some."""
    found = {
        key: _or_parameter(described[key])
        for key in ("items", "additionalProperties")
        if isinstance(described.get(key), dict)
    }
    if isinstance(members := described.get("properties"), dict):
        found["properties"] = {k: v if "const" in v else _or_parameter(v) for k, v in members.items()}
    return {**described, **found}
