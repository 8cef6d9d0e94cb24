"""Workers of this machine: rows as of a serial run, workers that are killed, runs that go on, nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from engines import ARMS, GIVEN, facts_of, serial

from kvpolicy import compare
from kvpolicy.errors import CompareError, KvpolicyError, MissingDependencyError
from kvpolicy.experiment.experiment import load_experiment
from kvpolicy.experiment.local import LocalPool, devices_of
from kvpolicy.experiment.pool import TRIES, Died, Dispatcher, Done, Pool, Ready, Warned
from kvpolicy.experiment.run import Encoded
from kvpolicy.experiment.store import Planned, read
from kvpolicy.experiment.work import Finished, Item, missing
from kvpolicy.hf.source import ModelSource
from kvpolicy.statistics.rows import Row
from kvpolicy.tasks.sample import Sample


def test_two_workers_one_of_them_killed_make_the_rows_of_a_serial_run_that_was_begun_without_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvpolicy.experiment.comparison.write_results", lambda *_: None)
    store_add = "kvpolicy.experiment.store.Store.add"
    taken = [0]

    def stop(self: Any, row: Row, attention: Any = None, add: Any = None) -> None:
        taken[0] += 1
        if taken[0] == 3:
            raise KeyboardInterrupt
        add(self, row, attention)

    from kvpolicy.experiment.store import Store

    add = Store.add
    with monkeypatch.context() as patch:
        patch.setattr(store_add, lambda *a: stop(*a, add=add))
        with pytest.raises(KeyboardInterrupt):
            compare(ARMS, out=tmp_path / "run", **GIVEN)
    begun = {(r.arm, r.sample): r.metrics for r in read(tmp_path / "run").rows}
    assert len(begun) == 2
    pools: list[LocalPool] = []
    made = LocalPool.__init__
    monkeypatch.setattr(LocalPool, "__init__", lambda self, *a: (made(self, *a), pools.append(self))[0])
    killed: list[int] = []

    def kill(self: Store, row: Row, attention: Any = None) -> None:
        add(self, row, attention)
        if not killed:
            busy = next(iter(pools[0].alive.values())).process
            os.kill(busy.pid, signal.SIGKILL)
            killed.append(busy.pid)

    monkeypatch.setattr(store_add, kill)
    engine = {"name": "local", "workers": 2}
    found = compare(ARMS, out=tmp_path / "run", engine=engine, **GIVEN)
    assert killed
    assert pools[0].started == 3
    assert not pools[0].alive
    assert [facts_of(r) for r in found.evidence.rows] == [facts_of(r) for r in serial().rows]
    assert begun == {
        (r.arm, r.sample): r.metrics for r in found.evidence.rows if (r.arm, r.sample) in begun
    }  # not computed again, times and all
    assert found.evidence.settings["engine"]["workers"] == 2
    assert found.evidence.settings["experiment"] == serial().settings["experiment"]


PROGRAM = """
import sys
import kvpolicy
sys.path.insert(0, {support!r})
from engines import ARMS, GIVEN

if __name__ == "__main__":
    kvpolicy.compare(ARMS, out=sys.argv[1], engine="local", **GIVEN)
