"""What a search found: recipes with their numbers on texts held out, tables, files."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from kvpolicy.errors import CompareError
from kvpolicy.experiment.printed import Printed
from kvpolicy.experiment.result import Estimate
from kvpolicy.experiment.search import Trial
from kvpolicy.experiment.study import write_text
from kvpolicy.recipe.load import Recipe
from kvpolicy.words import clip, in_line

RESULT, PICTURE = "result.json", "front.png"
_RECIPES = re.compile(r"(best|front-\d+)\.yaml")
_CAUSES = 3
"""Causes of refused combinations that the notes name."""


@dataclass(frozen=True)
class Found:
    """A recipe of the front, or the best under a budget; the estimates are over the samples held out."""

    label: str
    """`best`, or `front-1` (of the fewest bits) and so on."""
    trial: Trial
    """The trial that drew it, with its numbers on the samples that were tuned on."""
    recipe: Recipe
    params: dict[str, Any]
    """What stands for each parameter of the space."""
    bits: Estimate
    """Effective bits per value."""
    kl: Estimate
    """KL from the exact cache, nats per token."""
    top1: Estimate
    """How often the most likely tokens agree, from 0 to 1."""


@dataclass(frozen=True)
class Tuning(Printed):
    """The result of `tune`."""

    found: list[Found]
    """By bits."""
    trials: list[Trial]
    """Every combination that was tried, once."""
    settings: dict[str, Any]
    """Model, texts, samples, budget and versions."""

    @property
    def best(self) -> Recipe:
        """The recipe of least KL on the samples that were tuned on."""
        return min(self.found, key=lambda found: found.trial.mean_kl).recipe

    def summary(self) -> dict[str, Any]:
        """All of it, as plain values for JSON."""
        return {
            **self.settings,
            "states": self._states(),
            "found": [
                {
                    "name": found.label,
                    "params": found.params,
                    "recipe": found.recipe.to_yaml(),
                    "held_out": {name: vars(getattr(found, name)) for name in ("bits", "kl", "top1")},
                    "tuned": {"bits": found.trial.mean_bits, "kl": found.trial.mean_kl},
                    "trial": found.trial.number,
                }
                for found in self.found
            ],
            "trials": [vars(trial) for trial in self.trials],
        }

    def tables(self) -> list[Any]:
        """A rich table: what was found, on the samples held out."""
        title = f"{self.settings['space']}: " + ("the best" if self._budget else "the front") + ", on held-out samples"
        table = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
        table.add_column("recipe")
        for column in ("bits per\nvalue", "KL to exact\n(nats)", "top-1", "KL where\ntuned"):
            table.add_column(column, justify="right", no_wrap=True)
        table.add_column("parameters", overflow="fold")
        for found in self.found:
            half = "" if found.top1.half_width is None else f" ±{100 * found.top1.half_width:.1f}"
            table.add_row(
                found.label,
                f"{found.bits.mean:.2f}",
                str(found.kl),
                f"{100 * found.top1.mean:.1f}{half}%",
                f"{found.trial.mean_kl:.3g}",
                Text(", ".join(f"{name}={_shown(value)}" for name, value in found.params.items())),
            )
        return [table]

    def notes(self) -> str:
        """How the table is to be read, and what became of the other trials."""
        states = self._states()
        words = {
            "complete": "finished",
            "pruned": "given up early",
            "over": f"over {self._budget or 0:g} bits",
            "refused": "refused",
            "failed": "failed",
        }
        counted = ", ".join(f"{states[key]} {word}" for key, word in words.items() if states.get(key))
        n = self.found[0].kl.n
        lines = [
            f"n = {n} held-out sample{'s' if n > 1 else ''}, which no trial saw. ± is the half-width of a 95% "
            "confidence interval over them. Recipes whose intervals overlap are not ranked. The KL where tuned "
            "flatters what was chosen by it.",
            f"{len(self.trials)} combinations: {counted}.",
        ]
        causes = list(dict.fromkeys(trial.cause for trial in self.trials if trial.cause))
        lines += [f"refused or failed: {cause}" for cause in causes[:_CAUSES]]
        if len(causes) > _CAUSES:
            lines.append(f"and for {len(causes) - _CAUSES} other reasons (all in {RESULT})")
        return "\n".join(lines)

    def plot(self, path: str | os.PathLike[str]) -> Path:
        """Draw KL against effective bits: what was found with its intervals, and behind it the finished trials."""
        from kvpolicy.experiment.plot import Point, plot_front

        points = []
        for found in self.found:
            half = found.kl.half_width or 0.0
            low, high = max(found.kl.mean - half, 0.0), found.kl.mean + half
            drops = found.recipe.tiers[-1].keys == "evict"
            points.append(Point(found.label, found.bits.mean, found.kl.mean, low, high, drops))
        behind = [(trial.mean_bits, trial.mean_kl) for trial in self.trials if trial.state == "complete"]
        title = f"{self.settings['space']}: {len(self.trials)} combinations"
        return plot_front(points, behind, self._budget, title, Path(path))

    def write(self, directory: Path) -> None:
        """Write recipes, picture and JSON; recipes of an earlier run of the search are replaced."""
        try:
            for file in directory.iterdir():
                if _RECIPES.fullmatch(file.name):
                    file.unlink()
        except OSError as error:
            raise CompareError(f"{in_line(directory)}: the results can't be written there: {error}") from error
        for found in self.found:
            write_text(directory / f"{found.label}.yaml", found.recipe.to_yaml().rstrip("\n"))
        write_text(directory / RESULT, json.dumps(self.summary(), indent=2, allow_nan=False))
        self.plot(directory / PICTURE)

    @property
    def _budget(self) -> float | None:
        bits: float | None = self.settings["bits"]
        return bits

    def _states(self) -> dict[str, int]:
        return dict(Counter(trial.state for trial in self.trials))


def _shown(value: Any) -> str:
    """A number or word as it is, anything else as YAML in a line."""
    if value is None:
        return "left out"
    return str(value) if isinstance(value, str | int | float) else clip(json.dumps(value).replace('"', ""), 60)
