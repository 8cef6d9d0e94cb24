"""Workers as actors of a Ray cluster. Ray is imported within functions."""

from __future__ import annotations

import logging
import os
import signal
import socket
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from typing import Any

from kvpolicy.errors import CompareError
from kvpolicy.experiment.bench import Job, open_job
from kvpolicy.experiment.engines import Engine
from kvpolicy.experiment.pool import Died, Done, Message, Pool, Ready, Warned, refusal
from kvpolicy.experiment.work import Item, Wanted
from kvpolicy.words import clip, quoted

PATIENCE = 60.0
"""Seconds without a word of any worker, after which it is said what is waited for."""


class Served:
    """An actor. Its methods are generators, whose items the driver gets as they come."""

    def __init__(self) -> None:
        self.stack, self.said = ExitStack(), list[Message]()

    def begin(self, job: Job) -> Iterator[Message]:
        """Load the model."""
        warnings.showwarning = lambda message, *_, **__: self.said.append(Warned(str(message)))
        try:
            opened = open_job(job, lambda text: self.said.append(Warned(text, "unlikely")))
            self.bench, seen = self.stack.enter_context(opened)
            self.stack.enter_context(self.bench.ready())
        except Exception as error:
            yield refusal(error)
            return
        yield from self._warnings()
        yield Ready(seen)

    def work(self, unit: list[Item], wanted: Wanted) -> Iterator[Message]:
        """Run a unit."""
        for finished in self.bench.run(unit, wanted, lambda *_: None):
            yield from self._warnings()
            yield finished
        yield Done()

    def _warnings(self) -> Iterator[Message]:
        said, self.said = self.said, []
        yield from said


class ClusterPool(Pool):
    """Actors, each with the devices that it asks Ray for. Ray must be initialized."""

    def __init__(self, engine: Engine, job: Job) -> None:
        import ray

        self.ray, self.job = ray, job
        self.asked = asked_for(engine, job.source.device, ray.cluster_resources())
        room = (int(ray.cluster_resources().get(name, 0) // n) for name, n in self.asked.items() if n)
        self.size = engine.workers or max(min(room), 1)
        if job.source.device is None and job.source.device_map is None:
            kind = "cuda" if self.asked["GPU"] else "cpu"
            self.job = replace(job, source=replace(job.source, device=kind))
        options = {"num_cpus": self.asked["CPU"], "num_gpus": self.asked["GPU"], "max_restarts": 0}
        self.kind = ray.remote(Served).options(**options)
        self.alive: dict[int, Any] = {}
        self.streams: dict[Any, int] = {}
        """What workers are saying."""
        self.started, self.heard = 0, time.monotonic()

    def start(self) -> int:
        """Ask for an actor, which begins where and when Ray has room for it."""
        self.started += 1
        self.alive[self.started] = actor = self.kind.remote()
        self._listen(self.started, actor.begin, self.job)
        return self.started

    def give(self, worker: int, unit: list[Item], wanted: Wanted) -> None:
        """Send a unit."""
        try:
            self._listen(worker, self.alive[worker].work, unit, wanted)
        except TypeError as error:
            raise CompareError(
                f"a sample must be data that a worker can be sent, found one that can't: {clip(str(error), 300)}"
            ) from error

    def _listen(self, worker: int, method: Any, *given: Any) -> None:
        self.streams[method.options(num_returns="streaming").remote(*given)] = worker

    def messages(self) -> list[tuple[int, Message]]:
        """One message of a worker that has some."""
        ready, _ = self.ray.wait(list(self.streams), num_returns=1, timeout=1.0)
        if not ready:
            return self._waited()
        self.heard = time.monotonic()
        stream = ready[0]
        worker = self.streams[stream]
        try:
            message: Message = self.ray.get(next(stream))
        except StopIteration:
            del self.streams[stream]
            return []
        except self.ray.exceptions.RayError as error:
            del self.streams[stream]
            self._end(worker)
            return [(worker, Died(_cause(error)))]
        if isinstance(message, Ready | Done):
            del self.streams[stream]
        return [(worker, message)]

    def _waited(self) -> list[tuple[int, Message]]:
        if time.monotonic() - self.heard < PATIENCE:
            return []
        self.heard = time.monotonic()
        asked = ", ".join(f"{n} {name}" for name, n in self.asked.items() if n)
        return [(0, Warned(f"no worker has said anything for {PATIENCE:.0f} s; each waits for {asked} of Ray", "wait"))]

    def _end(self, worker: int) -> None:
        with suppress(Exception):  # it is dead, or its node
            self.ray.kill(self.alive.pop(worker))

    def close(self) -> None:
        """Leave no actor behind."""
        self.streams.clear()
        for worker in list(self.alive):
            self._end(worker)


def asked_for(engine: Engine, device: str | None, resources: dict[str, float]) -> dict[str, int]:
    """CPUs and GPUs of a worker. Which GPU it gets is Ray's choice.

    Raises:
        CompareError: the device has a number.
    """
    if device is not None and ":" in device:
        raise CompareError(
            f"Ray chooses the devices of its workers, so device must have no number, found {quoted(device)}; give cuda"
        )
    wants = device == "cuda" or (device is None and resources.get("GPU", 0) > 0)
    gpus = engine.gpus if engine.gpus is not None else int(wants)
    return {"CPU": engine.cpus, "GPU": gpus}


@contextmanager
def open_cluster(engine: Engine, job: Job) -> Iterator[ClusterPool]:
    """Actors of a cluster; there are none in the end. One that the program has connected to stays connected.

    Raises:
        CompareError: the cluster can't be reached, or is another than the one that the program is connected to.
    """
    import ray

    with ExitStack() as stack:
        if not ray.is_initialized():
            _connect(engine.address)
            stack.callback(ray.shutdown)
        elif engine.address not in (None, "auto", here := ray.get_runtime_context().gcs_address):
            raise CompareError(
                f"address must be of the cluster that this program is connected to, {here}, found "
                f"{quoted(engine.address)}; leave it out, or call ray.shutdown() before"
            )
        pool = ClusterPool(engine, job)
        stack.callback(pool.close)
        yield pool


def _connect(address: str | None) -> None:
    import ray

    before = signal.getsignal(signal.SIGTERM)
    named = address or os.environ.get("RAY_ADDRESS", "auto")
    try:
        host, colon, port = named.rpartition(":")
        if colon and port.isdigit():  # Ray itself tries for minutes
            socket.create_connection((host, int(port)), timeout=10).close()
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, ValueError, RuntimeError) as error:
        raise CompareError(
            f"the Ray cluster {quoted(named)} can't be reached: {_first_line(error)}; start it (ray start --head), or "
            "give its address (--address)"
        ) from error
    finally:
        with suppress(ValueError, TypeError):  # not in the main thread, or not set by Python
            signal.signal(signal.SIGTERM, before)  # Ray sets its own, which would end the program without its rows


def _cause(error: BaseException) -> str:
    """What Ray says of a death, in a line."""
    because = next((line for line in str(error).splitlines() if line.startswith("The actor is dead because")), None)
    return _first_line(error) if because is None else f"Ray says: {clip(because, 200)}"


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {clip(lines[0], 300)}" if lines else type(error).__name__
