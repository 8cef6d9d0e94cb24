"""What a comparison found: means with confidence intervals, paired differences, tables."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from kvpolicy.errors import CompareError
from kvpolicy.experiment.attention_distance import Distances
from kvpolicy.experiment.experiment import is_exact
from kvpolicy.experiment.names import AGAIN, EXACT, METRICS
from kvpolicy.experiment.printed import Printed
from kvpolicy.experiment.records import number, records
from kvpolicy.recipe.load import load_recipe
from kvpolicy.statistics.margins import Given
from kvpolicy.statistics.rows import Evidence
from kvpolicy.words import in_words

if TYPE_CHECKING:
    from kvpolicy.experiment.plot import Point
    from kvpolicy.experiment.store import Store
    from kvpolicy.recipe.load import Recipe
    from kvpolicy.statistics.verdicts import Verdicts


@dataclass(frozen=True)
class Estimate:
    """A mean over samples, and the half-width of its 95% confidence interval (Student's t)."""

    mean: float
    half_width: float | None
    """None for a single sample. 0 says that all samples gave the same value, not that the mean is certain."""
    n: int

    def __str__(self) -> str:
        return _number(self.mean) + ("" if self.half_width is None else f" ±{_number(self.half_width)}")


def estimate(values: Sequence[float]) -> Estimate | None:
    """Mean and confidence interval of some values; None if there are none."""
    n = len(values)
    if n == 0:
        return None
    mean = math.fsum(values) / n
    if n == 1:
        return Estimate(mean, None, 1)
    deviation = math.sqrt(math.fsum((x - mean) ** 2 for x in values) / (n - 1))
    return Estimate(mean, _student(n - 1) * deviation / math.sqrt(n), n)


def _student(freedom: int) -> float:
    """The 97.5% quantile of Student's t, by its expansion around the normal one (error below 0.2%)."""
    exact = {1: 12.7062, 2: 4.3027, 3: 3.1824, 4: 2.7764}
    if freedom in exact:
        return exact[freedom]
    z = 1.959964
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / freedom + second / freedom**2 + third / freedom**3


@dataclass(frozen=True)
class Comparison(Printed):
    """The result of `compare`: one row per arm and sample, and what follows from them."""

    evidence: Evidence
    """All rows, those of the exact cache and those that hold an error included, and how they were made."""
    arms: dict[str, Recipe]
    """The recipe of each arm, by its name, in the order given; the A/A arm last."""
    distances: Distances = field(default_factory=Distances)
    """Attention by distance of the exact cache, over all samples; empty where attention was not watched."""

    @classmethod
    def of(cls, store: Store, recipes: Mapping[str, Recipe]) -> Comparison:
        """What a store holds now."""
        evidence = store.evidence()
        again = {AGAIN: load_recipe("full")} if AGAIN in evidence.arms else {}
        return cls(evidence, {**recipes, **again}, Distances.of(store.attention()))

    @property
    def settings(self) -> Mapping[str, Any]:
        """Tasks, seeds, model, number of samples, whether the model was attached, versions, digests."""
        return self.evidence.settings

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """One flat record per arm and sample; None stands for what a sample does not have."""
        return records(self.evidence, self.arms)

    @property
    def failures(self) -> dict[str, str]:
        """Arms that failed on some sample, and why on the first of them."""
        found: dict[str, str] = {}
        for row in self.rows:
            if row["error"] is not None:
                found.setdefault(row["arm"], f"sample {row['sample']}: {row['error']}")
        return found

    @property
    def tasks(self) -> list[str]:
        """The names of the tasks."""
        return list(self.evidence.planned)

    def of_task(self, task: str) -> Comparison:
        """The same with the rows of one task."""
        if task not in self.evidence.planned:
            raise CompareError(f"task must be one of {', '.join(self.tasks)}, found {in_words(task)}")
        rows = tuple(row for row in self.evidence.rows if row.task == task)
        n = self.evidence.planned[task]
        e = replace(self.evidence, rows=rows, planned={task: n}, settings={**self.settings, "task": task, "n": n})
        return replace(self, evidence=e)

    def values(self, arm: str, metric: str) -> dict[Any, float]:
        """A metric by sample.

        Samples whose answer is one token have no nll, kl, top1 and step_seconds, and say nothing of attention (l1, l2
        and the masses); nor do those whose attention could not be watched. Of several tasks one must be chosen
        first, by `of_task`.
        """
        if metric not in METRICS:
            raise CompareError(f"metric must be one of {', '.join(METRICS)}, found {in_words(metric)}")
        if arm not in self.arms and arm != EXACT:
            raise CompareError(
                f"arm must be one of {', '.join(dict.fromkeys([*self.arms, EXACT]))}, found {in_words(arm)}"
            )
        if len(self.tasks) > 1:
            raise CompareError(
                f"means are those of one task, found {len(self.tasks)}; choose one: of_task({self.tasks[0]!r})"
            )
        found = [row for row in self.evidence.rows if row.arm == arm and metric in row.metrics]
        return {number(row.sample): row.metrics[metric] for row in found}

    def mean(self, arm: str, metric: str) -> Estimate | None:
        """Mean of a metric over the samples of an arm."""
        return estimate(list(self.values(arm, metric).values()))

    def difference(self, arm: str, other: str = EXACT, metric: str = "score") -> Estimate | None:
        """Mean of the paired differences, `arm` minus `other`, over the samples that both have."""
        ours, theirs = self.values(arm, metric), self.values(other, metric)
        return estimate([ours[sample] - theirs[sample] for sample in ours if sample in theirs])

    def verdicts(
        self,
        *,
        metric: str | None = None,
        margins: Given = None,
        baseline: str | None = None,
        alpha: float = 0.05,
    ) -> Verdicts:
        """Whether each arm is better, worse, equivalent or undecided, by task and over all tasks, and why.

        Args:
            metric: what all tasks are judged by; by default each by `score`, or `nll`, or `kl`, or its first metric.
            margins: differences that don't matter, by metric or one for all, and those of tasks by task under `tasks`;
                by default those of the experiment, and 0.01 for scores.
            baseline: the arm that the others are compared with; by default the experiment's.
            alpha: probability that any arm is wrongly called better or worse.

        Raises:
            CompareError: the baseline or the metric is unknown, or a number is out of range.
        """
        from kvpolicy.statistics.verdicts import judge

        return judge(self.evidence, metric=metric, margins=margins, baseline=baseline, alpha=alpha)

    def diverged(self, arm: str) -> tuple[int, int]:
        """In how many samples greedy decoding left that of the exact cache, and the number of samples."""
        rows = [row for row in self.rows if row["arm"] == arm and row["generated"] is not None]
        found = [row["first_divergence"] is not None for row in rows]
        return sum(found), len(found)

    def samples(self, arm: str) -> int:
        """On how many samples an arm has run without an error."""
        return sum(row["arm"] == arm and row["error"] is None for row in self.rows)

    def plot(self, path: str | os.PathLike[str]) -> Path:
        """Draw quality against effective bits, one point per arm."""
        from kvpolicy.experiment.plot import Panels, plot_comparison

        if len(self.tasks) > 1:
            return self.of_task(self.tasks[0]).plot(path)
        exact = None if EXACT in self.arms or not self.rows else self.mean(EXACT, "score")
        panels = Panels(self._points("score", 1.0), self._points("kl", math.inf), None if exact is None else exact.mean)
        return plot_comparison(panels, self._title, Path(path))

    def plot_attention(self, path: str | os.PathLike[str]) -> Path:
        """Draw the exact cache's mean attention per token against distance from the query, with its power law.

        Both axes are logarithmic; thin lines are layers. `Distances.fit` says what is fitted.
        """
        from kvpolicy.experiment.attention_plot import plot_attention

        title = f"{self._title}: attention of the exact cache by distance"
        return plot_attention(self.distances, title, Path(path))

    @property
    def _title(self) -> str:
        return f"{self.settings['task']}, n = {self.settings['n']} samples"

    def _points(self, metric: str, most: float) -> list[Point]:
        """Each arm that has the metric; its confidence interval is cut at 0 and `most`."""
        from kvpolicy.experiment.plot import Point, shortened

        points = []
        for arm, recipe in self.arms.items():
            bits, value = self.mean(arm, "bits"), self.mean(arm, metric)
            if bits is None or value is None:
                continue
            half = value.half_width or 0.0
            low, high = max(value.mean - half, 0.0), min(value.mean + half, most)
            drops = recipe.tiers[-1].keys == "evict"
            points.append(Point(shortened(arm), bits.mean, value.mean, low, high, drops))
        return points

    def tables(self) -> list[Any]:
        """Rich tables: verdicts, then of each task quality, cost, and attention unless that was not asked for."""
        found = self._verdicts()
        for part in map(self.of_task, self.tasks):
            attention = [part._attention()] if self.settings.get("errors") else []
            found += [part._quality(), part._cost(), *attention]
        return found

    def notes(self) -> str:
        """How the tables are to be read."""
        counts = ", ".join(
            f"{n}" if len(self.tasks) == 1 else f"{n} ({task})" for task, n in self.evidence.planned.items()
        )
        answers = {(row["task"], row["sample"]) for row in self.rows if row["decode_steps"] == 0}
        lines = [
            f"n = {counts} samples, the same for all arms. ± is the half-width of a 95% confidence interval over them; "
            "differences (Δ) to the exact cache are paired. ±0 says that all samples gave the same value, no more. "
            "Do not rank arms by means whose intervals overlap; the paired `difference` of two arms may still tell "
            "them apart. Arms of different bits differ in cost, too.",
            "NLL, KL and top-1 (agreement with the exact cache) are per token of the answer after its first, which "
            "the prefill predicts without reading a stored token.",
        ]
        if self.settings.get("errors"):
            lines.append(self._attention_note())
        if answers:
            lines.append(
                f"answers of a single token: {len(answers)}; the prefill gives it, so that no cache can change it."
            )
        lines += self._matched_notes()
        lines += [f"failed: {arm}{self._everywhere(arm)}: {cause}" for arm, cause in self.failures.items()]
        if not self.complete:
            lines.append(self._partial_note())
        return "\n".join(lines)

    def _matched_notes(self) -> list[str]:
        """What was chosen so that bits match, and the bits that were measured: a mean over tasks, as planned."""
        found = self.settings.get("match") or {}
        lines = []
        for arm, chosen in found.get("arms", {}).items():
            means = [x.mean for task in self.tasks if (x := self.of_task(task).mean(arm, "bits")) is not None]
            measured = f"{sum(means) / len(means):.3f} measured" if means else "not measured"
            bound = "at most " if chosen["at_most"] else ""
            lines.append(
                f"matched: {arm}: {bound}{chosen['planned_bits']:.3f} bits planned, {measured}, {found['bits']:.3f} "
                "wanted."
            )
        return lines

    @property
    def complete(self) -> bool:
        """Whether every arm has a row for every sample."""
        return len(self.evidence.rows) >= sum(self.evidence.planned.values()) * len(self.evidence.arms)

    def _partial_note(self) -> str:
        planned = sum(self.evidence.planned.values())
        counted = {arm: sum(row.arm == arm for row in self.evidence.rows) for arm in self.evidence.arms}
        each = ", ".join(f"{arm} {count}" for arm, count in counted.items())
        return f"partial: the run did not end. Of {planned} samples there are: {each}. The same command goes on."

    def _everywhere(self, arm: str) -> str:
        return "" if self.samples(arm) else " (on every sample that it was given)"

    @cached_property
    def _judged(self) -> Verdicts:
        return self.verdicts()

    def _verdicts(self) -> list[Any]:
        """Nothing where no arm is judged: an exact arm has the rows of the exact cache, and shows no noise."""
        from kvpolicy.experiment.verdict_table import verdict_table

        verdicts = self._judged
        copies = {arm for arm, recipe in self.arms.items() if arm != AGAIN and is_exact(recipe)}
        found = tuple(v for v in verdicts.found if not (v.noise and v.arm in copies))
        return [verdict_table(replace(verdicts, found=found), self.complete)] if found else []

    def _quality(self) -> Any:
        differences = ("Δ score", "Δ NLL\n(nats)", "KL to exact\n(nats)", "top-1", "texts that\ndiverge")
        table = _table(f"{self.settings['task']}: quality", ("bits per\nvalue", "score", *differences))
        if self.rows and not any(is_exact(recipe) for arm, recipe in self.arms.items() if arm != AGAIN):
            table.add_row("(exact cache)", "", _cell(self.mean(EXACT, "score")), *([""] * 5))
        for arm in self.arms:
            bits, top1 = self.mean(arm, "bits"), self.mean(arm, "top1")
            count, n = self.diverged(arm)
            table.add_row(
                self._name(arm),
                f"{bits.mean:.2f}" if bits else "-",
                _cell(self.mean(arm, "score")),
                _cell(self.difference(arm, metric="score"), sign=True),
                _cell(self.difference(arm, metric="nll"), sign=True),
                _cell(self.mean(arm, "kl")),
                f"{100 * top1.mean:.1f}%" if top1 else "-",
                f"{count} of {n}" if n else "-",
            )
        return table

    def _cost(self) -> Any:
        columns = ("bits per\nvalue", "smaller\nthan exact", "final\nkB", "peak\nkB", "prefill\nms", "decode\nms/token")
        table = _table(f"{self.settings['task']}: cost", columns)
        for arm in self.arms:
            found = {metric: self.mean(arm, metric) for metric in METRICS}
            final, exact = found["final_bytes"], found["exact_bytes"]
            table.add_row(
                self._name(arm),
                _scaled(found["bits"], 1, 2),
                f"{exact.mean / final.mean:.2f}x" if final and exact and final.mean else "-",
                _scaled(final, 1e-3, 1),
                _scaled(found["peak_bytes"], 1e-3, 1),
                _scaled(found["prefill_seconds"], 1e3, 1),
                _scaled(found["step_seconds"], 1e3, 2),
            )
        return table

    def _attention(self) -> Any:
        columns = ("L1 error", "L2 error", "attention on\nexact tokens", "on quantized\ntokens", "on dropped\ntokens")
        table = _table(f"{self.settings['task']}: attention", columns)
        for arm in self.arms:
            errors = [_cell(self.mean(arm, metric)) for metric in ("l1", "l2")]
            masses = [_percent(self.mean(arm, f"{kept}_mass")) for kept in ("exact", "quantized", "dropped")]
            table.add_row(self._name(arm), *errors, *masses)
        return table

    def _attention_note(self) -> str:
        if not self.settings.get("attached"):
            return "attention is watched in attached models only; this one ran unattached."
        if not self.distances.layers:
            return "attention could not be watched: no answer is longer than a token."
        text = (
            "L1 and L2 errors are those of attention outputs, relative to exact attention of the same queries, means "
            "over the compressed layers; beside them the shares of exact attention by how its tokens are kept."
        )
        if any(row["kl"] is not None and row["l1"] is None for row in self.rows):
            text += " -: this model computes on keys and values itself, so what it attends can't be watched."
        return f"{text}\n{self.distances.sentence()}"

    def _name(self, arm: str) -> Text:
        n = self.samples(arm)
        return Text(arm if n == self.settings["n"] else f"{arm} ({n} of {self.settings['n']} samples)")


def _number(value: float) -> str:
    if value == 0:
        return "0"
    if abs(value) < 0.0005:
        return f"{value:.0e}"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"


def _cell(found: Estimate | None, sign: bool = False) -> str:
    if found is None:
        return "-"
    return ("+" if sign and found.mean > 0 else "") + str(found)


def _percent(found: Estimate | None) -> str:
    if found is None:
        return "-"
    half = "" if found.half_width is None else f" ±{100 * found.half_width:.1f}"
    return f"{100 * found.mean:.1f}{half}%"


def _scaled(found: Estimate | None, factor: float, digits: int) -> str:
    return "-" if found is None else f"{found.mean * factor:,.{digits}f}"


def _table(title: str, columns: Sequence[str]) -> Any:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("arm", overflow="fold", min_width=8)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table
