"""Scorers agree with the official ones, on cases that were made to be tricky."""

from __future__ import annotations

import difflib
import itertools
import json
import random
import time
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpolicy.errors import MissingDependencyError, TaskError
from kvpolicy.tasks.execution import Program
from kvpolicy.tasks.longbench_metrics import rouge_l
from kvpolicy.tasks.measures import common_subsequence, similarity
from kvpolicy.tasks.sample import Sample
from kvpolicy.tasks.scorers import SCORERS, check_scorer, numbers, score

# Made by LongBench's metrics.py and eval.py (commit c5ea10b) with rouge 1.0.1, jieba 0.42.1, fuzzywuzzy 0.18.0 without
# python-Levenshtein, as its requirements.txt has it, and sys.setrecursionlimit(100000).
GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "longbench.json").read_text(encoding="utf-8"))
CHINESE = ("multifieldqa_zh", "dureader", "vcsum")


def of(scorer: Any, *answers: str, **fields: Any) -> Sample:
    return Sample("t", "p", answers[0], answers=answers, scorer=scorer, **fields)


def test_longbench_metrics_are_the_official_ones() -> None:
    assert len({case["dataset"] for case in GOLDEN}) >= 13
    for case in GOLDEN:
        if case["dataset"] in CHINESE:
            continue
        facts = {"dataset": case["dataset"], "classes": case["classes"]}
        assert score(of("longbench", *case["answers"], facts=facts), case["output"]) == pytest.approx(
            case["score"], abs=1e-9
        ), case


def test_chinese_metrics_are_the_official_ones() -> None:
    cases = [case for case in GOLDEN if case["dataset"] in CHINESE]
    try:
        import jieba  # noqa: F401
    except ImportError:
        with pytest.raises(MissingDependencyError, match=r"needs? jieba, .*pip install 'kvpolicy\[tasks\]'"):
            score(of("longbench", "x", facts={"dataset": "vcsum"}), "x")
        pytest.skip("jieba is not installed")
    for case in cases:
        facts = {"dataset": case["dataset"]}
        assert score(of("longbench", *case["answers"], facts=facts), case["output"]) == pytest.approx(case["score"])


def test_rouge_of_long_texts_is_no_zero_and_no_error() -> None:
    rng = random.Random(0)
    text = " ".join(f"word{rng.randrange(200)}" for _ in range(700))
    assert rouge_l(text, text) == pytest.approx(1)
    assert 0 < rouge_l(text[:2000], text[2000:]) < 1


NUMBERS = [
    ("1,234.0", "1234"), ("$5.", "5"), ("-3", "-3"), ("it is 5-3=2", "2"), ("2 apples, 3 pears", "3"), ("0.50", ".5"),
    ("$1,000,000", "1000000"), ("1,2,3", "3"), ("x=3.", "3"), ("10%", "10"), ("**12**", "12"), ("\\boxed{12}", "12"),
    ("5-10", "10"), ("-$5", "-5"), ("$-5", "-5"), ("7th", "7"), ("3 - 5", "5"), ("(2)-5", "5"), ("12kg", "12"),
    ("1e3", "1000"), ("5...6", "6"), ("\u22127", "-7"), ("3 #### 42", "42"), ("#### 42 then 7", "42"),
    ("####\n18.00", "18"), ("#### none, but 5", "5"), ("v2.0", "2"), ("1,23", "23"), ("12,345,678.90", "12345678.9"),
    ("+4", "4"),
    ("5 ####", "5"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "number"), NUMBERS)
def test_numbers_are_compared_as_numbers(text: str, number: str) -> None:
    assert score(of("numeric", f"because\n#### {number}"), text) == 1
    assert score(of("numeric", str(Decimal(number) + 1)), text) == 0
    assert score(of("numeric", number), "none") == score(of("numeric", "none"), text) == 0


@given(st.text(max_size=40), st.text(alphabet="0123456789.,-+$e #x", max_size=40))
@settings(max_examples=25, deadline=None)
def test_any_text_has_numbers_and_scores(one: str, other: str) -> None:
    for text in (one, other):
        assert all(isinstance(number, Decimal) for number in numbers(text))
        for name in set(SCORERS) - {"longbench", "rouge", "regex", "call", "copied"}:
            assert 0 <= score(of(name, "a 1", other or "b"), text) <= 1, name


