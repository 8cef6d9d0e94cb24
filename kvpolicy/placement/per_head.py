"""The planner of a layer whose tokens differ by row or KV head: padded batches, and policies that rank tokens.

Tiers that select by position place each row as if it were alone. Tiers that rank their tokens come below them and
select by row and head. Stores stay rectangular: where a row or head has fewer tokens than another its places are empty.
How many tokens are where is arithmetic on the host; which ones is known to the device alone, and nobody waits for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvpolicy.interfaces.site import Site
from kvpolicy.placement.attention_scores import Observer
from kvpolicy.placement.contract import Planner
from kvpolicy.placement.moves import EMPTY, NEW, NOTHING, AllMoves, Arrival, ColumnMap, Moves
from kvpolicy.placement.padding import Padding
from kvpolicy.placement.ranking import Ranking, Turn
from kvpolicy.placement.step import Step
from kvpolicy.placement.token_table import Candidates, TokenTable, codes_of, in_order, indices_of, present
from kvpolicy.storage.pages import gather_tokens

Ints = NDArray[np.int64]


class PerHeadPlacement(Planner[Turn]):
    """Tables of what the stores of a layer hold, by row and head."""

    def __init__(self, step: Step, batch: int, site: Site, device: torch.device) -> None:
        """Take over a layer whose tokens were in the same places in all rows and heads, as `step` says."""
        self.step = step
        state, placement = step.state, step.placement
        self.shape = (batch, site.kv_heads if placement.by_head else 1)
        self.ranking = Ranking(placement, site)
        self.aligned = placement.first_tier["keys"] == placement.first_tier["values"]
        tiers = [*state.tiers, np.empty(0, dtype=np.int64)]
        self.counts: Ints = np.array([len(held) for held in tiers], dtype=np.int64).reshape(-1, 1, 1)
        """Tokens of each tier: `[tiers, rows or 1, heads or 1]`."""
        self.judged: Ints = np.zeros_like(self.counts)
        """Of these, the tokens that competed already, where a policy asks for those that arrive."""
        self.tables: dict[str, list[TokenTable | None]] = {}
        for side in ("keys",) if self.aligned else ("keys", "values"):
            self.tables[side] = [
                None if spec == "evict" else TokenTable(self.shape, device, self._scored(side, s), placement.tier_dtype)
                for s, spec in enumerate(placement.store_spec(side, s) for s in range(len(placement.first_tier[side])))
            ]
            for table, order in zip(self.tables[side], state.stores[side], strict=True):
                if table is not None and order.length:
                    held = order.array.astype(np.int64)
                    into = placement.tier_of(state, held)
                    places, tier = (torch.from_numpy(x).to(device).expand(*self.shape, -1) for x in (held, into))
                    table.append(places, tier, None)
        if placement.specs["keys"][-1] != "evict":
            self.counts[-1] = step.seen - self.counts[:-1].sum()
        self.step = step.scattered()

    @property
    def last(self) -> int:
        return len(self.placement.policies) - 1

    def _scored(self, side: str, s: int) -> bool:
        return side == "keys" and self.placement.scores.width > 0 and self.movable(side, s)

    def movable(self, side: str, s: int) -> bool:
        """Whether tokens may leave a store: not if it is the last tier's alone."""
        return self.placement.tiers_of_store(side, s).start < self.last

    def live(self) -> list[TokenTable]:
        """The tables of keys whose tokens may still descend; they come before the others."""
        return [t for s, t in enumerate(self.tables["keys"]) if t is not None and self.movable("keys", s)]

    def _table(self, side: str, store: int) -> TokenTable | None:
        return self.tables[side if side in self.tables else "keys"][store]

    def length(self, side: str, store: int) -> int:
        table = self._table(side, store)
        return 0 if table is None else table.length

    @property
    def uneven(self) -> bool:
        held = self.counts.sum(0)
        return bool((held != held.max()).any())

    @property
    def width(self) -> int:
        return int(self.counts.sum(0).max())

    def width_after(self, n: int, padding: Padding | None, ends: bool) -> int:
        step, counts, judged = self.step, self.counts, self.judged
        if n:
            step = step.advance(n, padding)
            _, counts, judged, *_ = step.counts(counts, judged)
        if ends and self.placement.prompted:
            counts = step.end_prompt().counts(counts, judged).after
        return int(counts.sum(0).max())

    def begin(self, new: Mapping[str, Tensor], padding: Padding | None, seen: Observer | None) -> Turn:
        n = new["keys"].shape[2]
        return self._turn(self.step.advance(n, padding), n, new, seen)

    def end_prompt(self) -> Turn:
        return self._turn(self.step.end_prompt(), 0, {}, None)

    def _turn(self, step: Step, n: int, new: Mapping[str, Tensor], seen: Observer | None) -> Turn:
        counts = step.counts(self.counts, self.judged)
        slots = step.new_slots(n, self._device).expand(*self.shape, -1)
        fresh = self._add_scores(seen, n)
        if fresh is not None and n:
            self.ranking.add_features(fresh, new, slots, step)
        return Turn(step, slots, counts, self._candidates("keys", step, slots, None, fresh))

    @property
    def _device(self) -> torch.device:
        return next(table.device for table in self._all())

    def _add_scores(self, seen: Observer | None, n: int) -> Tensor | None:
        """Add what an update's queries attended to the scores of stored tokens; returns those of the new ones."""
        if not self.placement.scores.width:
            return None
        fresh = torch.zeros((*self.shape, n, self.placement.scores.width), device=self._device)
        if seen is not None:
            at = 0
            for table in self.live():
                if table.scores is not None:
                    seen.add(table.scores, at, table.length)
                at += table.length
            seen.add(fresh, at, n)
        return fresh

    def _candidates(
        self, side: str, step: Step, slots: Tensor, verdict: Tensor | None, fresh: Tensor | None
    ) -> Candidates:
        """The tokens that may move, and where to as far as position, or `verdict` by slot, says."""
        live = [] if step.quiet else [s for s, t in enumerate(self.tables[side]) if t is not None and t.length]
        live = [s for s in live if self.movable(side, s)]
        tables = [t for s in live if (t := self.tables[side][s]) is not None]
        bounds = np.cumsum([0, *(t.length for t in tables), slots.shape[2]]).tolist()
        new = torch.zeros_like(slots, dtype=self.placement.tier_dtype)
        if step.quiet:
            padded = step.padding is not None and step.padding.before(step.seen)
            target = new.masked_fill(slots < 0, self.placement.nowhere) if padded else new
            return Candidates(live, bounds, slots, target, fresh)
        positions = torch.cat([*(t.positions for t in tables), slots], dim=2)
        target = self._targets(positions, torch.cat([*(t.tiers for t in tables), new], dim=2), step)
        if verdict is not None:
            place = positions.clamp(min=0)
            target = torch.where(target >= self.placement.ranked, verdict.gather(2, place), target)
        target.masked_fill_(positions < 0, self.placement.nowhere)
        scores = None
        if fresh is not None and side == "keys":
            scores = torch.cat([*(t.scores for t in tables if t.scores is not None), fresh], dim=2)
        return Candidates(live, bounds, positions, target, scores)

    def _targets(self, positions: Tensor, tiers: Tensor, step: Step) -> Tensor:
        """The tier of each token as far as position says."""
        slots, into = (x.expand(*self.shape, -1) for x in step.moved(positions.device))
        if not slots.shape[2]:
            return tiers
        at = torch.searchsorted(slots.contiguous(), positions).clamp_(max=slots.shape[2] - 1)
        moves = (slots.gather(2, at) == positions) & (tiers < self.placement.ranked)
        return torch.where(moves, into.gather(2, at), tiers)

    def rank(self, turn: Turn, tier: int) -> Tensor | None:
        return self.ranking.rank(turn, tier) if tier in turn.counts.selections else None

    def select(self, turn: Turn, tier: int, rank: Tensor) -> None:
        stayed = self.ranking.select(turn, tier, rank)
        if stayed is not None:
            turn.known[tier] = stayed.cpu().numpy()
            turn.counts = turn.step.counts(self.counts, self.judged, turn.known)

    def moves(self, turn: Turn) -> AllMoves:
        step, found = turn.step, {"keys": self._moves("keys", turn, turn.keys)}
        if self.aligned:
            found["values"] = found["keys"]
        else:
            ranks = self.placement.ranked < self.last and not step.quiet
            verdict = self._verdict(turn.keys, step.seen) if ranks else None
            values = self._candidates("values", step, turn.slots, verdict, None)
            found["values"] = self._moves("values", turn, values)
        self.step, self.counts, self.judged = step, turn.counts.after, turn.counts.judged
        return found

    def _verdict(self, keys: Candidates, stop: int) -> Tensor:
        """The tier of each slot, where the tables of values differ from those of keys."""
        found = torch.full((*self.shape, stop + 1), self.last, dtype=keys.target.dtype, device=keys.target.device)
        return found.scatter_(2, torch.where(keys.positions < 0, stop, keys.positions), keys.target)

    def _moves(self, side: str, turn: Turn, work: Candidates) -> list[Moves]:
        """What the stores of `side` do; their tables do it at once."""
        plans: list[Moves] = []
        for s, table in enumerate(self.tables[side]):
            if table is None or (s not in work.live and turn.step.quiet and s > 0):
                plans.append(NOTHING)
                continue
            covers = self.placement.tiers_of_store(side, s)
            entering = turn.counts.new - (turn.counts.after - turn.counts.before)[: covers.start].sum(0)
            held = turn.counts.after[covers.start : covers.stop].sum(0)
            most = int(np.minimum(entering, held).max())
            inside = (work.target >= covers.start) & (work.target < covers.stop)
            if s in work.live:
                first, end = work.bounds[work.live.index(s)], work.bounds[work.live.index(s) + 1]
                table.tiers.copy_(work.target[..., first:end])
                table.positions.masked_fill_(~inside[..., first:end], EMPTY)
                if (judged := self.placement.scores.judged) is not None and table.scores is not None:
                    assert work.scores is not None
                    table.scores[..., judged].copy_(work.scores[..., first:end, judged])
                inside[..., first:end] = False
            arrivals = [self._arrive(side, s, turn, work, inside, most)] if most else []
            length = int(held.max())
            table.gaps = bool((held < length).any())
            came = self._empty(side, s, table)
            leaving = None
            if table.length > length:
                leaving = table.surplus(table.length - length)
                plans.append(Moves(arrivals, leaving, (came, came)))
                table.remove(leaving)
            else:
                plans.append(Moves(arrivals, None, (came, None)))
        return plans

    def _grouped(self, side: str, s: int) -> bool:
        """Whether a store groups neighbouring tokens, so that their order counts and empty places widen no group."""
        sides = ("keys", "values") if self.aligned else (side,)
        return any(getattr(self.placement.store_spec(name, s), "per", "token") == "channel" for name in sides)

    def _empty(self, side: str, s: int, table: TokenTable) -> Tensor | None:
        return table.positions < 0 if self._grouped(side, s) and table.length else None

    def _arrive(self, side: str, s: int, turn: Turn, work: Candidates, inside: Tensor, most: int) -> Arrival:
        """Let the tokens where `inside` is True into a table, `most` at most."""
        table = self.tables[side][s]
        assert table is not None
        n = work.bounds[-1] - work.bounds[-2]
        if turn.step.quiet and most == n:  # all that are new, in order
            positions, tiers, scores = work.positions, work.target, work.scores
            arrival = Arrival(
                (NEW,), np.arange(n, dtype=np.int64), (), lambda: turn.step.in_text(work.positions), (0, n)
            )
        else:
            index = indices_of(inside, most)
            if len(work.live) and self._grouped(side, s):
                index = _by_position(index, work.positions)
            sources = tuple(x for x in work.live if x < s)
            spans = list(pairwise(work.bounds))
            place, empty = index.clamp(min=0), index < 0
            positions = work.positions.gather(2, place).masked_fill_(empty, EMPTY)
            bounds = (*spans[: len(sources)], spans[-1])
            arrival = Arrival((*sources, NEW), index, bounds, lambda: turn.step.in_text(positions))
            tiers = work.target.gather(2, place).masked_fill_(empty, self.placement.nowhere)
            scores = None
            if "scores" in table.parts:
                assert work.scores is not None
                scores = gather_tokens(work.scores, place).masked_fill_(empty.unsqueeze(3), 0.0)
        table.append(positions, tiers, scores)
        return arrival

    def columns(self, device: torch.device) -> ColumnMap:
        seen = self.step.seen
        if self.aligned:
            tables = self.tables["keys"]
            ends = np.cumsum([0 if t is None else t.length for t in tables]).tolist()
            offsets: list[int | Tensor] = [0, *ends[:-1]]
            gaps = any(t is not None and t.gaps for t in tables)
            return ColumnMap(offsets, offsets, ends[-1], gaps, self._positions)
        where: dict[str, list[int | Tensor]] = {
            side: [0 if t is None else torch.where(t.positions < 0, seen, t.positions.long()) for t in tables]
            for side, tables in self.tables.items()
        }
        return ColumnMap(where["keys"], where["values"], seen + 1, True, lambda: present(self._of("keys"), seen))

    def _of(self, side: str) -> list[TokenTable]:
        return [t for t in self.tables[side] if t is not None]

    def _positions(self) -> Tensor:
        return torch.cat([t.positions for t in self._of("keys")], dim=2)

    def aim(self, observer: Observer) -> None:
        """Tell an observer which columns of attention are those of the stores whose tokens may yet descend."""
        live, seen = self.live(), self.step.seen
        if not seen:  # a first update attends its own tokens alone
            return
        observer.live, observer.held = sum(t.length for t in live), self.columns(self._device).width
        if not self.aligned:
            places = torch.cat([t.positions for t in live], dim=2).long()
            new = torch.arange(observer.held, observer.held + observer.tokens, device=places.device)
            places = torch.where(places < 0, seen, places)
            observer.index = torch.cat([places, new.expand(*self.shape, -1)], dim=2)

    def crop(self, length: int) -> AllMoves:
        self.step = self.step.crop(length)
        for table in self._all():
            if table.length:
                table.positions.masked_fill_(table.positions >= length, EMPTY)
        self.recount()
        found: AllMoves = {}
        for side, tables in self.tables.items():
            plans = found[side] = []
            for s, own in enumerate(tables):
                held = self._counted(side, s)
                if own is None or own.length == held:
                    plans.append(NOTHING)
                    continue
                came = self._empty(side, s, own)
                leaving = own.surplus(own.length - held)
                own.remove(leaving)
                plans.append(Moves([], leaving, (came, came)))
        if self.aligned:
            found["values"] = found["keys"]
        return found

    def restore(self, step: Step) -> None:
        """Go by `step`, as whose tokens the tables were filled."""
        self.step = step
        self.recount()

    def recount(self) -> None:
        """Ask the tables how many tokens they hold: after what only the device knows."""
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
                    own.gaps = bool((self._held(side, s) < self._counted(side, s)).any())

    def _held(self, side: str, s: int) -> Ints:
        covers = self.placement.tiers_of_store(side, s)
        held: Ints = self.counts[covers.start : covers.stop].sum(0)
        return held

    def _counted(self, side: str, s: int) -> int:
        return int(self._held(side, s).max())

    def select_rows(self, rows: Tensor) -> None:
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


def _by_position(index: Tensor, positions: Tensor) -> Tensor:
    """`index` in the order of the text, as neighbours share a group of channels; empty places last."""
    places = positions.gather(2, index.clamp(min=0)).masked_fill(index < 0, torch.iinfo(positions.dtype).max)
    return index.gather(2, places.argsort(dim=2, stable=True))
