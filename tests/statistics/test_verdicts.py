"""Verdicts: what they say of samples whose truth is known, of hardly any samples, and of none."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from scipy import stats

from kvpolicy.errors import CompareError
from kvpolicy.report.merging import merge
from kvpolicy.report.tables import Report
from kvpolicy.report.words import methods
from kvpolicy.statistics import paired
from kvpolicy.statistics.collapse import collapses, parting, repetition
from kvpolicy.statistics.paired import Paired, compare_pairs
from kvpolicy.statistics.pairs import lower_is_better
from kvpolicy.statistics.power import minimum_effect
from kvpolicy.statistics.rows import Evidence, Row
from kvpolicy.statistics.verdicts import ALL_TASKS, Verdict, judge

pytestmark = pytest.mark.filterwarnings("error")
Values = Sequence[float | None]


def rows(arm: str, task: str, values: Values, metric: str = "score", docs: int = 0) -> list[Row]:
    """A row a value; None leaves the sample out. `docs` samples share each document."""
    return [
        Row(arm, task, str(i), {metric: float(v)}, document=f"d{i // docs}" if docs else None)
        for i, v in enumerate(values)
        if v is not None
    ]


def evidence(*found: list[Row], baseline: str = "exact", **given: Any) -> Evidence:
    every = [row for part in found for row in part]
    return Evidence(tuple(every), given.pop("arms", dict.fromkeys(r.arm for r in every)), baseline, **given)


def one(ours: Values, theirs: Values, metric: str = "score", docs: int = 0, **given: Any) -> Verdict:
    found = evidence(rows("exact", "t", theirs, metric, docs), rows("a", "t", ours, metric, docs))
    return judge(found, **given).of("a", "t")


RNG = np.random.default_rng(0)
HALF = RNG.random(400)
NEAR = HALF + RNG.normal(0, 0.01, 400)


@pytest.mark.parametrize(
    ("ours", "theirs", "given", "verdict", "reason"),
    [
        ([0], [1], {}, "undecided", "one sample"),
        ([0, 0], [1, 1], {}, "undecided", "2 pairs are too few"),
        ([0, 0, 0], [1, 1, 1], {}, "undecided", "3 pairs are too few"),
        ([0.3], [0.0], {"metric": "kl"}, "undecided", "one sample"),
        ([0] * 6, [1] * 6, {}, "worse", "McNemar"),
        ([1] * 6, [0] * 6, {}, "better", "McNemar"),
        ([1] * 20, [1] * 20, {}, "undecided", "all 20 pairs tie"),
        ([1] * 500, [1] * 500, {}, "equivalent", "within ±0.01"),
        ([0.3] * 50, [0.3] * 50, {"metric": "nll"}, "undecided", "tie"),
        ([0.4] * 30, [0.5] * 30, {}, "worse", "Wilcoxon"),
        ([0.4] * 30, [0.5] * 30, {"metric": "nll"}, "better", "Wilcoxon"),
        (HALF + 1e-17, HALF, {"margins": 0.05}, "equivalent", "within ±0.05"),
        (np.clip(NEAR, 0, 1), np.clip(HALF, 0, 1), {"margins": {"score": 0.01}}, "equivalent", "within ±0.01"),
        ([0.0] + [0.5] * 99, [1.0] + [0.5] * 99, {}, "undecided", "p = "),
        ([0] * 10, [1] * 10, {"docs": 10}, "undecided", "share one document"),
        ([0] * 10, [1] * 10, {"docs": 5}, "undecided", "2 documents are too few"),
        ([None, 1.0], [1.0, None], {}, "undecided", "no sample has both"),
        ([math.nan] * 9, [1.0] * 9, {}, "undecided", "no sample has both"),
        ([0] * 9 + [None], [1] * 10, {}, "worse", "1 samples are not paired"),
        (100 * HALF, 100 * HALF[::-1], {}, "undecided", "p = "),
    ],
)
def test_verdicts_of_samples_whose_answer_is_known(
    ours: Values, theirs: Values, given: dict[str, Any], verdict: str, reason: str
) -> None:
    found = one(list(ours), list(theirs), **given)
    assert (found.verdict, reason in found.reason) == (verdict, True), found
    if found.paired is not None and found.paired.low is not None:
        assert found.paired.high is not None
        assert found.paired.low <= found.paired.difference <= found.paired.high


def test_tests_are_those_named() -> None:
    """Against the binomial distribution, scipy's test on the plain differences, and Agresti and Min's formula."""
    theirs = np.array([1.0] * 60 + [0.0] * 40)
    ours = np.array([0.0] * 15 + [1.0] * 45 + [1.0] * 4 + [0.0] * 36)
    found = one(ours.tolist(), theirs.tolist()).paired
    assert found is not None
    assert found.p == pytest.approx(2 * sum(math.comb(19, k) for k in range(5)) / 2**19)
    b, c, n = 4.5, 15.5, 102
    half = 1.959964 * math.sqrt(b + c - (b - c) ** 2 / n) / n
    assert (found.low, found.high) == pytest.approx(((b - c) / n - half, (b - c) / n + half), abs=0.002)
    noisy = HALF + RNG.normal(0.03, 0.2, 400)
    found = one(noisy.tolist(), HALF.tolist(), metric="nll").paired
    assert found is not None
    assert found.p == pytest.approx(stats.wilcoxon(noisy - HALF).pvalue)
    ends = stats.bootstrap((noisy - HALF,), np.mean, n_resamples=4999, rng=np.random.default_rng(5)).confidence_interval
    assert (found.low, found.high) == pytest.approx((ends.low, ends.high), abs=0.003)


def test_holm_over_arms_and_tasks() -> None:
    """Ten pairs that all fall decide alone, but not among ten comparisons; the A/A arm is no comparison of theirs."""
    fall, tie = [0.0] * 9 + [1.0], [1.0] * 10
    alone = evidence(rows("exact", "t", tie), rows("a", "t", fall))
    assert judge(alone).of("a", "t").verdict == "worse"
    arms = [rows(f"arm {i}", "t", fall if i == 0 else tie) for i in range(15)]
    among = judge(evidence(rows("exact", "t", tie), *arms))
    p = among.of("arm 0", "t")
    assert p.paired is not None
    assert p.p_holm == pytest.approx(15 * (p.paired.p or 0))
    assert p.verdict == "undecided"
    named = evidence(rows("exact", "t", tie), *arms, settings={"aa": [f"arm {i}" for i in range(1, 15)]})
    assert judge(named).of("arm 0", "t").verdict == "worse"
    twin = evidence(rows("exact", "t", tie), *arms[:2], arms={"exact": "r", "arm 0": "q", "arm 1": "r"})
    assert [v.noise for v in judge(twin).found] == [False, True]


def test_over_all_tasks_each_task_weighs_the_same() -> None:
    big, small = [0.5] * 300, [0.5] * 30
    found = evidence(
        rows("exact", "big", big),
        rows("exact", "small", small),
        rows("a", "big", (0.5 + RNG.normal(0, 0.01, 300)).tolist()),
        rows("a", "small", (0.8 + RNG.normal(0, 0.01, 30)).tolist()),
    )
    over = judge(found).of("a", ALL_TASKS)
    assert over.paired is not None
    assert over.paired.difference == pytest.approx(0.15, abs=0.01)
    assert over.mean == pytest.approx(0.65, abs=0.01)
    assert over.verdict == "better"


def test_what_failed_or_is_missing_is_said() -> None:
    """An arm that fails where it is hard is not called better by the rest."""
    failed = [Row("a", "t", str(i), error="out of memory") for i in range(20)]
    rest = [Row("a", "t", str(i), {"score": 1.0}) for i in range(20, 40)]
    found = judge(evidence(rows("exact", "t", [0.0] * 40), failed, rest, planned={"t": 60})).of("a", "t")
    assert (found.verdict, found.n, found.errors, found.partial) == ("undecided", 20, 20, True)
    assert "failed on 20 samples" in found.reason
    assert "partial: 20 of 60" in found.reason
    nothing = judge(evidence(rows("exact", "t", [1.0] * 3), failed)).of("a", "t")
    assert (nothing.verdict, nothing.reason) == ("undecided", "the arm failed on every sample")
    assert judge(evidence(rows("exact", "t", [1.0]), arms={"exact": None, "a": None})).of("a", "t").n == 0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"baseline": "exakt"}, "the baseline must be one of the arms, exact, a, found 'exakt'"),
        ({"metric": "speed"}, "metric must be one of score, found 'speed'"),
        ({"margins": -1.0}, "a margin must be a number above 0, found -1.0"),
        ({"margins": {"scor": 1.0}}, "a margin must be of a metric among score, found 'scor' .did you mean 'score'?"),
        ({"margins": {"tasks": {"u": {"score": 1.0}}}}, "a margin must be of a task among t, found 'u'"),
        ({"margins": {"tasks": {"t": {"kl": 1.0}}}}, "a margin must be of a metric among score, found 'kl'"),
        ({"margins": {"tasks": {"t": {"score": 0}}}}, "must be a number above 0, found 0 for 'score' of task 't'"),
        ({"margins": {"tasks": {"t": 0.1}}}, "margins of tasks must be numbers by metric, by task"),
        ({"alpha": 2.0}, "alpha must lie between 0 and 1, found 2.0"),
    ],
)
def test_what_can_not_be_judged_is_refused(given: dict[str, Any], message: str) -> None:
    found = evidence(rows("exact", "t", [1.0]), rows("a", "t", [1.0]))
    with pytest.raises(CompareError, match=message):
        judge(found, **given)
    with pytest.raises(CompareError, match="an arm must have one row for each sample, found two of arm 'a'"):
        judge(evidence(rows("exact", "t", [1.0]), rows("a", "t", [1.0]), rows("a", "t", [0.0])))


def test_tasks_have_margins_of_their_own() -> None:
    both = [rows(arm, task, x) for task in ("t", "u") for arm, x in (("exact", HALF), ("a", HALF - 0.03))]
    margins = {"score": 0.01, "tasks": {"u": {"score": 0.05}}}
    for found in (judge(evidence(*both), margins=margins), judge(evidence(*both, settings={"margins": margins}))):
        assert [found.of("a", task).margin for task in ("t", "u", ALL_TASKS)] == [0.01, 0.05, 0.01]
    near = HALF + RNG.normal(-0.03, 0.01, 400)
    said = [rows(arm, task, x) for task in ("t", "u") for arm, x in (("exact", HALF), ("a", near))]
    found = judge(evidence(*said), margins=margins)
    assert [found.of("a", task).verdict for task in ("t", "u")] == ["worse", "equivalent"]
    assert "±0.01 of score (t, all tasks), ±0.05 of score (u)" in "\n".join(methods(Report.of(evidence(*said), found)))
    # Of several runs: the first one's margins, and those of tasks that another brings.
    one = evidence(*both[:2], settings={"margins": {"score": 0.02, "kl": 1}})
    two = evidence(*both, settings={"margins": {"score": 0.1, "tasks": {"t": {"score": 0.3}}}})
    assert merge([("one", one), ("two", two)]).settings["margins"] == {
        "score": 0.02, "kl": 1, "tasks": {"u": {"score": 0.1}}
    }  # fmt: skip


def test_directions() -> None:
    assert all(map(lower_is_better, ("kl", "nll", "word_nll", "peak_bytes", "step_seconds", "bits", "l1", "ppl")))
    assert not any(map(lower_is_better, ("score", "acc", "acc_norm", "f1", "top1", "exact_mass", "exact_match,none")))


def simulate(
    draw: Callable[[], Any], times: int, docs: Sequence[str] | None = None, **given: Any
) -> tuple[float, float, float]:
    """How often a difference is found, equivalence is found, and the interval holds 0 (or the negative margin)."""
    truth = -given.get("margin", 0.0)
    found: list[Paired] = []
    for _ in range(times):
        d = draw()
        found.append(compare_pairs(d, docs or [str(i) for i in range(len(d))], reach=1.0, **given))
    covered = [r.low <= truth <= r.high for r in found if r.low is not None and r.high is not None]
    return (
        sum(r.p is not None and r.p < 0.05 and r.agrees for r in found) / times,
        sum(r.p_equivalent is not None and r.p_equivalent < 0.05 for r in found) / times,
        sum(covered) / max(len(covered), 1),
    )


def test_error_rates_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under the null differences are rarely found, at the margin equivalence is, and intervals hold the truth.

    Of 120 to 300 draws; 2 standard errors of a rate of 5% in 120 are 4%.
    """
    monkeypatch.setattr(paired, "RESAMPLES", 399)
    monkeypatch.setattr(paired, "SIGNS", 499)
    rng = np.random.default_rng(3)

    def signs(n: int, up: float, down: float) -> Any:
        return rng.choice([1.0, -1.0, 0.0], size=n, p=[up, down, 1 - up - down])

    def skewed(n: int, mean: float) -> Any:
        return np.where(rng.random(n) < 0.4, rng.choice([-1.0, 1.0], size=n) * rng.random(n), 0) + mean

    def grouped(mean: float) -> Any:
        return np.repeat(rng.normal(0, 0.3, 45), 4) + rng.normal(mean, 0.2, 180)

    documents = [f"d{i // 4}" for i in range(180)]
    for found in (
        simulate(lambda: signs(100, 0.1, 0.1), 300, binary=True),
        simulate(lambda: signs(30, 0.04, 0.04), 120, binary=True),
        simulate(lambda: skewed(60, 0.0), 120, binary=False),
        simulate(lambda: grouped(0.0), 120, documents, binary=False),
    ):
        assert found[0] <= 0.1, found
        assert found[2] >= 0.88, found
    for found in (
        simulate(lambda: signs(200, 0.05, 0.1), 300, binary=True, margin=0.05),
        simulate(lambda: signs(60, 0.0, 0.1), 100, binary=True, margin=0.1),
        simulate(lambda: signs(300, 0.0, 0.02), 100, binary=False, margin=0.02),
        simulate(lambda: skewed(60, -0.1), 120, binary=False, margin=0.1),
        simulate(lambda: grouped(-0.1), 120, documents, binary=False, margin=0.1),
    ):
        assert found[1] <= 0.1, found
        assert found[2] >= 0.88, found
    blind = simulate(lambda: grouped(0.0), 60, [str(i) for i in range(180)], binary=False)
    assert blind[0] > 0.1, "documents matter, or the simulation would say nothing"


