"""The compressed keys and values of one attention layer, apart from transformers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvpolicy.errors import CacheError
from kvpolicy.layer.commit import Committing, commit_all
from kvpolicy.layer.held import PENDING, SIDES, Positions
from kvpolicy.layer.merging import merge
from kvpolicy.layer.mover import move
from kvpolicy.layer.paging import PageTable
from kvpolicy.layer.view import View
from kvpolicy.placement.attention_scores import Counted, Observer
from kvpolicy.placement.contract import select
from kvpolicy.placement.moves import EMPTY, AllMoves
from kvpolicy.placement.per_head import PerHeadPlacement
from kvpolicy.storage.make import make_store

MAX_PENDING = 64
"""Tokens of the last update that wait outside the tiers at most, so that `crop` of them is exact."""
MAX_APART = 24
"""The same where policies ask for scores: what each of these tokens' queries attended is kept apart."""


class LayerCache(Committing):
    """One layer whose tokens come, descend and go: staged, then pending, then committed."""

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Until the end the layer is not whole; what interrupts it leaves it so."""
        before, self.broken = self.broken, True
        yield
        self.broken = before

    def held_after_commit(self, coming: int = 0) -> int:
        """Tokens that the stores will hold once the pending ones are committed.

        Args:
            coming: tokens of the update before which this happens, if there is one.
        """
        ends = self.ends_prompt(coming)
        if not self.waiting and not ends:
            return self.planner.width
        planner = self.by_head() if self.tells_apart else self.planner
        return planner.width_after(self.waiting, self.padding, ends)

    def ends_prompt(self, coming: int = 1) -> bool:
        """Whether an update of so many tokens ends the prompt, and policies ask for that."""
        return coming == 1 and self.asks_for_end and self.step.prompt is None and self.seen > 0

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

    def update(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add tokens; returns all keys and values held before, decoded, and the new ones, in token order."""
        if not self.stores:
            self.start(keys, values)
        self._check_rows(keys)
        self.check_told(keys)
        self.commit(keys.shape[2])
        new = {"keys": keys, "values": values}
        dense = (keys, values) if self.committed == 0 else self._dense(new, self.scratch)
        self.add(keys, values)
        return dense

    def stage(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add tokens, once `hold` is called; returns views of all, for attention to read until then.

        They show the next layer once it is staged, unless several layers read the same keys and values.
        """
        if not self.stores:
            self.start(keys, values)
        rows, _, tokens, _ = keys.shape
        if rows != self.like["keys"].shape[0]:
            self._check_rows(keys)
        if self.placement.scores.told is not None:
            self.check_told(keys)
        if self.broken or self.staged or self.decoded or self.pending or self.asks_for_end:
            self.commit(tokens)
        first = self.planner.step.seen == 0
        if first and tokens and not self.placement.attends and not self.wants_queries:
            self.add(keys, values)
            return keys, values
        shown = keys, values
        if keys.requires_grad or values.requires_grad:
            keys, values = keys.detach(), values.detach()
        if tokens:
            self.staged = {"keys": keys, "values": values}
        if not first:  # gradients reach the tokens of a first update
            shown = keys, values
        views = View.of_both if self.scratch is None else self.reading.views.of
        return views(self, *shown, self.planner.width)

    def densified(self) -> dict[str, Tensor]:
        """What the views of `stage` stand for, for models that compute on it."""
        if self.placement.reader is not None:
            self.staged = {}
            raise CacheError(
                f"reader {self.placement.reader.kind!r} must see queries, and this model computes on keys and values "
                "before its attention; use a recipe without read"
            )
        if self.placement.attends:
            self.staged = {}
            kinds = ", ".join(map(repr, self.attending))
            raise CacheError(
                f"policy {kinds} must see attention, and this model computes on keys and values before its attention; "
                "use a recipe that selects tokens by position"
            )
        if self.wants_queries:
            raise CacheError(
                f"transform {self.asking!r} must see queries, and this model computes on keys and values before its "
                "attention; use a recipe whose transforms need none"
            )
        if not self.decoded:
            self.densely = True
            self.decoded = dict(zip(SIDES, self._dense(self.staged, self.scratch), strict=True))
        return self.decoded

    def heed(self, query: Tensor) -> None:
        """Take note of queries `[batch, heads, queries, head_dim]`, the newest of the tokens of `stage`."""
        if not self.wants_queries or not self.staged:
            return
        queries = query.shape[2]
        grouped = query.detach().unflatten(1, (self.like["keys"].shape[1], -1)).float()
        shown = grouped.isfinite()
        padding = self.reading.padding
        if padding is not None and padding.before(self.seen):
            real = torch.from_numpy(padding.real[:, self.seen - queries : self.seen]).to(
                query.device, non_blocking=True
            )
            shown = shown & real[:, None, None, :, None]
        grouped = torch.where(shown, grouped, 0.0).flatten(2, 3)
        found = torch.stack([grouped.amin(2).clamp(max=0.0), grouped.amax(2).clamp(min=0.0)], dim=2)
        for chain in self._asking():
            chain.heed(found)

    def observe(self, query: Tensor | None = None) -> Observer | None:
        """What is to be told of the attention of the tokens of `stage`, if any policy asks for it.

        `query` is theirs, `[batch, heads, tokens, head_dim]`; it is kept for scorers that must see it.
        """
        scores = self.placement.scores
        asks = scores.features and scores.reads_query(prompting=self.step.prompt is None)
        if query is not None and self.staged and asks:
            self.staged["query"] = query.detach()
        if not self.placement.kinds:
            return None
        return self.expect(self.staged["keys"].shape[2])

    def counted(self, tokens: int) -> Counted:
        """Which queries of an update of so many tokens count for policies that rank by attention."""
        return self.by_head().step.counted(tokens, self.padding, MAX_APART)

    def expect(self, tokens: int = 1) -> Observer:
        """The observer of an update of so many tokens that follow those committed."""
        if self.observer is None:
            planner = self.by_head()
            observer = Observer(self.counted(tokens), *planner.shape)
            observer.room = self.reading.room
            planner.aim(observer)
            self.observer = observer
        return self.observer

    def hold(self) -> None:
        """Let the tokens of `stage` in; its views are no longer valid."""
        if self.decoded:
            self.decoded = {}
        if self.staged:
            before, self.broken = self.broken, True
            self._enter(self.staged, self.reading.lasting and self.placement.merger is None)
            self.staged, self.broken = {}, before

    def add(self, keys: Tensor, values: Tensor) -> None:
        """Add tokens without decoding what is held: the pending ones commit, the newest of these wait."""
        if not self.stores:
            self.start(keys, values)
        self.commit(keys.shape[2])
        with self._changing():
            self._enter({"keys": keys.detach(), "values": values.detach()})

    def _enter(self, new: dict[str, Tensor], lasting: bool = False) -> None:
        """Take in new tokens, none pending: the newest wait, the others are let into the tiers.

        Nobody else writes to tensors that are `lasting`: few tokens of such wait without being copied.
        """
        keys, values = self.like["keys"].dtype, self.like["values"].dtype
        if new["keys"].dtype != keys or new["values"].dtype != values:  # autocast may have changed it
            new = {side: x.to(self.like[side if side in SIDES else "keys"].dtype) for side, x in new.items()}
        n = new["keys"].shape[2]
        if self.told is not None and self.step.prompt is None:
            new = {**new, "told": self.told[:, :, self.committed :].to(new["keys"].device)}
        early = max(n - MAX_PENDING, 0)
        if self.placement.ranks:  # scores speak of an update as a whole, and layers that agree wait for each other
            most = MAX_APART if self.placement.kinds else MAX_PENDING
            early = n if n > most and not self.placement.shared else 0
        if early:
            self._let_in({side: x[:, :, :early] for side, x in new.items()})
            new = {side: x[:, :, early:] for side, x in new.items()}
        if lasting and not early and n <= MAX_PENDING:
            self.pending = new
        else:
            self.pending = {side: x.clone() for side, x in new.items()} if early < n else {}

    def commit(self, coming: int = 0) -> None:
        """Let the pending tokens into the tiers; see `commit_all`."""
        waits = self.broken or self.staged or self.decoded or self.pending
        if waits or (self.asks_for_end and self.ends_prompt(coming)):
            commit_all([[self]], coming)

    def begin(self, new: dict[str, Tensor]) -> Any:
        """Plan to let in new tokens; see `Planner.begin`."""
        if self.tells_apart:
            self.by_head()
        return self.planner.begin(new, self.padding, self.observer)

    def moved(self, moves: AllMoves) -> None:
        """Tokens have been let in, and moved."""
        if moves["keys"][-1].leaving is not None:
            self.forget_pages()
        self.observer = None

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
        self.observer = None
        self.staged, self.decoded = {}, {}
        if self.seen > length:
            self.pending = {}
        return True

    def _let_in(self, new: dict[str, Tensor]) -> None:
        turn = self.begin(new)
        select([self.planner], [turn])
        moves = self.moves(turn, new)
        move([self.stores], [new], [moves])
        self.moved(moves)

    def moves(self, turn: Any, new: dict[str, Tensor]) -> AllMoves:
        """What moves as planned; values that are dropped are merged, `new` with them."""
        merger, stores = self.placement.merger, self.stores["values"]
        if merger is not None and stores[0] is not None:
            merge(merger, self.placement, turn, stores[0], new, self.site_of("values"))
        return self.planner.moves(turn)

    def settle(self) -> None:
        """Once all was restored: rows and heads take no more room than they took as it was saved."""
        if isinstance(self.planner, PerHeadPlacement):
            move([self.stores], [self.like], [self.planner.settle()])

    def by_head(self) -> PerHeadPlacement:
        """From now on each row, and each head that policies look at, has places of its own."""
        if not isinstance(self.planner, PerHeadPlacement):
            like = self.like["keys"]
            with self._changing():
                planner = PerHeadPlacement(self.step, like.shape[0], self.site_of("keys"), like.device)
                for store in (store for stores in self.stores.values() for store in stores if store is not None):
                    store.differ_by_head(planner.shape)
                self.planner = planner
        assert isinstance(self.planner, PerHeadPlacement)
        return self.planner

    def pages(self) -> PageTable | None:
        """The pages of the last tier, as its store is now, if a reader chooses among them."""
        table, stores = self.page_table, self.stores.get("keys")
        if table is None or not stores or stores[-1] is None:
            return None
        table.refresh(stores[-1], self.by_head(), self.site_of("keys"), self.like["keys"].dtype)
        return table

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
        if self.stores and self.tells_apart:
            self.by_head()
        held, tiers = self.planner.positions().cpu().numpy(), self.planner.tiers().cpu().numpy().astype(np.int16)
        new = np.arange(self.committed, self.seen, dtype=np.int64)
        if held.ndim > 1:
            tiers = np.where(held < 0, np.int16(PENDING), tiers)
            new = np.broadcast_to(new, (*held.shape[:2], len(new)))
            if self.padding is not None and self.padding.before(self.seen):
                new = np.where(self.padding.real[:, None, self.committed : self.seen], new, EMPTY)
        waits = np.full(new.shape, PENDING, dtype=np.int16)
        return Positions(np.concatenate([held, new], axis=-1), np.concatenate([tiers, waits], axis=-1))

    def crop(self, length: int) -> None:
        """Forget the positions from `length` on. Exact for pending tokens; past descents are kept."""
        self.check_whole()
        self.hold()
        with self._changing():
            if length > self.committed:
                self.pending = {side: x[:, :, : length - self.committed].clone() for side, x in self.pending.items()}
                if self.observer is not None:
                    self.observer.crop(length - self.committed)
                return
            self.pending, self.observer = {}, None
            if length < self.committed:
                move([self.stores], [self.like], [self.planner.crop(length)])
                self.forget_pages()

    def select(self, rows: Tensor) -> None:
        """Keep the batch rows `rows`, in that order, repeats included."""
        self.check_whole()
        self.hold()
        with self._changing():
            self.forget_pages()
            self.planner.select_rows(rows)
            for stores in self.stores.values():
                for store in stores:
                    if store is not None:
                        store.select(rows)
            if self.observer is not None:
                self.observer.select(rows)
            for held in (self.pending, self.like):
                for side, x in held.items():
                    held[side] = x.index_select(0, rows.to(x.device, non_blocking=True))

    def to(self, device: torch.device) -> None:
        self.hold()
        for stores in self.stores.values():
            for store in stores:
                if store is not None:
                    store.to(device)
        self.forget_pages()
        self.planner.to(device)
        if self.observer is not None:
            self.observer.to(device)
        for held in (self.pending, self.like):
            for side, x in held.items():
                held[side] = x.to(device, non_blocking=True)
