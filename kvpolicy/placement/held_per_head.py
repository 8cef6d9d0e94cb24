"""What a layer holds whose tokens differ by row or KV head: a table of each store."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvpolicy.interfaces.site import Site
from kvpolicy.placement.attention_scores import Observer
from kvpolicy.placement.contract import Planner
from kvpolicy.placement.moves import EMPTY, ColumnMap
from kvpolicy.placement.ranking import Ranking, Turn
from kvpolicy.placement.slots import STORES, slots_by_head
from kvpolicy.placement.step import Step
from kvpolicy.placement.token_table import TokenTable, codes_of, in_order, present

Ints = NDArray[np.int64]
Tables = dict[str, list[TokenTable | None]]


class Together(Protocol):
    """Planners of several layers that plan as one; see `joint.py`."""

    @property
    def planner(self) -> HeldPerHead:
        """The one that plans for all of them."""

    def tables_of(self, member: Any) -> Tables:
        """The tables of one of them, to be read."""

    def part(self) -> None:
        """Each plans alone again."""


class HeldPerHead(Planner[Turn]):
    """Tables of what the stores of a layer hold, by row and head."""

    def __init__(self, step: Step, batch: int, site: Site, device: torch.device) -> None:
        """Take over a layer whose tokens were in the same places in all rows and heads, as `step` says."""
        self.step = step
        state, placement = step.state, step.placement
        self.shape = (batch, site.kv_heads if placement.by_head else 1)
        self.ranking = Ranking(placement, [site])
        self._width: tuple[Ints, int] | None = None
        """Counts, and the width that they make."""
        self._held_columns: tuple[Step, Ints, tuple[int, int]] | None = None
        self.joint: Together | None = None
        """The planners of several layers as one, if this is one of them."""
        self.aligned = placement.first_tier["keys"] == placement.first_tier["values"]
        tiers = [*state.tiers, np.empty(0, dtype=np.int64)]
        self.counts: Ints = np.array([len(held) for held in tiers], dtype=np.int64).reshape(-1, 1, 1)
        """Tokens of each tier: `[tiers, rows or 1, heads or 1]`."""
        self.judged: Ints = np.zeros_like(self.counts)
        """Of these, the tokens that competed already, where a policy asks for those that arrive."""
        self.own: Tables = {}
        for side in ("keys",) if self.aligned else ("keys", "values"):
            self.own[side] = [
                None if spec == "evict" else TokenTable(self.shape, device, self._scored(side, s), placement.tier_dtype)
                for s, spec in enumerate(placement.store_spec(side, s) for s in range(len(placement.first_tier[side])))
            ]
            for table, order in zip(self.own[side], state.stores[side], strict=True):
                if table is not None and order.length:
                    held = order.array.astype(np.int64)
                    into = placement.tier_of(state, held)
                    places, tier = (torch.from_numpy(x).to(device).expand(*self.shape, -1) for x in (held, into))
                    table.append(places, tier, None)
        if placement.specs["keys"][-1] != "evict":
            self.counts[-1] = step.seen - self.counts[:-1].sum()
        self.step = step.scattered()

    def __getstate__(self) -> dict[str, Any]:
        self.part()
        return self.__dict__

    @property
    def tables(self) -> Tables:
        """Of each side and store. To be written to once this planner was parted from others."""
        return self.own if self.joint is None else self.joint.tables_of(self)

    @property
    def _alike(self) -> HeldPerHead:
        """A planner whose tables are as long as these."""
        return self if self.joint is None else self.joint.planner

    def part(self) -> None:
        """Plan alone from now on."""
        if self.joint is not None:
            self.joint.part()

    @property
    def last(self) -> int:
        return len(self.placement.policies) - 1

    def _scored(self, side: str, s: int) -> bool:
        return side == "keys" and self.placement.scores.width > 0 and self.movable(side, s)

    def movable(self, side: str, s: int) -> bool:
        """Whether tokens may leave a store: not if it is the last tier's alone."""
        return self.placement.first_tier[side][s] < self.last

    def live(self) -> list[TokenTable]:
        """The tables of keys whose tokens may still descend; they come before the others."""
        return [t for s, t in enumerate(self._alike.own["keys"]) if t is not None and self.movable("keys", s)]

    def table(self, side: str, store: int) -> TokenTable | None:
        """What there is to be read of a store; None: it holds nothing."""
        return self.tables[side if side in self.tables else "keys"][store]

    def _table(self, side: str, store: int) -> TokenTable | None:
        tables = self._alike.own
        return tables[side if side in tables else "keys"][store]

    def length(self, side: str, store: int) -> int:
        table = self._table(side, store)
        return 0 if table is None else table.length

    @property
    def uneven(self) -> bool:
        held = self.counts.sum(0)
        return bool((held != held.max()).any())

    @property
    def width(self) -> int:
        known = self._alike._width  # of planners that plan as one once
        if known is None or known[0] is not self.counts:
            known = self._alike._width = self.counts, int(self.counts.sum(0).max())
        return known[1]

    @property
    def device(self) -> torch.device:
        return next(table.device for tables in self._alike.own.values() for table in tables if table is not None)

    @property
    def plain(self) -> bool:
        return self.aligned and not any(t is not None and t.gaps for t in self._alike.own["keys"])

    def columns(self, device: torch.device) -> ColumnMap:
        seen = self.step.seen
        if self.aligned:
            tables = self._alike.own["keys"]
            ends = np.cumsum([0 if t is None else t.length for t in tables]).tolist()
            offsets: list[int | Tensor] = [0, *ends[:-1]]
            gaps = any(t is not None and t.gaps for t in tables)
            return ColumnMap(offsets, offsets, ends[-1], gaps, self._positions)
        where = {
            side: [None if t is None else torch.where(t.positions < 0, seen, t.positions.long()) for t in tables]
            for side, tables in self.tables.items()
        }
        keys, values = ([0 if at is None else at for at in where[side]] for side in ("keys", "values"))
        slots = lru_cache(1)(lambda: slots_by_head(where["keys"], where["values"], self._common(), seen))
        known = slots if len(values) <= STORES else None
        return ColumnMap(keys, values, seen + 1, True, lambda: present(self._of("keys"), seen), slots=known)

    def _common(self) -> list[list[int]]:
        """For each store of keys the stores of values in which the values of its tokens may be."""
        covers = {
            side: [self.placement.tiers_of_store(side, s) for s in range(len(tables))]
            for side, tables in self.tables.items()
        }
        return [
            [s for s, own in enumerate(covers["values"]) if own.start < tiers.stop and tiers.start < own.stop]
            for tiers in covers["keys"]
        ]

    def in_last(self, first: int) -> Tensor:
        """Of the tokens of the last store, from place `first` on, the positions among the real ones of their rows.

        `[batch, kv_heads or 1, places]`, `EMPTY` where no token is.
        """
        table = self.tables["keys"][-1]
        assert table is not None
        slots = table.positions[..., first:]
        return self.step.in_text(slots).masked_fill(slots < 0, EMPTY)

    def slots_of_last(self, places: Tensor) -> Tensor:
        """The slots of the tokens at some places of the last store, `[batch, kv_heads, any, tokens]`."""
        table = self.tables["keys"][-1]
        assert table is not None
        index = places.clamp(min=0).long().flatten(2)
        slots: Tensor = table.positions.expand(-1, index.shape[1], -1).gather(2, index).unflatten(2, places.shape[2:])
        return slots

    def _of(self, side: str) -> list[TokenTable]:
        return [t for t in self.tables[side] if t is not None]

    def _positions(self) -> Tensor:
        return torch.cat([t.positions for t in self._of("keys")], dim=2)

    def aim(self, observer: Observer) -> None:
        """Tell an observer which columns of attention are those of the stores whose tokens may yet descend."""
        seen = self.step.seen
        if not seen:  # a first update attends its own tokens alone
            return
        observer.live, held = self._columns()
        if self.aligned:
            observer.held = held
        else:
            observer.held = self.columns(self.device).width
            live = [t for s, t in enumerate(self.tables["keys"]) if t is not None and self.movable("keys", s)]
            places = torch.cat([t.positions for t in live], dim=2).long()
            new = torch.arange(observer.held, observer.held + observer.tokens, device=places.device)
            places = torch.where(places < 0, seen, places)
            observer.index = torch.cat([places, new.expand(*self.shape, -1)], dim=2)

    def _columns(self) -> tuple[int, int]:
        """Columns of the tokens that may yet descend, and of all, where keys and values are in the same order."""
        alike = self._alike  # of planners that plan as one they are found once
        known = alike._held_columns
        if known is None or known[0] is not self.step or known[1] is not self.counts:
            held = sum([t.length for t in alike.own["keys"] if t is not None])
            known = alike._held_columns = self.step, self.counts, (sum([t.length for t in self.live()]), held)
        return known[2]

    def restore(self, step: Step) -> None:
        """Go by `step`, as whose tokens the tables were filled."""
        self.step = step
        self.recount()

    def recount(self) -> None:
        """Ask the tables how many tokens they hold: after what only the device knows."""
        self.part()
        counts = np.zeros((2, len(self.placement.policies), *self.shape), dtype=np.int64)
        at = self.placement.scores.judged
        for table in (t for t in self.tables["keys"] if t is not None and t.length):
            for tier in range(counts.shape[1]):
                here = (table.positions >= 0) & (table.tiers == tier)
                counts[0, tier] += here.sum(2).cpu().numpy()
                if at is not None and table.scores is not None:
                    counts[1, tier] += (here & (table.scores[..., at] == tier)).sum(2).cpu().numpy()
        same = [(counts == counts.take([0], axis)).all() for axis in (2, 3)]
        self.counts, self.judged = counts[:, :, : 1 if same[0] else None, : 1 if same[1] else None]
        for side in self.tables:
            for s, own in enumerate(self.tables[side]):
                if own is not None:
                    # Rows may have been taken out of longer ones.
                    own.gaps = bool((self._held(side, s) < own.length).any())

    def _held(self, side: str, s: int) -> Ints:
        covers = self.placement.tiers_of_store(side, s)
        held: Ints = self.counts[covers.start : covers.stop].sum(0)
        return held

    def _counted(self, side: str, s: int) -> int:
        return int(self._held(side, s).max())

    def select_rows(self, rows: Tensor) -> None:
        self.part()
        self.shape = (len(rows), self.shape[1])
        for table in self._all():
            table.select(rows)
        if self.step.padding is not None or max(self.counts.shape[1], self.judged.shape[1]) > 1:
            chosen = rows.cpu().numpy()
            self.step = self.step.select(chosen)
            if self.counts.shape[1] > 1:
                self.counts = self.counts[:, chosen]
            if self.judged.shape[1] > 1:
                self.judged = self.judged[:, chosen]

    def to(self, device: torch.device) -> None:
        self.part()
        for table in self._all():
            table.to(device)

    def _all(self) -> list[TokenTable]:
        return [table for tables in self.tables.values() for table in tables if table is not None]

    def _in_order(self, side: str) -> tuple[Tensor, Tensor]:
        return in_order(self._of(side), self.width)

    def positions(self) -> Tensor:
        return self._in_order("keys")[1].long()

    def tiers(self) -> Tensor:
        order, _ = self._in_order("keys")
        return torch.cat([t.tiers for t in self._of("keys")], dim=2).gather(2, order)

    def layout(self, side: str) -> list[int | Tensor]:
        side = side if side in self.tables else "keys"
        order, positions = self._in_order(side)
        lengths = [0 if t is None else t.length for t in self.tables[side]]
        where = torch.full((*self.shape, sum(lengths)), EMPTY, dtype=torch.int64, device=order.device)
        at = torch.arange(order.shape[2], device=order.device).expand_as(order)
        where.scatter_(2, order, torch.where(positions < 0, EMPTY, at))
        return list(where.split(lengths, dim=2))

    def by_position(self, codes: list[int], absent: int) -> NDArray[np.int8]:
        found: NDArray[np.int8] = codes_of(self._of("keys"), self.step.seen, codes, absent).cpu().numpy()
        return found

    def bytes(self, side: str, store: int) -> dict[str, int]:
        table = self.tables[side][store] if side in self.tables else None
        return {} if table is None else {**table.bytes(), "reserved": table.reserved()}
