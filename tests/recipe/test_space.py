"""Spaces of recipes: what is drawn, what it makes, and what is refused."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from kvpolicy.errors import RecipeError
from kvpolicy.recipe.load import load_recipe, load_yaml
from kvpolicy.recipe.space import Choices, Drawn, Range, Space, load_space

SINKS = {"policy": {"kind": "sink", "tokens": 4}, "store": "full"}
PER_CHANNEL = {"kind": "int", "nbits": "$nbits", "group_size": "$group", "per": "channel"}
PAGE: dict[str, Any] = {
    "recipe": {
        "name": "mine",
        "params": {"window": 8},
        "tiers": [
            {"policy": {"kind": "recent", "window": "$window"}, "store": "full"},
            "$sinks",
            {"keys": "$keys", "values": {"kind": "int", "nbits": "$nbits", "group_size": 32, "per": "token"}},
        ],
    },
    "search": {
        "window": {"from": 16, "to": 64, "step": 16},
        "nbits": [2, 4],
        "group": [32, 16],
        "sinks": [None, SINKS],
        "keys": [PER_CHANNEL, {"kind": "int", "nbits": 4, "group_size": 32, "per": "token"}],
    },
}


def changed(**search: Any) -> dict[str, Any]:
    return {**PAGE, "search": {**PAGE["search"], **search}}


def of(space: Space, **chosen: int) -> Drawn:
    """A combination: the first of each, but for those named."""
    return space.draw(lambda name, among: chosen.get(name, 0 if isinstance(among, Choices) else among.low))


def test_a_combination_is_the_recipe_that_one_would_write() -> None:
    space = load_space(PAGE)
    found = space.recipe(of(space, sinks=1, nbits=1, window=48, group=1))
    expected = load_yaml(
        """
        name: mine
        params: {window: 48, nbits: 4, group: 16}
        tiers:
          - {policy: {kind: recent, window: $window}, store: full}
          - {policy: {kind: sink, tokens: 4}, store: full}
          - keys: {kind: int, nbits: $nbits, group_size: $group, per: channel}
            values: {kind: int, nbits: $nbits, group_size: 32, per: token}
        """
    )
    assert found == expected
    assert load_yaml(found.to_yaml()) == found
    assert load_yaml(found.to_yaml(), window=16).tiers[0].policy.window == 16


def test_null_leaves_out_an_item_and_a_key() -> None:
    space = load_space(PAGE)
    assert [tier.policy and tier.policy.kind for tier in space.recipe(space.first()).tiers] == ["recent", None]
    page = {
        "recipe": {"tiers": [{"store": {"kind": "int", "nbits": 4, "per": "$per"}}]},
        "search": {"per": [None, "channel"]},
    }
    space = load_space(page)
    assert space.recipe({"per": 0}).tiers[0].keys == load_yaml("tiers: [{store: {kind: int, nbits: 4}}]").tiers[0].keys
    assert space.recipe({"per": 1}).tiers[0].keys.per == "channel"


def test_only_what_a_combination_uses_is_drawn() -> None:
    space = load_space(PAGE)
    assert set(of(space)) == {"window", "nbits", "group", "sinks", "keys"}
    drawn = of(space, keys=1)
    assert set(drawn) == {"window", "nbits", "sinks", "keys"}
    assert space.recipe(drawn).params == {"window": 16, "nbits": 2}


def test_the_first_is_not_valid_but_another_is() -> None:
    """Precision must never rise down the list, so that low: 4 needs high: 8."""
    high, low = ({"kind": "int", "nbits": f"${name}"} for name in ("high", "low"))
    tiers = [{"policy": {"kind": "recent", "window": 8}, "store": high}, {"store": low}]
    page = {"recipe": {"tiers": tiers}, "search": {"high": [2, 8], "low": [4, 2]}}
    space = load_space(page)
    with pytest.raises(RecipeError, match="precision must never rise"):
        space.recipe(space.first())
    with pytest.raises(RecipeError, match=r"precision must never rise.*\(with search.low\[0\], and whatever else"):
        load_space({**page, "search": {"high": [2, 3], "low": [4, 2]}})


def test_a_bundled_recipe_is_searched_by_its_parameters(tmp_path: Path) -> None:
    file = tmp_path / "two.yaml"
    file.write_text("recipe: logquant\nsearch: {window: {from: 8, to: 64, log: true}, nbits: [2, 4]}\n")
    space = load_space(file)
    recipe = space.recipe({"window": 24, "nbits": 1})
    assert recipe.tiers == load_recipe("logquant", window=24, nbits=4).tiers
    assert recipe.params == {"window": 24, "nbits": 4, "quantizer": "int"}
    assert recipe.name == "two"


def test_a_calibration_is_relative_to_the_space(tmp_path: Path) -> None:
    file = tmp_path / "two.yaml"
    page = "recipe: {calibration: own.safetensors, tiers: [{store: {kind: int, nbits: $nbits}}]}"
    file.write_text(f"{page}\nsearch: {{nbits: [2, 4]}}\n")
    recipe = load_space(file).recipe({"nbits": 1})
    assert recipe.calibration == str(tmp_path / "own.safetensors")
    assert load_yaml(recipe.to_yaml()) == recipe  # wherever it is written to


def test_ranges_are_whole_numbers_if_all_of_theirs_are() -> None:
    rng = random.Random(0)
    steps = Range.model_validate({"from": 16, "to": 64, "step": 16})
    assert {steps.some(rng) for _ in range(200)} == {16, 32, 48, 64}
    assert not Range.model_validate({"from": 1, "to": 2.0}).whole
    assert not Range.model_validate({"from": 0, "to": 1, "step": 0.25}).whole


@pytest.mark.parametrize(
    ("page", "message"),
    [
        ({"name": "mine", "tiers": []}, "found a recipe; put it below recipe"),
        ({"recipe": "logquant"}, "a space is a mapping with the keys recipe and search, found no search"),
        ({"tiers": [], "search": {}}, "unknown key 'tiers'; a recipe's keys stand below recipe"),
        ({**PAGE, "serch": 1}, r"unknown key 'serch' \(did you mean 'search'\?\)"),
        ({**PAGE, "search": {}}, "search must be a mapping of parameters to lists or ranges, found an empty mapping"),
        ({**PAGE, "recipe": 3}, "recipe must be the page of a recipe or the name of one, found 3"),
        ({**PAGE, "recipe": "logqant"}, "extends must name a bundled recipe.*did you mean 'logquant'"),
        (changed(group=[]), r"search.group: must be a list of choices or a range .*, found an empty list"),
        (changed(group=32), "search.group: must be a list of choices or a range .*, found 32"),
        (changed(nbits=[2, 2]), r"search.nbits\[1\]: choices must differ, found 2 twice"),
        (changed(nbits=[2, {1}]), r"search.nbits\[1\]: a choice must be plain data"),
        (changed(window={"from": 16}), "search.window: a range must have from and to, found no to"),
        (changed(window={"from": 16, "to": 8}), "search.window: from must be below to, found from 16 to 8"),
        (changed(window={"from": "a", "to": 8}), "search.window.from: must be a number, found 'a'"),
        (changed(window={"from": True, "to": 8}), "search.window.from: must be a number, found True"),
        (changed(window={"from": 1, "to": float("inf")}), "search.window.to: must be a number, found inf"),
        (changed(window={"from": 16, "to": 64, "step": 17}), "step must be above 0 and lead from 16 to 64 in whole"),
        (changed(window={"from": 16, "to": 64, "step": -16}), "step must be above 0"),
        (changed(window={"from": 0, "to": 64, "log": True}), "log must go with numbers above 0 and without step"),
        (changed(window={"from": 8, "to": 64, "log": 1}), "search.window.log: must be true or false, found 1"),
        (
            changed(window={"from": 8, "to": 64, "stap": 1}),
            r"'stap' \(did you mean 'step'\?\); a range has",
        ),
        (changed(**{"a b": [1, 2]}), "a parameter's name has letters, digits and _ only, found 'a b'"),
        (
            {**PAGE, "recipe": {**PAGE["recipe"], "params": {"odd": 1}}},
            r"params.odd: parameter 'odd' must be used",
        ),
        (changed(spare=[1, 2]), r"parameter 'spare' must be used as \$spare somewhere"),
        (changed(sinks=[None, "$snks"]), r"search.sinks: \$snks must stand in search, or in params of the recipe"),
        (changed(keys=[PER_CHANNEL, {"kind": "int", "x": "$keys"}]), r"a choice must not contain its own parameter"),
        (changed(nbits=[2, 40]), r"must be 1, 2, 3, 4 or 8, found 40.*with search.nbits\[1\]"),
        (changed(sinks=[None, {"policy": {"kind": "snk"}, "store": "full"}]), r"no policy of kind 'snk'.*sinks\[1\]"),
        (changed(window={"from": -16, "to": 64}), r"tiers\[0\].policy.window.*search.window, -16"),
        ({**PAGE, "recipe": {**PAGE["recipe"], "tierz": 1}}, "unknown key 'tierz'"),
        (3, "a space must be the path of a YAML file or a mapping, found 3"),
        ("", "a space must be the path"),
        ("nothing.yaml", "nothing.yaml: no such file"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_wrong_is_told(page: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_space(page)


def test_problems_have_lines(tmp_path: Path) -> None:
    file = tmp_path / "space.yaml"
    file.write_text("recipe: logquant\nsearch:\n  window: {from: 8}\n  nbits: []\n")
    with pytest.raises(RecipeError) as caught:
        load_space(file)
    assert [line.split(": ")[:2] for line in str(caught.value).splitlines()] == [
        [f"{file}:3", "search.window"],
        [f"{file}:4", "search.nbits"],
    ]
    file.write_text("- 1\n")
    with pytest.raises(RecipeError, match="a space is a mapping with the keys recipe and search, found a list"):
        load_space(file)
