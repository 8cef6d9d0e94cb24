"""The results of an experiment: one SQLite file, one row per arm and sample, each committed when it is finished.

SQLite, and not Parquet: a Parquet file is written whole, so a run that is killed would lose it or need a file per row.
Here a row is in the file or it is not, whatever ends the process, and the file is read while it grows. The journal is
SQLite's ordinary one, not its write-ahead log, which needs shared memory and so fails on network file systems.
"""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvpolicy.arguments import LEGACY, RESULTS
from kvpolicy.errors import CompareError
from kvpolicy.statistics.rows import Evidence, Row
from kvpolicy.words import clip, in_words

FILE = RESULTS[0]
FORMAT = 1
BUSY = 30.0
"""Seconds that a reader or the writer waits for the other."""
_SCHEMA = """
CREATE TABLE about (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE arms (place INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, recipe TEXT);
CREATE TABLE samples (
    place INTEGER PRIMARY KEY, task TEXT NOT NULL, sample TEXT NOT NULL, document TEXT, facts TEXT NOT NULL,
    prompt TEXT NOT NULL, answer TEXT NOT NULL, UNIQUE (task, sample)
);
CREATE TABLE rows (
    arm TEXT NOT NULL, task TEXT NOT NULL, sample TEXT NOT NULL, metrics TEXT NOT NULL, facts TEXT NOT NULL,
    output TEXT, error TEXT, PRIMARY KEY (arm, task, sample)
);
CREATE TABLE attention (task TEXT NOT NULL, sample TEXT NOT NULL, sums TEXT NOT NULL, PRIMARY KEY (task, sample));
"""


@dataclass(frozen=True)
class Planned:
    """A sample that an experiment is to run."""

    task: str
    sample: str
    prompt: str
    answer: str
    document: str | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Contents:
    """What an experiment is, before it has rows."""

    identity: Mapping[str, Any]
    """What the numbers of rows depend on, as plain data: only an equal experiment goes on in its directory."""
    settings: Mapping[str, Any]
    """What else is recorded."""
    arms: Mapping[str, str]
    """Every arm with its resolved recipe, the exact cache first."""
    samples: Sequence[Planned]
    baseline: str


class Store:
    """The rows of one experiment, in a file or in memory. Made by `open_store`."""

    def __init__(self, file: Path | None, contents: Contents, continues: bool) -> None:
        self.file, self.contents = file, contents
        self.waiting = file is not None and not continues
        """Whether the file is still under another name, because it has no row yet."""
        self.path = file.with_name(f".{file.name}.new") if file is not None and self.waiting else file
        if self.path is not None and self.waiting:
            _remove(self.path)
        self.connection = _connect(self.path)
        if continues:
            with self.connection:
                self._set("settings", {**self.about("settings"), **contents.settings})
        else:
            self._fill()

    def _fill(self) -> None:
        c = self.contents
        with self.connection:
            self.connection.executescript(_SCHEMA)
            self._set("format", FORMAT)
            self._set("identity", c.identity)
            self._set("settings", c.settings)
            self._set("baseline", c.baseline)
            self.connection.executemany(
                "INSERT INTO arms VALUES (?, ?, ?)",
                [(i, name, recipe) for i, (name, recipe) in enumerate(c.arms.items())],
            )
            self.connection.executemany(
                "INSERT INTO samples VALUES (?, ?, ?, ?, ?, ?, ?)",
                [
                    (i, s.task, s.sample, s.document, _dump(s.facts), s.prompt, s.answer)
                    for i, s in enumerate(c.samples)
                ],
            )

    def _set(self, key: str, value: Any) -> None:
        self.connection.execute("INSERT OR REPLACE INTO about VALUES (?, ?)", (key, _dump(value)))

    def about(self, key: str) -> Any:
        """What is recorded under a key: `identity`, `settings`, `baseline`."""
        return _about(self.connection, key)

    def add(self, row: Row, attention: Mapping[str, Any] | None = None) -> None:
        """Commit a row, and what its sample says of attention by distance.

        Raises:
            CompareError: it can't be written. Every row that was committed before stays.
        """
        values = (row.arm, row.task, row.sample, _dump(row.metrics), _dump(row.facts), row.output, row.error)
        try:
            with self.connection:
                self.connection.execute("INSERT OR REPLACE INTO rows VALUES (?, ?, ?, ?, ?, ?, ?)", values)
                if attention is not None:
                    sums = (row.task, row.sample, _dump(attention))
                    self.connection.execute("INSERT OR REPLACE INTO attention VALUES (?, ?, ?)", sums)
            if self.waiting:
                self._take_place()
        except (sqlite3.Error, OSError) as error:
            raise CompareError(
                f"{self.path or 'memory'}: a row can't be written: {error}; those before it are kept, and the same "
                "command goes on from there"
            ) from error

    def _take_place(self) -> None:
        """With a first row in it the file takes its name, and an earlier experiment goes."""
        assert self.file is not None
        assert self.path is not None
        self.connection.close()  # a file must not be renamed under an open connection, whose journal has its name
        for name in (*RESULTS[1:], *LEGACY):
            (self.file.parent / name).unlink(missing_ok=True)
        os.replace(self.path, self.file)
        self.path, self.waiting = self.file, False
        self.connection = _connect(self.path)

    def finished(self, failed: bool = True) -> set[tuple[str, str, str]]:
        """Arm, task and sample of every row; with `failed=False` without those that hold an error."""
        chosen = "SELECT arm, task, sample FROM rows" + ("" if failed else " WHERE error IS NULL")
        return set(self.connection.execute(chosen))

    def evidence(self) -> Evidence:
        """All rows."""
        return _evidence(self.connection)

    def attention(self) -> list[Any]:
        """What the samples say of attention by distance, in their order."""
        return _attention(self.connection)

    def close(self) -> None:
        """Close the file; one that has no row yet is removed."""
        self.connection.close()
        if self.waiting and self.path is not None:
            _remove(self.path)


