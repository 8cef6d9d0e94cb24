"""The verdict of each arm and task: better, worse, equivalent or undecided."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from kvpolicy.errors import CompareError
from kvpolicy.statistics.margins import Given, Margins, margins_of, span
from kvpolicy.statistics.paired import Paired, compare_pairs
from kvpolicy.statistics.pairs import BOUNDED, Pairs, Table, judged_by, lower_is_better, pair, table, tasks_of
from kvpolicy.statistics.power import minimum_effect
from kvpolicy.statistics.rows import Evidence
from kvpolicy.words import in_words, listed, quoted, suggest

if TYPE_CHECKING:
    import pandas as pd

ALL_TASKS = "all tasks"
"""Stands for the mean over tasks, each with the same weight."""


@dataclass(frozen=True)
class Verdict:
    """What is known of an arm on a task, against the baseline."""

    arm: str
    task: str
    """A task, or `ALL_TASKS`."""
    metric: str
    verdict: str
    """`better`, `worse`, `equivalent` (within the margin) or `undecided`."""
    reason: str
    n: int
    """Samples that both arms have."""
    documents: int
    """Independent units among them."""
    planned: int | None
    """Samples that the task was to have, where that is known."""
    unpaired: int
    """Samples that only one of the two arms has."""
    errors: int
    """Samples on which the arm failed."""
    mean: float | None
    """Of the arm, over the pairs."""
    baseline: float | None
    """Mean of the baseline, over the pairs."""
    margin: float | None
    paired: Paired | None
    """Difference, interval and p; None without a pair."""
    p_holm: float | None = None
    """p of no difference, adjusted by Holm over arms and tasks."""
    p_equivalent_holm: float | None = None
    """p of the two one-sided tests, adjusted likewise among themselves."""
    detectable: float | None = None
    """The smallest true difference that as many pairs of this spread would show 4 times in 5."""
    noise: bool = False
    """Whether this is an A/A arm: the baseline again, whose differences are noise."""

    @property
    def partial(self) -> bool:
        """Whether samples are missing that were planned."""
        return self.planned is not None and self.n < self.planned


@dataclass(frozen=True)
class Verdicts:
    """The verdicts of all arms and tasks, and how they were reached."""

    found: tuple[Verdict, ...]
    baseline: str
    alpha: float
    metrics: Mapping[str, str]
    """The metric that each task is judged by."""

    def of(self, arm: str, task: str) -> Verdict:
        """The verdict of an arm on a task, or on `ALL_TASKS`.

        Raises:
            CompareError: there is none.
        """
        for verdict in self.found:
            if (verdict.arm, verdict.task) == (arm, task):
                return verdict
        arms, tasks = dict.fromkeys(v.arm for v in self.found), dict.fromkeys(v.task for v in self.found)
        raise CompareError(
            f"a verdict must be of an arm ({listed(arms)}) and a task ({listed(tasks)}), found {quoted(arm)} and "
            f"{quoted(task)}"
        )

    def records(self) -> list[dict[str, Any]]:
        """A mapping of plain values for each verdict."""
        return [record(verdict) for verdict in self.found]

    def to_pandas(self) -> pd.DataFrame:
        """A row for each arm and task."""
        import pandas as pd

        return pd.DataFrame(self.records(), columns=list(_COLUMNS))


_COLUMNS = (
    "arm", "task", "metric", "verdict", "n", "documents", "planned", "unpaired", "errors", "baseline_mean", "mean",
    "difference", "low", "high", "interval", "test", "p", "p_holm", "margin", "p_equivalent", "p_equivalent_holm",
    "detectable", "noise", "reason",
)  # fmt: skip


def record(verdict: Verdict) -> dict[str, Any]:
    """A verdict as plain values, with None for what is not known."""
    p = verdict.paired
    given = {
        "baseline_mean": verdict.baseline,
        "difference": p and p.difference,
        "low": p and p.low,
        "high": p and p.high,
        "interval": p.interval if p else "",
        "test": p.test if p else "",
        "p": p and p.p,
        "p_equivalent": p and p.p_equivalent,
    }
    return {name: given[name] if name in given else getattr(verdict, name) for name in _COLUMNS}


def judge(
    evidence: Evidence,
    *,
    metric: str | None = None,
    margins: Given = None,
    baseline: str | None = None,
    alpha: float = 0.05,
) -> Verdicts:
    """Judge each arm against the baseline, by task, and over all tasks where there are several.

    An arm is better or worse where the test of no difference, adjusted by Holm's method over all arms and tasks, is
    below `alpha` and the 95% interval agrees; equivalent where two one-sided tests, adjusted likewise, put the
    difference within the margin; else undecided. A mean alone decides nothing.

    Args:
        evidence: rows of experiments.
        metric: what all tasks are judged by; by default each by `score`, or `nll`, or `kl`, or its first metric.
        margins: differences that don't matter, in a metric's units: by metric, or one for all. Tasks may have their
            own, `{"score": 0.01, "tasks": {"gsm8k": {"score": 0.02}}}`. By default those of the evidence's settings
            (`margins`), and 0.01 for metrics in [0, 1]; other metrics have none.
        baseline: the arm that the others are compared with; by default the evidence's.
        alpha: probability that any arm is wrongly called better or worse.

    Raises:
        CompareError: the baseline or the metric is unknown, a margin or alpha is out of range, a margin is of an
            unknown task or metric, or an arm has two rows of one sample.
    """
    if not 0 < alpha < 1:
        raise CompareError(f"alpha must lie between 0 and 1, found {in_words(alpha)}")
    rows = table(evidence)
    arms = list(dict.fromkeys([*evidence.arms, *(row.arm for row in evidence.rows)]))
    base = evidence.baseline if baseline is None else baseline
    if base not in arms:
        raise CompareError(
            f"the baseline must be one of the arms, {listed(arms) or '(there are none)'}, found {quoted(base)}"
            f"{suggest(base, arms)}"
        )
    metrics = judged_by(evidence, metric)
    declared = margins_of(margins, evidence, metrics.values())
    noise = noise_arms(evidence, base)
    found = []
    for arm in arms:
        if arm != base:
            mine = [_judge_task(rows, evidence, arm, base, task, metrics, declared) for task in tasks_of(evidence)]
            mine += _over_tasks(rows, arm, base, metrics, declared, mine)
            found += [replace(verdict, noise=arm in noise) for verdict in mine]
    return Verdicts(tuple(_decided(found, alpha)), base, alpha, metrics)


def noise_arms(evidence: Evidence, baseline: str) -> tuple[str, ...]:
    """A/A arms: those that the settings name (`aa`), and those with the baseline's recipe."""
    named = evidence.settings.get("aa") or ()
    named = [named] if isinstance(named, str) else list(named)
    recipe = evidence.arms.get(baseline)
    same = [arm for arm, text in evidence.arms.items() if recipe is not None and text == recipe]
    return tuple(arm for arm in dict.fromkeys([*named, *same]) if arm != baseline)


