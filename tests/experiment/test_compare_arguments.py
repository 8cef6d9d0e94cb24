"""Arguments of a comparison that can't be right, and names that are long."""

from __future__ import annotations

import json
import re
import time
import warnings
from pathlib import Path
from typing import Any

import pytest

import kvpolicy
import kvpolicy.experiment.prepared as prepared
from kvpolicy.arguments import check_prompt, check_room
from kvpolicy.errors import CompareError, KvpolicyError, RecipeError, TaskError
from kvpolicy.experiment.run import encode
from kvpolicy.hf.models import load_model
from kvpolicy.tasks.sample import Sample


def test_the_function_stays_a_function_when_its_module_is_imported() -> None:
    from kvpolicy.experiment.comparison import Comparison

    assert Comparison is not None
    assert callable(kvpolicy.compare)


@pytest.mark.parametrize(
    "options",
    [{"seed": -4}, {"seed": 1.5}, {"task": 5}, {"out": 5}, {"out": ""}, {"tokens": "128"}, {"tokens": 128.5}],
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


def rows(path: Path, *pairs: tuple[str, str]) -> Path:
    path.write_text("".join(json.dumps({"prompt": p, "answer": a}) + "\n" for p, a in pairs), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": 10_000_000}, r"tokens must be at most 1,048,576, found 10000000"),
        ({"tokens": 100_000}, r"must fit the model's max_position_embeddings, 2048, found 100000"),
        ({"n": 10**9}, r"samples times tokens must be at most 134,217,728, found 1000000000 times 1024"),
        ({"n": 10**30, "task": "arithmetic"}, r"at most 134,217,728"),
        ({"task": "LINES"}, r"did you mean 'lines'"),
        ({"model": "/nowhere"}, r"found no directory or file '/nowhere'"),
        ({"out": "/dev/null/x"}, r"/dev/null is a file"),
        ({"arms": ["logquant", "window=64"]}, r"write logquant:window=64"),
    ],
    ids=str,
)
def test_what_is_out_of_bounds_is_refused_before_anything_is_made(
    options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("made")

    monkeypatch.setattr(prepared, "load_task", never)
    monkeypatch.setattr(prepared, "load_model", never)
    arms = options.pop("arms", ["full"])
    with pytest.raises(KvpolicyError, match=message):
        kvpolicy.compare(arms, progress=False, **{"n": 1, **options})


def test_a_length_that_another_tokenizer_might_fit_is_left_to_the_tokens() -> None:
    check_room(8192, 2048)
    check_room(10**9, None)
    with pytest.raises(CompareError, match="found 8193"):
        check_room(8193, 2048)


def test_fewer_rows_than_asked_for_are_said_before_the_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loading(*_: Any, **__: Any) -> Any:
        raise CompareError("loading")

    monkeypatch.setattr(prepared, "load_model", loading)
    file = rows(tmp_path / "one.jsonl", ("a", "b"))
    with (
        pytest.warns(UserWarning, match=r"one.jsonl holds 1 row, fewer than the 16 samples asked for \(-n\)"),
        pytest.raises(CompareError, match="loading"),
    ):
        kvpolicy.compare(["full"], task=file, n=16, progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(CompareError, match="loading"):
            kvpolicy.compare(["full"], task=file, n=1, progress=False)


def test_a_long_line_is_refused_at_once(tmp_path: Path) -> None:
    file = rows(tmp_path / "long.jsonl", ("a", "b"), ("ab " * 14_000_000, "b"))
    start = time.perf_counter()
    with pytest.raises(TaskError, match=r"long.jsonl, line 2: a row must have at most 16,777,216 bytes, found more"):
        kvpolicy.compare(["full"], task=file, n=1, progress=False)
    assert time.perf_counter() - start < 4


def test_a_text_beyond_the_model_is_not_cut_into_tokens() -> None:
    model, tokenizer = load_model(device="cpu")

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("cut into tokens")

    text = "x" * (64 * 2048)
    with pytest.raises(CompareError, match=r"sample 0: .* at most 131,072 characters to fit .*, 2048, found 131,073"):
        encode([Sample("jsonl", text, "y")], never, model.config)
    with pytest.raises(
        CompareError, match=r"must fit the model's max_position_embeddings, 2048, found \d+ \+ 1 tokens"
    ):
        encode([Sample("jsonl", text[:-1], "y")], tokenizer, model.config)
    with pytest.raises(CompareError, match=r"the prompt must have at most 16,777,216 characters, found 16,777,217"):
        check_prompt("the prompt", "x" * ((1 << 24) + 1), None)


GOOD = "<k1> <v10>\n<k2> <v20>\n<k3> <v30>\n<k4> <v40>\n? <k4> <k2> <k1> <k3>\n", "<k4> <v40>\n<k2> <v20>"


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ([GOOD[1]], []),
        (
            [GOOD[1] + "\n<k1> <v10>\n<k3> <v30>\n"],
            [r"sample 0: .* gives '\\n', the last of 12 in the answer, .* below e\^-8"],
        ),
        (
            [GOOD[1], "<k4> <v41>\n<k2> <v20>", "<k4> <v41>"],
            [r"sample 1: .* gives ' <v41>', token 2 of 5 in the answer"],
        ),
    ],
    ids=["as the model would", "a newline too many", "wrong in the middle"],
)
def test_an_answer_that_the_exact_cache_finds_impossible_is_said_once(
    answers: list[str], expected: list[str], tmp_path: Path
) -> None:
    model, tokenizer = load_model(device="cpu")
    file = rows(tmp_path / "mine.jsonl", *((GOOD[0], answer) for answer in answers))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        kvpolicy.compare(
            ["full", "kivi"], model=model, tokenizer=tokenizer, task=file, n=len(answers), progress=False, attach=False
        )
    said = [str(w.message) for w in caught if "exact cache itself" in str(w.message)]
    assert len(said) == len(expected)
    for message, pattern in zip(said, expected, strict=True):
        assert re.search(pattern, message), message


@pytest.mark.parametrize("task", ["lines", "arithmetic", "code"])
def test_nothing_is_said_of_the_tasks_that_are_generated(task: str) -> None:
    model, tokenizer = load_model(device="cpu")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*exact cache itself")
        kvpolicy.compare(
            ["full"], model=model, tokenizer=tokenizer, task=task, n=2, tokens=256, progress=False, attach=False
        )
