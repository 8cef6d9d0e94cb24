"""Generators, loader and scoring of the evaluation tasks."""

from __future__ import annotations

import json
import random
import re
import warnings
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvpolicy.errors import KvpolicyError, TaskError
from kvpolicy.tasks import lines, source
from kvpolicy.tasks.files import JsonLines
from kvpolicy.tasks.load import load_task
from kvpolicy.tasks.sample import Sample
from kvpolicy.tasks.scorers import score

SCORERS = {"lines": "pairs", "arithmetic": "pairs", "code": "code", "jsonl": "exact"}


def of(task: str, answer: str) -> Sample:
    return Sample(task, "p", answer, scorer=SCORERS[task])


def read(file: Path) -> list[Sample]:
    """All samples of a file, in order."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return JsonLines(path=str(file)).samples(10**6, 0)


@pytest.mark.parametrize("name", ["lines", "arithmetic", "code"])
def test_samples_depend_on_the_seed_alone(name: str) -> None:
    first = load_task(name, 3, seed=7, tokens=300)
    random.seed(1)
    assert load_task(name, 3, seed=7, tokens=300) == first
    assert load_task(name, 3, seed=8, tokens=300) != first
    assert len(first) == 3
    assert all(sample.task == name and sample.prompt and sample.answer for sample in first)


def test_lines_ask_for_lines_of_the_context() -> None:
    for sample in load_task("lines", 5, seed=0, tokens=512):
        context, request = sample.prompt.removeprefix(lines.LINES_HEADER).split("? ")
        pairs = context.splitlines()
        assert len({pair.split()[0] for pair in pairs}) == len(pairs)
        answered = sample.answer.split("\n")
        assert set(answered) <= set(pairs)
        assert [line.split()[0] for line in answered] == request.split()


def test_requested_lines_lie_anywhere_in_the_context() -> None:
    places = []
    for sample in load_task("lines", 100, seed=0, tokens=512):
        pairs = sample.prompt.removeprefix(lines.LINES_HEADER).splitlines()[:-1]
        places += [pairs.index(line) / len(pairs) for line in sample.answer.split("\n")]
    quarters = [sum(low <= place < low + 0.25 for place in places) for low in (0, 0.25, 0.5, 0.75)]
    assert min(quarters) > 0.15 * len(places)


def test_arithmetic_is_right_modulo_ten_and_defined_in_order() -> None:
    for sample in load_task("arithmetic", 5, seed=3, tokens=400):
        known: dict[str, int] = {}
        context = sample.prompt.removeprefix(lines.ARITHMETIC_HEADER).split("? ")[0]
        for line in context.splitlines():
            name, left, operator, right = re.fullmatch(r"(<k\d+>)=(<k\d+>|\d)([-+*])(\d)", line).groups()  # type: ignore[union-attr]
            a, b = known[left] if left in known else int(left), int(right)
            known[name] = {"+": a + b, "-": a - b, "*": a * b}[operator] % 10
        stated = [line.split("=") for line in sample.answer.split("\n")]
        assert len(stated) == lines.STEPS
        assert all(f"{name}={text}\n" in context for name, text, _ in stated)
        assert [known[name] for name, _, _ in stated] == [int(value) for _, _, value in stated]


def test_code_is_held_out_and_continues_its_file() -> None:
    texts = [text for _, text in source.stdlib_files("test")]
    for sample in load_task("code", 5, seed=0, tokens=512):
        assert len(sample.answer) == source.ANSWER_CHARACTERS
        assert any(sample.prompt + sample.answer in text for text in texts)


def test_splits_are_disjoint_and_follow_the_module() -> None:
    held_out = {name for name, _ in source.stdlib_files("test")}
    trained = {name for name, _ in source.stdlib_files("train")}
    assert held_out
    assert trained
    assert not held_out & trained
    modules = [{name.split("/")[0] for name in split} for split in (held_out, trained)]
    assert not modules[0] & modules[1]
    assert "tarfile.py" in held_out
    assert "argparse.py" in trained
    assert not any("site-packages" in name for name in held_out | trained)
    for module in ("tarfile", "argparse"):
        split = source.split_of(f"{module}.py")
        assert source.split_of(f"{module}/__init__.py") == split
        assert source.split_of(f"{module}/_local.py") == split
        assert source.split_of(f"test/test_{module}.py") == split


def test_a_standard_library_without_sources_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source.sysconfig, "get_path", lambda name: str(tmp_path / "none"))
    with pytest.raises(TaskError, match=r"at least .* characters in the test split, found none"):
        load_task("code", 1, 0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: load_task("lines", 1, 0, tokens=20), "lines: tokens must be at least .*found 20"),
        (lambda: load_task("arithmetic", 1, 0, tokens=30), "arithmetic: tokens must be.*found 30"),
        (lambda: load_task("code", 1, 0, tokens=5), "code: tokens must be at least 128, found 5"),
        (lambda: load_task("code:split=dev", 1, 0), "option 'split' must be 'test' or 'train', found 'dev'"),
        (lambda: load_task("lines", -1, 0), "number of samples must be at least 0, found -1"),
        (lambda: load_task("lines", 1, 0, tokens=10**7), "lines: tokens must be at most 1,048,576, found 10000000"),
        (lambda: load_task("arithmetic", 1, 0, tokens=10**7), "tokens must be at most 1,048,576, found 10000000"),
        (lambda: load_task("code", 1, 0, tokens=10**7), "tokens must be at most 1,048,576, found 10000000"),
        (lambda: load_task("lines", 10**9, 0), "must be at most 134,217,728, found 1000000000 times 1024"),
        (lambda: load_task("line", 1, 0), "one of lines, arithmetic, .* or .*'line'.*mean 'lines'"),
        (lambda: load_task("x" * 5000, 1, 0), "one of lines, arithmetic, "),
        (lambda: load_task("a\0.jsonl", 1, 0), "must be a readable file of JSON Lines"),
    ],
)
def test_arguments_out_of_range_are_reported(call: object, message: str) -> None:
    with pytest.raises(TaskError, match=message):
        call()  # type: ignore[operator]


def test_lines_beyond_the_bundled_keys_stay_distinct() -> None:
    (sample,) = load_task("lines", 1, seed=0, tokens=4096)
    keys = re.findall(r"^<k\d+>", sample.prompt, re.MULTILINE)
    assert len(keys) == len(set(keys)) > lines.KEYS


def test_jsonl_rows_are_read_in_order(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"p{i}", "answer": f"a{i}", "extra": i} for i in range(5)]
    file.write_text("\n\n".join(json.dumps(row) for row in rows) + "\r\n", encoding="utf-8-sig")
    samples = read(file)
    assert [sample.prompt for sample in samples] == [f"p{i}" for i in range(5)]
    drawn = load_task(str(file), 3, seed=1)
    assert drawn == load_task(str(file), 3, seed=1)
    assert [samples.index(sample) for sample in drawn] == sorted(map(samples.index, drawn))
    with pytest.warns(UserWarning, match="holds 5 rows, fewer than the 50 samples"):
        assert load_task(str(file), 50, seed=1) == samples


GOOD = b'{"prompt": "p", "answer": "a"}\n'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "must hold at least one row, found none"),
        (b" \n\n", "must hold at least one row, found none"),
        (GOOD + b"{", "line 2: must be a JSON object, found "),
        (GOOD + b"[1]", "line 2: must be a JSON object, found a list"),
        (GOOD + b"null", "line 2: must be a JSON object, found a NoneType"),
        (GOOD + b'{"prompt": "p"}', 'line 2: "answer" must be a string, found none'),
        (GOOD + b'{"prompt": 3, "answer": "a"}', 'line 2: "prompt" must be a string, found a int'),
        (GOOD + b'{"prompt": "p", "answer": ""}', 'line 2: "answer" must not be empty'),
        (GOOD + b'{"prompt": "\\ud800", "answer": "a"}', "line 2: .*found a lone surrogate"),
        (GOOD + b"\x89PNG\xff", "line 2: must be UTF-8 text, found the byte 0x89"),
        (b"[" * 100_000, "line 1: must be a JSON object"),
    ],
)
def test_bad_files_name_the_line(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_bytes(content)
    with pytest.raises(TaskError, match=message) as error:
        read(file)
    assert str(file) in str(error.value)


def test_missing_files_and_directories_are_reported(tmp_path: Path) -> None:
    for path in (tmp_path / "none.jsonl", tmp_path):
        with pytest.raises(TaskError, match="must be a readable file of JSON Lines, found "):
            load_task(str(path), 1, 0)


@given(st.binary(max_size=60))
def test_any_bytes_give_samples_or_a_task_error(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    file = tmp_path_factory.getbasetemp() / "any.jsonl"
    file.write_bytes(content)
    try:
        samples = read(file)
    except KvpolicyError as error:
        message = str(error)
    else:
        message = "any.jsonl" if samples else ""
    assert "any.jsonl" in message


def test_scores_count_the_values_by_key() -> None:
    answer = "<k1> <v5>\n<k2> <v6>\n<k3> <v7>\n<k4> <v8>"
    assert score(of("lines", answer), answer) == 1
    assert score(of("lines", answer), answer + "\n? <k1>\n<k1> <v9>") == 1
    assert score(of("lines", answer), "<k1> <v5>\n<k3> <v7>\n<k2> <v9>\n<k4>") == 0.5
    assert score(of("lines", answer), "<k1> <v50>") == 0
    assert score(of("lines", answer), "") == 0
    chained = "<k1>=4+3=7\n<k2>=<k1>*5=5"
    assert score(of("arithmetic", chained), chained) == 1
    assert score(of("arithmetic", chained), "<k1>=7\n<k2>=<k1>*5=6") == 0.5


def test_scores_of_code_and_exact_matches() -> None:
    assert score(of("code", "\n    return x\nelse"), "\n    return x\nother") == 1
    assert score(of("code", "\nabcd\n"), "\nabXd") == 0.5
    assert score(of("code", "\nabcd\n"), "") == 0
    assert score(of("jsonl", "four"), " four\n") == 1
    assert score(of("jsonl", "four"), "four\nQ: five") == 1
    assert score(of("jsonl", "4"), "42") == 0


@pytest.mark.parametrize("name", ["lines", "arithmetic", "code"])
def test_answers_score_full_marks_and_nothing_scores_none(name: str) -> None:
    for sample in load_task(name, 4, seed=2, tokens=256):
        assert score(sample, sample.answer) == 1
        assert score(sample, "") == 0
