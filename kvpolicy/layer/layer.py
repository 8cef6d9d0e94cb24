"""The compressed keys and values of one attention layer, apart from transformers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvpolicy.errors import CacheError
from kvpolicy.interfaces.policy import RankPolicy
from kvpolicy.interfaces.site import Site
from kvpolicy.layer.view import Scratch, View
from kvpolicy.placement.attention_scores import Observer
from kvpolicy.placement.padding import Padding
from kvpolicy.placement.per_head import PerHeadPlacement
from kvpolicy.placement.planner import NEW, Moves
from kvpolicy.placement.selection import Selection, alone
from kvpolicy.placement.step import Step
from kvpolicy.placement.token_table import EMPTY, ColumnMap
from kvpolicy.storage.base import Store
from kvpolicy.storage.make import make_store

__all__ = ["DROPPED", "EXACT", "MAX_APART", "PENDING", "QUANTIZED", "LayerCache", "Positions", "Reading"]

Ints = NDArray[np.int64]
SIDES = ("keys", "values")
MAX_PENDING = 64
"""Tokens of the last update that wait outside the tiers at most, so that `crop` of them is exact."""
MAX_APART = 24
"""The same where policies ask for scores: what each of these tokens' queries attended is kept apart."""
PENDING = -1
"""The tier that `positions` gives for pending tokens."""
EXACT, QUANTIZED, DROPPED = 0, 1, 2
"""What `LayerCache.exactness` says of a token."""


class Positions(NamedTuple):
    """Where the tokens of a layer are."""

    positions: Ints
    """Positions in the context of all tokens held, ascending: `[tokens]`.

    Where rows or KV heads hold different tokens (padded batches, policies by attention): `[batch, kv_heads or 1,
    tokens]`, positions of padding not held, and -1 first in rows that hold fewer tokens than others.
    """
    tiers: NDArray[np.int16]
    """The tier of each, counted from 0; `PENDING` (-1) for those not yet committed. Of the shape of `positions`."""


@dataclass
class Reading:
    """What all layers of a cache know of the forward pass that brings the next tokens."""

    attached: bool = False
    """Whether an attached model reads the stores: updates give views, and masks cover all tokens seen."""
    padding: Padding | None = None
    """Which of all tokens are padding, those of the pass included, once some are."""


