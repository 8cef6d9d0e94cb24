"""Rows in a file: killed at any instant, shared with nobody, replaced late, honest when the disk is full."""

from __future__ import annotations

import json
import random
import resource
import signal
import sqlite3
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from kvpolicy.errors import CompareError
from kvpolicy.experiment.lock import locked
from kvpolicy.experiment.store import Contents, Planned, check_same, open_store, read
from kvpolicy.statistics.rows import Row

ARMS = {"exact": "name: full", "a": "name: a"}
N = 16


def contents(n: int = N, **identity: Any) -> Contents:
    samples = [Planned("t", str(i), f"p{i}", f"a{i}", f"d{i // 2}", {"depth": i}) for i in range(n)]
    return Contents({"arms": "a", "batch": 1, **identity}, {"model": "m"}, ARMS, samples, "exact")


def row(arm: str, i: int, **given: Any) -> Row:
    return Row(arm, "t", str(i), {"kl": i / 3, "bytes": i}, facts={"steps": [i, None, 0.1]}, output=f"o{i}", **given)


CHILD = """
import sys
from pathlib import Path
from kvpolicy.experiment.lock import locked
from kvpolicy.experiment.store import open_store
from test_store import N, contents, row
directory = Path(sys.argv[1])
with locked(directory, "a comparison"), open_store(directory, contents(), False) as store:
    done = store.finished()
    for i in range(N):
        for arm in ("exact", "a"):
            if (arm, "t", str(i)) not in done:
                store.add(row(arm, i), {"0": [1, 0.0, 0.5, [1.0], [0.5]]} if arm == "exact" else None)
                print("has", arm, i, flush=True)
print("end", flush=True)
"""


