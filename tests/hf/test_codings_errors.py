"""Transforms and quantizers that don't fit, or misbehave, are named with their place."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from kvpolicy_hadamard import Hadamard
from kvpolicy_int import Int
from layers import HEAD_DIM, Layer

from kvpolicy import Site, load_recipe
from kvpolicy.errors import PluginError, RecipeError
from kvpolicy.recipe.load import load_yaml
from kvpolicy.storage.make import make_store


def test_what_a_transform_needs_and_nobody_has_is_refused_by_name() -> None:
    class Asks(Hadamard):
        needs: ClassVar[frozenset[str]] = frozenset({"queries"})

    class Wants(Hadamard):
        needs: ClassVar[frozenset[str]] = frozenset({"calibration"})

    for transform, side, word in ((Asks(), "values", "queries"), (Wants(), "keys", "a calibration")):
        recipe = load_recipe({"tiers": [{"store": Int(transforms=(transform,))}]})
        with pytest.raises(
            RecipeError, match=rf"tiers\[0\]\.{side}\.transforms\[0\], layer 0: transform 'hadamard' needs {word}"
        ):
            Layer(recipe)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"forward": lambda *a: a[1][..., :1]}, "must give .* from forward, found"),
        ({"forward": lambda *a: a[1].double()}, "must give .* from forward, found .* torch.float64"),
        ({"inverse": lambda *a: None}, "must give .* from inverse, found NoneType"),
        ({"adjoint": lambda *a: 3}, "must give .* from adjoint, found int"),
        ({"forward": lambda *a: a[1].add_(1)}, "must not change what forward is given"),
        ({"fit": lambda *a: [1]}, "must give named tensors from fit"),
        ({"fit": lambda *a: {"x": torch.zeros(7, 2)}}, r"\[batch or 1, kv_heads or 1, \.\.\.\]"),
        ({"fit": lambda *a: 1 / 0}, "transform 'hadamard': fit must not fail, found ZeroDivisionError"),
    ],
)
def test_transforms_that_misbehave_are_named(change: dict[str, Any], told: str) -> None:
    liar: Any = type("Liar", (Hadamard,), {"__module__": __name__, **change})
    store: Any = make_store(Int(nbits=8, group_size=8, transforms=(liar(),)), HEAD_DIM)

    def used() -> None:
        store.append(torch.randn(2, 2, 9, HEAD_DIM))
        store.take(torch.arange(2).numpy(), torch.float32)
        assert store.direct

    with pytest.raises(PluginError, match=told):
        used()


def test_a_recipe_of_before_says_what_replaces_its_option() -> None:
    for value in (True, False):
        with pytest.raises(
            RecipeError, match=r"tiers\[0\]\.store: channel_separable is .*transforms: \[\{kind: scale\}\]"
        ):
            load_recipe({"tiers": [{"store": {"kind": "int", "channel_separable": value}}]})


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (["hadamrd"], r"transforms\[0\].*hadamrd"),
        (
            [{"kind": "hadamard", "sed": 1}],
            r"transforms\[0\]\.sed: unknown option 'sed' of hadamard",
        ),
        ([{"kind": "hadamard", "seed": -1}], r"transforms\[0\]\.seed: must be .* 0, found -1"),
        ("hadamard", r"transforms: must be a list"),
        (
            [{"kind": "int"}],
            r"transforms\[0\]\.kind: no transform of kind 'int', which is a quantizer; installed: hadamard",
        ),
        ([3], r"transforms\[0\]: a transform must be a kind or a mapping with kind and options, found"),
    ],
)
def test_what_is_wrong_with_a_list_of_transforms_is_told_by_its_place(value: Any, told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        load_recipe({"tiers": [{"store": {"kind": "int", "transforms": value}}]})


def test_transforms_are_parameters_and_are_written_again() -> None:
    text = "params: {t: hadamard, s: 3}\ntiers:\n- {store: {kind: int, transforms: [$t, {kind: hadamard, seed: $s}]}}\n"
    recipe = load_yaml(text)
    assert recipe.tiers[0].keys.transforms == (Hadamard(), Hadamard(seed=3))  # type: ignore[union-attr]
    for resolved in (False, True):
        assert load_yaml(recipe.to_yaml(resolved=resolved)).tiers == recipe.tiers


def test_a_rotation_of_an_odd_number_of_channels_would_do_nothing() -> None:
    with pytest.raises(RecipeError, match=r"hadamard needs an even head_dim, found 9"):
        make_store(Int(nbits=4, group_size="head", transforms=(Hadamard(),)), 9)


@pytest.mark.parametrize("channels", [80, 96, 112, 20])
@pytest.mark.parametrize("seed", [None, 3])
def test_a_rotation_of_any_even_number_of_channels_is_orthonormal(channels: int, seed: int | None) -> None:
    transform, x = Hadamard(seed=seed), torch.eye(channels, dtype=torch.float64)[None, None]
    state = transform.fit(x, None, Site())
    matrix = transform.forward(x, state, None)
    torch.testing.assert_close(matrix @ matrix.transpose(2, 3), x)
    block = channels & -channels
    assert (matrix.abs() > 0).sum() == channels * block
    torch.testing.assert_close(matrix.abs().amax(), torch.tensor(block**-0.5, dtype=torch.float64))