@contextmanager
def open_store(directory: Path | None, contents: Contents, overwrite: bool) -> Iterator[Store]:
    """The store of an experiment: new, or the one in `directory` if it is of an equal experiment.

    The directory must be `locked`.

    Args:
        directory: where `run.sqlite` is; None keeps rows in memory.
        contents: the experiment.
        overwrite: begin anew. What the directory holds stays until the new run has its first row.

    Raises:
        CompareError: it can't be written, or holds another experiment, with what tells them apart.
    """
    file = None if directory is None else directory / FILE
    continues = file is not None and not overwrite and file.exists()
    if directory is not None and not overwrite:
        check_same(directory, contents.identity)
    try:
        store = Store(file, contents, continues)
    except (sqlite3.Error, OSError) as error:
        raise CompareError(f"{clip(str(file), 300)}: the results can't be written there: {error}") from error
    with closing(store):
        yield store


def read(directory: str | os.PathLike[str]) -> Evidence:
    """The rows of an experiment that runs, was interrupted, or is finished.

    Args:
        directory: what was given as `out`.

    Raises:
        CompareError: it holds no results that can be read.
    """
    file = Path(directory) / FILE
    with _reading(file) as connection:
        found = _evidence(connection)
        sums = _attention(connection)
    if not sums:
        return found
    from kvpolicy.experiment.attention_distance import Distances

    return Evidence(
        found.rows, found.arms, found.baseline, found.planned,
        {**found.settings, "attention": Distances.of(sums).to_dict()},
    )  # fmt: skip


@contextmanager
def _reading(file: Path) -> Iterator[sqlite3.Connection]:
    shown = clip(str(file), 300)
    if not file.is_file():
        raise CompareError(
            f"{shown}: must be the results of a comparison, found no such file; name the directory that was given as "
            "--out, once its run has a first row"
        )
    try:
        with closing(_connect(file)) as connection:
            written = _about(connection, "format")
            if written != FORMAT:
                raise CompareError(
                    f"{shown}: must be of format {FORMAT}, found {in_words(written)}; read it with the version of "
                    "kvpolicy that wrote it"
                )
            yield connection
    except (sqlite3.Error, ValueError, TypeError, KeyError) as error:
        raise CompareError(
            f"{shown}: must be the results of a comparison, found a file that can't be read: {clip(str(error), 200)}"
        ) from error


