"""Workers as processes of this machine, one for each device."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from typing import Any

from kvpolicy.errors import CompareError
from kvpolicy.experiment.bench import Job, open_job
from kvpolicy.experiment.engines import Engine
from kvpolicy.experiment.pool import Died, Done, Message, Pool, Ready, Refused, Warned, refusal
from kvpolicy.experiment.work import Item, Wanted
from kvpolicy.hf.source import ModelSource

NAME = "kvpolicy-worker"
UNGUARDED = 78
"""Exit status of a worker whose program started workers itself when it was imported."""


def refuse_within_worker() -> None:
    """End a worker that was about to start workers: it imports a program that has no guard."""
    if multiprocessing.current_process().name.startswith(NAME):
        os._exit(UNGUARDED)


def devices_of(source: ModelSource, count: int) -> list[str | None]:
    """Devices of workers, where there are so many CUDA devices; None: wherever the model's device map says."""
    if source.device_map is not None:
        return [None]
    if source.device == "cuda" or (source.device is None and count):
        return [f"cuda:{i}" for i in range(count)] or ["cuda"]
    return [source.device or "cpu"]


@dataclass(frozen=True)
class _Process:
    process: Any
    connection: Connection
    device: str | None


class LocalPool(Pool):
    """Processes that are spawned: they share nothing with this one but a pipe."""

    def __init__(self, engine: Engine, job: Job) -> None:
        import torch

        self.job = job
        self.devices = devices_of(job.source, torch.cuda.device_count())
        self.size = engine.workers or len(self.devices)
        if self.size > 1 and self.devices == [None]:
            raise CompareError(
                f"workers must be 1 where a device_map spreads the model over devices, found {self.size}; leave it out"
            )
        self.context = multiprocessing.get_context("spawn")
        self.alive: dict[int, _Process] = {}
        self.started = 0

    def start(self) -> int:
        """Begin a process on the device that has fewest."""
        used = [x.device for x in self.alive.values()]
        device = min(self.devices, key=used.count)
        self.started += 1
        here, there = self.context.Pipe()
        job = replace(self.job, source=replace(self.job.source, device=device))
        process = self.context.Process(target=_serve, args=(there, job), name=f"{NAME}-{self.started}", daemon=True)
        with _without_interrupts():
            process.start()
            self.alive[self.started] = _Process(process, here, device)
        there.close()  # so that the death of the process ends the pipe
        return self.started

    def give(self, worker: int, unit: list[Item], wanted: Wanted) -> None:
        """Send a unit. One that died in the meantime says so later."""
        try:
            with suppress(BrokenPipeError, ConnectionResetError):
                self.alive[worker].connection.send((unit, wanted))
        except Exception as error:
            raise CompareError(
                f"a sample must be data that a worker can be sent, found one that can't: {error}; its scorer must be a "
                "function of a module, by its name"
            ) from error

    def messages(self) -> list[tuple[int, Message]]:
        """One message of each process that has some."""
        by_connection = {x.connection: number for number, x in self.alive.items()}
        ready = wait(list(by_connection), timeout=1.0)
        return [(by_connection[found], self._received(by_connection[found])) for found in ready]  # type: ignore[index]

    def _received(self, worker: int) -> Message:
        held = self.alive[worker]
        try:
            message: Message = held.connection.recv()
            return message
        except (EOFError, OSError):
            pass
        self._end(worker)
        if held.process.exitcode == UNGUARDED:
            return Refused(
                "CompareError",
                "it imports the program that started it, which must not start workers then; put what the program does "
                'below `if __name__ == "__main__":`',
            )
        return Died(_ending(held.process.exitcode))

    def _end(self, worker: int) -> None:
        held = self.alive.pop(worker)
        held.process.kill()
        held.process.join()
        held.connection.close()

    def close(self) -> None:
        """Leave no process behind."""
        for held in self.alive.values():
            held.process.kill()
        for worker in list(self.alive):
            self._end(worker)


@contextmanager
def open_local(engine: Engine, job: Job) -> Iterator[LocalPool]:
    """Workers of this machine; there are none in the end, however it comes.

    Raises:
        CompareError: more workers than a device map allows.
    """
    pool = LocalPool(engine, job)
    try:
        yield pool
    finally:
        pool.close()


def _ending(status: int | None) -> str:
    if status is None or status >= 0:
        return f"it ended with status {status}"
    name = signal.Signals(-status).name if -status in set(signal.Signals) else f"signal {-status}"
    memory = " (the system does that where memory runs out)" if name == "SIGKILL" else ""
    return f"it was killed by {name}{memory}"


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """A process that is started here is deaf to Ctrl-C, which its driver hears; here it is heard afterwards."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve(connection: Connection, job: Job) -> None:
    """The life of a process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_driver, daemon=True).start()
    warnings.showwarning = lambda message, *_, **__: connection.send(Warned(str(message)))
    try:
        with open_job(job, lambda text: connection.send(Warned(text, "unlikely"))) as (bench, seen), bench.ready():
            connection.send(Ready(seen))
            while True:
                unit, wanted = connection.recv()
                for finished in bench.run(unit, wanted, lambda *_: None):
                    connection.send(finished)
                connection.send(Done())
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass  # the driver is no more
    except Exception as error:
        connection.send(refusal(error))


def _end_with_driver() -> None:
    """A driver that is killed can't end its workers."""
    driver = multiprocessing.parent_process()
    if driver is not None:
        driver.join()
        os._exit(1)