class LayerCache:
    """One layer: stores for keys and values, where their tokens are, and the pending tokens."""

    def __init__(self, start: Step, scratch: Scratch | None, reading: Reading, site: Site | None = None) -> None:
        self.site = site or Site()
        """Where the layer stands in its model; side, heads and channels are those of its stores."""
        self.first, self.scratch, self.reading = start, scratch, reading
        self.placement = start.placement
        specs = [spec for side in SIDES for spec in self.placement.specs[side]]
        self.told_apart = any(spec != "full" for spec in specs) or bool(self.placement.kinds)
        """Whether it matters which tokens are padding: not where all is kept as it came."""
        self.clear()

    def clear(self) -> None:
        self.broken = True
        self.step = self.first
        """Where the tokens are that were let in; the same value in all layers with the same tiers."""
        self.ragged: PerHeadPlacement | None = None
        """Tables by row and head, once tokens differ so."""
        self.observer: Observer | None = None
        self.stores: dict[str, list[Store | None]] = {}
        self.pending: dict[str, Tensor] = {}
        self.like: dict[str, Tensor] = {}
        self.staged: dict[str, Tensor] = {}
        self.decoded: dict[str, Tensor] = {}
        self.densely = False
        self.broken = False

    @property
    def padding(self) -> Padding | None:
        """Which of the tokens seen are padding, if this layer tells them apart."""
        return self.reading.padding if self.told_apart else None

    @property
    def evicts(self) -> bool:
        """Whether its last tier drops tokens."""
        return bool(self.placement.specs["keys"][-1] == "evict")

    @property
    def waiting(self) -> int:
        return self.pending["keys"].shape[2] if self.pending else 0

    @property
    def committed(self) -> int:
        """Tokens that were let into the tiers, dropped ones included."""
        return self.step.seen

    @property
    def seen(self) -> int:
        return self.committed + self.waiting + (self.staged["keys"].shape[2] if self.staged else 0)

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Until the end the layer is not whole; what interrupts it leaves it so."""
        before, self.broken = self.broken, True
        yield
        self.broken = before

    def held_after_commit(self) -> int:
        """Tokens that the stores will hold once the pending ones are committed; where rows differ, those held now."""
        if self.ragged is not None:
            return self.waiting + sum(store.length for store in self.stores["keys"] if store is not None)
        step = self._next() if self.waiting else self.step
        if step.spread:
            return self.waiting + sum(s.length for s in self.step.state.stores["keys"])
        return sum(s.length for s in step.state.stores["keys"])

    def _next(self) -> Step:
        """The step that lets the pending tokens in."""
        return self._from().advance(self.waiting, self.waiting, self.padding)

    def _from(self) -> Step:
        """Where the next step begins: where that is needed, each row, and each head, has places of its own."""
        padded = self.padding is not None and self.padding.before(self.padding.length)
        return self.step.scattered() if padded or self.placement.kinds else self.step

    def expected_length(self, side: str, store: int) -> int:
        """Tokens that a store must hold."""
        if self.ragged is not None:
            table = self.ragged.tables[side if side in self.ragged.tables else "keys"][store]
            return 0 if table is None else table.length
        return self.step.state.stores[side][store].length

    def start(self, keys: Tensor, values: Tensor) -> None:
        """Make the stores for tensors of this kind: an empty slice of each is kept for type and device."""
        self.like = {"keys": keys[:, :, :0].detach().clone(), "values": values[:, :, :0].detach().clone()}
        self.stores = {
            side: [
                make_store(self.placement.store_spec(side, s), self.like[side].shape[3], self.site_of(side))
                for s in range(len(self.placement.first_tier[side]))
            ]
            for side in SIDES
        }

    def site_of(self, side: str) -> Site:
        """Where the stores of a side stand."""
        _, heads, _, dim = self.like[side].shape
        return replace(self.site, side="keys" if side == "keys" else "values", kv_heads=heads, head_dim=dim)

    def update(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add tokens; returns all keys and values held before, decoded, and the new ones, in token order."""
        if not self.stores:
            self.start(keys, values)
        self._check_rows(keys)
        self.commit()
        new = {"keys": keys, "values": values}
        dense = (keys, values) if self.committed == 0 else self._dense(new, self.scratch)
        self.add(keys, values)
        return dense

    def stage(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add tokens, once `hold` is called; returns views of all, for attention to read until then."""
        if not self.stores:
            self.start(keys, values)
        self._check_rows(keys)
        self.commit()
        if self.committed == 0 and keys.shape[2] and not self.placement.kinds:
            self.add(keys, values)
            return keys, values
        staged = {"keys": keys.detach(), "values": values.detach()}
        held = sum(s.length for s in self.step.state.stores["keys"]) if self.ragged is None else self.ragged.width
        first = self.committed == 0  # gradients reach the tokens of a first update
        shown = {"keys": keys, "values": values} if first else staged
        if keys.shape[2]:
            self.staged = staged
        return View(self, "keys", shown["keys"], held), View(self, "values", shown["values"], held)

    def densified(self) -> dict[str, Tensor]:
        """What the views of `stage` stand for, for models that compute on it."""
        if self.placement.kinds:
            self.staged = {}
            kinds = ", ".join(repr(p.kind) for p in self.placement.policies if isinstance(p, RankPolicy))
            raise CacheError(
                f"policy {kinds} must see attention, and this model computes on keys and values before its attention; "
                "use a recipe that selects tokens by position"
            )
        if not self.decoded:
            self.densely = True
            self.decoded = dict(zip(SIDES, self._dense(self.staged, self.scratch), strict=True))
        return self.decoded

    def visible(self) -> Tensor:
        """Positions of what the views of `stage` show, in token order; `[batch, 1, tokens]` where rows differ."""
        if self.ragged is not None:
            found = self.ragged.places()[0]
            new = torch.arange(self.committed, self.seen, device=found.device)
            return torch.cat([found.long(), new.expand(*found.shape[:2], -1)], dim=2)
        held = np.sort(np.concatenate([s.array for s in self.step.state.stores["keys"]])).astype(np.int64)
        return torch.from_numpy(np.concatenate([held, np.arange(self.committed, self.seen, dtype=np.int64)]))

    def columns(self) -> ColumnMap:
        """Where attention finds the tokens of each store."""
        if self.ragged is not None:
            return self.ragged.columns(self.committed)
        keys, values, positions = self.step.columns()
        return ColumnMap(keys, values, len(positions), False, lambda: positions)

    def observe(self) -> Observer | None:
        """What is to be told of the attention of the tokens of `stage`, if any policy asks for it."""
        if not self.placement.kinds:
            return None
        if self.observer is None:
            self._scatter()
            assert self.ragged is not None
            tokens = self.staged["keys"].shape[2]
            batch, lines = self.like["keys"].shape[0], self.ragged.lines
            observer = Observer(self.placement.kinds, tokens, self.committed, batch, self.padding, MAX_APART, lines)
            self.ragged.aim(observer, self.committed)
            self.observer = observer
        return self.observer

    def hold(self) -> None:
        """Let the tokens of `stage` in; its views are no longer valid."""
        self.decoded = {}
        if self.staged:
            with self._changing():
                self._enter(self.staged)
                self.staged = {}

    def add(self, keys: Tensor, values: Tensor) -> None:
        """Add tokens without decoding what is held: the pending ones commit, the newest of these wait."""
        if not self.stores:
            self.start(keys, values)
        self.commit()
        with self._changing():
            self._enter({"keys": keys.detach(), "values": values.detach()})

    def _enter(self, new: dict[str, Tensor]) -> None:
        """Take in new tokens, none pending: the newest wait, the others are let into the tiers."""
        new = {side: x.to(self.like[side].dtype) for side, x in new.items()}  # autocast may have changed it
        n = new["keys"].shape[2]
        early = max(n - MAX_PENDING, 0)
        if self.placement.kinds:  # scores speak of an update as a whole, and layers that agree wait for each other
            early = n if n > MAX_APART and not self.placement.shared else 0
        if early:
            alone(self._apply({side: x[:, :, :early] for side, x in new.items()}, early, n))
        self.pending = {side: x[:, :, early:].clone() for side, x in new.items()} if early < n else {}

    def commit(self) -> None:
        """Let the pending tokens into the tiers."""
        alone(self.committing())

    def committing(self) -> Selection:
        """Like `commit`, for layers that select tokens together."""
        self.check_whole()
        self.hold()
        if self.waiting:
            with self._changing():
                yield from self._apply(self.pending, self.waiting, self.waiting)
                self.pending = {}

    def revert(self, length: int) -> bool:
        """Take the last update back, before which `length` tokens were seen; whether that could be done."""
        if self.broken:
            return False
        if self.seen == length:
            return True
        if length == 0:
            self.clear()
            return True
        if self.committed > length or self.committed + (0 if self.staged else self.waiting) < length:
            return False
        self.staged, self.decoded = {}, {}
        if self.seen > length:
            self.pending, self.observer = {}, None
        return True

    def _check_rows(self, keys: Tensor) -> None:
        rows = self.like["keys"].shape[0]
        if keys.shape[0] != rows:
            raise CacheError(
                f"an update must have the rows of the cache, {rows}, found {keys.shape[0]}; use batch_select_indices "
                "or batch_repeat_interleave, or another cache"
            )

    def check_whole(self) -> None:
        if self.broken:
            raise CacheError(
                "a layer of the cache must be whole, and an update of this one was interrupted; reset() the cache, or "
                "make a new one"
            )

    def _apply(self, new: dict[str, Tensor], n: int, of: int) -> Selection:
        self._scatter()
        step = self._from().advance(n, of, self.padding)
        if self.ragged is None:
            self._move(new, step)
        else:
            yield from self.ragged.commit(new, step, self.stores, self.observer)
            self.observer = None
        self.step = step

    def _scatter(self) -> None:
        """Where that is needed, each row, and each head that policies look at, has places of its own from now on."""
        step = self._from()
        if step.spread and self.ragged is None:
            with self._changing():
                self.ragged = PerHeadPlacement(self.step, self.stores, self.like)
                self.step = step

    def _move(self, new: dict[str, Tensor], step: Step) -> None:
        plan = step.plan
        assert plan is not None
        for side in SIDES:
            stores, plans = self.stores[side], plan.sides[side]
            arrivals = [self._collect(p, stores, new[side]) for p in plans]
            for store, x, p in zip(stores, arrivals, plans, strict=True):
                if store is None:
                    continue
                before = store.length
                places = self._arriving(p, side) if store.by_position else [None] * len(x)
                for part, positions in zip(x, places, strict=True):
                    store.append(part, None, positions)
                # After the arrivals, so that groups close as they would token by token.
                gone = np.concatenate([p.leaving, before + p.passing]) if len(p.passing) else p.leaving
                if len(gone):
                    store.drop(gone)

    def _collect(self, plan: Moves, stores: list[Store | None], new: Tensor) -> list[Tensor]:
        """The tokens that arrive in a store, decoded, in order: a tensor for each run."""
        runs: dict[int, list[Tensor]] = {}
        for source, index, run in plan.arrivals:
            first, last = int(index.min()), int(index.max())
            if source != NEW:
                store = stores[source]
                assert store is not None
                ascending = np.sort(index)
                x, lookup = store.take(ascending, new.dtype), np.searchsorted(ascending, index)
            else:
                x, lookup = new[:, :, first : last + 1], index - first
            if not np.array_equal(lookup, np.arange(x.shape[2])):
                x = x.index_select(2, torch.from_numpy(lookup).to(x.device))
            runs.setdefault(run, []).append(x)
        return [torch.cat(parts, dim=2) if len(parts) > 1 else parts[0] for parts in runs.values()]

    def _arriving(self, plan: Moves, side: str) -> list[Tensor]:
        """The positions of what `_collect` gives, `[tokens]` for each run."""
        held = self.step.state.stores[side]
        runs: dict[int, list[Ints]] = {}
        for source, index, run in plan.arrivals:
            found = held[source].array[index] if source != NEW else self.step.state.seen + index
            runs.setdefault(run, []).append(found.astype(np.int64))
        return [torch.from_numpy(np.concatenate(parts)) for parts in runs.values()]

    def _dense(self, new: dict[str, Tensor], scratch: Scratch | None) -> tuple[Tensor, Tensor]:
        out = {}
        if self.ragged is not None:
            parts = {side: [self.ragged.dense(side, self.stores[side], new[side]), new[side]] for side in SIDES}
            return torch.cat(parts["keys"], dim=2), torch.cat(parts["values"], dim=2)
        for side in SIDES:
            layout, held = self.step.layout(side)
            x = new[side]
            shape = (*x.shape[:2], held + x.shape[2], x.shape[3])
            dense = x.new_empty(shape) if scratch is None else scratch.get(side, shape, x)
            # From the last, most of the tokens: what it writes between its own is written over by the others.
            filled = [(s, at) for s, at in zip(self.stores[side], layout, strict=True) if s is not None and s.length]
            for number, (store, at) in enumerate(reversed(filled)):
                if isinstance(at, int):
                    store.write(dense, at)
                elif number == 0:
                    store.spread(dense, at.to(x.device))
                else:
                    store.scatter(dense, at.to(x.device))
            dense[:, :, held:] = x
            out[side] = dense
        return out["keys"], out["values"]

    def dense(self) -> tuple[Tensor, Tensor]:
        """All keys and values held, decoded, in token order; tensors of their own.

        Where rows or heads hold different tokens, each in its own order, empty places first and zero.
        """
        self.check_whole()
        self.hold()
        return self._dense(self.pending or self.like, None)

    def positions(self) -> Positions:
        """Positions and tiers of all tokens held; the same for keys and values."""
        self.hold()
        if self.stores:
            self._scatter()
        if self.ragged is not None:
            places, tiers = self.ragged.places()
            new = torch.arange(self.committed, self.seen, device=places.device).expand(*places.shape[:2], -1)
            if self.padding is not None and self.padding.before(self.seen):
                real = torch.from_numpy(self.padding.real[:, self.committed : self.seen]).to(new.device)
                new = torch.where(real.unsqueeze(1), new, EMPTY)
            found = torch.cat([places, new], dim=2).cpu().numpy().astype(np.int64)
            waits = torch.full_like(new, PENDING).to(tiers.dtype)
            where = torch.cat([tiers.masked_fill(places < 0, PENDING), waits], dim=2)
            return Positions(found, where.cpu().numpy().astype(np.int16))
        held = np.sort(np.concatenate([s.array for s in self.step.state.stores["keys"]]))
        waiting = np.arange(self.committed, self.seen, dtype=np.int64)
        committed = self.placement.tier_of(self.step.state, held)
        return Positions(
            np.concatenate([held, waiting]), np.concatenate([committed, np.full(len(waiting), PENDING, dtype=np.int16)])
        )

    def exactness(self) -> NDArray[np.int8]:
        """How each position seen is kept, `[batch or 1, kv_heads or 1, seen]`.

        `EXACT`: key and value are in full stores, pending, or just coming in. `QUANTIZED`: one of them is in another
        store. `DROPPED`: neither is held. It goes by tier: what waits for its group in a per-channel store counts as
        quantized although it is still as it came.
        """
        tiers = zip(self.placement.specs["keys"], self.placement.specs["values"], strict=True)
        kept = [EXACT if k == v == "full" else DROPPED if k == "evict" else QUANTIZED for k, v in tiers]
        if self.ragged is not None:
            held = self.ragged.by_position(kept, DROPPED, self.committed).cpu().numpy()
        else:
            tier = self.placement.tier_of(self.step.state, np.arange(self.committed, dtype=np.int64))
            held = np.asarray(kept, dtype=np.int8)[tier][None, None]
        new = self.seen - self.committed
        return np.pad(held, ((0, 0), (0, 0), (0, new)), constant_values=EXACT)

    def crop(self, length: int) -> None:
        """Forget the positions from `length` on. Exact for pending tokens; past descents are kept."""
        self.check_whole()
        self.hold()
        with self._changing():
            if length > self.committed:
                self.pending = {side: x[:, :, : length - self.committed].clone() for side, x in self.pending.items()}
                if self.observer is not None:
                    self.observer.crop(length - self.committed)
                if any(row.through > length for row in self.step.rows):
                    self.step = self.step.crop(length)
                return
            self.pending, self.observer = {}, None
            if length == self.committed:
                return
            self.step = self.step.crop(length)
            if self.ragged is not None:
                self.ragged.crop(length, self.stores)
                return
            assert self.step.drops is not None
            for side, stores in self.stores.items():
                for store, index in zip(stores, self.step.drops[side], strict=True):
                    if store is not None and len(index):
                        store.drop(index)

    def select(self, rows: Tensor) -> None:
        """Keep the batch rows `rows`, in that order, repeats included."""
        self.check_whole()
        self.hold()
        with self._changing():
            if self.step.padding is not None:
                self.step = self.step.select(rows.cpu().numpy())
            for stores in self.stores.values():
                for store in stores:
                    if store is not None:
                        store.select(rows)
            for part in (self.ragged, self.observer):
                if part is not None:
                    part.select(rows)
            for held in (self.pending, self.like):
                for side, x in held.items():
                    held[side] = x.index_select(0, rows.to(x.device))

    def to(self, device: torch.device) -> None:
        self.hold()
        for stores in self.stores.values():
            for store in stores:
                if store is not None:
                    store.to(device)
        for part in (self.ragged, self.observer):
            if part is not None:
                part.to(device)
        for held in (self.pending, self.like):
            for side, x in held.items():
                held[side] = x.to(device, non_blocking=True)
