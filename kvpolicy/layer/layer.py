"""The compressed keys and values of one attention layer, apart from transformers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvpolicy.errors import CacheError
from kvpolicy.interfaces.policy import RankPolicy
from kvpolicy.interfaces.site import Site
from kvpolicy.layer.mover import move
from kvpolicy.layer.view import Scratch, View
from kvpolicy.placement.attention_scores import Observer
from kvpolicy.placement.by_position import ByPosition
from kvpolicy.placement.contract import Planner, select
from kvpolicy.placement.moves import EMPTY, ColumnMap
from kvpolicy.placement.padding import Padding
from kvpolicy.placement.per_head import PerHeadPlacement
from kvpolicy.placement.step import Step
from kvpolicy.storage.base import Store
from kvpolicy.storage.later import Later
from kvpolicy.storage.make import make_store

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
        self.told_apart = any(spec != "full" for spec in specs) or self.placement.ranks
        """Whether it matters which tokens are padding: not where all is kept as it came."""
        self.clear()

    def clear(self) -> None:
        self.broken = True
        self.planner: Planner[Any] = ByPosition(self.first)
        """Where the tokens are that were let in, and what moves."""
        self.observer: Observer | None = None
        self.stores: dict[str, list[Store | None]] = {}
        self.pending: dict[str, Tensor] = {}
        self.like: dict[str, Tensor] = {}
        self.staged: dict[str, Tensor] = {}
        self.decoded: dict[str, Tensor] = {}
        self.densely = False
        self.backends: tuple[str, ...] = ()
        """Who computed attention last."""
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

    @property
    def step(self) -> Step:
        """Where the committed tokens are by position; the same value in all layers with the same tiers."""
        return self.planner.step

    def held_after_commit(self, coming: int = 0) -> int:
        """Tokens that the stores will hold once the pending ones are committed.

        Args:
            coming: tokens of the update before which this happens, if there is one.
        """
        ends = self._ends_prompt(coming)
        if not self.waiting and not ends:
            return self.planner.width
        planner = self.by_head() if self.tells_apart else self.planner
        return planner.width_after(self.waiting, self.padding, ends)

    def _ends_prompt(self, coming: int) -> bool:
        """Whether an update of so many tokens ends the prompt, and policies ask for that."""
        asked = self.placement.prompted or self.placement.ranks
        return coming == 1 and asked and self.seen > 0 and self.step.prompt is None

    @property
    def attending(self) -> list[str]:
        """The policies that must see attention."""
        policies = self.placement.policies
        return [p.kind for p in policies if isinstance(p, RankPolicy) and p._scores() is not None]

    @property
    def tells_apart(self) -> bool:
        """Whether rows, or heads that policies look at, have places of their own."""
        padded = self.padding is not None and self.padding.before(self.padding.length)
        return padded or self.placement.ranks

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
        self.commit(keys.shape[2])
        new = {"keys": keys, "values": values}
        dense = (keys, values) if self.committed == 0 else self._dense(new, self.scratch)
        self.add(keys, values)
        return dense

    def stage(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add tokens, once `hold` is called; returns views of all, for attention to read until then."""
        if not self.stores:
            self.start(keys, values)
        self._check_rows(keys)
        self.commit(keys.shape[2])
        if self.committed == 0 and keys.shape[2] and not self.placement.kinds:
            self.add(keys, values)
            return keys, values
        staged = {side: x.detach() if x.requires_grad else x for side, x in (("keys", keys), ("values", values))}
        held = self.planner.width
        first = self.committed == 0  # gradients reach the tokens of a first update
        shown = {"keys": keys, "values": values} if first else staged
        if keys.shape[2]:
            self.staged = staged
        return View(self, "keys", shown["keys"], held), View(self, "values", shown["values"], held)

    def densified(self) -> dict[str, Tensor]:
        """What the views of `stage` stand for, for models that compute on it."""
        if self.placement.kinds:
            self.staged = {}
            kinds = ", ".join(map(repr, self.attending))
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
        found = self.planner.positions()
        new = torch.arange(self.committed, self.seen, device=found.device)
        return torch.cat([found, new.expand(*found.shape[:-1], -1)], dim=-1)

    def columns(self) -> ColumnMap:
        """Where attention finds the tokens of each store."""
        return self.planner.columns(self.like["keys"].device)

    def observe(self) -> Observer | None:
        """What is to be told of the attention of the tokens of `stage`, if any policy asks for it."""
        if not self.placement.kinds:
            return None
        if self.observer is None:
            planner = self.by_head()
            tokens, shape = self.staged["keys"].shape[2], planner.shape
            observer = Observer(self.placement.kinds, tokens, self.committed, shape[0], self.padding, MAX_APART, shape)
            planner.aim(observer)
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
        self.commit(keys.shape[2])
        with self._changing():
            self._enter({"keys": keys.detach(), "values": values.detach()})

    def _enter(self, new: dict[str, Tensor]) -> None:
        """Take in new tokens, none pending: the newest wait, the others are let into the tiers."""
        if any(x.dtype != self.like[side].dtype for side, x in new.items()):  # autocast may have changed it
            new = {side: x.to(self.like[side].dtype) for side, x in new.items()}
        n = new["keys"].shape[2]
        early = max(n - MAX_PENDING, 0)
        if self.placement.ranks:  # scores speak of an update as a whole, and layers that agree wait for each other
            most = MAX_APART if self.placement.kinds else MAX_PENDING
            early = n if n > most and not self.placement.shared else 0
        if early:
            self._let_in({side: x[:, :, :early] for side, x in new.items()})
            new = {side: x[:, :, early:] for side, x in new.items()}
        self.pending = {side: x.clone() for side, x in new.items()} if early < n else {}

    def commit(self, coming: int = 0) -> None:
        """Let the pending tokens into the tiers; see `commit_all`."""
        commit_all([[self]], coming)

    def begin(self, new: dict[str, Tensor]) -> Any:
        """Plan to let in new tokens; see `Planner.begin`."""
        if self.tells_apart:
            self.by_head()
        return self.planner.begin(new, self.padding, self.observer)

    def finish(self, new: dict[str, Tensor], turn: Any, later: Later | None = None) -> None:
        """Let new tokens in as planned; what `later` codes is not in its store yet."""
        move(self.stores, new, self.planner.moves(turn), later)
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

    def _let_in(self, new: dict[str, Tensor]) -> None:
        turn = self.begin(new)
        select([self.planner], [turn])
        self.finish(new, turn)

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

    def _dense(self, new: dict[str, Tensor], scratch: Scratch | None) -> tuple[Tensor, Tensor]:
        held, out = self.planner.width, {}
        for side in SIDES:
            x = new[side]
            shape = (*x.shape[:2], held + x.shape[2], x.shape[3])
            dense = x.new_empty(shape) if scratch is None else scratch.get(side, shape, x)
            # From the last, most of the tokens: what it writes between its own is written over by the others.
            layout = zip(self.stores[side], self.planner.layout(side), strict=True)
            filled = [(store, at) for store, at in layout if store is not None and store.length]
            for number, (store, at) in enumerate(reversed(filled)):
                if isinstance(at, int):
                    store.write(dense, at)
                elif at.ndim > 1:
                    if number == 0:
                        dense[:, :, :held] = 0
                    store.scatter_by_head(dense[:, :, :held], at)
                elif number == 0:
                    store.scatter_between(dense, at.to(x.device, non_blocking=True))
                else:
                    store.scatter(dense, at.to(x.device, non_blocking=True))
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

    def exactness(self) -> NDArray[np.int8]:
        """How each position seen is kept, `[batch or 1, kv_heads or 1, seen]`.

        `EXACT`: key and value are in full stores, pending, or just coming in. `QUANTIZED`: one of them is in another
        store. `DROPPED`: neither is held. It goes by tier: what waits for its group in a per-channel store counts as
        quantized although it is still as it came.
        """
        tiers = zip(self.placement.specs["keys"], self.placement.specs["values"], strict=True)
        kept = [EXACT if k == v == "full" else DROPPED if k == "evict" else QUANTIZED for k, v in tiers]
        held = self.planner.by_position(kept, DROPPED)
        return np.pad(held, ((0, 0), (0, 0), (0, self.seen - self.committed)), constant_values=EXACT)

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
                move(self.stores, self.like, self.planner.crop(length))

    def select(self, rows: Tensor) -> None:
        """Keep the batch rows `rows`, in that order, repeats included."""
        self.check_whole()
        self.hold()
        with self._changing():
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
        self.planner.to(device)
        if self.observer is not None:
            self.observer.to(device)
        for held in (self.pending, self.like):
            for side, x in held.items():
                held[side] = x.to(device, non_blocking=True)


