"""The JSON schema of experiments."""

from __future__ import annotations

from typing import Any

from kvpolicy.experiment.engines import NAMES
from kvpolicy.experiment.experiment import Experiment
from kvpolicy.recipe.schema import recipe_schema


def experiment_schema() -> dict[str, Any]:
    """A JSON schema (draft 2020-12) of experiments, with recipes written in them."""
    schema, recipe = Experiment.model_json_schema(), recipe_schema()
    inline = {key: recipe[key] for key in ("type", "properties", "additionalProperties", "if", "else")}
    definitions = {**schema.pop("$defs"), **recipe["$defs"], "recipe": inline}
    described = definitions["Arm"]["properties"]["recipe"]
    definitions["Arm"]["properties"]["recipe"] = {
        **described,
        "anyOf": [{"type": "string"}, {"$ref": "#/$defs/recipe"}],
    }
    words = {"type": "string", "minLength": 1}
    whole = {"required": ["tiers"]}
    arm = {"if": words, "else": {"if": whole, "then": {"$ref": "#/$defs/recipe"}, "else": {"$ref": "#/$defs/Arm"}}}
    schema["properties"]["arms"]["items"] = arm
    schema["properties"]["tasks"]["items"] = {"if": {"type": "string"}, "then": words, "else": {"$ref": "#/$defs/Task"}}
    engine = schema["properties"]["engine"]
    engine["anyOf"] = [{"enum": list(NAMES)}, *engine["anyOf"]]
    return {"$schema": recipe["$schema"], **schema, "title": "kvpolicy experiment", "$defs": definitions}
