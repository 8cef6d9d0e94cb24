"""Presets of KVTuner as recipes, and recipes for models of one number of layers."""

from __future__ import annotations

import re
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from models import ids, tiny
from words import CACHE

from kvpolicy import attach, load_recipe, make_cache
from kvpolicy.cli.main import main
from kvpolicy.errors import RecipeError
from kvpolicy.interfaces.quantizer import AffineQuantizer
from kvpolicy.recipe.inherit import bundled_names
from kvpolicy.recipe.load import load_yaml
from kvpolicy.recipe.presets import kvtuner_recipe
from kvpolicy.recipe.spec import Recipe

KVTUNER = [name for name in bundled_names() if name.startswith("kvtuner")]


def preset(path: Path, *pairs: tuple[Any, Any]) -> Path:
    path.write_text("".join(f"{i}:\n  nbits_key: {k}\n  nbits_value: {v}\n" for i, (k, v) in enumerate(pairs)))
    return path


def widths(recipe: Recipe, layers: int) -> list[tuple[int, int]]:
    lowest = [recipe.tiers_of(i, layers)[-1] for i in range(layers)]
    return [(tier.keys.nbits, tier.values.nbits) for tier in lowest]  # type: ignore[union-attr]


PAIRS = [(4, 2), (8, 8), (8, 8), (4, 2), (2, 2), (8, 8), (4, 2), (4, 2)]


@pytest.mark.parametrize(("name", "groups"), [("m_kivi_KVTuner4_0", None), ("m_pertoken_X", None), ("m", "token")])
def test_a_preset_becomes_the_recipe_that_it_describes(name: str, groups: Any, tmp_path: Path) -> None:
    recipe = load_yaml(kvtuner_recipe(preset(tmp_path / f"{name}.yaml", *PAIRS), groups))
    assert widths(recipe, 8) == PAIRS
    assert recipe.model_layers == 8
    assert " 4.75 bits" in recipe.summary
    by_channel = groups is None and "kivi" in name
    for layer in range(8):
        tiers = recipe.tiers_of(layer, 8)
        keys, values = tiers[-1].keys, tiers[-1].values
        assert isinstance(keys, AffineQuantizer)
        assert isinstance(values, AffineQuantizer)
        assert (keys.per, values.per) == ("channel" if by_channel else "token", "token")
        assert (keys.group_size, values.group_size) == ((32, 32) if by_channel else ("head", "head"))
        assert len(tiers) == (2 if by_channel else 1)
    again = load_yaml(recipe.to_yaml())
    assert again == recipe
    resolved = load_yaml(recipe.to_yaml(resolved=True))
    assert widths(resolved, 8) == PAIRS


BAD = {
    "": "found an empty file",
    "0: 3": "0: a layer must have nbits_key and nbits_value, found 3",
    "0: {nbits_key: 4}": "0: a layer must have nbits_key and nbits_value, found nbits_key",
    "0: {0: 4, 1: 4}": "presets by head are none",
    "0: {nbits_key: 5, nbits_value: 4}": "0.nbits_key: must be one of 1, 2, 3, 4, 8 bits, found 5",
    "0: {nbits_key: 4, nbits_value: true}": "0.nbits_value: must be one of",
    "1: {nbits_key: 4, nbits_value: 4}": "must name layers 0 to 1, found none for layer 0",
    "first: {nbits_key: 4, nbits_value: 4}": "must be layers, counted from 0, found 'first'",
    "{}": "a preset must map each layer",
    "[1, 2]": "found a list",
}


@pytest.mark.parametrize("text", BAD)
def test_what_is_no_preset_is_refused_by_one_error(text: str, tmp_path: Path) -> None:
    path = tmp_path / "m_kivi.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=re.escape(BAD[text])) as found:
        kvtuner_recipe(path)
    assert len(str(found.value).splitlines()) == 1


def test_the_command_prints_a_recipe_and_refuses_what_it_does_not_know(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*arguments: Any) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["kvpolicy", "import", *map(str, arguments)])
        with pytest.raises(SystemExit) as status:
            main()
        return (int(status.value.code or 0), *capsys.readouterr())

    path = preset(tmp_path / "Some-Model_v1.yaml", (4, 4), (2, 2))
    status, out, err = run("kvtuner", path, "--groups", "channel", "--name", "mine")
    assert (status, err) == (0, "")
    assert widths(load_yaml(out), 2) == [(4, 4), (2, 2)]
    assert load_yaml(out).name == "mine"
    for arguments, message in (
        (
            (path,),
            "a preset's name must have kivi or pertoken in it, found 'Some-Model_v1.yaml'; give --groups channel",
        ),
        ((path, "--groups", "chanel"), "--groups must be channel or token, found 'chanel' (did you mean 'channel'?)"),
        ((tmp_path / "none_kivi.yaml",), "no such file"),
    ):
        status, out, err = run("kvtuner", *arguments)
        assert (status, out) == (2, "")
        assert message in err
        assert err.count("\n") == 1
    assert "METHOD must be kvtuner, found 'kvtunr' (did you mean 'kvtuner'?)" in run("kvtunr", path)[2]


@pytest.mark.parametrize("name", KVTUNER)
def test_bundled_presets_are_for_a_model_of_as_many_layers(name: str) -> None:
    recipe = load_recipe(name)
    layers = {"llama": 32, "mistral": 32, "qwen2.5-3b": 36, "qwen2.5-7b": 28}
    assert recipe.model_layers == next(n for model, n in layers.items() if model in name)
    bits = float(re.findall(r"([\d.]+) bits on average", recipe.summary)[0])
    found = widths(recipe, recipe.model_layers)
    assert abs(sum(map(sum, found)) / 2 / len(found) - bits) < 1e-3
    assert bits <= 4
    with pytest.raises(RecipeError) as error:
        make_cache(name, tiny("llama"))
    assert str(error.value).startswith(f"recipe {name}: the model must have {recipe.model_layers} layers")
    assert len(str(error.value).splitlines()) == 1


def test_the_layers_of_a_model_are_a_number() -> None:
    tiers = {"tiers": [{"store": "full"}]}
    for given in (0, -1, 2.0, True, "4", 10**6):
        with pytest.raises(RecipeError, match="model_layers must be a number from 1 to 9999"):
            load_recipe({**tiers, "model_layers": given})
    with pytest.raises(RecipeError, match=r"layers\.5 must name layers of the model, which has 4"):
        load_recipe({**tiers, "model_layers": 4, "layers": {"5": "full"}})


@pytest.mark.parametrize("groups", ["channel", "token"])
def test_layers_hold_the_widths_of_the_preset_attached_and_not(groups: Any, tmp_path: Path) -> None:
    model = tiny("llama")
    pairs = [((8, 8), (4, 2), (2, 2), (8, 4))[i % 4] for i in range(model.config.num_hidden_layers)]
    text = kvtuner_recipe(preset(tmp_path / "preset.yaml", *pairs), groups)
    heads, dim = model.config.num_key_value_heads, model.config.head_dim
    found = []
    for attached in (False, True):
        cache = make_cache(load_yaml(text), model)
        with torch.no_grad(), attach(model) if attached else nullcontext():
            steps = [model(ids(n, seed=n), **{CACHE: cache}).logits for n in (96, 1, 1, 1)]
        found.append(torch.cat(steps, dim=1))
        cache.commit()
        for layer, (k, v) in enumerate(pairs):
            for side, bits in (("keys", k), ("values", v)):
                store = cache.layers[layer].tiers.stores[side][-1]
                assert store.bytes()["codes"] == heads * dim * bits * (99 if groups == "token" else 96) // 8
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)
