"""Which pictures a report has, and what they are drawn from."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup

from kvpolicy.report.charts import COLOURS, Line, Point, curves, scatter, stacked
from kvpolicy.report.tables import Report, mean, number
from kvpolicy.statistics.collapse import parting
from kvpolicy.statistics.pairs import lower_is_better
from kvpolicy.statistics.rows import Row

MOST_TASKS = 12
"""Tasks that have pictures of their own."""
FRONT = (
    "Bars are 95% intervals of each mean; what reaches 0 ends at a logarithmic axis. The stepped line is the Pareto "
    "front, and filled points are on it: no arm has both fewer bits and a better mean. It does not rank arms whose "
    "bars overlap; that is what verdicts are for."
)
ALPHA = "\u03b1"
NAMES = {
    "score": "score",
    "kl": "KL to exact, nats per token",
    "nll": "negative log-likelihood, nats per token",
    "bits": "effective bits per key or value",
}


@dataclass(frozen=True)
class Key:
    """An entry of a legend."""

    mark: str
    name: str
    classes: str = ""
    colour: str | None = None
    note: str = ""


@dataclass(frozen=True)
class Figure:
    """A picture, its legend, which stands outside it, and what is to be said."""

    title: str
    picture: Markup
    legend: Sequence[Key]
    note: str = ""
    choose: bool = False
    """Whether a curve can be picked out by its entry in the legend."""
    facts: Sequence[str] = field(default=())
    first: bool = True
    """Whether it is shown before a reader asks for more."""


def quality(report: Report) -> list[Figure]:
    """Quality against effective bits, one picture for each task and metric; with several tasks, their mean first."""
    arms, rows = report.arms, report.rows
    found = []
    judged = list(dict.fromkeys(report.verdicts.metrics.values()))
    for metric in dict.fromkeys([*judged, "kl"]):
        tasks = [task for task in report.tasks if any(mean(rows, arm, task, metric) for arm in arms)]
        for chosen in ([tasks] if len(tasks) > 1 else []) + [[task] for task in tasks][:MOST_TASKS]:
            figure = _quality(report, chosen, metric, first=len(chosen) == len(tasks))
            if figure is not None:
                found.append(figure)
    return found


def _quality(report: Report, tasks: Sequence[str], metric: str, first: bool) -> Figure | None:
    rows, drawn = report.rows, []
    for style, arm in enumerate(report.arms):
        bits = [mean(rows, arm, task, "bits") for task in tasks]
        values = [mean(rows, arm, task, metric) for task in tasks]
        known = [(b.mean, v) for b, v in zip(bits, values, strict=True) if b is not None and v is not None]
        if len(known) == len(tasks):
            y = sum(v.mean for _, v in known) / len(known)
            # Tasks are independent: the errors of their mean add in squares.
            low, high = (
                math.sqrt(sum((v.mean - (v.low if v.low is not None else v.mean)) ** 2 for _, v in known)) / len(known),
                math.sqrt(sum(((v.high if v.high is not None else v.mean) - v.mean) ** 2 for _, v in known))
                / len(known),
            )
            drawn.append((arm, sum(b for b, _ in known) / len(known), y, y - low, y + high, style))
    if len(drawn) < 2:
        return None
    sign = -1 if lower_is_better(metric) else 1

    def front(one: tuple[Any, ...]) -> bool:
        return not any(
            o[1] <= one[1] and sign * o[2] >= sign * one[2] and (o[1], o[2]) != (one[1], one[2]) for o in drawn
        )

    points = [Point(*d, front(d)) for d in sorted(drawn, key=lambda d: d[1])]
    name = NAMES.get(metric, metric)
    legend = [
        Key(str(i), p.name, f"s{p.style % COLOURS}", note=f"{number(p.x, 2)} bits, {number(p.y)}")
        for i, p in enumerate(points, 1)
    ]
    over = tasks[0] if len(tasks) == 1 else f"mean of {len(tasks)} tasks"
    return Figure(
        f"{name}: {over}",
        scatter(points, NAMES["bits"], name, sign > 0),
        legend,
        first=first,
    )


def attention(settings: Mapping[str, Any]) -> Figure | None:
    """Attention of the exact cache by distance, each layer by its name."""
    found = settings.get("attention")
    if not isinstance(found, Mapping) or not found.get("distances") or not found.get("layers"):
        return None
    x, layers, fits = found["distances"], found["layers"], found.get("fit_layers") or {}
    lines, legend = [], []
    for place, (layer, y) in enumerate(layers.items()):
        hue = 220 - 200 * place / max(len(layers) - 1, 1)
        colour = f"hsl({hue:.0f} 65% 52%)"
        fit = fits.get(layer)
        note = f"{ALPHA} {fit['alpha']:.2f}" if fit else ""
        lines.append(Line(f"layer {layer}", x, y, "layer", colour))
        legend.append(Key("", f"layer {layer}", "layer", colour, note))
    lines.append(Line("mean of the layers", x, found["mean"], "strong"))
    legend.insert(0, Key("", "mean of the layers", "strong"))
    fit = found.get("fit")
    facts = []
    if fit:
        facts.append(
            f"{ALPHA} = {fit['alpha']:.2f}, R² = {fit['r2']:.2f}: mean attention per token falls as distance^-{ALPHA}, "
            f"fitted from distance {fit['first']:.0f} to {fit['last']:.0f}."
        )
    if "first_tokens" in found:
        facts.append(
            f"Not drawn: the first tokens of the text ({100 * found['first_tokens']:.0f}% of attention) and the "
            f"query's own ({100 * found.get('own_token', 0):.0f}%)."
        )
    picture = curves(lines, "distance from the query, tokens", "mean attention per token", log_x=True, log_y=True)
    return Figure("Attention of the exact cache by distance", picture, legend, "", True, facts)


def divergence(report: Report) -> Figure | None:
    """The share of outputs that still equal the baseline's, by token where that is known, else by character."""
    rows, baseline = report.rows, report.verdicts.baseline
    by_arm: dict[str, list[int | None]] = {}
    by_token = all("first_divergence" in row.facts for row in report.evidence.rows if _written(row, baseline))
    for arm in report.arms[1:]:
        for task in report.tasks:
            theirs = rows.get((baseline, task), {})
            for sample, row in rows.get((arm, task), {}).items():
                if by_token and _written(row, baseline) and "first_divergence" in row.facts:
                    by_arm.setdefault(arm, []).append(row.facts["first_divergence"])
                elif not by_token and sample in theirs and row.output is not None and theirs[sample].output is not None:
                    by_arm.setdefault(arm, []).append(parting(theirs[sample].output or "", row.output))
    if not by_arm:
        return None
    last = max([place for places in by_arm.values() for place in places if place is not None] or [1]) + 1
    lines, legend = [], []
    for arm, places in by_arm.items():
        style = f"s{report.arms.index(arm) % COLOURS}"
        marks = sorted(place for place in places if place is not None)
        n, x, y = len(places), [0.0], [1.0]
        for place in sorted(set(marks)):
            x.append(float(place + 1))
            y.append(1 - sum(m <= place for m in marks) / n)
        lines.append(Line(arm, [*x, float(last)], [*y, y[-1]], style))
        legend.append(Key("", arm, style, note=f"{len(marks)} of {n} part"))
    unit = "tokens" if by_token else "characters"
    note = f"Curves that fall at once are of arms whose outputs part from {baseline}'s with their first {unit}."
    return Figure(
        f"Outputs that still equal those of {baseline}",
        curves(lines, f"{unit} of output", "share of samples", step=True),
        legend,
        note,
        True,
    )


