"""What caches save where tokens differ by row or KV head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvpolicy.errors import CacheError
from kvpolicy.layer import Tiers
from kvpolicy.padding import Padding
from kvpolicy.placement import Placement, State
from kvpolicy.ragged import Ragged
from kvpolicy.table import EMPTY, Table

__all__ = ["fill_ragged", "load_padding", "save_padding", "save_ragged"]

PADDING = "state.padding"


def save_padding(padding: Padding | None, tensors: dict[str, Tensor]) -> None:
    """Add what is known of padding, if anything, to `tensors`."""
    if padding is not None:
        tensors[PADDING] = torch.from_numpy(padding.real.astype(np.uint8))


def load_padding(tensors: dict[str, Tensor], path: Path) -> Padding | None:
    """What `save_padding` added."""
    if PADDING not in tensors:
        return None
    real = tensors[PADDING].numpy()
    if real.ndim != 2 or real.dtype != np.uint8 or not real.size or real.max() > 1:
        raise CacheError(f"{path} is damaged: padding must be a mask by row and token")
    padding = Padding(len(real), 0)
    padding.append(real.astype(np.bool_))
    return padding


def save_ragged(ragged: Ragged, number: int, groups: list[list[State]], tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Add the tables of a layer to `tensors`; returns what the header says of it. Layers share their rows."""
    group = next((i for i, rows in enumerate(groups) if list(map(id, rows)) == list(map(id, ragged.rows))), len(groups))
    if group == len(groups):
        groups.append(ragged.rows)
        for r, row in enumerate(ragged.rows):
            tensors[f"state.rows.{group}.{r}"] = torch.tensor([row.seen, row.through])
            for i, held in enumerate(row.tiers[: ragged.placement.ranked]):
                tensors[f"state.rows.{group}.{r}.tier.{i}"] = torch.from_numpy(held.copy())
    for side, tables in ragged.tables.items():
        for s, table in enumerate(tables):
            for name, part in (table.parts if table is not None else {}).items():
                if part.length:
                    tensors[f"{number}.table.{side}.{s}.{name}"] = part.all()
    return {
        "type": "ragged",
        "rows": group,
        "count": len(ragged.rows),
        "seen": ragged.seen,
        "prompt": ragged.prompt,
        "prompting": ragged.prompting,
    }


def fill_ragged(
    tiers: Tiers,
    number: int,
    entry: dict[str, Any],
    made: dict[Any, list[State]],
    padding: Padding | None,
    tensors: dict[str, Tensor],
    path: Path,
) -> None:
    """Restore the tables of a layer, whose stores are made and still empty."""
    placement, key = tiers.placement, (id(tiers.placement), "rows", entry["rows"])
    ragged = Ragged(placement, placement.start(), tiers.stores, tiers.like)
    if key not in made:
        made[key] = _rows(entry, placement, padding, tensors, path)
    ragged.rows = made[key]
    ragged.seen, ragged.prompt, ragged.prompting = entry["seen"], entry["prompt"], entry["prompting"]
    for side, tables in ragged.tables.items():
        for s, table in enumerate(tables):
            prefix = f"{number}.table.{side}.{s}."
            parts = {name[len(prefix) :]: t for name, t in tensors.items() if name.startswith(prefix)}
            if table is not None and parts:
                _fill_table(table, parts)
                _check_table(table, ragged, side, s, f"{path} is damaged: layer {number}, {side}, store {s}: ")
    _check_counts(ragged, f"{path} is damaged: layer {number}: ")
    tiers.ragged, tiers.padding = ragged, padding


def _rows(
    entry: dict[str, Any], placement: Placement, padding: Padding | None, tensors: dict[str, Tensor], path: Path
) -> list[State]:
    rows = []
    for r in range(entry["count"]):
        prefix = f"state.rows.{entry['rows']}.{r}"
        seen, through = tensors[prefix].tolist()
        held = tuple(tensors[f"{prefix}.tier.{i}"].numpy() for i in range(placement.ranked))
        expected = entry["seen"] if padding is None else padding.count(0, entry["seen"])[r]
        fits = all(t.ndim == 1 and (np.diff(t) > 0).all() and ((t >= 0) & (t < seen)).all() for t in held)
        if seen != expected or not fits:
            raise CacheError(
                f"{path} is damaged: the positions of row {r} must ascend below the {expected} tokens seen"
            )
        rows.append(State(seen, held, {}, through))
    return rows


def _fill_table(table: Table, parts: dict[str, Tensor]) -> None:
    if parts.keys() != table.parts.keys():
        raise CacheError(f"a saved table must hold {list(table.parts)}, found {sorted(parts)}")
    for name, tensor in parts.items():
        table.parts[name].append(tensor)


def _check_table(table: Table, ragged: Ragged, side: str, s: int, where: str) -> None:
    positions, tiers = table.positions, table.tiers
    covers = ragged.placement.tiers_of_store(side, s)
    real = positions != EMPTY
    ordered = positions.sort(2).values
    twice = (ordered[:, :, 1:] == ordered[:, :, :-1]) & (ordered[:, :, 1:] != EMPTY)
    lengths = {part.length for part in table.parts.values()}
    shapes = [tuple(part.pages[0].shape[:2]) for part in table.parts.values()]
    if len(lengths) > 1 or shapes != [table.lines] * len(shapes):
        raise CacheError(f"{where}a table must have a place for each token of {table.lines} rows and heads")
    if ((positions < EMPTY) | (positions >= ragged.seen)).any() or twice.any():
        raise CacheError(f"{where}positions must be different and below the {ragged.seen} tokens seen")
    if (real & ((tiers < covers.start) | (tiers >= covers.stop))).any():
        raise CacheError(f"{where}its tokens must be in tiers {covers.start} to {covers.stop - 1}")
    table.gaps = bool((~real).any())


def _check_counts(ragged: Ragged, where: str) -> None:
    if ragged.placement.specs["keys"][-1] == "evict":
        return
    seen = torch.tensor([row.seen for row in ragged.rows]).expand(ragged.lines[0])
    for side in ragged.tables:
        held = sum((t.positions != EMPTY).sum(2) for t in ragged.tables[side] if t is not None)
        if not isinstance(held, Tensor) or (held.cpu() != seen[:, None]).any():
            raise CacheError(f"{where}the stores must hold all tokens seen, {seen.tolist()} by row")
