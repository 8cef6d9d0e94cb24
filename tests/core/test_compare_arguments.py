"""Arguments of a comparison that can't be right, and names that are long."""

from __future__ import annotations

from typing import Any

import pytest

import kvpolicy
from kvpolicy.errors import CompareError, RecipeError
from kvpolicy.models import load_model


def test_the_function_stays_a_function_when_its_module_is_imported() -> None:
    from kvpolicy.comparison import Comparison

    assert Comparison is not None
    assert callable(kvpolicy.compare)


@pytest.mark.parametrize(
    "options",
    [{"seed": -4}, {"seed": None}, {"task": None}, {"out": 5}, {"out": ""}, {"tokens": "128"}, {"tokens": 128.5}],
    ids=str,
)
def test_arguments_of_the_wrong_kind_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(CompareError, match=f"{next(iter(options))}.* found"):
        kvpolicy.compare(["full"], n=1, progress=False, **options)


def test_the_arm_that_does_not_fit_the_model_is_named() -> None:
    model, tokenizer = load_model()
    with pytest.raises(RecipeError, match=r"arm 'kivi:group_size=48': recipe kivi: .*group_size must divide head_dim"):
        kvpolicy.compare(["full", "kivi:group_size=48"], model=model, tokenizer=tokenizer, n=1, progress=False)


def test_long_names_leave_the_numbers_whole() -> None:
    arm = "logquant:window=32,nbits=4,quantizer=int"
    result = kvpolicy.compare({arm * 4: "logquant"}, n=1, progress=False)
    assert "…" not in str(result)
    assert arm * 4 in str(result)
