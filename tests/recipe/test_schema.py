"""The JSON schema accepts what loads, and refuses what does not."""

from __future__ import annotations

from typing import Any

import jsonschema
import pytest
from jsonschema.exceptions import best_match
from ruamel.yaml import YAML

from kvpolicy.plugins import HOOKS, registry
from kvpolicy.recipe.build import LISTS
from kvpolicy.recipe.inherit import BUNDLED
from kvpolicy.recipe.load import bundled_names, load_recipe
from kvpolicy.recipe.schema import recipe_schema

SCHEMA = recipe_schema()
NAMELESS = ("backend", "calibrator")
"""Plugins that no recipe names."""
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)


def parsed(text: str) -> Any:
    return YAML(typ="safe", pure=True).load(text)


def test_it_is_a_schema() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


@pytest.mark.parametrize("name", bundled_names())
def test_bundled_recipes_validate_as_written_and_as_dumped(name: str) -> None:
    VALIDATOR.validate(parsed((BUNDLED / f"{name}.yaml").read_text()))
    VALIDATOR.validate(parsed(load_recipe(name).to_yaml()))
    VALIDATOR.validate(parsed(load_recipe(name).to_yaml(resolved=True)))


GOOD = [
    "{extends: kivi, params: {nbits: 4}}",
    "{version: 1, tiers: [{store: full}]}",
    "{tiers: [{store: {kind: $q, anything: 3}}], params: {q: int}}",
    '{tiers: [{store: full}], layers: {"0": full, "-1": full, "2-5": [{store: {kind: int, nbits: 2}}]}}',
    "{tiers: [{policy: {kind: recent, window: 0, flush: 8}, store: full}, {store: evict}]}",
    "{tiers: [{policy: {kind: recent, window: 0.5}, store: full}, {store: $low}], params: {low: evict}}",
]
BAD = {
    "no tiers": "{name: x}",
    "empty tiers": "{tiers: []}",
    "unknown key": "{tiers: [{store: full}], tires: 3}",
    "unknown tier key": "{tiers: [{stor: full}]}",
    "store and keys": "{tiers: [{store: full, keys: full}]}",
    "keys alone": "{tiers: [{keys: full}]}",
    "unknown kind": "{tiers: [{store: {kind: nothing}}]}",
    "no kind": "{tiers: [{store: {nbits: 2}}]}",
    "unknown option": "{tiers: [{store: {kind: int, bits: 2}}]}",
    "wrong nbits": "{tiers: [{store: {kind: int, nbits: 5}}]}",
    "group size 0": "{tiers: [{store: {kind: int, group_size: 0}}]}",
    "wrong type": "{tiers: [{policy: {kind: recent, window: many}, store: full}, {store: evict}]}",
    "budget 0": "{tiers: [{policy: {kind: log, budget: 0}, store: full}, {store: evict}]}",
    "budget above 1": "{tiers: [{policy: {kind: log, budget: 1.5}, store: full}, {store: evict}]}",
    "negative window": "{tiers: [{policy: {kind: recent, window: -1}, store: full}, {store: evict}]}",
    "flush 0": "{tiers: [{policy: {kind: recent, flush: 0}, store: full}, {store: evict}]}",
    "placement": "{placement: update, tiers: [{store: full}]}",
    "layer selector": "{tiers: [{store: full}], layers: {first: full}}",
    "newer version": "{version: 2, tiers: [{store: full}]}",
    "a list": "[1, 2]",
    "params list": "{params: [1], tiers: [{store: full}]}",
}


@pytest.mark.parametrize("text", GOOD)
def test_good_ones_validate(text: str) -> None:
    VALIDATOR.validate(parsed(text))


@pytest.mark.parametrize("case", BAD)
def test_bad_ones_do_not_validate(case: str) -> None:
    assert not VALIDATOR.is_valid(parsed(BAD[case]))


POINTS = {
    "{tiers: [{store: {kind: int, nbits: 5}}]}": ("$.tiers[0].store.nbits", "5 is not one of"),
    "{tiers: [{keys: {kind: int, nbits: 9}, values: full}]}": ("$.tiers[0].keys.nbits", "9 is not one of"),
    "{tiers: [{store: {kind: int, nbits: 2, group_size: 0}}]}": ("$.tiers[0].store.group_size", "0 is less than"),
    "{tiers: [{store: {kind: itn, nbits: 2}}]}": ("$.tiers[0].store.kind", "'itn' is not one of ["),
    "{tiers: [{store: {kind: int, bits: 2}}]}": ("$.tiers[0].store", "'bits' was unexpected"),
    "{tiers: [{store: {nbits: 2}}]}": ("$.tiers[0].store", "'kind' is a required property"),
    "{tiers: [{store: ful}]}": ("$.tiers[0].store", "'ful' is not one of ['full', 'evict']"),
    "{tiers: [{policy: {kind: recent, flush: 0}, store: full}, {store: evict}]}": (
        "$.tiers[0].policy.flush",
        "0 is less",
    ),
    "{tiers: [{policy: {kind: recent, window: many}, store: full}, {store: evict}]}": (
        "$.tiers[0].policy.window",
        "many",
    ),
    "{tiers: [{policy: {kind: attention, heads: x}, store: full}, {store: evict}]}": (
        "$.tiers[0].policy.heads",
        "'x' is not",
    ),
    "{tiers: [{policy: {kind: recnt}, store: full}, {store: evict}]}": (
        "$.tiers[0].policy.kind",
        "'recnt' is not one of",
    ),
    "{tiers: [{store: full}], layers: {'0': [{store: {kind: int, nbits: 9}}]}}": (
        "$.layers['0'][0].store.nbits",
        "9 is not",
    ),
    "{tiers: [{store: full}], layers: {'0': ful}}": ("$.layers['0']", "'full' was expected"),
    "{tiers: [{store: full, keys: full}]}": ("$.tiers[0].keys", ""),
    "{placement: update, tiers: [{store: full}]}": ("$", "'placement' was unexpected"),
    "{name: x}": ("$", "'tiers' is a required property"),
}


@pytest.mark.parametrize("text", POINTS)
def test_errors_point_at_the_option(text: str) -> None:
    error = best_match(VALIDATOR.iter_errors(parsed(text)))
    path, message = POINTS[text]
    assert error.json_path == path
    assert message in error.message


def test_editors_are_offered_the_words() -> None:
    assert SCHEMA["$defs"]["store"]["examples"] == ["full", "evict"]
    assert SCHEMA["$defs"]["transform"]["else"]["examples"] == sorted(registry().transforms)
    for what, known in (("policy", registry().policies), ("quantizer", registry().quantizers)):
        assert SCHEMA["$defs"][what]["properties"]["kind"]["examples"] == sorted(known)


def test_every_installed_kind_and_option_is_described() -> None:
    for what in HOOKS:
        for kind, info in registry().known(what).items() if what not in NAMELESS else ():
            definition = SCHEMA["$defs"][f"{what}-{kind}"]
            assert set(definition["properties"]) == set(info.cls.model_fields)
            assert definition["additionalProperties"] is False
            for option, described in definition["properties"].items():
                if option in LISTS:
                    assert described["items"] == {"$ref": f"#/$defs/{option[:-1]}"}
                elif option == "scorer":
                    assert described["$ref"] == "#/$defs/scorer"
                    assert described["description"]
                elif option != "kind":
                    assert described["description"]
                    assert {"$ref": "#/$defs/parameter"} in described["anyOf"]
