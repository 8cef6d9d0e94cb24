"""What is found, arm by arm. A ratio is only to be had of a row whose checks hold."""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from .card import release

EXACT = "DynamicCache"


@dataclass(frozen=True)
class Check:
    """How far a result is from what it is compared with, and how far it may be."""

    what: str
    error: float
    bound: float

    @property
    def holds(self) -> bool:
        return self.error <= self.bound  # not so for nan


@dataclass
class Row:
    """One arm of one size."""

    section: str
    arm: str
    batch: int
    tokens: int
    seconds: float = 0.0
    base: tuple[int, float] | None = None
    """Rows and seconds of the arm that it is compared with."""
    graphs: bool = False
    checks: Sequence[Check] = ()
    skipped: str = ""
    """Why there are no figures, where that is no fault."""
    failed: str = ""
    more: dict[str, float] = field(default_factory=dict)
    """Other figures, by name and unit."""

    @property
    def wrong(self) -> bool:
        return bool(self.failed) or any(not check.holds for check in self.checks)

    @property
    def shown(self) -> bool:
        """Whether its figures may be shown."""
        return not (self.wrong or self.skipped)

    @property
    def ratio(self) -> float | None:
        """Its time of a row's step, as a part of the other's. None: nothing to compare with, or not checked."""
        return self.seconds / self.base[1] if self._comparable() and self.base else None

    @property
    def throughput(self) -> float | None:
        """Its rows in a second, of the other's."""
        return self.batch / self.seconds / (self.base[0] / self.base[1]) if self._comparable() and self.base else None

    def _comparable(self) -> bool:
        return self.shown and bool(self.checks)

    def __str__(self) -> str:
        name = f"{self.section:8} batch {self.batch:3}, {self.tokens:7,} tokens, {self.arm}"
        name += ", graphs" if self.graphs else ""
        errors = "; ".join(f"{c.what} {c.error:.1e} of {c.bound:.1e}" for c in self.checks)
        if self.skipped or self.failed:
            return f"{name}: {self.skipped or f'FAILED, {self.failed}'}"
        if self.wrong:
            return f"{name}: WRONG, {errors}: no times"
        time = f"{self.seconds * 1e3:.3f} ms" if self.seconds else ""
        ratios = (
            [] if self.ratio is None else [f"{self.ratio:.3f} of the time, {self.throughput:.2f} x the rows a second"]
        )
        more = [f"{name} {value:,.4g}" for name, value in self.more.items()]
        return f"{name}: " + "; ".join([x for x in (time, *ratios, *more, errors) if x])


class Book:
    """All rows of a run, printed as they come and written after each."""

    def __init__(self, about: str, path: Path | None = None) -> None:
        self.about, self.path = about, path
        self.rows: list[Row] = []

    def add(self, row: Row) -> Row:
        print(row, flush=True)
        self.rows.append(row)
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            found = {"about": self.about, "rows": [asdict(row) for row in self.rows]}
            self.path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        return row

    def attempt(self, row: Row, call: Callable[[], Any]) -> Any:
        """What `call` gives. Where it raises, `row` says why and the next arm has its turn."""
        try:
            return call()
        except torch.cuda.OutOfMemoryError:
            row.skipped = "does not fit on this card"
        except Exception as error:
            traceback.print_exc()
            row.failed = f"{type(error).__name__}: {error}"[:300]
        release()  # what the traceback held
        self.add(row)
        return None

    @property
    def wrong(self) -> bool:
        return any(row.wrong for row in self.rows)


def read(path: Path) -> tuple[str, list[Row]]:
    """What a run wrote: what it was measured on, and its rows."""
    found = json.loads(path.read_text(encoding="utf-8"))
    rows = []
    for one in found["rows"]:
        one["checks"] = [Check(**check) for check in one["checks"]]
        one["base"] = None if one["base"] is None else tuple(one["base"])
        rows.append(Row(**one))
    return found["about"], rows