def test_rules_of_the_other_scorers() -> None:
    assert score(of("exact", "no", "Yes"), " Yes \nQuestion") == 1
    assert score(of("exact", "Yes"), "yes") == 0
    assert score(of("contains", "nine", "Paris"), "it is PARIS.") == 1
    assert score(of("contains", "nine"), "") == 0
    assert score(of("contains_all", "12", "Ab"), "ab\x0012") == 1
    assert score(of("contains_all", "12", "Ab"), "ab") == 0.5
    assert score(of("f1", "the cat sat."), "A cat, sat!") == 1
    assert score(of("f1", "cat dog", "cat"), "cat bird") == pytest.approx(2 / 3)
    assert score(of("f1", "the"), "") == 0
    assert score(of("regex", r"^\d+ cats?$", "dog"), "12 cats") == 1
    assert score(of("regex", r"^\d+$"), "12 cats") == 0
    assert score(of("edit", "kitten"), "sitting") == pytest.approx(2 * 4 / 13)
    assert score(of("copied", "a b c d"), "x a b d c") == 0.75
    assert score(of("exact", "4", stop=("Question:", "\n\n")), "4\n\nQuestion: 5") == 1


def test_rouge_is_that_of_the_package() -> None:
    pytest.importorskip("rouge_score")
    assert score(of("rouge", "the cat sat on the mat", "none"), "the cat lay on a mat") == pytest.approx(4 / 6)
    assert score(of("rouge", "the cat"), "") == 0


CALL = {"name": "ship", "arguments": {"id": "12", "items": 3, "weight": 1.5, "express": True}}


@pytest.mark.parametrize(
    ("text", "right"),
    [
        (json.dumps(CALL), 1.0),
        (f"Sure: ```json\n{json.dumps(CALL, indent=2)}\n```", 1.0),
        ("{bad {" + json.dumps(CALL), 1.0),
        (json.dumps({"parameters": CALL["arguments"], "name": "ship"}), 1.0),
        (json.dumps({**CALL, "arguments": {"id": 12, "items": 3, "weight": 1.5, "express": True}}), 0.75),
        (json.dumps({**CALL, "arguments": {"id": "12", "items": 3.0, "weight": 1.5, "express": 1}}), 0.5),
        (json.dumps({**CALL, "arguments": {"id": "12", "extra": 1}}), 0.2),
        (json.dumps({**CALL, "name": "other"}), 0.0),
        (json.dumps({**CALL, "arguments": "12"}), 0.0),
        (json.dumps(CALL)[:-1], 0.0),
        ("[]", 0.0),
    ],
)
def test_calls_are_scored_as_parsed_json(text: str, right: float) -> None:
    assert score(of("call", json.dumps(CALL)), text) == right


def test_functions_are_scorers_and_their_faults_are_named() -> None:
    def length(text: str, sample: Sample) -> float:
        return len(text) / len(sample.answer)

    assert score(of(length, "abcd"), "ab") == 0.5
    with pytest.raises(TaskError, match="scorer 'length' must give a number from 0 to 1, found 2"):
        score(of(length, "a"), "ab")
    with pytest.raises(TaskError, match="scorer 'length' must not fail, found ZeroDivisionError"):
        score(Sample("t", "p", "", scorer=length), "ab")
    with pytest.raises(TaskError, match=r"scorer must be one of exact, .*found 'exakt' \(did you mean 'exact'\?\)"):
        check_scorer("exakt")


@given(st.text(alphabet="ab\u00e9", max_size=12), st.text(alphabet="ab\u00e9", max_size=12))
@settings(max_examples=40, deadline=None)
def test_subsequences_are_the_longest(one: str, other: str) -> None:
    shared = (
        [
            "".join(part)
            for size in range(min(len(one), len(other)), -1, -1)
            for part in itertools.combinations(one, size)
            if _within("".join(part), other)
        ][:1]
        if len(one) < 9
        else None
    )
    if shared is not None:
        assert common_subsequence(one, other) == len(shared[0])
    assert common_subsequence(one, other) == common_subsequence(other, one)
    assert similarity(one, other) >= difflib.SequenceMatcher(None, one, other).ratio() - 1e-12


def _within(part: str, whole: str) -> bool:
    rest = iter(whole)
    return all(letter in rest for letter in part)


TEST = "def check(f):\n    assert f(3) == 9\n"


@pytest.mark.parametrize(
    ("body", "passes"),
    [
        ("return x * x", True),
        ("print('x' * 10**6); return x * x", True),
        ("return x + x", False),
        ("import sys; sys.exit(0)", False),
        ("import os; os._exit(0)", False),
        ("return len(bytearray(1 << 31)) and 9", False),
        ("open('f', 'wb').write(b'x' * (1 << 22)); return 9", False),
        ("syntax error", False),
    ],
)
def test_what_is_run_passes_its_tests_or_not(body: str, passes: bool) -> None:
    sample = of(Program(TEST, "f"), "x", stop=("\ndef",))
    assert score(sample, "\ndef") == 0
    given = Sample("t", "def f(x):\n    ", "x", scorer=Program(TEST, "f"))
    assert score(given, body) == passes


def test_what_runs_on_is_ended_with_all_that_it_started() -> None:
    start = time.monotonic()
    assert not Program(TEST, "f", seconds=0.5).passes("import os\nos.fork()\nwhile True: pass")
    assert time.monotonic() - start < 5