def _written(row: Row, baseline: str) -> bool:
    return row.arm != baseline and row.error is None and row.output is not None


def steps(report: Report) -> Figure | None:
    """Mean divergence by step of the answer."""
    lines, legend = [], []
    for style, arm in enumerate(report.arms):
        lists = [
            row.facts["kl_steps"]
            for row in report.evidence.rows
            if row.arm == arm and row.error is None and row.facts.get("kl_steps")
        ]
        if arm == report.verdicts.baseline or not lists:
            continue
        longest = max(map(len, lists))
        reached = [[values[i] for values in lists if len(values) > i] for i in range(longest)]
        kept = [(float(i + 2), sum(v) / len(v)) for i, v in enumerate(reached) if 2 * len(v) >= len(lists)]
        lines.append(Line(arm, [x for x, _ in kept], [y for _, y in kept], f"s{style % COLOURS}"))
        legend.append(Key("", arm, f"s{style % COLOURS}"))
    if not any(y > 0 for line in lines for y in line.y):
        return None
    return Figure(
        "KL to the exact cache by token of the answer",
        curves(lines, "token of the answer", "mean KL, nats"),
        legend,
        "Drawn while at least half of the answers are as long.",
        True,
    )


@dataclass(frozen=True)
class Cost:
    """What an arm costs, over all samples."""

    arm: str
    style: str
    cells: Sequence[str]
    parts: Sequence[tuple[str, str]]
    """Mean bytes by part, in words."""
    bar: Markup | None