def _reach(pairs: Pairs) -> float | None:
    """The largest difference of a bounded metric."""
    every = np.concatenate([pairs.ours, pairs.theirs])
    return span(float(every.min()), float(every.max())) if BOUNDED.match(pairs.metric) else None


def _binary(pairs: Pairs) -> bool:
    every = np.concatenate([pairs.ours, pairs.theirs])
    return bool(BOUNDED.match(pairs.metric)) and bool(np.isin(every, (0.0, 1.0)).all())


def _judge_task(
    rows: Table,
    evidence: Evidence,
    arm: str,
    baseline: str,
    task: str,
    metrics: Mapping[str, str],
    margins: Margins,
) -> Verdict:
    metric, planned = metrics.get(task, ""), evidence.planned.get(task)
    pairs = pair(rows, arm, baseline, task, metric)
    if not pairs.samples:
        why = "the arm failed on every sample" if pairs.errors else "no sample has both arms"
        errors, margin = pairs.errors, margins.of(metric, task)
        return Verdict(
            arm, task, metric, "undecided", why, 0, 0, planned, pairs.unpaired, errors, None, None, margin, None
        )
    margin = margins.of(metric, task)
    paired = compare_pairs(
        pairs.differences, pairs.documents, binary=_binary(pairs), reach=_reach(pairs), margin=margin
    )
    return Verdict(
        arm,
        task,
        metric,
        "undecided",
        "",
        len(pairs.samples),
        paired.documents,
        planned,
        pairs.unpaired,
        pairs.errors,
        float(pairs.ours.mean()),
        float(pairs.theirs.mean()),
        margin,
        paired,
    )


