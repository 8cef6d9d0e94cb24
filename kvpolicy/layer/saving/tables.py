"""Where tokens are, as caches save it: by position, or by row and KV head."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvpolicy.layer.layer import LayerCache
from kvpolicy.layer.saving.file import Damaged, Held, PerHeadEntry, StateEntry, TiersEntry
from kvpolicy.layer.saving.flat import COUNTS, counts_in, packed, unpacked
from kvpolicy.placement.by_position import ByPosition
from kvpolicy.placement.moves import EMPTY
from kvpolicy.placement.padding import Padding
from kvpolicy.placement.per_head import PerHeadPlacement
from kvpolicy.placement.planner import Placement, State
from kvpolicy.placement.position_list import PositionList
from kvpolicy.placement.step import Step
from kvpolicy.placement.token_table import TokenTable

Ints = NDArray[np.int64]
Tables = dict[str, list[tuple[range, dict[str, Tensor]]]]
"""For each side, of each table the tiers that it covers and its tensors."""
PADDING = "state.padding"


def save_padding(padding: Padding | None, seen: int, tensors: dict[str, Tensor]) -> None:
    """Add what is known of padding, if anything, to `tensors`."""
    if padding is not None:
        tensors[PADDING] = torch.from_numpy(padding.real[:, :seen].astype(np.uint8))


def load_padding(held: Held) -> Padding | None:
    """What `save_padding` added."""
    if PADDING not in held:
        return None
    real = held.take(PADDING, torch.uint8, 2).numpy()
    if not real.size or real.max() > 1:
        raise Damaged("padding must be a mask by row and token")
    return Padding.none(len(real), 0).append(real.astype(np.bool_))


class Saving:
    """Adds where the tokens of layers are to the tensors of a file. What layers share is written once."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors
        self.steps: list[Step] = []
        """Those by position, in the order of their numbers."""
        self._rows: list[Step] = []

    def layer(self, tiers: LayerCache, number: int) -> TiersEntry | PerHeadEntry:
        """Add where the tokens of layer `number` are; returns what the header says of it."""
        if not isinstance(tiers.planner, PerHeadPlacement):
            return TiersEntry(state=self._state(tiers.step))
        return self._per_head(tiers.planner, tiers.step, number)

    def _state(self, step: Step) -> int:
        number = next((i for i, known in enumerate(self.steps) if known is step), len(self.steps))
        if number == len(self.steps):
            self.steps.append(step)
            self._add(f"state.{number}.tier.", step.state.tiers)
            for side, orders in step.state.stores.items():
                self._add(f"state.{number}.{side}.", [order.array for order in orders])
        return number

    def _per_head(self, planner: PerHeadPlacement, step: Step, number: int) -> PerHeadEntry:
        group = next((i for i, known in enumerate(self._rows) if known is step), len(self._rows))
        if group == len(self._rows):
            self._rows.append(step)
            for r, row in enumerate(step.rows):
                self.tensors[f"state.rows.{group}.{r}"] = torch.tensor([row.seen])
                self._add(f"state.rows.{group}.{r}.tier.", row.tiers[: planner.placement.ranked])
        for side, s, table in _tables(planner):
            held = table.tensors() if table.length else {}
            if table.flat is not None:
                held = {**packed(held, table.flat), COUNTS: torch.from_numpy(table.flat.astype(np.int32))}
            self.tensors |= {f"{number}.table.{side}.{s}.{name}": x for name, x in held.items()}
        prompt = step.seen if step.prompt is None else step.prompt
        going_on = step.prompt is None
        return PerHeadEntry(rows=group, count=len(step.rows), seen=step.seen, prompt=prompt, prompting=going_on)

    def _add(self, prefix: str, arrays: Any) -> None:
        for i, array in enumerate(arrays):
            self.tensors[f"{prefix}{i}"] = torch.from_numpy(array.copy())