COSTS = (
    ("bits", "bits per value", 1.0, 2),
    ("final_bytes", "cache at the end, kB", 1e-3, 1),
    ("peak_bytes", "cache at its peak, kB", 1e-3, 1),
    ("prefill_seconds", "time to first token, ms", 1e3, 1),
    ("step_seconds", "decode, ms per token", 1e3, 2),
)


def costs(report: Report) -> tuple[list[str], list[Cost], list[str]]:
    """Names of columns, a line for each arm, and the parts of memory; empty where no row has costs."""
    by_arm: dict[str, list[Row]] = {arm: [] for arm in report.arms}
    for row in report.evidence.rows:
        if row.error is None:
            by_arm[row.arm].append(row)
    columns = [c for c in COSTS if any(c[0] in row.metrics for row in report.evidence.rows)]
    parts = dict.fromkeys(
        name for row in report.evidence.rows for name, value in (row.facts.get("memory") or {}).items() if value
    )
    held = {
        arm: [(name, _mean([(row.facts.get("memory") or {}).get(name) for row in rows]) or 0.0) for name in parts]
        for arm, rows in by_arm.items()
    }
    most = max([sum(value for _, value in values) for values in held.values()] or [0.0])
    lines = []
    for style, (arm, rows) in enumerate(by_arm.items()):
        cells = []
        for metric, _, scale, digits in columns:
            value = _mean([row.metrics.get(metric) for row in rows])
            cells.append(number(None if value is None else value * scale, digits))
        if any(cell != "-" for cell in cells):
            own = held[arm]
            said = [(name, number(value / 1e3, 1)) for name, value in own]
            bar = stacked(own, most) if any(value for _, value in own) else None
            lines.append(Cost(arm, f"s{style % COLOURS}", cells, said, bar))
    return [name for _, name, _, _ in columns], lines, list(parts)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [float(v) for v in values if v is not None and math.isfinite(v)]
    return sum(known) / len(known) if known else None


@dataclass(frozen=True)
class Heat:
    """Mean score by depth and length of an arm on a task."""

    arm: str
    task: str
    lengths: Sequence[str]
    lines: Sequence[tuple[str, Sequence[tuple[str, float | None, int]]]]
    """For each depth its cells: text, score and samples."""


_LENGTH = re.compile(r"(?<=[:,])tokens=\d+(,|$)")


def _of_any_length(task: str) -> str:
    """A task without its length: the same at several lengths is one map."""
    return _LENGTH.sub("", task).rstrip(":,")


def heat_maps(report: Report) -> list[Heat]:
    """Depth by length, where samples differ in depth; tasks that differ by their length alone are one map."""
    by_task: dict[tuple[str, str], list[tuple[float, float, float]]] = {}
    for (arm, task), rows in report.rows.items():
        by_task.setdefault((_of_any_length(task), arm), []).extend(
            (float(row.facts["depth"]), float(row.facts["length"]), row.metrics["score"])
            for row in rows.values()
            if row.error is None
            and "score" in row.metrics
            and all(isinstance(row.facts.get(name), int | float) for name in ("depth", "length"))
        )
    found = []
    order = {arm: place for place, arm in enumerate(report.arms)}
    for (task, arm), known in sorted(by_task.items(), key=lambda item: order[item[0][1]]):
        lengths = sorted({length for _, length, _ in known})
        drawn = {min(int(depth * 10), 9) for depth, _, _ in known}
        bands = range(min(drawn, default=0), max(drawn, default=-1) + 1)  # also those without a sample between others
        if len(bands) < 2 or len(lengths) > 24:
            continue
        lines = []
        for band in bands:
            cells = []
            for length in lengths:
                scores = [s for d, x, s in known if x == length and min(int(d * 10), 9) == band]
                value = sum(scores) / len(scores) if scores else None
                cells.append((number(value, 2), value, len(scores)))
            lines.append((f"{10 * band} to {10 * band + 10}%", cells))
        found.append(Heat(arm, task, [f"{length:,.0f}" for length in lengths], lines))
    return found