def _over_tasks(
    rows: Table,
    arm: str,
    baseline: str,
    metrics: Mapping[str, str],
    margins: Margins,
    by_task: list[Verdict],
) -> list[Verdict]:
    """The mean over tasks, each with the same weight; none where tasks are judged by different metrics."""
    judged = [v for v in by_task if v.n]
    if len(by_task) < 2 or not judged or len(set(metrics.values())) != 1:
        return []
    metric = judged[0].metric
    every = [pair(rows, arm, baseline, v.task, metric) for v in judged]
    total = sum(len(pairs.samples) for pairs in every)
    scaled = [pairs.differences * (total / len(every) / len(pairs.samples)) for pairs in every]
    documents = [f"{number} {name}" for number, pairs in enumerate(every) for name in pairs.documents]
    reaches, most = [_reach(pairs) for pairs in every], max(total / len(every) / len(p.samples) for p in every)
    reach = None if None in reaches else most * max(r for r in reaches if r is not None)
    margin = margins.of(metric)
    paired = compare_pairs(np.concatenate(scaled), documents, binary=False, reach=reach, weighted=True, margin=margin)
    missing = len(by_task) - len(judged)
    planned = [v.planned for v in by_task if v.planned is not None]
    return [
        Verdict(
            arm,
            ALL_TASKS,
            metric,
            "undecided",
            f"{missing} of {len(by_task)} tasks have no pair" if missing else "",
            total,
            paired.documents,
            sum(planned) if len(planned) == len(by_task) else None,
            sum(v.unpaired for v in by_task),
            sum(v.errors for v in by_task),
            float(np.mean([v.mean for v in judged if v.mean is not None])),
            float(np.mean([v.baseline for v in judged if v.baseline is not None])),
            margin,
            paired,
        )
    ]


def _decided(found: list[Verdict], alpha: float) -> list[Verdict]:
    """Adjust over arms and tasks, A/A arms apart from the others, and decide."""
    decided = list(found)
    for noise in (False, True):
        places = [i for i, verdict in enumerate(found) if verdict.noise is noise]
        tests = [found[i].paired.p if found[i].paired else None for i in places]  # type: ignore[union-attr]
        equal = [found[i].paired.p_equivalent if found[i].paired else None for i in places]  # type: ignore[union-attr]
        family = sum(p is not None for p in tests)
        for i, p, q in zip(places, _holm(tests), _holm(equal), strict=True):
            decided[i] = _decide(replace(found[i], p_holm=p, p_equivalent_holm=q), alpha, max(family, 1))
    return decided


def _holm(ps: list[float | None]) -> list[float | None]:
    from statsmodels.stats.multitest import multipletests

    known = [p for p in ps if p is not None]
    # One p is as it is, and the library takes its time.
    adjusted = iter(multipletests(known, method="holm")[1].tolist() if len(known) > 1 else known)
    return [None if p is None else float(next(adjusted)) for p in ps]


def _decide(verdict: Verdict, alpha: float, family: int) -> Verdict:
    paired = verdict.paired
    if paired is None:
        return verdict
    notes = [verdict.reason] if verdict.reason else []
    differs = verdict.p_holm is not None and verdict.p_holm < alpha
    within = verdict.p_equivalent_holm is not None and verdict.p_equivalent_holm < alpha
    rises = (paired.difference > 0) is not lower_is_better(verdict.metric)
    detectable = None
    if paired.deviation and not paired.bounded:
        detectable = minimum_effect(paired.documents, deviation=paired.deviation, comparisons=family, alpha=alpha)
    if within:
        word = "equivalent"
        notes.insert(0, f"within ±{verdict.margin:g}" + (f", though detectably {_side(rises)}" if differs else ""))
    elif differs and paired.agrees:
        word = _side(rises)
        notes.insert(0, f"{paired.test}, {_p(verdict.p_holm)} after Holm")
        if paired.bounded:
            notes.append("few pairs differ, so the interval is an outer bound")
    else:
        word = "undecided"
        notes.insert(0, _open(verdict, paired, differs, family, alpha, detectable))
    if verdict.errors:
        notes.append(f"failed on {verdict.errors} samples, which no pair shows")
        if word in ("better", "equivalent"):
            word = "undecided"
    if verdict.partial:
        notes.append(f"partial: {verdict.n} of {verdict.planned} samples")
    elif verdict.unpaired and not verdict.errors:
        notes.append(f"{verdict.unpaired} samples are not paired")
    return replace(verdict, verdict=word, reason="; ".join(notes), detectable=detectable)


def _side(rises: bool) -> str:
    return "better" if rises else "worse"


def _p(p: float | None) -> str:
    return "no p" if p is None else "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def _open(verdict: Verdict, paired: Paired, differs: bool, family: int, alpha: float, detectable: float | None) -> str:
    """Why nothing is decided."""
    # With k units the smallest p of a test by signs is 2 * 0.5 ** k.
    if 1 < paired.documents < 1000 and 2 * 0.5**paired.documents >= alpha / family:
        unit = "documents" if paired.documents < verdict.n else "pairs"
        among = f" among {family} comparisons" if family > 1 else ""
        return f"{paired.documents} {unit} are too few to show any difference{among}"
    if paired.why:
        return f"{paired.why}; that says nothing of others"
    if differs:
        return f"{paired.test} and the interval of the mean disagree: a few samples weigh too much"
    p = f"{_p(verdict.p_holm)} after Holm"
    return p if detectable is None else f"{p}; so many samples show differences from {detectable:.2g}"
