"""What a report says in words, in HTML as in Markdown."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from typing import Any

from kvpolicy.report.tables import Report, number
from kvpolicy.statistics.pairs import lower_is_better
from kvpolicy.statistics.verdicts import ALL_TASKS, Verdict

VERDICTS = ("better", "worse", "equivalent", "undecided")
HIDDEN = ("attention", "notes")
"""Settings that have a place of their own."""


def headline(report: Report) -> list[str]:
    """The answer first: a sentence for each arm."""
    found, baseline = [], report.verdicts.baseline
    for arm in report.arms[1:]:
        mine = [v for v in report.verdicts.found if v.arm == arm]
        tasks = [v for v in mine if v.task != ALL_TASKS]
        over = next((v for v in mine if v.task == ALL_TASKS), None)
        counts = [(word, [v.task for v in tasks if v.verdict == word]) for word in VERDICTS]
        if len(tasks) == 1:
            text = f"{arm} is {_as(tasks[0].verdict, baseline)}: {tasks[0].reason}."
        else:
            said = ", ".join(f"{word} on {len(names)}" for word, names in counts if names)
            text = f"{arm}: {said} of {len(tasks)} tasks"
            text += f"; over all tasks {_as(over.verdict, baseline)}." if over else "."
        if any(v.noise for v in mine):
            said = "its rows are the baseline's, so that they show no noise." if report.copied(arm) else _noise(mine)
            text = f"{arm} is an A/A arm, the baseline again: {said}"
        found.append(text)
    return found


def _as(verdict: str, baseline: str) -> str:
    joined = {"better": f"better than {baseline}", "worse": f"worse than {baseline}"}
    return joined.get(verdict, f"equivalent to {baseline}" if verdict == "equivalent" else "undecided")


def _noise(mine: list[Any]) -> str:
    """The noise floor, and what it means."""
    tasks = [v for v in mine if v.task != ALL_TASKS and v.paired is not None]
    if not tasks:
        return "it has no pair."
    most = max(tasks, key=lambda v: abs(v.paired.difference))
    text = f"its largest difference is {number(most.paired.difference, 4, sign=True)} ({most.metric}, {most.task})"
    if any(v.verdict in ("better", "worse") for v in mine):
        return f"{text}, which is more than chance. Something but the cache differs between arms; find it first."
    return f"{text}. Differences of other arms as small as this are noise."


def methods(report: Report) -> list[str]:
    """How the verdicts were reached."""
    verdicts = report.verdicts
    metrics = list(dict.fromkeys(verdicts.metrics.values()))
    sides = [f"{name} ({'lower' if lower_is_better(name) else 'higher'} is better)" for name in metrics]
    said = _margins(verdicts.found)
    family = sum(v.paired is not None and v.paired.p is not None and not v.noise for v in verdicts.found)
    tests = dict.fromkeys(v.paired.test for v in verdicts.found if v.paired is not None)
    intervals = dict.fromkeys(v.paired.interval for v in verdicts.found if v.paired is not None and v.paired.interval)
    clustered = any(v.documents < v.n for v in verdicts.found)
    lines = [
        f"Every arm is compared with {verdicts.baseline} on the samples that both have, by "
        f"{', '.join(sides) or 'nothing'}.",
        f"Better or worse: the test of no difference ({', '.join(tests) or 'none'}), adjusted by Holm over {family} "
        f"comparisons of arms and tasks, has p < {verdicts.alpha:g}, and the 95% interval of the mean agrees "
        f"({', '.join(intervals) or 'none'}; intervals are not adjusted).",
        f"Equivalent: two one-sided tests, adjusted likewise, put the difference within {', '.join(said)}."
        if said
        else "Equivalent: no margin was declared, so no arm is called equivalent (--margin declares one).",
        "Undecided: neither. That is no proof of equality; the reason says what so many samples can show.",
    ]
    if clustered:
        lines.append("Samples that share a document are not independent; documents are what is counted and resampled.")
    return lines


def _margins(found: Iterable[Verdict]) -> list[str]:
    """The margin of each metric; where tasks have their own, of which tasks."""
    margins: dict[str, dict[float, list[str]]] = {}
    for v in found:
        if v.margin is not None:
            tasks = margins.setdefault(v.metric, {}).setdefault(v.margin, [])
            tasks += [v.task] if v.task not in tasks else []
    return [
        f"±{margin:g} of {name}" + (f" ({', '.join(tasks)})" if len(own) > 1 else "")
        for name, own in margins.items()
        for margin, tasks in own.items()
    ]


def settings_text(settings: Mapping[str, Any]) -> str:
    """Settings as YAML."""
    from ruamel.yaml import YAML

    kept = {name: _plain(value) for name, value in settings.items() if name not in HIDDEN and value is not None}
    if not kept:
        return ""
    stream = io.StringIO()
    yaml = YAML()
    yaml.width = 100
    yaml.default_flow_style = False
    yaml.dump(kept, stream)
    return stream.getvalue()


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple | set):
        return [_plain(inner) for inner in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)
