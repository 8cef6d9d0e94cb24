"""The report as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from kvpolicy.report import figures
from kvpolicy.report.page import command, title
from kvpolicy.report.tables import Mean, Report, difference, mean, name_of, number, p_value
from kvpolicy.report.words import headline, methods, settings_text


def markdown(report: Report) -> str:
    """Verdicts, means, costs and settings; pictures and samples are in the page."""
    parts = [f"# {_text(title(report))}", *(_text(line) for line in headline(report))]
    partial = report.partial()
    if partial:
        parts += ["**This run is partial.** Samples that are missing may tell otherwise.", _items(partial)]
    parts += [f"**Note.** {_text(note)}" for note in report.evidence.settings.get("notes", ())]
    parts += ["## Verdicts", _verdicts(report), _items(methods(report)), *_collapse(report)]
    if report.errors():
        said = [
            f"{arm}, {task}, {count} sample{'s' * (count != 1)}: {text}" for arm, task, text, count in report.errors()
        ]
        parts += ["### Errors", _items(said)]
    parts += ["## Arms by task", *_means(report), *_costs(report), *_again(report)]
    return "\n\n".join(parts) + "\n"


def _verdicts(report: Report) -> str:
    base = report.verdicts.baseline
    columns = ["Arm", "Task", "Verdict", "n", base, "Arm's", "Difference [95%]", "p (Holm)", "Why"]
    lines = [
        [
            v.arm + (" (A/A)" if v.noise else ""),
            name_of(v.task),
            f"**{v.verdict}**",
            f"{v.n} of {v.planned}" if v.partial else str(v.n),
            number(v.baseline),
            number(v.mean),
            difference(v),
            p_value(v.p_holm),
            v.reason,
        ]
        for v in report.verdicts.found
    ]
    return _table(columns, lines, right=(3, 4, 5, 6, 7))


def _collapse(report: Report) -> list[str]:
    signs = [c for c in report.signs if c.signs]
    if not signs:
        return []
    columns = ["Arm", "Task", "Outputs", "repeat themselves", "have another length", "part at once", "Signs"]
    lines = [
        [c.arm, c.task, str(c.n), str(c.repeats), str(c.lengths), str(c.at_once), ", ".join(c.signs)] for c in signs
    ]
    return ["### Collapse", _table(columns, lines, right=(2, 3, 4, 5))]


def _means(report: Report) -> list[str]:
    rows, found = report.rows, []
    for metric in dict.fromkeys([*report.verdicts.metrics.values(), "kl", "nll", "top1", "bits"]):
        lines = []
        for task in report.tasks:
            cells = [mean(rows, arm, task, metric) for arm in report.arms]
            if any(cells):
                lines.append([task, *map(_mean, cells)])
        if lines:
            found += [
                f"### {_text(metric)}",
                _table(["Task", *report.arms], lines, right=range(1, 1 + len(report.arms))),
            ]
    return found


def _mean(found: Mean | None) -> str:
    if found is None:
        return "-"
    if found.low is None:
        return number(found.mean)
    return f"{number(found.mean)} [{number(found.low)}, {number(found.high)}]"


def _costs(report: Report) -> list[str]:
    columns, costs, parts = figures.costs(report)
    if not costs:
        return []
    found = [
        "## Time and memory",
        _table(["Arm", *columns], [[c.arm, *c.cells] for c in costs], right=range(1, 1 + len(columns))),
    ]
    if parts:
        lines = [[c.arm, *(cell for _, cell in c.parts)] for c in costs]
        found += ["### Memory by part, kB", _table(["Arm", *parts], lines, right=range(1, 1 + len(parts)))]
    return found


def _again(report: Report) -> list[str]:
    settings = report.evidence.settings
    found = ["## Run it again"]
    found += [_fenced(text, "sh") for text in command(settings)]
    text = settings_text(settings)
    found += [_fenced(text.rstrip(), "yaml")] if text else []
    for arm, recipe in report.evidence.arms.items():
        if recipe:
            found += [f"### Recipe of {_text(arm)}", _fenced(recipe.rstrip(), "yaml")]
    return found if len(found) > 1 else []


def _fenced(text: str, language: str) -> str:
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}{language}\n{text}\n{fence}"


def _items(lines: Iterable[str]) -> str:
    return "\n".join(f"- {_text(line)}" for line in lines)


def _table(columns: Sequence[str], lines: Sequence[Sequence[str]], right: Sequence[int]) -> str:
    rule = ["---:" if i in right else "---" for i in range(len(columns))]
    body = [[_cell(cell) for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in [[_cell(c) for c in columns], rule, *body])


def _cell(text: str) -> str:
    return _text(text).replace("|", "\\|")


def _text(text: str) -> str:
    """One line, in which nothing is taken for HTML."""
    return " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;")