"""


def workers_of(pid: int) -> list[int]:
    listed = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    pairs = [tuple(map(int, line.split())) for line in listed.splitlines()]
    return [child for child, parent in pairs if parent == pid]


def test_a_driver_that_is_killed_leaves_its_rows_and_no_worker(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.format(support=str(Path(__file__).parents[1] / "support")))
    process = subprocess.Popen([sys.executable, str(program), str(tmp_path / "run")])
    deadline = time.monotonic() + 120
    while not (tmp_path / "run" / "run.sqlite").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    children = workers_of(process.pid)
    assert children
    process.kill()
    process.wait()
    while any(Path(f"/proc/{child}").exists() for child in children):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert read(tmp_path / "run").rows


class Script(Pool):
    """Workers whose life is written down: what each says, by the number of its start."""

    size = 2

    def __init__(self, lives: list[str], seen: list[str] | None = None) -> None:
        self.lives, self.seen = lives, seen or []
        self.says: list[tuple[int, Any]] = []
        self.started = 0
        self.given: list[str] = []

    def start(self) -> int:
        self.started += 1
        life = self.lives[min(self.started, len(self.lives)) - 1]
        dtype = self.seen[self.started - 1] if self.seen else "x"
        ready: Any = Died("no memory") if life == "stillborn" else Ready({"same": {"dtype": dtype}, "attached": True})
        self.says.append((self.started, ready))
        return self.started

    def give(self, worker: int, unit: list[Item], wanted: Any) -> None:
        self.given.append(unit[0].planned.sample)
        rows = [Finished(Row(*key)) for key in sorted(wanted)]
        dies = self.lives[min(worker, len(self.lives)) - 1] == "dies"
        bad = dies or unit[0].planned.sample == "poison"
        said = [rows[0], Died("it was killed")] if bad and len(rows) == 2 else [Died("it was killed")] if bad else None
        self.says += [(worker, x) for x in (said or [*rows, Warned("w", "topic"), Done()])]

    def messages(self) -> list[tuple[int, Any]]:
        said, self.says = self.says, []
        return said


def pending(*samples: str) -> Any:
    items = [Item(Planned("t", x, "p", "a"), Encoded(Sample("t", "p", "a"), [1], [2])) for x in samples]
    return [([item], missing([item], ["exact", "a"], set())) for item in items]


def rows_of(pool: Script, *samples: str) -> list[Row]:
    dispatcher = Dispatcher(pool)
    dispatcher.begin(len(samples))
    with dispatcher.labour(pending(*samples), lambda *_: None) as rows:
        return [x.row for x in rows]


@pytest.mark.filterwarnings("ignore:w")
def test_a_unit_runs_again_where_its_worker_died_and_is_given_up_after_some() -> None:
    pool = Script(["dies", "lives"])
    rows = rows_of(pool, "0", "1", "2")
    assert sorted((r.arm, r.sample) for r in rows) == [(a, s) for a in ("a", "exact") for s in "012"]
    assert not any(r.error for r in rows)
    pool = Script(["lives"])
    rows = rows_of(pool, "0", "poison", "1")
    errors = {(r.arm, r.sample): r.error for r in rows if r.error}
    assert len(rows) == 6
    assert errors == {("exact", "poison"): "the worker that ran it died, 3 times, the last because it was killed"}
    assert pool.given.count("poison") == TRIES
    with pytest.raises(CompareError, match=r"found 3 that died before they were ready, the last because no memory"):
        rows_of(Script(["stillborn"]), "0")
    with pytest.raises(CompareError, match=r"found one where dtype is 'x' there and 'y' here; install"):
        rows_of(Script(["lives"], ["x", "y"]), "0", "1")


def test_what_workers_cannot_do_is_said_before_any_starts(tmp_path: Path) -> None:
    import torch

    with pytest.raises(CompareError, match=r"given by their names, found a Linear; save it \(save_pretrained\)"):
        compare(["full"], model=torch.nn.Linear(1, 1), engine="local", n=1)
    with pytest.raises(CompareError, match="workers must be 1 where a device_map"):
        compare(["full"], model=ModelSource(device_map="cpu"), engine={"name": "local", "workers": 2}, n=1)
    cases: Iterator[tuple[Any, str]] = iter(
        [
            ("dask", "engine must be one of local, ray"),
            ({"name": "local", "worker": 2}, "unknown key 'worker' (did you mean 'workers'?)"),
            ({"name": "local", "address": "a:1"}, "address is of the engine ray, found it with local"),
            ({"name": "ray", "address": "ray://a:1"}, "must be HOST:PORT of a node"),
            ({"name": "local", "workers": 0}, "must be greater than or equal to 1, found 0"),
        ]
    )
    for engine, told in cases:
        with pytest.raises(CompareError) as caught:
            load_experiment(["full"], engine=engine)
        assert told in str(caught.value)
    (tmp_path / "e.yaml").write_text("arms: [full]\nengine: {name: local, workers: 3}\n")
    assert load_experiment(tmp_path / "e.yaml")[0].engine.workers == 3  # type: ignore[union-attr]
    assert load_experiment(tmp_path / "e.yaml", engine="ray")[0].engine.name == "ray"  # type: ignore[union-attr]


def test_ray_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib.metadata import PackageNotFoundError

    def none(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr("kvpolicy.arguments.version", none)
    with pytest.raises(MissingDependencyError, match=r"pip install 'kvpolicy\[ray\]'") as caught:
        compare(["full"], engine="ray", n=1)
    assert isinstance(caught.value, KvpolicyError)


def test_devices_of_workers() -> None:
    assert devices_of(ModelSource(), 0) == ["cpu"]
    assert devices_of(ModelSource(), 3) == devices_of(ModelSource(device="cuda"), 3) == ["cuda:0", "cuda:1", "cuda:2"]
    assert devices_of(ModelSource(device="cuda:1"), 3) == ["cuda:1"]
    assert devices_of(ModelSource(device="cpu"), 3) == ["cpu"]
    assert devices_of(ModelSource(device_map="auto"), 3) == [None]
