"""Workers that run units, and what gives them out: a worker that dies is replaced, its unit runs again elsewhere."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import kvpolicy.errors as errors
from kvpolicy.errors import CompareError
from kvpolicy.experiment.store import differences
from kvpolicy.experiment.work import Finished, Item, Pending, Said, Wanted, named
from kvpolicy.statistics.rows import Row
from kvpolicy.words import clip

TRIES = 3
"""Workers that may die of one unit, or in a row before they are ready."""


@dataclass(frozen=True)
class Ready:
    """A worker has its model. `seen` is as `open_job` has it."""

    seen: Mapping[str, Any]


@dataclass(frozen=True)
class Warned:
    """Of several with a topic one is said."""

    text: str
    topic: str | None = None


@dataclass(frozen=True)
class Done:
    """The unit has all its rows."""


@dataclass(frozen=True)
class Refused:
    """What no other worker could do better: the name of an error of kvpolicy, and its text."""

    kind: str
    text: str


@dataclass(frozen=True)
class Died:
    """The worker is no more."""

    cause: str


Message: TypeAlias = Ready | Warned | Finished | Done | Refused | Died


def refusal(error: Exception) -> Refused:
    """An error of a worker, for its driver."""
    if isinstance(error, errors.KvpolicyError):
        return Refused(type(error).__name__, str(error))
    return Refused("CompareError", f"{type(error).__name__}: {error}")


class Pool(ABC):
    """Workers, by number."""

    size: int
    """The most that run at once."""

    @abstractmethod
    def start(self) -> int:
        """Begin a worker. It says `Ready`, `Refused` or `Died`."""

    @abstractmethod
    def give(self, worker: int, unit: list[Item], wanted: Wanted) -> None:
        """Let a worker that is ready run a unit. It says its rows, and `Done` or `Died`."""

    @abstractmethod
    def messages(self) -> list[tuple[int, Message]]:
        """What workers say; waits a while for something. What one says stays in order."""


@dataclass
class _Task:
    unit: list[Item]
    wanted: Wanted
    """Rows that have not come."""
    deaths: int = 0


class Dispatcher:
    """Gives units to the workers of a pool."""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.starting: set[int] = set()
        self.idle: set[int] = set()
        self.doing: dict[int, _Task] = {}
        self.queue: deque[_Task] = deque()
        self.seen: Mapping[str, Any] | None = None
        self.failed_starts = 0
        self.said: set[str] = set()

    def begin(self, units: int) -> Mapping[str, Any]:
        """Start workers for so many units, and wait for the first; returns what it sees of its model."""
        self._start(units)
        while self.seen is None:
            for worker, message in self.pool.messages():
                self._take(worker, message)
            self._start(units)
        return self.seen

    @contextmanager
    def labour(self, pending: Pending, said: Said) -> Iterator[Iterator[Finished]]:
        """The rows of units, as they come."""
        self.queue.extend(_Task(unit, set(wanted)) for unit, wanted in pending)
        yield self._rows(said)

    def _rows(self, said: Said) -> Iterator[Finished]:
        while self.queue or self.doing:
            self._start(len(self.queue) + len(self.doing))
            while self.idle and self.queue:
                worker, task = self.idle.pop(), self.queue.popleft()
                self.doing[worker] = task
                said(f"{named(task.unit)}; workers: {len(self.doing)}", 0)
                self.pool.give(worker, task.unit, task.wanted)
            for worker, message in self.pool.messages():
                for finished in self._take(worker, message):
                    said("", 1)
                    yield finished

    def _start(self, units: int) -> None:
        while len(self.starting) + len(self.idle) + len(self.doing) < min(self.pool.size, units):
            self.starting.add(self.pool.start())

    def _take(self, worker: int, message: Message) -> list[Finished]:
        """The rows that follow from what a worker says."""
        if isinstance(message, Ready):
            self._check(message.seen)
            self.starting.discard(worker)
            self.idle.add(worker)
        elif isinstance(message, Finished):
            row, task = message.row, self.doing[worker]
            if (key := (row.arm, row.task, row.sample)) in task.wanted:
                task.wanted.discard(key)
                return [message]
        elif isinstance(message, Done):
            del self.doing[worker]
            self.idle.add(worker)
        elif isinstance(message, Warned):
            key_ = message.topic or message.text
            if key_ not in self.said:
                warnings.warn(message.text, stacklevel=8)
            self.said.add(key_)
        elif isinstance(message, Refused):
            raise getattr(errors, message.kind, CompareError)(f"in a worker: {message.text}")
        else:
            return self._bury(worker, message.cause)
        return []

    def _check(self, seen: Mapping[str, Any]) -> None:
        self.failed_starts = 0
        if self.seen is None:
            self.seen = seen
        one, other = ({**x["same"], "attached": x["attached"]} for x in (self.seen, seen))
        if one != other:
            told = "; ".join(list(differences(one, other, ""))[:4])
            raise CompareError(
                f"every worker must have the same model, versions and kind of device, found one where {told}; install "
                "the same versions everywhere, and give every machine the same files"
            )

    def _bury(self, worker: int, cause: str) -> list[Finished]:
        """A worker died. Its unit runs again, unless it was the death of too many."""
        self.idle.discard(worker)
        if worker in self.starting:
            self.starting.discard(worker)
            self.failed_starts += 1
            if self.failed_starts >= TRIES:
                raise CompareError(
                    f"workers must start, found {TRIES} that died before they were ready, the last because {cause}; "
                    "is there memory for a model in each? Try fewer workers"
                )
        task = self.doing.pop(worker, None)
        if task is None:
            return []
        task.deaths += 1
        if task.deaths < TRIES:
            self.queue.append(task)
            return []
        text = f"the worker that ran it died, {TRIES} times, the last because {clip(cause, 300)}"
        return [Finished(Row(*key, error=text)) for key in sorted(task.wanted)]
