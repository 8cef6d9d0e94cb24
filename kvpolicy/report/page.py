"""The report as one page of HTML that needs nothing beside it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib.metadata import version
from typing import Any

from markupsafe import Markup

from kvpolicy.report import figures
from kvpolicy.report.charts import COLOURS, MINUS, Scale, interval
from kvpolicy.report.drill import embedded, samples
from kvpolicy.report.tables import Report, difference, mean, name_of, number, p_value
from kvpolicy.report.words import VERDICTS, headline, methods, settings_text
from kvpolicy.statistics.verdicts import ALL_TASKS, Verdict
from kvpolicy.words import model_name

MOST_LINES = 400
"""Lines of the table of verdicts."""


def page(report: Report) -> str:
    """The page."""
    tables, texts = figures.costs(report), _texts()
    beside = [figures.divergence(report), figures.steps(report), figures.attention(report.evidence.settings)]
    shown = samples(report)
    return str(
        _environment()
        .get_template("page.html")
        .render(
            title=title(report),
            headline=headline(report),
            partial=report.partial(),
            errors=report.errors(),
            notes=report.evidence.settings.get("notes", ()),
            summary=_summary(report),
            groups=_groups(report),
            verdicts=VERDICTS,
            methods=methods(report),
            signs=[c for c in report.signs if c.signs],
            checked=bool(report.signs),
            means=_means(report),
            tasks=report.tasks,
            arms=report.arms,
            counts=report.counts(),
            planned=report.evidence.planned,
            baseline=report.verdicts.baseline,
            quality=figures.quality(report),
            quality_note=figures.FRONT,
            divergence=[figure for figure in beside[:2] if figure],
            attention=beside[2],
            cost_columns=tables[0],
            costs=tables[1],
            cost_parts=tables[2],
            heats=figures.heat_maps(report),
            drill=embedded(shown),
            shown=len(shown["samples"]),
            total=shown["total"],
            recipes=[(arm, text) for arm, text in report.evidence.arms.items() if text],
            command=command(report.evidence.settings),
            settings=settings_text(report.evidence.settings),
            version=version("kvpolicy"),
            style=Markup(texts["style.css"]),
            script=Markup(texts["script.js"]),
        )
    )


@cache
def _environment() -> Any:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("kvpolicy.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(number=_number, p=p_value, task=name_of)
    return environment


@cache
def _texts() -> dict[str, str]:
    loader = _environment().loader
    return {name: loader.get_source(_environment(), name)[0] for name in ("style.css", "script.js")}


def _number(value: float | None) -> str:
    return _minus(number(value))


def _minus(text: str) -> str:
    """Numbers with a true minus."""
    return text if text == "-" else text.replace("-", MINUS)


def _two(verdict: Verdict) -> tuple[str, str]:
    """The difference, and its interval."""
    middle, _, ends = _minus(difference(verdict)).partition(" [")
    return middle, ends.rstrip("]").replace(",", " to")


def title(report: Report) -> str:
    """Arms, tasks and model."""
    model = report.evidence.settings.get("model")
    tasks = report.tasks
    over = tasks[0] if len(tasks) == 1 else f"{len(tasks)} tasks"
    arms = len(report.arms) - 1
    against = f"{arms} arm{'s' if arms != 1 else ''} against {report.verdicts.baseline}"
    return f"{against}, {over}" + (f", {model_name(model)}" if isinstance(model, str) else "")


def command(settings: Mapping[str, Any]) -> list[str]:
    """What was run; of several runs, one after the other."""
    every = [settings, *(settings.get("runs") or {}).values()]
    found = [s["command"] for s in every if isinstance(s, Mapping) and s.get("command")]
    return [text if isinstance(text, str) else " ".join(map(str, text)) for text in found]


def _summary(report: Report) -> list[dict[str, Any]]:
    """For each arm the verdict over all tasks, and how many tasks have which."""
    found = []
    for place, arm in enumerate(report.arms[1:], 1):
        mine = [v for v in report.verdicts.found if v.arm == arm]
        over = next((v for v in mine if v.task == ALL_TASKS), None)
        by_task = [v for v in mine if v.task != ALL_TASKS]
        counts = [(word, sum(v.verdict == word for v in by_task)) for word in VERDICTS]
        one = over or (by_task[0] if len(by_task) == 1 else None)
        found.append(
            {
                "arm": arm,
                "style": f"s{place % COLOURS}",
                "noise": any(v.noise for v in mine),
                "one": one,
                "difference": _minus(difference(one)) if one else "",
                "counts": [(word, count) for word, count in counts if count],
                "tasks": len(by_task),
                "collapsed": sorted({sign for c in report.signs if c.arm == arm and c.collapsed for sign in c.signs}),
            }
        )
    return found


def _groups(report: Report) -> list[dict[str, Any]]:
    """The verdicts by arm, each with its interval on the scale of its metric."""
    scales: dict[str, Scale] = {}
    for metric in dict.fromkeys(v.metric for v in report.verdicts.found):
        ends = [0.0]
        for v in report.verdicts.found:
            if v.metric == metric and v.paired is not None:
                ends += [x for x in (v.paired.difference, v.paired.low, v.paired.high) if x is not None]
        scales[metric] = Scale.over(ends)
    found, left = [], MOST_LINES
    for arm in report.arms[1:]:
        mine = [v for v in report.verdicts.found if v.arm == arm]
        found.append(
            {"arm": arm, "lines": [_line(v, scales[v.metric]) for v in mine[:left]], "left_out": len(mine[left:])}
        )
        left = max(0, left - len(mine))
    return found


def _line(verdict: Verdict, scale: Scale) -> dict[str, Any]:
    paired = verdict.paired
    picture = None
    if paired is not None:
        picture = interval(paired.low, paired.difference, paired.high, scale, verdict.margin)
    return {
        "v": verdict,
        "difference": _two(verdict),
        "picture": picture,
        "all": verdict.task == ALL_TASKS,
    }


def _means(report: Report) -> list[dict[str, Any]]:
    """Means of every metric by task and arm."""
    rows, judged = report.rows, list(dict.fromkeys(report.verdicts.metrics.values()))
    names = dict.fromkeys([*judged, *(name for row in report.evidence.rows for name in row.metrics)])
    found = []
    for metric in list(names)[:24]:
        lines = []
        for task in report.tasks:
            cells = [mean(rows, arm, task, metric) for arm in report.arms]
            if any(cells):
                lines.append((task, cells))
        found.append({"metric": metric, "judged": metric in judged, "lines": lines})
    return found
