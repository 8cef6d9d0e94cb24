"""Several runs as one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from kvpolicy.errors import CompareError
from kvpolicy.report.readers import default_baseline
from kvpolicy.statistics.margins import merged as merged_margins
from kvpolicy.statistics.rows import Evidence, Row
from kvpolicy.words import clip, listed, quoted, suggest

_COSTS = ("seconds", "bytes")


def merge(runs: Sequence[tuple[str, Evidence]]) -> Evidence:
    """Put runs together, so that arms of one are compared with those of another.

    An arm of several runs is one arm where their rows don't contradict each other. Else the later one has the name of
    its run in brackets.

    Args:
        runs: the name and the rows of each.

    Raises:
        CompareError: samples of one name differ between arms.
    """
    rows: dict[tuple[str, str, str], Row] = {}
    arms: dict[str, str | None] = {}
    planned: dict[str, int] = {}
    for label, run in runs:
        names = dict.fromkeys([*run.arms, *(row.arm for row in run.rows)])
        by_arm: dict[str, list[Row]] = {name: [] for name in names}
        for row in run.rows:
            by_arm[row.arm].append(row)
        for arm, own in by_arm.items():
            name = arm if _agree(arm, own, run, rows, arms) else _free(f"{arm} ({label})", arms)
            arms.setdefault(name, run.arms.get(arm))
            for row in own:
                rows.setdefault((name, row.task, row.sample), replace(row, arm=name))
        for task, count in run.planned.items():
            planned[task] = max(count, planned.get(task, 0))
    found = tuple(rows.values())
    settings = _settings(runs)
    notes = same_samples(found)
    if notes:
        settings["notes"] = [*settings.get("notes", ()), *notes]
    first = runs[0][1].baseline
    baseline = first if len(runs) == 1 or first in ("exact", "full") else default_baseline(arms)
    return Evidence(found, arms, baseline, planned, settings)


def of_arms(evidence: Evidence, arms: Sequence[str], baseline: str | None = None) -> Evidence:
    """The rows of the baseline and of some arms: what is not asked about needs no comparison.

    Raises:
        CompareError: an arm is unknown.
    """
    known = list(dict.fromkeys([*evidence.arms, *(row.arm for row in evidence.rows)]))
    for arm in arms:
        if arm not in known:
            raise CompareError(f"an arm must be one of {listed(known)}, found {quoted(arm)}{suggest(arm, known)}")
    kept = {evidence.baseline if baseline is None else baseline, *arms}
    recipes = {arm: evidence.arms.get(arm) for arm in known if arm in kept}
    return replace(evidence, rows=tuple(row for row in evidence.rows if row.arm in kept), arms=recipes)


def _agree(arm: str, own: list[Row], run: Evidence, rows: Mapping[Any, Row], arms: Mapping[str, str | None]) -> bool:
    if arm not in arms:
        return True
    if arms[arm] != run.arms.get(arm):
        return False
    shared = [(row, rows[key]) for row in own if (key := (arm, row.task, row.sample)) in rows]
    return all(_result(one) == _result(other) for one, other in shared)


def _result(row: Row) -> Any:
    """What an arm made of a sample, without what it cost."""
    metrics = {name: value for name, value in row.metrics.items() if not name.endswith(_COSTS)}
    return metrics, row.output, row.error is None


def _free(name: str, arms: Mapping[str, Any]) -> str:
    number, found = 2, name
    while found in arms:
        number, found = number + 1, f"{name} {number}"
    return found


def _settings(runs: Sequence[tuple[str, Evidence]]) -> dict[str, Any]:
    if len(runs) == 1:
        return dict(runs[0][1].settings)
    merged: dict[str, Any] = {}
    margins = merged_margins(run for _, run in runs)
    if margins:
        merged["margins"] = margins
    for name in ("aa", "attention"):
        given = [run.settings[name] for _, run in runs if run.settings.get(name)]
        if given:
            merged[name] = given[0]
    for label, run in runs:
        merged.setdefault("runs", {})[_free(label, merged.get("runs", {}))] = {
            name: value for name, value in run.settings.items() if name != "attention"
        }
    return merged


def same_samples(rows: Sequence[Row]) -> list[str]:
    """What is to be said of samples whose prompts differ between arms.

    Raises:
        CompareError: rows of one task and sample are of different samples: what was asked for differs.
    """
    first: dict[tuple[str, str], Row] = {}
    differ: dict[str, tuple[int, Row, Row]] = {}
    for row in rows:
        other = first.setdefault((row.task, row.sample), row)
        for name, one, two in (
            ("answer", other.answer, row.answer),
            ("doc_hash", other.facts.get("doc_hash"), row.facts.get("doc_hash")),
        ):
            if one is not None and two is not None and one != two:
                raise CompareError(
                    f"rows of a task and a sample must be of the same sample, found {name} {quoted(str(one))} of arm "
                    f"{quoted(other.arm)} and {quoted(str(two))} of arm {quoted(row.arm)} in task {quoted(row.task)}, "
                    f"sample {quoted(row.sample)}; run all arms with the same seed, data and number of samples"
                )
        if None not in (other.prompt, row.prompt) and other.prompt != row.prompt:
            count = differ.get(row.task, (0, other, row))[0]
            differ[row.task] = (count + 1, other, row)
    return [
        f"Task {clip(task)}: prompts of {count} rows differ from those of other arms (such as {clip(two.arm)} and "
        f"{clip(one.arm)}), so that templates or truncation differ, and with them more than the cache."
        for task, (count, one, two) in differ.items()
    ]