def child(directory: Path) -> subprocess.Popen[str]:
    path = [str(Path(__file__).parent), *sys.path]
    command = [sys.executable, "-c", f"import sys; sys.path[:0] = {path!r}\n{CHILD}", str(directory)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_a_run_that_is_killed_at_any_instant_goes_on_and_loses_and_doubles_nothing(tmp_path: Path) -> None:
    rng, has = random.Random(0), []
    for _ in range(40):
        process = child(tmp_path)
        assert process.stdout is not None
        lines = rng.randint(1, 24)
        said = [line for _, line in zip(range(lines), process.stdout, strict=False)]
        process.send_signal(signal.SIGKILL)
        said += process.stdout.readlines()
        process.wait()
        has += [line.split()[1:] for line in said if line.startswith("has")]
        if said[-1] == "end\n":
            break
        if has:
            assert {tuple(x) for x in has} <= {(r.arm, r.sample) for r in read(tmp_path).rows}
    else:
        raise AssertionError("never came to an end")
    found = read(tmp_path)
    assert [(r.arm, r.sample) for r in found.rows] == [(arm, str(i)) for i in range(N) for arm in ARMS]
    expected = [row(arm, i) for i in range(N) for arm in ARMS]
    for one, other in zip(found.rows, expected, strict=True):
        assert (one.metrics, one.output) == (other.metrics, other.output)
    assert len({tuple(x) for x in has}) == len(has)  # nothing that was finished was begun again
    assert {path.name for path in tmp_path.iterdir()} <= {"run.sqlite", ".running"}
    assert found.settings["attention"]["layers"]["0"] is not None


def test_what_was_written_is_read(tmp_path: Path) -> None:
    with open_store(tmp_path, contents(2), False) as store:
        store.add(row("exact", 0))
        store.add(Row("a", "t", "0", error="RuntimeError: out of memory"))
        now = read(tmp_path).rows
        assert [(r.arm, r.error) for r in now] == [("exact", None), ("a", "RuntimeError: out of memory")]
    found = read(tmp_path)
    assert (found.arms, found.baseline, found.planned) == (ARMS, "exact", {"t": 2})
    first = found.rows[0]
    assert (first.prompt, first.answer, first.document) == ("p0", "a0", "d0")
    assert first.facts == {"depth": 0, "steps": [0, None, 0.1]}
    assert found.settings["model"] == "m"
    with open_store(tmp_path, contents(2), False) as store:
        assert store.finished() == {("exact", "t", "0"), ("a", "t", "0")}
        assert store.finished(failed=False) == {("exact", "t", "0")}
        store.add(row("a", 0))
    assert [r.error for r in read(tmp_path).rows] == [None, None]


def test_nothing_is_deleted_before_the_new_run_has_its_first_row(tmp_path: Path) -> None:
    with open_store(tmp_path, contents(), False) as store:
        store.add(row("exact", 0))
    (tmp_path / "report.html").write_text("old")
    (tmp_path / "mine.txt").write_text("mine")
    for killed in (False, True):
        with ExitStack() as stack:
            store = stack.enter_context(open_store(tmp_path, contents(batch=2), True))
            if killed:  # its file stays, as after SIGKILL
                stack.pop_all()
        assert len(read(tmp_path).rows) == 1
        assert (tmp_path / "report.html").exists()
    with open_store(tmp_path, contents(batch=2), True) as store:
        assert not store.finished()
        store.add(row("a", 3))
        assert not (tmp_path / "report.html").exists()
    assert [(r.arm, r.sample) for r in read(tmp_path).rows] == [("a", "3")]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.txt", "run.sqlite"]


def test_another_experiment_is_refused_and_said_how_it_differs(tmp_path: Path) -> None:
    with open_store(tmp_path, contents(model={"weights": "x"}, arm={"a": {"recipe": "1"}}), False) as store:
        store.add(row("exact", 0))
    check_same(tmp_path, {"batch": 1})
    other = contents(arms="a, b", model={"weights": "y"}, arm={"a": {"recipe": "1"}, "b": {"recipe": "2"}})
    told = "arms is 'a' there and 'a, b' here; model weights is 'x' there and 'y' here; repeat"
    refused = pytest.raises(CompareError, match=f"the directory holds another experiment: {told}")
    with refused, open_store(tmp_path, other, False):
        raise AssertionError("opened")


@pytest.mark.parametrize("bytes_", [b"", b"not a database, whatever its name says" * 100])
def test_a_file_that_is_no_store_is_said_to_be_none(tmp_path: Path, bytes_: bytes) -> None:
    with pytest.raises(CompareError, match="found no such file"):
        read(tmp_path)
    (tmp_path / "run.sqlite").write_bytes(bytes_)
    with pytest.raises(CompareError, match=r"run\.sqlite: must be"):
        read(tmp_path)
    with pytest.raises(CompareError, match=r"run\.sqlite: must be"):
        check_same(tmp_path, {})


def test_a_store_of_another_format_is_refused(tmp_path: Path) -> None:
    with open_store(tmp_path, contents(), False) as store:
        store.add(row("exact", 0))
    with sqlite3.connect(tmp_path / "run.sqlite") as connection:
        connection.execute("UPDATE about SET value = ? WHERE key = 'format'", (json.dumps(99),))
    with pytest.raises(CompareError, match="must be of format 1, found 99"):
        read(tmp_path)


def test_a_directory_serves_one_process_which_is_named(tmp_path: Path) -> None:
    process = child(tmp_path)
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGSTOP)
    try:
        named = rf"a comparison is running there \(process {process.pid} on .*--out"
        with pytest.raises(CompareError, match=named), locked(tmp_path, "a comparison"):
            raise AssertionError("locked")
    finally:
        process.kill()
        process.stdout.close()
        process.wait()
    with locked(tmp_path, "a comparison"):  # the lock died with its process
        pass
    with pytest.raises(KeyError), locked(tmp_path / "new", "a comparison"):
        raise KeyError
    assert not (tmp_path / "new").exists()


def test_a_full_disk_is_said_and_what_was_committed_stays(tmp_path: Path) -> None:
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    written = 0
    try:
        with open_store(tmp_path, contents(), False) as store:
            store.add(row("exact", 0))
            size = (tmp_path / "run.sqlite").stat().st_size
            resource.setrlimit(resource.RLIMIT_FSIZE, (size + 8192, limit[1]))
            with pytest.raises(CompareError, match=r"a row can't be written: .*; those before it are kept"):  # noqa: PT012
                for written in range(1, N):
                    store.add(Row("a", "t", str(written), output="x" * 3000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    assert 1 < written < N - 1
    assert len(read(tmp_path).rows) == written
    with open_store(tmp_path, contents(), False) as store:
        store.add(Row("a", "t", str(written), output="x" * 3000))
    assert len(read(tmp_path).rows) == written + 1
