"""The trials of a search: combinations of a space, run text by text, the worse ones given up early."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from kvpolicy.errors import CalibrationError, CompareError, KvpolicyError, MissingDependencyError
from kvpolicy.experiment.study import RECORD, set_constraint
from kvpolicy.experiment.work import cause_of
from kvpolicy.recipe.space import Choices, Drawn, Range, Space
from kvpolicy.words import clip

MARGIN = 1.25
"""Without a budget a trial is given up whose KL is above this many times that of a finished one of no more bits."""
WARM = 2
"""Texts that a trial is given before another one beats it."""
IN_VAIN = 20
"""Trials of which none could be run, after which a search ends."""
REPEATS = 100
"""Combinations in a row that were drawn before, after which a search ends: there are hardly any others."""
REFUSED = 1e6
"""Bits beyond the budget that the sampler is told of a combination that makes no recipe for the model."""

Measure = Callable[[Drawn], Iterator[tuple[float, float]]]
"""Runs a combination: KL and effective bits, text by text."""


@dataclass(frozen=True)
class Trial:
    """A combination, and what became of it."""

    number: int
    drawn: Drawn
    state: str
    """`complete`; `pruned`: given up; `over`: beyond the budget; `refused`: no recipe for the model; `failed`."""
    kl: list[float]
    """Nats per token, of each text that was run."""
    bits: list[float]
    """Effective bits per value after each text."""
    cause: str = ""

    @property
    def mean_kl(self) -> float:
        return math.fsum(self.kl) / len(self.kl)

    @property
    def mean_bits(self) -> float:
        return math.fsum(self.bits) / len(self.bits)

    def record(self, budget: float | None) -> dict[str, Any]:
        """As plain data, with the bits beyond the budget."""
        excess = REFUSED if not self.bits else 0.0 if budget is None else self.mean_bits - budget
        return {**vars(self), "excess": excess}


class Search:
    """A study of a space.

    Args:
        study: of Optuna.
        space: what is drawn from.
        budget: the most effective bits per value, or None.
        measure: runs a combination.
        texts: how many there are.
    """

    def __init__(self, study: Any, space: Space, budget: float | None, measure: Measure, texts: int) -> None:
        self.study, self.space, self.budget, self.measure, self.texts = study, space, budget, measure, texts
        self.trials: dict[str, Trial] = {}
        """Those that were finished, by what was drawn; a combination is run once."""
        for trial in study.get_trials(deepcopy=False):
            record = trial.user_attrs.get(RECORD)
            if trial.state.is_finished() and record is not None:
                parts = {key: value for key, value in record.items() if key != "excess"}
                self.trials.setdefault(_key(record["drawn"]), Trial(**parts))

    def run(self, trials: int, advance: Callable[[str, int], None]) -> None:
        """Run trials until there are so many, or hardly any other combination is left.

        Raises:
            CompareError: no combination can be run.
        """
        if not self.study.get_trials(deepcopy=False):
            first = {name: 0 if isinstance(among, Choices) else among.low for name, among in self.space.search.items()}
            self.study.enqueue_trial(first)
        repeats = 0
        while len(self.trials) < trials and repeats < REPEATS:
            advance(f"trial {len(self.trials) + 1} of {trials}{self._best()}", 0)
            if self._one():
                repeats = 0
                advance("", 1)
            else:
                repeats += 1
            self._check()

    def complete(self) -> list[Trial]:
        """Trials that saw every text and keep the budget."""
        return [trial for trial in self.trials.values() if trial.state == "complete"]

    def found(self) -> list[Trial]:
        """The best under the budget; without one the front: no other trial has less KL and no more bits. By bits."""
        done = sorted(self.complete(), key=lambda trial: (trial.mean_bits, trial.mean_kl, trial.number))
        if self.budget is not None:
            return sorted(done, key=lambda trial: trial.mean_kl)[:1]
        front: list[Trial] = []
        for trial in done:
            if not front or trial.mean_kl < front[-1].mean_kl:
                front.append(trial)
        return front

    def _best(self) -> str:
        found = self.found()
        if not found:
            return ""
        if self.budget is None:
            return f", {len(found)} on the front"
        return f", best so far {found[0].mean_kl:.4g} nats at {found[0].mean_bits:.2f} bits"

    def _check(self) -> None:
        states = [trial.state for trial in self.trials.values()]
        if len(states) >= IN_VAIN and set(states) <= {"refused", "failed"}:
            raise CompareError(f"none of {len(states)} combinations could be run: {self.causes()[0]}; mend the space")

    def causes(self) -> list[str]:
        """Why combinations were refused or failed, each cause once."""
        return list(dict.fromkeys(trial.cause for trial in self.trials.values() if trial.cause))

    def _one(self) -> bool:
        """One trial of the study; says whether its combination is a new one."""
        import optuna

        trial = self.study.ask()
        try:
            raw = {name: _suggest(trial, name, among) for name, among in self.space.search.items()}
            drawn = self.space.draw(lambda name, _: raw[name])
            known = self.trials.get(_key(drawn))
            ended = known or self._tried(trial, drawn)
            record = ended.record(self.budget)
            trial.set_user_attr(RECORD, record)
            if self.budget is not None:
                set_constraint(trial, record["excess"])
            if ended.state == "complete":
                values = ended.mean_kl if self.budget is not None else (ended.mean_kl, ended.mean_bits)
                self.study.tell(trial, values)
            else:
                self.study.tell(trial, state=optuna.trial.TrialState.PRUNED)
        except BaseException:
            self.study.tell(trial, state=optuna.trial.TrialState.FAIL, skip_if_finished=True)
            raise
        self.trials.setdefault(_key(drawn), ended)
        return known is None

    def _tried(self, trial: Any, drawn: Drawn) -> Trial:
        kl: list[float] = []
        bits: list[float] = []
        state, cause = "complete", ""
        try:
            for one, width in self.measure(drawn):
                kl.append(one)
                bits.append(width)
                if state := self._given_up(trial, Trial(trial.number, drawn, "", kl, bits)):
                    break
        except (CalibrationError, MissingDependencyError):  # nothing of the combination: mended, it would run
            raise
        except KvpolicyError as error:
            state, cause = "refused", str(error).partition("\n")[0]
        except OSError:
            raise
        except Exception as error:
            state, cause = "failed", clip(cause_of(error), 300)
        return Trial(trial.number, drawn, state or "complete", kl, bits, cause)

    def _given_up(self, trial: Any, now: Trial) -> str:
        """`over` or `pruned` if more texts would tell nothing, else nothing."""
        n = len(now.kl)
        if self.budget is not None:
            if now.mean_bits > self.budget:
                return "over"
            trial.report(now.mean_kl, n)
            return "pruned" if n < self.texts and trial.should_prune() else ""
        # Optuna prunes for a single objective only.
        beaten = WARM <= n < self.texts and any(
            other.mean_bits <= now.mean_bits and math.fsum(other.kl[:n]) * MARGIN < math.fsum(now.kl)
            for other in self.complete()
        )
        return "pruned" if beaten else ""


def _key(drawn: Drawn) -> str:
    return json.dumps(drawn, sort_keys=True)


def _suggest(trial: Any, name: str, among: Choices | Range) -> int | float:
    """Every parameter in every trial, used or not: samplers learn from what all trials have."""
    if isinstance(among, Choices):
        return int(trial.suggest_categorical(name, list(range(len(among.values)))))
    if among.whole:
        return int(trial.suggest_int(name, among.low, among.high, step=among.step or 1, log=among.log))
    found = trial.suggest_float(name, float(among.low), float(among.high), step=among.step, log=among.log)
    return float(f"{found:.12g}")  # 0.3, not 0.30000000000000004