class Filling:
    """Puts back what `Saving` wrote, for one layer after the other, and finds what can't be."""

    def __init__(self, states: list[StateEntry], held: Held) -> None:
        self.states, self.held = states, held
        self._made: dict[tuple[str, int], tuple[Placement, Any, Step]] = {}

    def layer(self, tiers: LayerCache, number: int, entry: TiersEntry | PerHeadEntry) -> None:
        """Say where the tokens of layer `number` are, whose stores are made and still empty."""
        if isinstance(entry, PerHeadEntry):
            self._per_head(tiers, number, entry)
        else:
            self._state(tiers, entry.state)

    def _state(self, tiers: LayerCache, number: int) -> None:
        placement = tiers.placement
        if number >= len(self.states):
            raise Damaged(f"it must go by one of {len(self.states)} states, found {number}")
        entry = self.states[number]
        if placement.tabled or (tiers.padding is not None and tiers.padding.before(entry.seen)):
            raise Damaged(
                "rows that are padded, ranked or read by pages must have tables of their own, found one state"
            )
        step = self._once(
            "state",
            number,
            placement,
            entry,
            lambda: _by_position(placement, number, entry, self.held, tiers.padding),
        )
        tiers.planner = ByPosition(step)

    def _per_head(self, tiers: LayerCache, number: int, entry: PerHeadEntry) -> None:
        placement, padding = tiers.placement, tiers.padding
        if padding is None and not placement.tabled:
            raise Damaged("rows must have the same tokens where none is padded, found tables")
        planner = tiers.by_head()
        rows = planner.shape[0]
        by_row = padding is not None and (padding.before(entry.seen) or entry.count > 1)
        if entry.count != (rows if by_row else 1) or entry.prompt > entry.seen:
            raise Damaged(f"{rows} rows of {entry.seen} tokens must be placed, found {entry!r}")
        slots = padding if by_row else None

        def make() -> Step:
            states = tuple(_rows(entry, placement, slots, self.held))
            prompt = None if entry.prompting else entry.prompt
            return Step(placement, states, entry.seen, padding, by_row, by_head=True, prompt=prompt)

        step = self._once("rows", entry.rows, placement, entry, make)
        saved: Tables = {side: [] for side in planner.tables}
        for side, s, table in _tables(planner):
            own = self.held.below(f"{number}.table.{side}.{s}.")
            table.flat = counts_in(own, table.shape)
            if table.flat is not None and not planner.may_be_flat(side, s):
                raise Damaged("rows and heads that share groups of tokens must take as much room as the longest")
            own = own if table.flat is None else unpacked(own, table.flat, EMPTY)
            parts = _parts(own, table, placement.scores.width)
            saved[side].append((placement.tiers_of_store(side, s), parts))
            if parts["positions"].shape[2]:
                moved = {name: x.to(table.device) for name, x in parts.items()}
                table.append(moved["positions"], moved["tiers"], moved.get("scores"))
        _check_tables(planner, step, saved, slots)
        planner.restore(step)

    def finish(self) -> None:
        """All that there is must have been used."""
        used = {number for what, number in self._made if what == "state"}
        if len(used) != len(self.states):
            raise Damaged(f"its layers must go by {len(self.states)} states, found {len(used)}")
        if self.held:
            raise Damaged(
                f"its recipe and model have no use for {len(self.held)} tensors, such as {min(self.held)[:80]}"
            )

    def _once(self, what: str, number: int, placement: Placement, entry: Any, make: Callable[[], Step]) -> Step:
        """What layers share; those with the same tiers have the same tokens by position."""
        if (what, number) not in self._made:
            self._made[what, number] = placement, entry, make()
        owner, saying, step = self._made[what, number]
        first = next(s for (k, _), (p, _, s) in self._made.items() if k == what and p is owner)
        same = len(first.rows) == len(step.rows) and all(map(_same, first.rows, step.rows))
        if owner is not placement or saying != entry or not same:
            raise Damaged("layers with the same tiers, and no others, must hold the same tokens by position")
        return first


