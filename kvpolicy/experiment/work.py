"""The work of an experiment: units that depend on nothing but themselves, and what runs one.

A unit is a batch of samples of one task with every arm, because the arms of a sample share its prompt and are compared
with one run of the exact cache. Whoever has the model runs units and yields rows; one process, which holds the lock of
the directory, says which units are pending and commits the rows.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from kvpolicy.errors import KvpolicyError
from kvpolicy.experiment.experiment import is_exact
from kvpolicy.experiment.names import AGAIN, EXACT
from kvpolicy.experiment.run import Encoded, Run, Runner, row, unlikely
from kvpolicy.experiment.store import Planned
from kvpolicy.experiment.together import Together
from kvpolicy.statistics.rows import Row
from kvpolicy.words import clip

NO_EXACT = "the exact cache, with which it is compared, failed"
Wanted = set[tuple[str, str, str]]
Said = Callable[[str, int], None]
"""Told what is under way, and how many runs were finished."""


@dataclass(frozen=True)
class Item:
    """A sample, planned and in tokens."""

    planned: Planned
    encoded: Encoded


@dataclass(frozen=True)
class Finished:
    """A row, and what its sample says of attention by distance if it is the exact cache's."""

    row: Row
    attention: Mapping[str, Any] | None = None


Pending = list[tuple[list[Item], Wanted]]
"""Units with the rows that they still lack."""
Labour = Callable[[Pending, Said], AbstractContextManager[Iterator[Finished]]]
"""Whatever runs units; rows come in any order."""


def units(items: Sequence[Item], batch: int) -> list[list[Item]]:
    """Batches of consecutive samples of one task; the same for a run that goes on, so that its rows are the same.

    A sample of several turns runs alone: those of others have other lengths.
    """
    found: list[list[Item]] = []
    for item in items:
        last = found[-1] if found else []
        alone = item.encoded.turns or any(other.encoded.turns for other in last)
        if last and not alone and len(last) < batch and last[0].planned.task == item.planned.task:
            found[-1].append(item)
        else:
            found.append([item])
    return found


def named(unit: Sequence[Item]) -> str:
    """A unit in a few words."""
    first = unit[0].planned
    more = f" to {unit[-1].planned.sample}" if len(unit) > 1 else ""
    return f"{clip(first.task, 30)}, sample {first.sample}{more}"


def missing(unit: Sequence[Item], arms: Sequence[str], done: Wanted) -> Wanted:
    """Arm, task and sample of the rows that a unit still lacks."""
    wanted = {(arm, item.planned.task, item.planned.sample) for arm in arms for item in unit}
    return wanted - done


class Worker:
    """Runs units.

    Args:
        runner: runs the model.
        caches: an empty cache for each arm; that of `exact` is first.
        warn: told, once, of a sample whose answer the exact cache itself finds impossible.
    """

    def __init__(self, runner: Runner, caches: Mapping[str, Any], warn: Callable[[str], None]) -> None:
        self.runner, self.caches, self.warn = runner, caches, warn
        self.together = Together(runner)
        self.warned = False

    def run(self, unit: Sequence[Item], wanted: Wanted, said: Said) -> Iterator[Finished]:
        """The rows that are wanted of a unit, each as it is finished; one that fails holds its error."""
        try:
            yield from self._unit(unit, wanted, said)
        finally:
            self.runner.forget()

    def _unit(self, unit: Sequence[Item], wanted: Wanted, said: Said) -> Iterator[Finished]:
        said(EXACT, 0)
        exact = self._try(EXACT, unit)
        if isinstance(exact, str) and len(unit) > 1:  # maybe one sample's fault, or too much at once
            for item in unit:
                yield from self.run([item], wanted, said)
            return
        if isinstance(exact, str):
            for arm in self.caches:
                cause = exact if arm == EXACT else f"{NO_EXACT}: {exact}"
                yield from self._failed(unit, arm, cause, wanted, said)
            return
        self._look(unit, exact)
        for arm, cache in self.caches.items():
            if not any((arm, item.planned.task, item.planned.sample) in wanted for item in unit):
                continue
            said(arm, 0)
            same = arm == EXACT or (arm != AGAIN and is_exact(cache.recipe))
            runs = exact if same else self._try_each(arm, unit, wanted)
            for item, run, reference in zip(unit, runs, exact, strict=True):
                if isinstance(run, str):
                    yield from self._failed([item], arm, run, wanted, said)
                else:
                    yield from self._rows(item, arm, run, reference, wanted, said)

    def _rows(self, item: Item, arm: str, run: Run, reference: Run, wanted: Wanted, said: Said) -> Iterator[Finished]:
        if (arm, item.planned.task, item.planned.sample) not in wanted:
            return
        try:
            made = row(item.planned, arm, item.encoded, run, reference)
        except Exception as error:
            yield from self._failed([item], arm, cause_of(error), wanted, said)
            return
        seen = run.attention if arm == EXACT else None
        said("", 1)
        yield Finished(made, None if seen is None else seen.distances.sums() or None)

    def _try_each(self, arm: str, unit: Sequence[Item], wanted: Wanted) -> Iterator[Run | str]:
        """The run of an arm on each sample, or why there is none. A batch that fails is run one by one."""
        runs = self._try(arm, unit)
        for i, item in enumerate(unit):
            if isinstance(runs, str) and len(unit) > 1 and (arm, item.planned.task, item.planned.sample) in wanted:
                found = self._try(arm, [item])
                yield found if isinstance(found, str) else found[0]
            else:
                yield runs if isinstance(runs, str) else runs[i]

    def _try(self, arm: str, unit: Sequence[Item]) -> list[Run] | str:
        """The runs of an arm, or why there are none."""
        cache, encoded = copy.deepcopy(self.caches[arm]), [item.encoded for item in unit]
        try:
            if arm == AGAIN and not encoded[0].turns:
                return [self.together.run(copy.deepcopy(self.caches[arm]), [item, item])[0] for item in encoded]
            return [self.runner.run(cache, encoded[0])] if len(unit) == 1 else self.together.run(cache, encoded)
        except Exception as error:
            cause = cause_of(error)
        del cache  # what is left of a run that had no room must not take the room of the next
        self._free()
        return f"the model can't be run: {cause}" if arm == EXACT else cause

    def _free(self) -> None:
        gc.collect()
        if self.runner.device.type == "cuda":
            import torch

            torch.cuda.empty_cache()

    def _failed(self, unit: Sequence[Item], arm: str, cause: str, wanted: Wanted, said: Said) -> Iterator[Finished]:
        for planned in (item.planned for item in unit):
            if (arm, planned.task, planned.sample) in wanted:
                said("", 1)
                yield Finished(Row(arm, planned.task, planned.sample, error=cause))

    def _look(self, unit: Sequence[Item], exact: Sequence[Run]) -> None:
        for item, run in zip(unit, exact, strict=True):
            said = None if self.warned else unlikely(item.planned.sample, item.encoded, run, self.runner.tokenizer)
            if said is not None:
                self.warn(said)
                self.warned = True


def cause_of(error: Exception) -> str:
    """An error in a line; of one that was not raised on purpose its type, too."""
    return str(error) if isinstance(error, KvpolicyError) else f"{type(error).__name__}: {error}"
