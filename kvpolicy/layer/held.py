"""What a layer holds: its stores, where their tokens are, and the tokens that are pending or staged."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvpolicy.errors import CacheError
from kvpolicy.interfaces.checks import needed
from kvpolicy.interfaces.policy import RankPolicy
from kvpolicy.interfaces.quantizer import Quantizer
from kvpolicy.interfaces.site import Site
from kvpolicy.layer.paging import PageTable
from kvpolicy.layer.standing import Kind, Stood
from kvpolicy.layer.view import Scratch, Views
from kvpolicy.placement.attention_scores import Observer
from kvpolicy.placement.by_position import ByPosition
from kvpolicy.placement.contract import Planner
from kvpolicy.placement.moves import ColumnMap
from kvpolicy.placement.padding import Padding
from kvpolicy.placement.step import Step
from kvpolicy.storage.base import Store
from kvpolicy.storage.chain import Chain
from kvpolicy.storage.coded import CodedStore

Ints = NDArray[np.int64]
SIDES = ("keys", "values")
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
    lasting: bool = False
    """Whether nobody else writes to the tensors that updates bring."""
    known: dict[Any, Any] = field(default_factory=dict)
    """What attention found out in the pass, for each kind of layers."""
    views: Views = field(default_factory=Views)
    room: int = 0
    """Columns that attention weights are to have at least, for policies that are told of them."""

    def forget(self) -> None:
        """What is of one pass alone."""
        self.known.clear()
        self.views.forget()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "known": {}}  # it is of the pass, and may hold what can't be copied


class Held:
    """One layer: stores for keys and values, where their tokens are, and the pending tokens."""

    def __init__(self, start: Step, scratch: Scratch | None, reading: Reading, site: Site | None = None) -> None:
        self.site = site or Site()
        """Where the layer stands in its model; side, heads and channels are those of its stores."""
        self.first, self.scratch, self.reading = start, scratch, reading
        self.placement = start.placement
        specs = [spec for side in SIDES for spec in self.placement.specs[side]]
        self.told_apart = any(spec != "full" for spec in specs) or self.placement.tabled
        """Whether it matters which tokens are padding: not where all is kept as it came."""
        self.evicts = bool(self.placement.specs["keys"][-1] == "evict")
        """Whether its last tier drops tokens."""
        self.asks_for_end = self.placement.prompted or self.placement.ranks
        """Whether policies ask where the prompt ends."""
        self.observes = self.placement.attends
        """Whether policies ask for what only an attached model shows."""
        self.asked_for = self.asking is not None
        """Whether a transform of keys must see queries."""
        self.clear()

    def clear(self) -> None:
        self.broken = True
        reader = self.placement.reader
        self.page_table = None if reader is None else PageTable(reader)
        """The pages of the last tier, where a reader chooses among them."""
        self.planner: Planner[Any] = ByPosition(self.first)
        """Where the tokens are that were let in, and what moves."""
        self.observer: Observer | None = None
        self.stores: dict[str, list[Store | None]] = {}
        self.pending: dict[str, Tensor] = {}
        self.like: dict[str, Tensor] = {}
        self.staged: dict[str, Tensor] = {}
        self.decoded: dict[str, Tensor] = {}
        self.told: Tensor | None = None
        """What the tokens of the prompt score, where a scorer must be told that: `[batch, kv_heads, tokens]`."""
        self.densely = False
        self.kind: Kind | None = None
        """What attention says of its stores once for all, if it was asked."""
        self.stood: Stood | None = None
        """What it knows of where tokens lie, as long as that holds."""
        self.backends: tuple[str, ...] = ()
        """Who computed attention last."""
        self.broken = False

    @property
    def padding(self) -> Padding | None:
        """Which of the tokens seen are padding, if this layer tells them apart."""
        return self.reading.padding if self.told_apart else None

    @property
    def waiting(self) -> int:
        return self.pending["keys"].shape[2] if self.pending else 0

    @property
    def committed(self) -> int:
        """Tokens that were let into the tiers, dropped ones included."""
        return self.step.seen

    @property
    def seen(self) -> int:
        pending = self.pending["keys"].shape[2] if self.pending else 0
        return self.planner.step.seen + pending + (self.staged["keys"].shape[2] if self.staged else 0)

    @property
    def step(self) -> Step:
        """Where the committed tokens are by position; the same value in all layers with the same tiers."""
        return self.planner.step

    @property
    def attending(self) -> list[str]:
        """The policies that must see attention."""
        policies = self.placement.policies
        ranks = [p for p in policies if isinstance(p, RankPolicy)]
        asking = [p for p in ranks if (scorer := p._scorer()) is not None and "query" in scorer.needs]
        return [p.kind for p in ranks if p in asking or p._scores() is not None]

    def check_attached(self) -> None:
        """Refuse what only an attached model can do, before any token is let in.

        Raises:
            CacheError: a policy must see attention, or rows or heads hold different numbers of tokens.
        """
        if self.reading.attached:
            return
        if self.placement.attends:
            raise CacheError(
                f"policy {self.attending[0]!r} selects tokens by the attention that they receive, which only an "
                "attached model shows; use: with kvpolicy.attach(model): ..."
            )
        if self.placement.reader is not None:
            raise CacheError(
                f"reader {self.placement.reader.kind!r} chooses by each query what it reads, which only an "
                "attached model shows; use: with kvpolicy.attach(model): ..."
            )
        if self.wants_queries:
            raise CacheError(
                f"transform {self.asking!r} fits keys to the queries that meet them, which only an attached "
                "model shows; use: with kvpolicy.attach(model): ..."
            )
        if self.placement.reads_counts:
            raise CacheError(
                f"policy {self.placement.reads_counts[0]!r} lets other numbers of tokens stay in each row "
                "and head, which only an attached model can read; use: with kvpolicy.attach(model): ..."
            )
        if self.step.by_row or (self.evicts and self.planner.uneven):
            raise CacheError(
                "a cache whose rows or heads hold different numbers of tokens (padded batches, or a crop of what "
                "had descended) must go on with an attached model, found one that is not; use: with "
                "kvpolicy.attach(model): ..."
            )

    @property
    def asking(self) -> str | None:
        """The transform of keys that must see queries, if there is one."""
        specs = [spec for spec in self.placement.specs["keys"] if isinstance(spec, Quantizer)]
        return next((t.kind for spec in specs for t in spec.transforms if "queries" in needed(t)), None)

    def _asking(self) -> list[Chain]:
        """The transforms of stores that must still see queries."""
        stores = self.stores.get("keys", [])
        chains = [store.chain for store in stores if isinstance(store, CodedStore) and store.chain is not None]
        return [chain for chain in chains if chain.wants_queries]

    @property
    def wants_queries(self) -> bool:
        """Whether it must be told of queries, by `heed`."""
        return self.asked_for and (not self.stores or bool(self._asking()))

    @property
    def tells_apart(self) -> bool:
        """Whether rows, or heads that policies look at, have places of their own."""
        padding = self.padding
        return self.placement.tabled or (padding is not None and padding.before(padding.length))

    def site_of(self, side: str) -> Site:
        """Where the stores of a side stand."""
        _, heads, _, dim = self.like[side].shape
        return replace(self.site, side="keys" if side == "keys" else "values", kv_heads=heads, head_dim=dim)

    def visible(self) -> Tensor:
        """Positions of what the views of `stage` show, in token order; `[batch, 1, tokens]` where rows differ."""
        found = self.planner.positions()
        new = torch.arange(self.committed, self.seen, device=found.device)
        return torch.cat([found, new.expand(*found.shape[:-1], -1)], dim=-1)

    def columns(self) -> ColumnMap:
        """Where attention finds the tokens of each store."""
        return self.planner.columns(self.like["keys"].device)

    def _check_rows(self, keys: Tensor) -> None:
        rows = self.like["keys"].shape[0]
        if keys.shape[0] != rows:
            raise CacheError(
                f"an update must have the rows of the cache, {rows}, found {keys.shape[0]}; use batch_select_indices "
                "or batch_repeat_interleave, or another cache"
            )

    def forget_pages(self) -> None:
        """What is known of pages no longer holds; it is made anew when it is read."""
        if self.page_table is not None:
            self.page_table.forget()

    def check_told(self, keys: Tensor) -> None:
        """Refuse tokens of a prompt whose scores are unknown.

        Raises:
            CacheError: a scorer must be told of them.
        """
        scorer = self.placement.scores.told
        if scorer is None:
            return
        end = self.seen + keys.shape[2]
        ends = keys.shape[2] == 1 and self.seen > 0  # what comes is no part of the prompt
        if self.step.prompt is not None or ends:
            return
        if self.told is None or self.told.shape != (*keys.shape[:2], end):
            raise CacheError(
                f"scorer {scorer.kind!r} must have the prompt read again before it is kept, found an update without; "
                "use kvpolicy.prepare(model, cache, input_ids), and then generate"
            )

    def check_whole(self) -> None:
        if self.broken:
            raise CacheError(
                "a layer of the cache must be whole, and an update of this one was interrupted; reset() the cache, or "
                "make a new one"
            )

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