def _tables(planner: PerHeadPlacement) -> Iterator[tuple[str, int, TokenTable]]:
    for side, tables in planner.tables.items():
        for s, table in enumerate(tables):
            if table is not None:
                yield side, s, table


def _same(a: State, b: State) -> bool:
    if (a.seen, a.stores.keys()) != (b.seen, b.stores.keys()):
        return False
    tiers = all(np.array_equal(x, y) for x, y in zip(a.tiers, b.tiers, strict=True))
    orders = [pair for side in a.stores for pair in zip(a.stores[side], b.stores[side], strict=True)]
    return tiers and all(np.array_equal(x.array, y.array) for x, y in orders)


def _by_position(placement: Placement, number: int, entry: StateEntry, held: Held, padding: Padding | None) -> Step:
    if entry.prompt is not None and entry.prompt > entry.seen:
        raise Damaged(f"a prompt must be of the {entry.seen} tokens seen at most, found {entry.prompt}")
    return Step(placement, (_state(placement, number, entry, held),), entry.seen, padding, prompt=entry.prompt)


def _state(placement: Placement, number: int, entry: StateEntry, held: Held) -> State:
    tiers = tuple(
        held.take(f"state.{number}.tier.{i}", torch.int64).numpy() for i in range(len(placement.policies) - 1)
    )
    stores = {
        side: tuple(_growing(held.take(f"state.{number}.{side}.{s}", torch.int32)) for s in range(len(first)))
        for side, first in placement.first_tier.items()
    }
    if placement.alike:
        if any(not np.array_equal(a.array, b.array) for a, b in zip(*stores.values(), strict=True)):
            raise Damaged("keys and values must be in the same order")
        stores["values"] = stores["keys"]
    state = State(entry.seen, tiers, stores)
    _check_tiers(state)
    _check_orders(state, placement)
    return state


def _growing(order: Tensor) -> PositionList:
    return PositionList(order.numpy(), len(order))


def _check_tiers(state: State) -> None:
    for tier in state.tiers:
        if (np.diff(tier) <= 0).any() or (len(tier) and not 0 <= tier[0] <= tier[-1] < state.seen):
            raise Damaged(f"the positions of a tier must ascend below the {state.seen} tokens seen")


def _check_orders(state: State, placement: Placement) -> None:
    """What the tiers hold must be what their stores hold; the last tier takes what is left."""
    held = {side: np.sort(np.concatenate([order.array for order in orders])) for side, orders in state.stores.items()}
    positions = held["keys"]
    if not np.array_equal(positions, held["values"]):
        raise Damaged("keys and values must be of the same tokens")
    if (np.diff(positions) == 0).any() or (len(positions) and not 0 <= positions[0] <= positions[-1] < state.seen):
        raise Damaged(f"positions must be different and below the {state.seen} tokens seen")
    if placement.specs["keys"][-1] != "evict" and len(positions) != state.seen:
        raise Damaged(f"the stores must hold all {state.seen} tokens seen, found {len(positions)}")
    for side, orders in state.stores.items():
        for s, order in enumerate(orders):
            covers = placement.tiers_of_store(side, s)
            tiers = np.concatenate([np.empty(0, dtype=np.int64), *(state.tiers[covers.start : covers.stop])])
            takes_rest = covers.stop > len(state.tiers) and placement.store_spec(side, s) != "evict"
            fits = np.isin(tiers, order.array).all() and (takes_rest or len(tiers) == order.length)
            if len(np.unique(tiers)) != len(tiers) or not fits:
                raise Damaged(f"the tiers and the {side} of store {s} must hold the same tokens")