def test_families_of_true_nulls_are_rarely_called_different() -> None:
    """12 arms without any difference: in at most 2 of 12 runs one is called better or worse. Without Holm, in half."""
    rng = np.random.default_rng(4)
    wrong = 0
    for _ in range(12):
        names = [f"a{i}" for i in range(12)]
        found = [rows(arm, "t", (rng.random(60) < 0.6).astype(float).tolist()) for arm in ("exact", *names)]
        verdicts = judge(evidence(*found)).found
        wrong += any(v.verdict in ("better", "worse") for v in verdicts)
    assert wrong <= 2


def test_minimum_effect() -> None:
    """Against the binomial sum, a simulated t test, and samples that can show nothing."""
    assert minimum_effect(5) is None
    assert minimum_effect(1, deviation=0.3) is None
    assert minimum_effect(10, deviation=0.0) == 0.0
    found = minimum_effect(100)
    assert found is not None
    shown = sum(math.comb(100, k) * found**k * (1 - found) ** (100 - k) for k in range(6, 101))
    assert shown == pytest.approx(0.8, abs=1e-6)
    found = minimum_effect(50, deviation=0.3, alpha=0.05)
    assert found is not None
    drawn = np.random.default_rng(0).normal(found, 0.3, (4000, 50))
    assert (stats.ttest_1samp(drawn, 0, axis=1).pvalue < 0.05).mean() == pytest.approx(0.8, abs=0.03)
    many = minimum_effect(50, deviation=0.3, comparisons=20)
    assert many is not None
    assert many > found
    with pytest.raises(CompareError, match="n must be a number of at least 0, found -1"):
        minimum_effect(-1)


def test_collapse() -> None:
    """Repetition and another length are collapse; other words are not, nor what the baseline does, too."""
    text = "The capital of France is Paris, which lies on the river Seine and has two million people."
    outputs = {
        "exact": text,
        "same": text,
        "loops": text[:20] + " and so on" * 60,
        "short": text[:5],
        "empty": "",
        "words": "It is Paris, of course: a city of two million people that lies on the Seine in France.",
        "汉": "的" * 200,
    }
    found = evidence(*([Row(arm, "t", str(i), output=out) for i in range(12)] for arm, out in outputs.items()))
    signs = {c.arm: c for c in collapses(found)}
    assert {arm for arm, c in signs.items() if c.collapsed} == {"loops", "short", "empty", "汉"}
    assert signs["words"].signs == ("divergence at once",)
    assert signs["same"].signs == ()
    assert {c.arm for c in collapses(found, "loops") if "repetition" in c.signs} == set()
    few = evidence([Row("exact", "t", "0", output=text)], [Row("a", "t", "0", output="x " * 200)])
    assert [c.signs for c in collapses(few)] == [()]
    assert repetition("yes") == 0.0
    assert (parting("abc", "abd"), parting("ab", "abc"), parting("a", "a")) == (2, 2, None)
