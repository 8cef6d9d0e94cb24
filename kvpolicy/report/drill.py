"""Samples that a page shows one by one: so many that it still opens, those that tell most."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from markupsafe import Markup

from kvpolicy.report.tables import Report
from kvpolicy.statistics.collapse import parting
from kvpolicy.statistics.pairs import lower_is_better
from kvpolicy.statistics.rows import Row

MOST = 600
"""Samples."""
CHARACTERS = 3_000_000
"""Of all texts together."""
BEFORE, AFTER = 300, 1_200
"""Characters of an output that are shown around the place where it parts."""
PROMPT = 600
"""Characters of a prompt's end."""


def samples(report: Report) -> dict[str, Any]:
    """What the page shows: samples with the outputs of all arms, and how many there are."""
    rows = report.rows
    every = list(dict.fromkeys((row.task, row.sample) for row in report.evidence.rows))
    chosen, spent, left_out = [], 0, 0
    for task, sample in every if len(every) <= MOST else list(_telling(report))[:MOST]:
        record, size = _record(report, rows, task, sample)
        if spent + size > CHARACTERS:
            left_out += 1
            continue
        spent += size
        chosen.append(record)
    place = {key: i for i, key in enumerate(every)}
    chosen.sort(key=lambda record: place[(record["task"], record["sample"])])
    return {
        "arms": report.arms,
        "tasks": [task for task in report.tasks if any(record["task"] == task for record in chosen)],
        "samples": chosen,
        "total": len(every),
    }


def embedded(data: Any) -> Markup:
    """JSON that can stand in a script element."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), default=str)
    for letter in "<>&\u2028\u2029":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return Markup(text)


def _telling(report: Report) -> Iterator[tuple[str, str]]:
    """Samples that failed, then in turn of each arm and task those with the largest losses and gains."""
    rows, baseline = report.rows, report.verdicts.baseline
    queues: list[list[tuple[str, str]]] = []
    for (arm, task), own in rows.items():
        metric, theirs = report.verdicts.metrics.get(task, ""), rows.get((baseline, task), {})
        if arm == baseline:
            continue
        sign = -1 if lower_is_better(metric) else 1
        rated = []
        for sample, row in own.items():
            if row.error is not None:
                rated.append((-float("inf"), sample))
            elif sample in theirs and metric in row.metrics and metric in theirs[sample].metrics:
                rated.append((sign * (row.metrics[metric] - theirs[sample].metrics[metric]), sample))
        rated.sort()
        ends = [rated[i // 2] if i % 2 == 0 else rated[-1 - i // 2] for i in range(len(rated))]
        queues.append([(task, sample) for _, sample in ends])
    seen: set[tuple[str, str]] = set()
    for place in range(max(map(len, queues), default=0)):
        for queue in queues:
            if place < len(queue) and queue[place] not in seen:
                seen.add(queue[place])
                yield queue[place]
    yield from (key for row in report.evidence.rows if (key := (row.task, row.sample)) not in seen)


def _record(report: Report, rows: Any, task: str, sample: str) -> tuple[dict[str, Any], int]:
    baseline, metric = report.verdicts.baseline, report.verdicts.metrics.get(task, "")
    base: Row | None = rows.get((baseline, task), {}).get(sample)
    arms: dict[str, Any] = {}
    size = 0
    for arm in report.arms:
        row: Row | None = rows.get((arm, task), {}).get(sample)
        if row is None:
            continue
        one: dict[str, Any] = {"v": _rounded(row.metrics.get(metric))}
        if row.error is not None:
            one["error"] = row.error[:AFTER]
        if row.output is not None:
            place = None if base is None or base.output is None else parting(base.output, row.output)
            one["part"], one["out"] = place, _clipped(row.output, place)
            if place is not None and base is not None and base.output is not None:
                one["base"] = _clipped(base.output, place)
        size += sum(len(str(value)) for value in one.values())
        arms[arm] = one
    first = next(row for arm in report.arms if (row := rows.get((arm, task), {}).get(sample)) is not None)
    record: dict[str, Any] = {"task": task, "sample": sample, "metric": metric, "arms": arms}
    if first.document is not None:
        record["document"] = first.document
    if first.answer is not None:
        record["answer"] = first.answer[:AFTER]
    if first.prompt is not None:
        record["prompt"] = ("…" if len(first.prompt) > PROMPT else "") + first.prompt[-PROMPT:]
    return record, size + sum(len(str(value)) for name, value in record.items() if name != "arms")


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.6g}")


def _clipped(text: str, place: int | None) -> dict[str, Any]:
    """A window of a text, how many characters stand before and after it, and where in it texts part."""
    start = 0 if place is None or place <= BEFORE else place - BEFORE
    end = start + (BEFORE + AFTER if place is not None else AFTER)
    found: dict[str, Any] = {"t": text[start:end]}
    if start:
        found["b"] = start
    if end < len(text):
        found["a"] = len(text) - end
    if place is not None:
        found["p"] = place - start
    return found
