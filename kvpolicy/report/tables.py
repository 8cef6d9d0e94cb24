"""Verdicts and means as tables: of pandas, in LaTeX, CSV, JSON and on a terminal."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from kvpolicy.statistics.collapse import Collapse, collapses
from kvpolicy.statistics.pairs import BOUNDED, Table, metrics_of, table, tasks_of, values
from kvpolicy.statistics.rows import Evidence
from kvpolicy.statistics.verdicts import ALL_TASKS, Verdict, Verdicts

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Mean:
    """A mean over the samples of an arm and a task, with its 95% confidence interval."""

    arm: str
    task: str
    metric: str
    n: int
    mean: float
    low: float | None
    """Wilson's interval for right or wrong scores, else Student's; None for one sample."""
    high: float | None


@dataclass(frozen=True)
class Report:
    """What a report says: rows, verdicts and what follows."""

    evidence: Evidence
    verdicts: Verdicts
    signs: tuple[Collapse, ...] = field(default=())

    @classmethod
    def of(cls, evidence: Evidence, verdicts: Verdicts) -> Report:
        """Look for collapses, too."""
        return cls(evidence, verdicts, collapses(evidence, verdicts.baseline))

    @cached_property
    def rows(self) -> Table:
        """Rows by arm and task, then by sample."""
        return table(self.evidence)

    @cached_property
    def arms(self) -> list[str]:
        """The baseline, then the others in the order given."""
        every = dict.fromkeys([*self.evidence.arms, *(row.arm for row in self.evidence.rows)])
        return [self.verdicts.baseline, *(arm for arm in every if arm != self.verdicts.baseline)]

    @property
    def tasks(self) -> tuple[str, ...]:
        """Tasks in order."""
        return tasks_of(self.evidence)

    def means(self, metrics: tuple[str, ...] | None = None) -> list[Mean]:
        """Means of each arm, task and metric that there are."""
        rows = self.rows
        names = metrics_of(self.evidence.rows) if metrics is None else metrics
        return [
            found
            for arm in self.arms
            for task in self.tasks
            for metric in names
            if (found := mean(rows, arm, task, metric)) is not None
        ]

    def counts(self) -> dict[str, dict[str, int]]:
        """Samples without an error, by arm and task."""
        rows = self.rows
        return {
            arm: {task: sum(r.error is None for r in rows.get((arm, task), {}).values()) for task in self.tasks}
            for arm in self.arms
        }

    def partial(self) -> list[str]:
        """What is missing, a line for each arm; empty where every planned sample is there."""
        planned = self.evidence.planned
        lines = []
        for arm, counts in self.counts().items():
            short = [f"{task} {counts.get(task, 0)} of {n}" for task, n in planned.items() if counts.get(task, 0) < n]
            if short:
                lines.append(f"{arm}: {', '.join(short)}")
        return lines

    def copied(self, arm: str) -> bool:
        """Whether an arm's rows are the baseline's, times and all: it was not run."""
        mine = {(task, s): r for (name, task), of in self.rows.items() if name == arm for s, r in of.items()}
        base = {
            (task, s): r
            for (name, task), of in self.rows.items()
            if name == self.verdicts.baseline
            for s, r in of.items()
        }
        timed = any(name.endswith("_seconds") for row in mine.values() for name in row.metrics)
        return timed and all(key in base and base[key].metrics == row.metrics for key, row in mine.items())

    def errors(self) -> list[tuple[str, str, str, int]]:
        """Arm, task, error and on how many samples."""
        found: dict[tuple[str, str, str], int] = {}
        for row in self.evidence.rows:
            if row.error is not None:
                key = (row.arm, row.task, row.error.strip().splitlines()[0] if row.error.strip() else "no message")
                found[key] = found.get(key, 0) + 1
        return [(*key, count) for key, count in found.items()]

    def to_pandas(self) -> pd.DataFrame:
        """The verdicts, a row for each arm and task."""
        return self.verdicts.to_pandas()

    def means_to_pandas(self) -> pd.DataFrame:
        """Means with intervals, a row for each arm, task and metric."""
        import pandas as pd

        return pd.DataFrame([asdict(m) for m in self.means()], columns=list(Mean.__annotations__))

    def to_latex(self) -> str:
        """The verdicts as a table of LaTeX (package booktabs)."""
        import pandas as pd

        lines = [
            {
                "Arm": v.arm,
                "Task": v.task,
                "$n$": str(v.n),
                "Baseline": number(v.baseline),
                "Arm's": number(v.mean),
                "Difference": difference(v),
                "$p$ (Holm)": p_value(v.p_holm),
                "Verdict": v.verdict,
            }
            for v in self.verdicts.found
        ]
        frame = pd.DataFrame(lines).map(_latex) if lines else pd.DataFrame()
        return str(frame.to_latex(index=False, escape=False, column_format="llrrrrrl"))

    def to_json(self) -> str:
        """Verdicts, means, collapses and settings as JSON."""
        found = {
            "baseline": self.verdicts.baseline,
            "alpha": self.verdicts.alpha,
            "verdicts": self.verdicts.records(),
            "means": [asdict(m) for m in self.means()],
            "collapses": [{**asdict(c), "collapsed": c.collapsed} for c in self.signs],
            "partial": self.partial(),
            "arms": dict(self.evidence.arms),
            "planned": dict(self.evidence.planned),
            "settings": dict(self.evidence.settings),
        }
        return json.dumps(_finite(found), indent=2, ensure_ascii=False, allow_nan=False, default=str) + "\n"


def mean(rows: Table, arm: str, task: str, metric: str) -> Mean | None:
    """The mean of a metric over the samples of an arm; None where no sample has it."""
    from scipy import stats
    from statsmodels.stats.proportion import proportion_confint

    found = values(rows, arm, task, metric)
    n = len(found)
    if not n:
        return None
    middle = float(found.mean())
    if n > 1 and metric == "score" and set(found.tolist()) <= {0.0, 1.0}:
        low, high = proportion_confint(int(found.sum()), n, method="wilson")
        return Mean(arm, task, metric, n, middle, float(low), float(high))
    error = float(found.std(ddof=1)) / math.sqrt(n) if n > 1 else 0.0
    if not error:
        return Mean(arm, task, metric, n, middle, None, None)
    low, high = stats.t.interval(0.95, n - 1, middle, error)
    if BOUNDED.match(metric) and found.min() >= 0 and found.max() <= 1:
        low, high = max(low, 0.0), min(high, 1.0)
    return Mean(arm, task, metric, n, middle, float(low), float(high))


def number(value: float | None, digits: int = 3, sign: bool = False) -> str:
    """A number in few digits; a dash for None."""
    if value is None:
        return "-"
    plus = "+" if sign else ""
    if value and abs(value) < 0.5 * 10**-digits:
        return format(value, f"{plus}.1g")
    return format(value, f"{plus},.0f" if abs(value) >= 10_000 else f"{plus}.{digits}f")


def difference(verdict: Verdict) -> str:
    """The difference and its interval."""
    paired = verdict.paired
    if paired is None:
        return "-"
    middle = number(paired.difference, sign=True)
    if paired.low is None or paired.high is None:
        return middle
    return f"{middle} [{number(paired.low, sign=True)}, {number(paired.high, sign=True)}]"


def p_value(p: float | None) -> str:
    """A p in few digits."""
    return "-" if p is None else "<0.001" if p < 0.001 else f"{p:.3f}"


def name_of(task: str) -> str:
    """A task as it is shown."""
    return "mean of all tasks" if task == ALL_TASKS else task


_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"$<$", "$": r"\$",
}  # fmt: skip


def _latex(text: str) -> str:
    return "".join(_LATEX.get(letter, letter) for letter in " ".join(text.split()))


def _finite(value: Any) -> Any:
    """JSON has no nan."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(name): _finite(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return value


def printed(report: Report) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """Tables for a terminal: title, columns, cells."""
    verdicts, metrics = report.verdicts, dict.fromkeys(report.verdicts.metrics.values())
    title = f"{', '.join(metrics)} against {verdicts.baseline}"
    columns = ["arm", "task", "n", "baseline", "arm's mean", "difference [95%]", "p (Holm)", "verdict", "why"]
    cells = [
        [
            v.arm + (" (A/A)" if v.noise else ""),
            name_of(v.task),
            str(v.n) if v.planned is None else f"{v.n} of {v.planned}",
            number(v.baseline),
            number(v.mean),
            difference(v),
            p_value(v.p_holm),
            v.verdict,
            v.reason,
        ]
        for v in verdicts.found
    ]
    yield title, columns, cells
    collapsed = [c for c in report.signs if c.signs]
    if collapsed:
        columns = ["arm", "task", "n", "repeat themselves", "other length", "part at once", "signs"]
        counted = [
            [c.arm, c.task, str(c.n), str(c.repeats), str(c.lengths), str(c.at_once), ", ".join(c.signs)]
            for c in collapsed
        ]
        yield "signs of collapse", columns, counted