def _rows(entry: PerHeadEntry, placement: Placement, padding: Padding | None, held: Held) -> list[State]:
    counts = [entry.seen] if padding is None else padding.count(0, entry.seen)
    rows: list[State] = []
    for r, expected in enumerate(counts):
        prefix = f"state.rows.{entry.rows}.{r}"
        numbers = held.take(prefix, torch.int64).tolist()
        if numbers not in ([expected], [expected, 0]):  # kvpolicy 0.1 wrote two
            raise Damaged(f"row {r} must have seen {expected} tokens, found {numbers[:2]}")
        tiers = tuple(held.take(f"{prefix}.tier.{i}", torch.int64).numpy() for i in range(placement.ranked))
        row = State(expected, tiers, {})
        _check_tiers(row)
        rows.append(next((known for known in rows if _same(known, row)), row))
    return rows


def _parts(parts: dict[str, Tensor], table: TokenTable, scores: int) -> dict[str, Tensor]:
    """What was saved of a table, of the right types and shapes."""
    if not parts:  # no token is in it
        return {name: torch.empty((*table.shape, 0), dtype=torch.int32) for name in ("positions", "tiers")}
    if parts.keys() != table.parts.keys():
        raise Damaged(f"a table must hold {list(table.parts)}, found {sorted(parts)}")
    places = parts["positions"].shape[2:3]
    for name, x in parts.items():
        exact = x.dtype == torch.float32 if name == "scores" else x.dtype in (torch.int8, torch.int16, torch.int32)
        if not exact or tuple(x.shape) != (*table.shape, *places, scores if name == "scores" else 1):
            raise Damaged(f"{name} must be of {table.shape} rows and heads, found {tuple(x.shape)} in {x.dtype}"[:200])
    return {name: x if name == "scores" else x.squeeze(3) for name, x in parts.items()}


def _check_tables(planner: PerHeadPlacement, step: Step, saved: Tables, padding: Padding | None) -> None:
    """Each row and head has the tokens of its tiers by position, and on both sides the same, each once."""
    evicts, ranked = planner.placement.specs["keys"][-1] == "evict", planner.placement.ranked
    for tables in saved.values():
        for covers, parts in tables:
            outside = (parts["tiers"] < covers.start) | (parts["tiers"] >= covers.stop)
            if (outside & (parts["positions"] >= 0)).any() or (parts["positions"] < -1).any():
                raise Damaged(f"the tokens of a table must be in tiers {covers.start} to {covers.stop - 1}")
    joined = [
        [torch.cat([parts[name].long() for _, parts in tables], dim=2).numpy() for name in ("positions", "tiers")]
        for tables in saved.values()
    ]
    for r, h in np.ndindex(*planner.shape):
        row = step.rows[min(r, len(step.rows) - 1)]
        slots = padding.slots(r, step.seen) if padding is not None else None
        found = [_line(positions[r, h], tiers[r, h], row.seen, slots) for positions, tiers in joined]
        positions, tiers = found[0]
        if any(not np.array_equal(a, b) for other in found[1:] for a, b in zip(other, found[0], strict=True)):
            raise Damaged(f"keys and values of row {r}, head {h} must be of the same tokens")
        if not evicts and len(positions) != row.seen:
            raise Damaged(f"row {r}, head {h} must hold all {row.seen} tokens seen, found {len(positions)}")
        expected = [held if slots is None else slots[held] for held in row.tiers[:ranked]]
        if any(not np.array_equal(positions[tiers == i], held) for i, held in enumerate(expected)):
            raise Damaged(f"row {r}, head {h} must hold the tokens of its tiers by position")


def _line(positions: Ints, tiers: Ints, seen: int, slots: Ints | None) -> tuple[Ints, Ints]:
    """The tokens of a row and head in order of position; they must be different and none of them padding."""
    order = np.argsort(positions, kind="stable")
    order = order[positions[order] >= 0]
    positions, tiers = positions[order], tiers[order]
    inside = positions < seen if slots is None else np.isin(positions, slots)
    if (np.diff(positions) == 0).any() or not inside.all():
        raise Damaged("positions must be different ones of tokens seen")
    return positions, tiers