def commit_all(groups: Iterable[Sequence[LayerCache]], coming: int = 0) -> None:
    """Let the pending tokens of layers into their tiers.

    Args:
        groups: layers that select tokens together, or one alone.
        coming: tokens of the update before which this happens, if there is one. The first that brings a single token to
            a cache that holds some ends the prompt.
    """
    groups = list(groups)
    for layer in (layer for group in groups for layer in group):
        layer.check_whole()
        layer.hold()
    waiting = [[layer for layer in group if layer.waiting] for group in groups]
    for layer in (layer for group in waiting for layer in group):
        layer.held_after_commit(coming)  # arithmetic first, which steps keep: interrupted, it leaves the layers whole
    _advance(waiting, lambda layer: layer.begin(layer.pending), lambda layer: layer.pending)
    ending = [[layer for layer in group if layer._ends_prompt(coming)] for group in groups]
    for layer in (layer for group in ending for layer in group):
        if not layer.placement.prompted:
            layer.planner.note_prompt()
    ending = [[layer for layer in group if layer.placement.prompted] for group in ending]
    _advance(ending, lambda layer: layer.planner.end_prompt(), lambda layer: layer.like)


def _advance(
    groups: Sequence[Sequence[LayerCache]],
    begin: Callable[[LayerCache], Any],
    new: Callable[[LayerCache], dict[str, Tensor]],
) -> None:
    """Move the tokens of layers; what several code is coded in one go."""
    before = [(layer, layer.broken) for group in groups for layer in group]
    for layer, _ in before:
        layer.broken = True
    later = Later()
    for group in (group for group in groups if group):
        turns = [begin(layer) for layer in group]
        if group[0].placement.ranks:
            select([layer.planner for layer in group], turns)
        for layer, turn in zip(group, turns, strict=True):
            layer.finish(new(layer), turn, later)
            layer.pending = {}
    later.run()
    for layer, broken in before:
        layer.broken = broken
