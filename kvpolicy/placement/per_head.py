"""Tokens whose place differs by row or KV head: padded batches, and policies that rank tokens by attention.

Tiers that select by position place each row as if it were alone. Tiers that select by attention come below them and
choose by row and head. Stores stay rectangular: where a row or head has fewer tokens than another its places are empty.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from kvpolicy.interfaces.policy import RankPolicy
from kvpolicy.placement.selection import Selection, due, highest, ranked
from kvpolicy.placement.step import Step
from kvpolicy.placement.token_table import EMPTY, Candidates, ColumnMap, TokenTable, in_order, indices_of
from kvpolicy.storage.affine import AffineStore
from kvpolicy.storage.base import LARGE, Store
from kvpolicy.storage.pages import gather_tokens

if TYPE_CHECKING:
    from kvpolicy.placement.attention_scores import Observer

__all__ = ["PerHeadPlacement"]

Stores = dict[str, list[Store | None]]


class PerHeadPlacement:
    """Tables of what the stores of a layer hold, and the descent of their tokens."""

    def __init__(self, step: Step, stores: Stores, like: dict[str, Tensor]) -> None:
        """Take over a layer whose tokens were in the same places in all rows and heads, as `step` says."""
        self.placement = placement = step.placement
        state = step.state
        batch, kv_heads = like["keys"].shape[:2]
        self.lines = (batch, kv_heads if placement.by_head else 1)
        self.aligned = placement.first_tier["keys"] == placement.first_tier["values"]
        device = like["keys"].device
        self.tables: dict[str, list[TokenTable | None]] = {}
        for side in ("keys",) if self.aligned else ("keys", "values"):
            self.tables[side] = [
                None if store is None else TokenTable(self.lines, device, self._scored(side, s), placement.tier_dtype)
                for s, store in enumerate(stores[side])
            ]
            for s, table in enumerate(self.tables[side]):
                held = torch.from_numpy(state.stores[side][s].array.astype(np.int64)).to(device)
                if table is not None and len(held):
                    tiers = placement.tier_of(state, held.cpu().numpy())
                    places = held.expand(*self.lines, -1), torch.from_numpy(tiers).to(device).expand(*self.lines, -1)
                    table.append(*places, None)
        for held_by in stores.values():
            for store in held_by:
                if store is not None:
                    store.ragged(self.lines)

    @property
    def last(self) -> int:
        return len(self.placement.policies) - 1

    def _scored(self, side: str, s: int) -> bool:
        return side == "keys" and bool(self.placement.kinds) and self.movable(side, s)

    def movable(self, side: str, s: int) -> bool:
        """Whether tokens may leave a store: not if it is the last tier's alone."""
        return self.placement.tiers_of_store(side, s).start < self.last

    def sides(self, side: str) -> tuple[str, ...]:
        """The sides that the tables of `side` speak of."""
        return ("keys", "values") if self.aligned else (side,)

    def live(self) -> list[TokenTable]:
        """The tables of keys whose tokens may still descend; they come before the others."""
        return [t for s, t in enumerate(self.tables["keys"]) if t is not None and self.movable("keys", s)]

    def commit(self, new: dict[str, Tensor], step: Step, stores: Stores, seen: Observer | None) -> Selection:
        """Let new tokens in, which lead to `step`."""
        n, device = new["keys"].shape[2], new["keys"].device
        start, stop = step.seen - n, step.seen
        slots = torch.arange(start, stop, device=device).expand(*self.lines, -1)
        if step.padding is not None and step.padding.before(stop):
            real = torch.from_numpy(step.padding.real[:, start:stop]).to(device)
            slots = torch.where(real.unsqueeze(1), slots, EMPTY)
        fresh = self._add_scores(seen, n)
        verdict: Tensor | None = None
        for side in self.tables:
            work = self._work(side, [] if step.quiet else self._stores_to_ask(side), slots, step, verdict, fresh)
            if side == "keys" and not step.quiet:
                yield from self._rank(work, step)
                if not self.aligned and self.placement.ranked < self.last:
                    verdict = self._verdict(work, stop)
            self._move(side, work, new, stores, step)

    def by_position(self, codes: list[int], absent: int, seen: int) -> Tensor:
        """The code of the tier of each of `seen` positions, `[batch, kv_heads or 1, seen]`, int8."""
        positions, tiers = self.places()
        known = torch.tensor([*codes, absent], dtype=torch.int8, device=positions.device)
        found = torch.full((*self.lines, seen + 1), absent, dtype=torch.int8, device=positions.device)
        at = torch.where(positions < 0, seen, positions).long()
        return found.scatter_(2, at, known[tiers.long().clamp(max=len(codes))])[..., :seen]

    def _stores_to_ask(self, side: str) -> list[int]:
        return [s for s, t in enumerate(self.tables[side]) if t is not None and t.length and self.movable(side, s)]

    def _work(
        self, side: str, live: list[int], slots: Tensor, step: Step, verdict: Tensor | None, fresh: Tensor | None
    ) -> Candidates:
        tables = [t for s in live if (t := self.tables[side][s]) is not None]
        positions = torch.cat([*(t.positions for t in tables), slots], dim=2)
        tiers = torch.cat([*(t.tiers for t in tables), torch.zeros_like(slots, dtype=self.placement.tier_dtype)], dim=2)
        by_slot = step.tiers_by_slot(slots.device)
        place = positions.clamp(min=0)
        expanded = by_slot[:, None].expand(self.lines[0], positions.shape[1], -1)
        target = torch.where(tiers < self.placement.ranked, expanded.gather(2, place), tiers)
        if verdict is not None:
            target = torch.where(target >= self.placement.ranked, verdict.gather(2, place), target)
        target = torch.where(positions < 0, self.placement.nowhere, target)
        bounds = np.cumsum([0, *(t.length for t in tables), slots.shape[2]]).tolist()
        scores = None
        if fresh is not None and side == "keys":
            scores = torch.cat([*(t.scores for t in tables if t.scores is not None), fresh], dim=2)
        return Candidates(live, bounds, positions, target, scores)

    def _add_scores(self, seen: Observer | None, n: int) -> Tensor | None:
        """Add what an update's queries attended to the scores of stored tokens; returns those of the new ones."""
        kinds = len(self.placement.kinds)
        if not kinds:
            return None
        fresh = torch.zeros((*self.lines, n, 2 * kinds), device=self.live()[0].device)
        if seen is not None:
            at = 0
            for table in self.live():
                if table.scores is not None:
                    seen.add(table.scores, at, table.length)
                at += table.length
            seen.add(fresh, at, n)
        return fresh

    def _rank(self, work: Candidates, step: Step) -> Selection:
        for tier in range(self.placement.ranked, self.last):
            policy = self.placement.policies[tier]
            assert isinstance(policy, RankPolicy)
            now = [due(policy, *turn) for turn in step.turns]
            if not any(now):
                continue
            candidates = (work.target == tier) & torch.tensor(now, device=work.target.device).view(-1, 1, 1)
            budgets = [policy._budget(row.seen, prompt) for row, prompt in zip(step.rows, step.prompts(), strict=True)]
            if int(candidates.sum(2).max()) <= min(budgets) and policy.select != "shared":
                continue
            assert work.scores is not None
            kind = 2 * self.placement.kind_of[tier]
            attention, queries = work.scores[..., kind], work.scores[..., kind + 1]
            rank = ranked(policy, attention, queries, step.ages(work.positions))
            if policy.select == "shared":
                rank = yield rank
            rank = rank.expand_as(candidates).masked_fill(~candidates, -torch.inf)
            work.target[candidates & ~highest(rank, budgets)] = tier + 1

    def _verdict(self, work: Candidates, stop: int) -> Tensor:
        """The tier of each slot, where the tables of values differ from those of keys."""
        found = torch.full((*self.lines, stop + 1), self.last, dtype=work.target.dtype, device=work.target.device)
        return found.scatter_(2, torch.where(work.positions < 0, stop, work.positions).long(), work.target)

    def _move(self, side: str, work: Candidates, new: dict[str, Tensor], stores: Stores, step: Step) -> None:
        contiguous = {name: new[name].contiguous() for name in self.sides(side)}
        arriving: list[tuple[int, TokenTable, Tensor]] = []
        for s, table in enumerate(self.tables[side]):
            if table is None:
                continue
            covers = self.placement.tiers_of_store(side, s)
            inside = (work.target >= covers.start) & (work.target < covers.stop)
            if s in work.live:
                first, end = work.bounds[work.live.index(s)], work.bounds[work.live.index(s) + 1]
                table.tiers.copy_(work.target[..., first:end])
                table.positions.masked_fill_(~inside[..., first:end], EMPTY)
                inside[..., first:end] = False
            index = indices_of(inside)
            if index is not None:
                grouped = any(getattr(stores[name][s], "by_channel", False) for name in self.sides(side))
                arriving.append((s, table, _by_position(index, work.positions) if grouped else index))
        for s, table, index in arriving:
            for name in self.sides(side):
                store = stores[name][s]
                assert store is not None
                x = self._collect(name, work, index, contiguous[name], stores[name])
                places = _in_text(work.positions.gather(2, index.clamp(min=0)), step) if store.by_position else None
                store.append(x, _empty(store, table, index), places)
            self._enter(table, work, index)
        for s, table in enumerate(self.tables[side]):
            if table is not None and (s in work.live or table.gaps):
                self._close(side, s, table, stores)

    def _collect(self, name: str, work: Candidates, index: Tensor, new: Tensor, stores: list[Store | None]) -> Tensor:
        """The tokens at `index`, decoded; zeros in empty places."""
        out: Tensor | None = None
        for number, (first, end) in enumerate(zip(work.bounds, work.bounds[1:], strict=False)):
            within = (index >= first) & (index < end)
            if end == first or not within.any():
                continue
            local = (index - first).clamp(0, end - first - 1)
            if number < len(work.live):
                store = stores[work.live[number]]
                assert store is not None
                x = store.gather(local, new.dtype)
            else:
                x = gather_tokens(new, local)
            if out is None and bool(within.all()):
                return x
            out = torch.where(within.unsqueeze(3), x, torch.zeros_like(x) if out is None else out)
        assert out is not None
        return out

    def _enter(self, table: TokenTable, work: Candidates, index: Tensor) -> None:
        place = index.clamp(min=0)
        empty = index < 0
        positions = work.positions.gather(2, place).masked_fill(empty, EMPTY)
        tiers = work.target.gather(2, place).masked_fill(empty, self.placement.nowhere)
        scores = None
        if "scores" in table.parts:
            assert work.scores is not None
            scores = gather_tokens(work.scores, place).masked_fill(empty.unsqueeze(3), 0.0)
        table.append(positions, tiers, scores)
        table.gaps = table.gaps or bool(empty.any())

    def _close(self, side: str, s: int, table: TokenTable, stores: Stores) -> None:
        """Remove empty places that no row needs."""
        index = table.surplus() if table.length else None
        if index is None:
            return
        for name in self.sides(side):
            store = stores[name][s]
            assert store is not None
            store.remove(index, _empty(store, table))
        table.remove(index)

    def columns(self, seen: int) -> ColumnMap:
        """Where attention finds the tokens of each store, after `seen` slots."""
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
        return ColumnMap(where["keys"], where["values"], seen + 1, True, lambda: self._present(seen))

    def _positions(self) -> Tensor:
        return torch.cat([t.positions for t in self.tables["keys"] if t is not None], dim=2)

    def _present(self, seen: int) -> Tensor:
        """The position of each column where columns are positions; `EMPTY` where no token is."""
        positions = self._positions().long()
        found = torch.full((*self.lines, seen + 1), EMPTY, dtype=torch.int64, device=positions.device)
        found.scatter_(2, torch.where(positions < 0, seen, positions), positions)
        found[..., seen] = EMPTY
        return found

    def aim(self, observer: Observer, seen: int) -> None:
        """Tell an observer which columns of attention are those of the stores whose tokens may yet descend."""
        live = self.live()
        if not seen:  # a first update attends its own tokens alone
            return
        observer.live, observer.held = sum(t.length for t in live), self.columns(seen).width
        if not self.aligned:
            places = torch.cat([t.positions for t in live], dim=2).long()
            new = torch.arange(observer.held, observer.held + observer.tokens, device=places.device)
            places = torch.where(places < 0, seen, places)
            observer.index = torch.cat([places, new.expand(*self.lines, -1)], dim=2)

    def crop(self, length: int, stores: Stores) -> None:
        """Forget the slots from `length` on."""
        for side, tables in self.tables.items():
            for s, table in enumerate(tables):
                if table is not None and table.length:
                    table.positions.masked_fill_(table.positions >= length, EMPTY)
                    self._close(side, s, table, stores)

    @property
    def width(self) -> int:
        """Tokens of `places`."""
        tables = [t for t in self.tables["keys"] if t is not None]
        if not any(t.gaps for t in tables):
            return sum(t.length for t in tables)
        return in_order(tables)[0].shape[2]

    def select(self, rows: Tensor) -> None:
        """Keep the batch rows `rows`; the stores' are not touched."""
        self.lines = (len(rows), self.lines[1])
        for table in self._all():
            table.select(rows)

    def to(self, device: torch.device) -> None:
        for table in self._all():
            table.to(device)

    def _all(self) -> list[TokenTable]:
        return [table for tables in self.tables.values() for table in tables if table is not None]

    def places(self) -> tuple[Tensor, Tensor]:
        """Position and tier of all tokens, each row and head in order of position, empty places first."""
        tables = [t for t in self.tables["keys"] if t is not None]
        order, positions = in_order(tables)
        return positions, torch.cat([t.tiers for t in tables], dim=2).gather(2, order)

    def dense(self, side: str, stores: list[Store | None], like: Tensor) -> Tensor:
        """All tokens of a side, decoded, in the order of `places`; zeros in empty places."""
        tables = self.tables[side if side in self.tables else "keys"]
        held = [(t, store) for t, store in zip(tables, stores, strict=True) if t is not None and store is not None]
        parts = [x for t, store in held if t.length for _, x in store.decoded(LARGE, like.dtype)]
        if not parts:
            return like[:, :, :0]
        order, positions = in_order([t for t, _ in held])
        return gather_tokens(torch.cat(parts, dim=2), order).masked_fill((positions < 0).unsqueeze(3), 0.0)


def _in_text(slots: Tensor, step: Step) -> Tensor:
    """The position among its row's real tokens of each of `slots`, `[batch, kv_heads or 1, tokens]`."""
    seen = torch.tensor([row.seen for row in step.rows], device=slots.device).view(-1, 1, 1)
    return (seen - step.ages(slots)).clamp(min=0)


def _by_position(index: Tensor, positions: Tensor) -> Tensor:
    """`index` in the order of the text, as neighbours share a group of channels; empty places last."""
    places = positions.gather(2, index.clamp(min=0)).masked_fill(index < 0, torch.iinfo(positions.dtype).max)
    return index.gather(2, places.argsort(dim=2, stable=True))


def _empty(store: Store, table: TokenTable, index: Tensor | None = None) -> Tensor | None:
    """Of a store per channel the empty ones among the tokens that wait for their group, and those coming in."""
    if not isinstance(store, AffineStore) or not store.by_channel:
        return None
    parts = [table.positions[..., store.parts["codes"].length :] < 0]
    found = torch.cat(parts if index is None else [*parts, index < 0], dim=2)
    return found if found.any() else None
