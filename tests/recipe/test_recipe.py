"""What a recipe may say: parameters, inheritance, layers, anchors, and YAML without loss."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpolicy.errors import RecipeError
from kvpolicy.plugins import registry
from kvpolicy.recipe.load import Recipe, Tier, load_recipe, load_yaml

INT = registry().quantizers["int"].cls
RECENT = registry().policies["recent"].cls
LOW = {"kind": "int", "nbits": 2}
FULL = [{"store": "full"}]


def two(policy: Any = None, store: Any = None, **more: Any) -> dict[str, Any]:
    upper = {"policy": policy or {"kind": "recent", "window": 8}, "store": "full"}
    return {"tiers": [upper, {"store": store or LOW}], **more}


def test_sources_a_name_a_path_a_mapping_and_a_recipe(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("params: {w: 8}\ntiers:\n  - {policy: {kind: recent, window: $w}, store: full}\n  - store: evict\n")
    recipe = load_recipe(path)
    assert recipe.name == "mine"
    assert load_recipe(str(path)) == recipe
    assert load_recipe(recipe) is recipe
    assert load_recipe({"name": "mine", "params": {"w": 8}, "tiers": recipe._template["tiers"]}) == recipe
    assert load_recipe("logquant").name == "logquant"


def test_parameters_come_as_arguments_or_on_the_shell(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("extends: logquant\n")
    expected = load_recipe("logquant", window=64, nbits=4)
    assert expected.tiers[0].policy == RECENT(window=64, flush=64)
    assert load_recipe("logquant:window=64,nbits=4") == expected
    assert load_recipe(" logquant:window = 64 , nbits = 4".strip()) == expected
    assert load_recipe(f"{path}:window=64,nbits=4").tiers == expected.tiers
    assert load_recipe("logquant:window=64", nbits=4) == expected
    assert load_recipe(load_recipe("logquant:nbits=4"), window=64) == expected


def test_shell_values_are_typed_as_in_yaml() -> None:
    assert load_recipe("streaming-llm:window=0.25").params["window"] == 0.25
    assert load_recipe("logquant:quantizer=hqq,nbits=3").tiers[2].keys.nbits == 3
    with pytest.raises(RecipeError, match="found 'many'"):
        load_recipe("streaming-llm:window=many")


def test_the_window_in_a_file_is_any_path_like(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "no suffix").write_text("tiers: [{store: full}]")
    assert load_recipe("no suffix").name == "no suffix"
    (tmp_path / "a:b=c.yaml").write_text("tiers: [{store: full}]")
    assert load_recipe("a:b=c.yaml").tiers == (Tier(keys="full", values="full"),)


def test_a_parameter_may_stand_anywhere() -> None:
    text = """
    params: {kind: recent, w: 8, low: evict, who: somebody}
    name: $who
    tiers: [{policy: {kind: $kind, window: $w}, store: full}, {store: $low}]
    """
    recipe = load_yaml(text)
    assert recipe.name == "somebody"
    assert recipe.tiers[0].policy == RECENT(window=8)
    assert load_yaml(text, low="full").tiers[1].keys == "full"
    assert load_yaml(recipe.to_yaml()) == recipe


def test_anchors_and_merge_keys_work() -> None:
    recipe = load_yaml(
        """
        tiers:
          - {policy: {kind: recent}, keys: full, values: &low {kind: int, nbits: 4, per: token}}
          - {keys: {<<: *low, nbits: 2}, values: *low}
        """
    )
    assert recipe.tiers[0].values == recipe.tiers[1].values == INT(nbits=4)
    assert recipe.tiers[1].keys == INT(nbits=2)


def test_a_child_overrides_keys_and_merges_params(tmp_path: Path) -> None:
    sub = tmp_path / "sub"
    sub.mkdir()
    (sub / "base.yaml").write_text("extends: logquant\nsummary: Mine.\nparams: {nbits: 4}\n")
    (tmp_path / "child.yaml").write_text('extends: sub/base.yaml\nparams: {window: 7}\nlayers: {"0": full}\n')
    child = load_recipe(tmp_path / "child.yaml")
    assert (child.name, child.summary) == ("child", "Mine.")
    assert child.params == {"window": 7, "nbits": 4, "quantizer": "int"}
    assert child.tiers == load_recipe("logquant:window=7,nbits=4").tiers
    assert child.tiers_of(0, 4) != child.tiers_of(1, 4)
    assert load_yaml(child.to_yaml()) == child


def test_a_child_with_tiers_of_its_own_drops_parameters_that_it_does_not_use() -> None:
    assert load_recipe({"extends": "kivi", "tiers": FULL}).params == {}
    assert load_recipe({"extends": "kivi", "tiers": FULL}).name == "kivi"


def test_a_null_default_must_be_given() -> None:
    text = "params: {w: null}\ntiers: [{policy: {kind: recent, window: $w}, store: full}, {store: evict}]"
    with pytest.raises(RecipeError, match=r"<string>:2: tiers\[0\].policy.window: parameter 'w' has no default and"):
        load_yaml(text)
    assert load_yaml(text, w=3).tiers[0].policy == RECENT(window=3)


def test_instances_of_plugins_may_stand_in_a_mapping() -> None:
    recipe = load_recipe(two(RECENT(window=9), INT(nbits=2)))
    assert recipe.tiers[0].policy == RECENT(window=9)
    assert load_yaml(recipe.to_yaml()) == recipe


def test_a_recipe_built_in_python_is_checked_and_dumped() -> None:
    recipe = Recipe(name="x", tiers=(Tier(policy=RECENT(), keys="full", values="full"), Tier(keys=INT(), values=INT())))
    assert load_yaml(recipe.to_yaml()) == recipe
    assert recipe.model_copy(update={"name": "y"}).name == "y"
    with pytest.raises(RecipeError, match=r"recipe x: tiers\[0\]: every tier but the last must have a policy"):
        Recipe(name="x", tiers=(Tier(keys="full", values="full"), Tier(keys="full", values="full")))
    with pytest.raises(RecipeError, match="built in Python and has none"):
        load_recipe(recipe, window=3)


def test_recipes_are_values() -> None:
    recipe = load_recipe("kivi")
    assert recipe == load_recipe("kivi") != load_recipe("kivi:nbits=4")
    assert copy.deepcopy(recipe) == recipe == pickle.loads(pickle.dumps(recipe))
    assert len({recipe, load_recipe("kivi")}) == 1
    assert pickle.loads(pickle.dumps(recipe)).to_yaml() == recipe.to_yaml()


def test_a_changed_copy_dumps_what_it_is() -> None:
    recipe = load_recipe("kivi")
    renamed = recipe.model_copy(update={"name": "other", "layers": {"0": "full"}})
    assert load_yaml(renamed.to_yaml()) == renamed
    assert (renamed.name, renamed.tiers, renamed.params) == ("other", recipe.tiers, {})


def test_layers_choose_tiers_by_index_from_either_end_and_by_range() -> None:
    recipe = load_recipe(two(layers={"0": "full", "-1": "full", "2-5": [{"store": LOW}], 7: [{"store": "full"}]}))
    full, low, own = load_recipe("full").tiers, (Tier(keys=INT(nbits=2), values=INT(nbits=2)),), recipe.tiers
    assert [recipe.tiers_of(i, 10) for i in range(10)] == [full, own, low, low, low, low, own, full, own, full]
    assert load_yaml(recipe.to_yaml()) == recipe
    assert load_yaml(recipe.to_yaml(resolved=True)) == recipe


@pytest.mark.parametrize("selector", ["-4--2", "6-8", "6--2", "-4-8"])
def test_ranges_may_be_counted_from_the_end(selector: str) -> None:
    recipe = load_recipe(two(layers={selector: "full"}))
    assert [i for i in range(10) if recipe.tiers_of(i, 10) != recipe.tiers] == [6, 7, 8]


def test_a_selector_beyond_the_model_or_overlapping_in_it_is_refused() -> None:
    recipe = load_recipe(two(layers={"3": "full", "-1": "full"}))
    assert recipe.tiers_of(3, 5) == load_recipe("full").tiers
    with pytest.raises(RecipeError, match=r"layer 3 of 4 in both layers\.3 and layers\.-1"):
        recipe.tiers_of(0, 4)
    with pytest.raises(RecipeError, match=r"layers\.3 must name layers of the model, which has 3 \(0 to 2"):
        recipe.tiers_of(0, 3)


texts = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=40).filter(lambda t: not t.startswith("$"))
budgets = st.integers(1, 500) | st.floats(0.01, 0.99)
policies = st.one_of(
    st.builds(lambda w, f: {"kind": "recent", "window": w, "flush": f}, budgets, st.integers(1, 99)),
    st.builds(lambda b: {"kind": "log", "budget": b}, budgets),
)
stores = st.builds(
    lambda nbits, size, per: {"kind": "int", "nbits": nbits, "group_size": size, "per": per},
    st.sampled_from([1, 2, 3, 4, 8]),
    st.sampled_from(["auto", "head", 32]),
    st.sampled_from(["token", "channel"]),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(policies, min_size=1, max_size=4), stores | st.just("evict"), texts, texts.filter(str.strip), st.data())
def test_any_recipe_survives_yaml(uppers: list[Any], last: Any, summary: str, name: str, data: st.DataObject) -> None:
    tiers = [{"policy": policy, "store": "full"} for policy in uppers] + [{"store": last}]
    layers = data.draw(st.dictionaries(st.sampled_from(["0", "2-3", "-1"]), st.sampled_from(["full", tiers])))
    recipe = load_recipe({"name": name, "summary": summary, "tiers": tiers, "layers": layers})
    assert load_yaml(recipe.to_yaml()) == recipe
    assert load_yaml(recipe.to_yaml(resolved=True)) == recipe


@pytest.mark.parametrize("written", ["mine.safetensors", "$file"])
def test_the_calibration_of_a_file_lies_beside_it_whatever_extends_it(tmp_path: Path, written: str) -> None:
    (tmp_path / "sub").mkdir()
    params = "params: {file: mine.safetensors}\n" if written == "$file" else ""
    (tmp_path / "sub" / "base.yaml").write_text(
        f"calibration: {written}\n{params}tiers: [{{store: {{kind: int, nbits: 4, scale_dtype: model}}}}]\n"
    )
    (tmp_path / "child.yaml").write_text("extends: sub/base.yaml\n")
    expected = str(tmp_path / "sub" / "mine.safetensors")
    assert load_recipe(tmp_path / "sub" / "base.yaml").calibration == expected
    assert load_recipe(tmp_path / "child.yaml").calibration == expected