def _connect(path: Path | None) -> sqlite3.Connection:
    return sqlite3.connect(":memory:" if path is None else path, timeout=BUSY)


def _remove(path: Path) -> None:
    for name in (path.name, f"{path.name}-journal"):
        with suppress(OSError):
            path.with_name(name).unlink(missing_ok=True)


def _dump(value: Any) -> str:
    return json.dumps(value, allow_nan=False)


def _about(connection: sqlite3.Connection, key: str) -> Any:
    found = connection.execute("SELECT value FROM about WHERE key = ?", (key,)).fetchone()
    return None if found is None else json.loads(found[0])


def _attention(connection: sqlite3.Connection) -> list[Any]:
    chosen = "SELECT sums FROM attention JOIN samples USING (task, sample) ORDER BY samples.place"
    return [json.loads(sums) for (sums,) in connection.execute(chosen)]


def _evidence(connection: sqlite3.Connection) -> Evidence:
    chosen = (
        "SELECT r.arm, r.task, r.sample, r.metrics, s.document, s.facts, r.facts, s.prompt, s.answer, r.output, "
        "r.error FROM rows r JOIN samples s USING (task, sample) JOIN arms a ON a.name = r.arm "
        "ORDER BY s.place, a.place"
    )
    rows = []
    for arm, task, sample, metrics, document, given, facts, prompt, answer, output, error in connection.execute(chosen):
        said = {**json.loads(given), **json.loads(facts)}
        rows.append(Row(arm, task, sample, json.loads(metrics), document, said, prompt, answer, output, error))
    arms = dict(connection.execute("SELECT name, recipe FROM arms ORDER BY place"))
    planned = dict(connection.execute("SELECT task, count(*) FROM samples GROUP BY task ORDER BY min(place)"))
    settings = {**_about(connection, "settings"), "identity": _about(connection, "identity")}
    return Evidence(tuple(rows), arms, _about(connection, "baseline"), planned, settings)


def check_same(directory: Path, identity: Mapping[str, Any]) -> None:
    """Refuse to go on with another experiment.

    Args:
        directory: where results may be already.
        identity: of an experiment; the parts of it that are known, before a model is loaded.

    Raises:
        CompareError: saying how they differ.
    """
    shown = clip(str(directory), 300)
    remedy = "choose another directory (--out), or replace it (overwrite=True, on the shell --overwrite)"
    if not (directory / FILE).exists():
        earlier = next((name for name in LEGACY if (directory / name).exists()), None)
        if earlier is not None:
            raise CompareError(f"{shown}: there must be no comparison of another version, found {earlier}; {remedy}")
        return
    with _reading(directory / FILE) as connection:
        there = _about(connection, "identity")
    here = json.loads(_dump(identity))
    told = list(differences({key: there.get(key) for key in here}, here, ""))
    if told:
        more = f", and {len(told) - 4} more" if len(told) > 4 else ""
        raise CompareError(
            f"{shown}: the directory holds another experiment: {'; '.join(told[:4])}{more}; repeat what it was begun "
            f"with, {remedy}"
        )


def differences(there: Any, here: Any, path: str) -> Iterable[str]:
    """What tells two experiments apart, in words."""
    if isinstance(there, dict) and isinstance(here, dict):
        for key in dict.fromkeys([*there, *here]):
            if isinstance(there.get(key) or here.get(key), dict) and not (key in there and key in here):
                continue  # an arm or a task that one of them lacks, which the lists of their names say
            yield from differences(there.get(key), here.get(key), f"{path} {key}" if path else key)
    elif isinstance(there, list) and isinstance(here, list) and len(there) == len(here):
        for i, (a, b) in enumerate(zip(there, here, strict=True)):
            yield from differences(a, b, f"{path} {i + 1}")
    elif there != here:
        yield f"{path} is {_shown(there)} there and {_shown(here)} here"


def _shown(value: Any) -> str:
    return "not given" if value is None else in_words(value)
