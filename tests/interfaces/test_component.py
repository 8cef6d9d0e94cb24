"""Options are strict: true is no number, 2.0 no integer, and the error says what is allowed."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from kvpolicy import load_recipe
from kvpolicy.errors import PluginError, RecipeError
from kvpolicy.interfaces.component import Component
from kvpolicy.interfaces.quantizer import AffineQuantizer
from kvpolicy.plugins import registry
from kvpolicy.recipe.load import Recipe, load_yaml

POLICY, QUANTIZER = registry().policies, registry().quantizers


class Choices(Component):
    """Literals of several types, by themselves and beside plain types."""

    kind: str = "choices"
    number: Literal[1, 2, 3] = 1
    mixed: Literal[0, "auto", True] = "auto"
    either: Literal[1, "auto"] | str = "auto"
    real: Literal[0] | float = 0.5
    optional: Literal[1, 2] | None = None


values = st.one_of(
    st.sampled_from([0, 1, 2, 3, 4, "auto", "1", None, True, False, 0.0, 1.0, 2.0, 0.5, np.int64(1), np.float32(2.0)]),
    st.integers(-(2**53), 2**53),
    st.floats(allow_nan=False, allow_infinity=False),
)
ALLOWED: dict[str, Any] = {
    "number": lambda v: type(v) is int and 1 <= v <= 3,
    "mixed": lambda v: (type(v) is int and v == 0) or v is True or (isinstance(v, str) and v == "auto"),
    "either": lambda v: isinstance(v, str) or (type(v) is int and v == 1),
    "real": lambda v: isinstance(v, int | float | np.number) and not isinstance(v, bool),
    "optional": lambda v: v is None or (type(v) is int and v in (1, 2)),
}


@settings(max_examples=300, deadline=None, derandomize=True)
@given(name=st.sampled_from(list(ALLOWED)), value=values)
def test_choices_are_told_apart_by_type(name: str, value: Any) -> None:
    if ALLOWED[name](value):
        found = getattr(Choices(**{name: value}), name)
        assert found == value
        assert type(found) is type(value) or name == "real"
    else:
        with pytest.raises(ValidationError):
            Choices(**{name: value})


@pytest.mark.parametrize("wrong", [True, False, 1.0, 2.0, "2", np.int64(2), np.True_, None, [2], 5])
def test_nbits_is_one_of_some_integers(wrong: Any) -> None:
    for info in QUANTIZER.values():
        if issubclass(info.cls, AffineQuantizer):
            with pytest.raises(ValidationError, match="nbits"):
                info.cls(nbits=wrong)


@pytest.mark.parametrize("wrong", [True, 2.0, "2", 1e3, np.float64(3.0)])
@pytest.mark.parametrize(("kind", "option"), [("recent", "flush"), ("sink", "tokens"), ("attention", "every")])
def test_counts_are_integers(kind: str, option: str, wrong: Any) -> None:
    with pytest.raises(ValidationError, match=option):
        POLICY[kind].cls(**{option: wrong})


YAML = """
name: numbers
params: {nbits: 2, flush: 1, window: 8, optimal: false}
tiers:
  - {policy: {kind: recent, window: $window, flush: $flush}, store: full}
  - {store: {kind: int, nbits: $nbits, symmetric: $optimal}}
"""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nbits: true", "nbits: must be 1, 2, 3, 4 or 8, found True, a bool (from parameter 'nbits')"),
        ("nbits: 2.0", "nbits: must be 1, 2, 3, 4 or 8, found 2.0, a float (from parameter 'nbits')"),
        ("nbits: '2'", "nbits: must be 1, 2, 3, 4 or 8, found '2'; write 2 without quotes (from parameter 'nbits')"),
        ("flush: 1e3", "flush: must be a valid integer, found 1000.0"),
        ("flush: true", "flush: must be a valid integer, found True"),
        ("window: 1e3", "found 1000.0; write an integer for a number of tokens"),
        ("window: true", "a budget is a number of tokens (an integer) or a fraction"),
        ("optimal: 1", "symmetric: must be true or false, found 1"),
    ],
)
def test_yaml_numbers_of_the_wrong_type_are_named(text: str, message: str) -> None:
    name = text.partition(": ")[0]
    default = {"nbits": "2", "flush": "1", "window": "8", "optimal": "false"}[name]
    with pytest.raises(RecipeError) as info:
        load_yaml(YAML.replace(f"{name}: {default}", text))
    assert message in str(info.value)


@pytest.mark.parametrize("word", ["nbits=2", "nbits=8", "window=64", "flush=16"])
def test_numbers_on_the_shell_are_numbers(word: str, tmp_path: Any) -> None:
    (tmp_path / "r.yaml").write_text(YAML)
    name, _, value = word.partition("=")
    assert load_recipe(f"{tmp_path}/r.yaml:{word}").params[name] == int(value)


@pytest.mark.parametrize(
    ("word", "message"), [("nbits=true", "found True, a bool"), ("nbits=2.0", "found 2.0"), ("flush=1e3", "1000.0")]
)
def test_others_on_the_shell_are_refused(word: str, message: str, tmp_path: Any) -> None:
    (tmp_path / "r.yaml").write_text(YAML)
    with pytest.raises(RecipeError, match=message):
        load_recipe(f"{tmp_path}/r.yaml:{word}")


@pytest.mark.parametrize("version", [True, 1.0, "1"])
def test_a_version_is_an_integer(version: Any) -> None:
    tiers = load_recipe("full").tiers
    assert Recipe(version=1, tiers=tiers)
    with pytest.raises(ValidationError, match="version"):
        Recipe(version=version, tiers=tiers)


def test_a_class_that_declares_its_options_anew_is_held_to_the_same() -> None:
    class Five(QUANTIZER["int"].cls):  # type: ignore[misc, name-defined]
        nbits: int = 5

    class Never(POLICY["attention"].cls):  # type: ignore[misc, name-defined]
        every: int = 0

    with pytest.raises(PluginError, match=r"'int' must have nbits 1, 2, 3, 4 or 8.*found 5"):
        Five()
    with pytest.raises(PluginError, match=r"'attention': every must be an integer, 1 or more.*0"):
        Never()
