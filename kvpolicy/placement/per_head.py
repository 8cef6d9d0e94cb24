"""The planner of a layer whose tokens differ by row or KV head: padded batches, and policies that rank tokens.

Tiers that select by position place each row as if it were alone. Tiers that rank their tokens come below them and
select by row and head. Places are a rectangle: where a row or head has fewer tokens than another some are empty. Once
the device has said how many tokens stay, these places take no room.
How many tokens are where is arithmetic on the host; which ones is known to the device alone, and nobody waits for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvpolicy.placement.attention_scores import Observer
from kvpolicy.placement.candidates import Candidates
from kvpolicy.placement.held_per_head import HeldPerHead
from kvpolicy.placement.moves import EMPTY, NEW, NOTHING, AllMoves, Arrival, Moves
from kvpolicy.placement.new_by_store import NewByStore
from kvpolicy.placement.padding import Padding
from kvpolicy.placement.ranking import Turn
from kvpolicy.placement.step import Step
from kvpolicy.placement.token_table import TokenTable, indices_of
from kvpolicy.storage.make import may_be_flat

Ints = NDArray[np.int64]


FEW = 4
"""Slots that are looked for one by one: where more move by position, all at once."""


class Coming(NamedTuple):
    """Tokens that enter a store, and what its table is to hold of them."""

    arrival: Arrival
    positions: Tensor
    tiers: Tensor
    scores: Tensor | None


class PerHeadPlacement(HeldPerHead):
    """Plans where the tokens of a layer go, by row and head."""

    @classmethod
    def stacked(cls, members: Sequence[PerHeadPlacement]) -> PerHeadPlacement:
        """A planner of several layers that stand at the same step, their rows one layer's after another's."""
        first = members[0]
        found = object.__new__(cls)
        found.__dict__.update(first.__dict__)
        found.shape = (sum(member.shape[0] for member in members), first.shape[1])
        found.ranking = type(first.ranking)(
            first.placement, [site for member in members for site in member.ranking.sites]
        )
        tables = {side: zip(*(member.own[side] for member in members), strict=True) for side in first.own}
        found.own = {
            side: [TokenTable.stacked(own) if own[0] is not None else None for own in stores]
            for side, stores in tables.items()
        }
        return found

    def width_after(self, n: int, padding: Padding | None, ends: bool) -> int:
        step, counts, judged = self.step, self.counts, self.judged
        if n:
            step = step.advance(n, padding)
            _, counts, judged, *_ = step.counts(counts, judged)
        if ends and self.placement.prompted:
            counts = step.end_prompt().counts(counts, judged).after
        return int(counts.sum(0).max())

    def begin(self, new: Mapping[str, Tensor], padding: Padding | None, seen: Observer | None) -> Turn:
        self.part()
        return self.begin_all([new], padding, [] if seen is None else [seen])

    def begin_all(self, new: Sequence[Mapping[str, Tensor]], padding: Padding | None, seen: Sequence[Observer]) -> Turn:
        """As `begin`, the tokens of each layer, and what its queries attended to."""
        n = new[0]["keys"].shape[2]
        return self._turn(self.step.advance(n, padding), n, new, seen)

    def end_prompt(self) -> Turn:
        self.part()
        return self._turn(self.step.end_prompt(), 0, [], [])

    def _turn(self, step: Step, n: int, new: Sequence[Mapping[str, Tensor]], seen: Sequence[Observer]) -> Turn:
        counts = step.counts(self.counts, self.judged).of_layers(len(self.ranking.sites))
        slots = self._spread(step.new_slots(n, self.device))
        fresh = self._add_scores(seen, n)
        if fresh is not None and n:
            self.ranking.add_features(fresh, new, slots, step)
        return Turn(step, slots, counts, self._candidates("keys", step, slots, None, fresh))

    def _spread(self, x: Tensor) -> Tensor:
        """What is the same in all rows, or said of the rows of one layer, for all rows and heads."""
        if 1 < x.shape[0] < self.shape[0]:
            x = x.repeat(self.shape[0] // x.shape[0], 1, 1)
        return x.expand(*self.shape, -1)

    def _add_scores(self, told: Sequence[Observer], n: int) -> Tensor | None:
        """Add what an update's queries attended to the scores of stored tokens; returns those of the new ones."""
        if not self.placement.scores.width:
            return None
        fresh = torch.zeros((*self.shape, n, self.placement.scores.width), device=self.device)
        seen = Observer.stacked(told) if told else None
        if seen is not None and seen.told:
            at = 0
            for table in self.live():
                if table.scores is not None:
                    table.lift()
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
        padded = step.padding is not None and step.padding.before(step.seen)
        if step.quiet:
            new = torch.zeros_like(slots, dtype=self.placement.tier_dtype)
            target = new.masked_fill(slots < 0, self.placement.nowhere) if padded else new
            return Candidates(live, bounds, [slots], target, None if fresh is None else [fresh])
        places = [*(t.positions for t in tables), slots]
        new = self._spread(step.tiers_of_slots(slots.shape[2], self.device))
        target = torch.cat([*(t.tiers for t in tables), new], dim=2)
        parts = target.split([x.shape[2] for x in places], dim=2)
        for s, at, own in zip(live, places, parts, strict=False):
            if self.placement.tiers_of_store(side, s).start < self.placement.ranked:
                self._move_by_position(at, own, step)
        if verdict is not None:
            place = torch.cat(places, dim=2).clamp(min=0).long()
            target.copy_(torch.where(target >= self.placement.ranked, verdict.gather(2, place), target))
        for gaps, at, own in zip([*(t.gaps for t in tables), padded], places, parts, strict=True):
            if gaps:
                own.masked_fill_(at < 0, self.placement.nowhere)
        if fresh is None or side == "values":
            return Candidates(live, bounds, places, target)
        noted = [*(t.scores for t in tables if t.scores is not None), fresh]
        return Candidates(live, bounds, places, target, noted)

    def _move_by_position(self, positions: Tensor, tiers: Tensor, step: Step) -> None:
        """Let tokens of a store go to the tiers where position says that they come to in this step."""
        ranked, alike = self.placement.ranked, step.moved_alike
        if alike is not None and len(alike) <= FEW:
            for slot, tier in alike:
                tiers.masked_fill_((positions == slot).logical_and_(tiers < ranked), tier)
            return
        slots, into = (self._spread(x) for x in step.moved(positions.device))
        if slots.shape[2] <= FEW:
            for i in range(slots.shape[2]):
                here = (positions == slots[..., i : i + 1]).logical_and_(tiers < ranked)
                torch.where(here, into[..., i : i + 1], tiers, out=tiers)
            return
        at = torch.searchsorted(slots.contiguous(), positions.contiguous()).clamp_(max=slots.shape[2] - 1)
        moves = (slots.gather(2, at) == positions) & (tiers < ranked)
        torch.where(moves, into.gather(2, at), tiers, out=tiers)

    def rank(self, turn: Turn, tier: int) -> Tensor | None:
        return self.ranking.rank(turn, tier) if tier in turn.counts.selections else None

    def select(self, turn: Turn, tier: int, rank: Tensor) -> None:
        stayed = self.ranking.select(turn, tier, rank)
        if stayed is not None:
            turn.known[tier] = self.ranking.read(stayed, turn, tier)
            turn.counts = turn.step.counts(self.counts, self.judged, turn.known)

    def moves(self, turn: Turn) -> AllMoves:
        step = turn.step
        ranks = not self.aligned and self.placement.ranked < self.last and not step.quiet
        verdict = self._verdict(turn.keys, step.seen) if ranks else None
        found = {"keys": self._moves("keys", turn, turn.keys)}
        if self.aligned:
            found["values"] = found["keys"]
        else:
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
        fresh = self._by_store(side, turn, work)
        tables = self.tables[side]
        still = [t is None or (s not in work.live and turn.step.quiet and s > 0) for s, t in enumerate(tables)]
        # All that moves is read before any table changes.
        coming = [
            self._coming(side, s, turn, work) if fresh is None and not still[s] else None for s in range(len(tables))
        ]
        return [
            NOTHING if t is None or still[s] else self._moved(side, s, turn, work, fresh, coming[s])
            for s, t in enumerate(tables)
        ]

    def _moved(
        self, side: str, s: int, turn: Turn, work: Candidates, fresh: NewByStore | None, coming: Coming | None
    ) -> Moves:
        """What a store does; its table does it at once."""
        table = self.tables[side][s]
        assert table is not None
        if fresh is not None:
            arrivals = fresh.enter(s, table, work, turn.step)
        else:
            self._leave(side, s, table, work)
            arrivals = [] if coming is None else [coming.arrival]
            if coming is not None:
                table.append(coming.positions, coming.tiers, coming.scores)
        held = self._held_after(side, s, turn)
        length = int(held.max())
        came = self._empty(side, s, table) if fresh is None or table.gaps else None
        if turn.known and self._flattens(side, s, table, held, turn.step.ended):
            return Moves(arrivals, None, (came, None), table.flatten(held))
        table.gaps = bool((held < (length if table.flat is None else table.length)).any())
        if table.length == length or table.flat is not None:
            return Moves(arrivals, None, (came, None))
        leaving = table.surplus(table.length - length)
        table.remove(leaving)
        return Moves(arrivals, leaving, (came, came))

    def _held_after(self, side: str, s: int, turn: Turn) -> Ints:
        covers = self.placement.tiers_of_store(side, s)
        held: Ints = turn.counts.after[covers.start : covers.stop].sum(0)
        return held

    def _by_store(self, side: str, turn: Turn, work: Candidates) -> NewByStore | None:
        """The new tokens by store, if they alone move, and as many to each store in all rows and heads."""
        n = work.bounds[-1]
        if work.live or turn.step.quiet or not n or (turn.counts.new != n).any():
            return None
        covers = [self.placement.tiers_of_store(side, s) for s in range(len(self.tables[side]))]
        came = turn.counts.after - turn.counts.before
        counts = [came[own.start : own.stop].sum(0) for own in covers[:-1]]
        if any((own != own.flat[0]).any() for own in counts):
            return None
        known = [int(own.flat[0]) for own in counts]
        return NewByStore.of(work, covers, [*known, n - sum(known)])

    def _leave(self, side: str, s: int, table: TokenTable, work: Candidates) -> None:
        """Note the tiers of a store's tokens; those that leave it are forgotten."""
        if s not in work.live:
            return
        first, end = work.bounds[work.live.index(s)], work.bounds[work.live.index(s) + 1]
        target = work.target[..., first:end]
        table.lift()
        table.tiers.copy_(target)
        table.positions.masked_fill_(target >= self.placement.tiers_of_store(side, s).stop, EMPTY)  # none rises
        if (judged := self.placement.scores.judged) is not None and table.scores is not None:
            assert work.scores is not None
            table.scores[..., judged].copy_(work.scores[..., first:end, judged])

    def may_be_flat(self, side: str, s: int) -> bool:
        """Whether rows and heads can take no more room than each needs in the stores of a table."""
        sides = ("keys", "values") if self.aligned else (side,)
        return all(may_be_flat(self.placement.store_spec(name, s)) for name in sides)

    def _flattens(self, side: str, s: int, table: TokenTable, held: Ints, ended: bool) -> bool:
        """Whether rows and heads, which hold so many tokens, are to take no more room than that.

        At the end of a prompt; later once an eighth is empty, so that it is seldom done.
        """
        if not self.may_be_flat(side, s):
            return False
        empty = table.room - int(np.broadcast_to(held, self.shape).sum())
        return empty > (0 if ended else table.room // 8)

    def _grouped(self, side: str, s: int) -> bool:
        """Whether a store groups neighbouring tokens, so that their order counts and empty places widen no group."""
        sides = ("keys", "values") if self.aligned else (side,)
        return any(getattr(self.placement.store_spec(name, s), "per", "token") == "channel" for name in sides)

    def _empty(self, side: str, s: int, table: TokenTable) -> Tensor | None:
        return table.positions < 0 if self._grouped(side, s) and table.length else None

    def _coming(self, side: str, s: int, turn: Turn, work: Candidates) -> Coming | None:
        """The tokens that enter a store, if there are any."""
        covers = self.placement.tiers_of_store(side, s)
        entering = turn.counts.new - (turn.counts.after - turn.counts.before)[: covers.start].sum(0)
        most = int(np.minimum(entering, self._held_after(side, s, turn)).max())
        if not most:
            return None
        n, step = work.bounds[-1] - work.bounds[-2], turn.step
        sources = tuple(x for x in work.live if x < s)
        if most == n and (step.quiet or (not sources and self._all_enter(side, s, turn, n))):  # in order
            positions = work.places[-1]
            full = bool((turn.counts.new == n).all())
            places = np.arange(n, dtype=np.int64)
            arrival = Arrival((NEW,), places, (), lambda: step.in_text(positions), (0, n), full=full)
            return Coming(arrival, positions, work.target[..., -n:], None if work.noted is None else work.noted[-1])
        inside = _inside(work.target, covers)
        if s in work.live:
            at = work.live.index(s)
            inside[..., work.bounds[at] : work.bounds[at + 1]] = False
        index = indices_of(inside, most)
        if len(work.live) and self._grouped(side, s):
            index = _by_position(index, work.positions)
        spans = list(pairwise(work.bounds))
        table = self.tables[side][s]
        assert table is not None
        positions, scores = work.taken(index, len(sources), "scores" in table.parts)
        bounds = (*spans[: len(sources)], spans[-1])
        arrival = Arrival((*sources, NEW), index, bounds, lambda: step.in_text(positions))
        tiers = work.target.gather(2, index.clamp(min=0)).masked_fill_(index < 0, self.placement.nowhere)
        return Coming(arrival, positions, tiers, scores)

    def _all_enter(self, side: str, s: int, turn: Turn, n: int) -> bool:
        """Whether position alone says that all new tokens, of all rows, enter a store."""
        covers = self.placement.tiers_of_store(side, s)
        first, last = turn.step.tiers_of_new
        return (
            bool((turn.counts.new == n).all())
            and covers.start <= first
            and last < min(covers.stop, self.placement.ranked)
        )

    def settle(self) -> AllMoves:
        """Of stores whose rows and heads are to take no more room than each needs: let it be so."""
        found: AllMoves = {}
        for side, tables in self.tables.items():
            found[side] = [
                NOTHING if t is None or t.flat is None else self._settled(side, s, t) for s, t in enumerate(tables)
            ]
        if self.aligned:
            found["values"] = found["keys"]
        return found

    def _settled(self, side: str, s: int, table: TokenTable) -> Moves:
        return Moves([], None, (None, None), table.flatten(self._held(side, s)))

    def crop(self, length: int) -> AllMoves:
        self.part()
        self.step = self.step.crop(length)
        for table in self._all():
            if table.length:
                table.lift()
                table.positions.masked_fill_(table.positions >= length, EMPTY)
        self.recount()
        found: AllMoves = {}
        for side, tables in self.tables.items():
            plans = found[side] = []
            for s, own in enumerate(tables):
                held = self._counted(side, s)
                if own is not None and own.flat is not None:
                    plans.append(self._settled(side, s, own))
                    continue
                if own is None or own.length == held:
                    plans.append(NOTHING)
                    continue
                came = self._empty(side, s, own)
                own.gaps = bool((self._held(side, s) < held).any())
                leaving = own.surplus(own.length - held)
                own.remove(leaving)
                plans.append(Moves([], leaving, (came, came)))
        if self.aligned:
            found["values"] = found["keys"]
        return found


def _inside(target: Tensor, covers: range) -> Tensor:
    """Which tokens are to be in one of some tiers."""
    if len(covers) == 1:
        return target == covers.start
    return (target >= covers.start) & (target < covers.stop)


def _by_position(index: Tensor, positions: Tensor) -> Tensor:
    """`index` in the order of the text, as neighbours share a group of channels; empty places last."""
    places = positions.gather(2, index.clamp(min=0)).masked_fill(index < 0, torch.iinfo(positions.dtype).max)
    return index.gather(2, places.argsort(dim=2, stable=True))
