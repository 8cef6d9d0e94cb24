"""The compressed keys and values of one attention layer, apart from transformers."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._pytree import tree_map_only

from kvpolicy.errors import CacheError
from kvpolicy.placement import NEW, Placement, State, StorePlan
from kvpolicy.stores import Store, make_store

__all__ = ["DROPPED", "EXACT", "PENDING", "QUANTIZED", "Positions", "Scratch", "Tiers"]

Ints = NDArray[np.int64]
SIDES = ("keys", "values")
MAX_PENDING = 64
"""Tokens of the last update that wait outside the tiers at most, so that `crop` of them is exact."""
PENDING = -1
"""The tier that `positions` gives for pending tokens."""
EXACT, QUANTIZED, DROPPED = 0, 1, 2
"""What `Tiers.exactness` says of a token."""


class Positions(NamedTuple):
    """Where the tokens of a layer are."""

    positions: Ints
    """Positions in the context of all tokens held, ascending: `[tokens]`."""
    tiers: NDArray[np.int16]
    """The tier of each, counted from 0; `PENDING` (-1) for those not yet settled: `[tokens]`."""


class Scratch:
    """Dense buffers into which one layer after the other is decoded. Not part of the cache's content."""

    def __init__(self) -> None:
        self.buffers: dict[tuple[str, torch.device, torch.dtype], Tensor] = {}

    def get(self, side: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """A contiguous tensor of `shape`, overwritten by the next layer."""
        key, size = (side, like.device, like.dtype), int(np.prod(shape))
        buffer = self.buffers.get(key)
        if buffer is None or not size <= buffer.numel() <= 4 * max(size, 1 << 16):
            with torch.inference_mode(False):
                buffer = torch.empty(size + size // 8, dtype=like.dtype, device=like.device)
            self.buffers[key] = buffer
        return buffer[:size].view(shape)

    @property
    def bytes(self) -> int:
        return sum(b.numel() * b.element_size() for b in self.buffers.values())

    def __deepcopy__(self, memo: dict[int, Any]) -> Scratch:
        return Scratch()


class View(Tensor):
    """Keys or values of a layer with the tokens just coming in, not decoded.

    Attention reads the stores behind it. Whatever else computes on it gets the dense tensor.
    """

    tiers: Tiers
    side: str
    arriving: Tensor

    @staticmethod
    def __new__(cls, tiers: Tiers, side: str, new: Tensor, held: int) -> View:
        shape = (*new.shape[:2], held + new.shape[2], new.shape[3])
        view: View = Tensor._make_wrapper_subclass(cls, shape, dtype=new.dtype, device=new.device)
        view.tiers, view.side, view.arriving = tiers, side, new
        return view

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        args, kwargs = tree_map_only(View, View.dense, (args, kwargs or {}))
        return func(*args, **kwargs)

    def dense(self) -> Tensor:
        """The decoded tensor `[batch, kv_heads, tokens, head_dim]`, in token order."""
        return self.tiers.densified()[self.side]


class Tiers:
    """One layer: stores for keys and values, the state of their placement, and the pending tokens."""

    def __init__(self, placement: Placement, scratch: Scratch | None) -> None:
        self.placement, self.scratch = placement, scratch
        self.clear()

    def clear(self) -> None:
        self.state: State = self.placement.start()
        self.stores: dict[str, list[Store | None]] = {}
        self.pending: dict[str, Tensor] = {}
        self.like: dict[str, Tensor] = {}
        self.incoming: dict[str, Tensor] = {}
        self.decoded: dict[str, Tensor] = {}
        self.densely = False
        self.broken = False

    @property
    def waiting(self) -> int:
        return self.pending["keys"].shape[2] if self.pending else 0

    @property
    def seen(self) -> int:
        return self.state.seen + self.waiting + (self.incoming["keys"].shape[2] if self.incoming else 0)

    def held_after_settling(self) -> int:
        """Tokens that the stores will hold once the pending ones are settled."""
        state, _ = self.placement.advance(self.state, self.waiting) if self.waiting else (self.state, None)
        return sum(s.length for s in state.stores["keys"])

    def start(self, keys: Tensor, values: Tensor) -> None:
        """Make the stores for tensors of this kind: an empty slice of each is kept for type and device."""
        self.like = {"keys": keys[:, :, :0].detach().clone(), "values": values[:, :, :0].detach().clone()}
        self.stores = {
            side: [
                make_store(self.placement.store_spec(side, s), self.like[side].shape[3])
                for s in range(len(self.placement.first_tier[side]))
            ]
            for side in SIDES
        }

    def update(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add tokens; returns all keys and values held before, decoded, and the new ones, in token order."""
        if not self.stores:
            self.start(keys, values)
        self.settle()
        new = {"keys": keys, "values": values}
        dense = (keys, values) if self.state.seen == 0 else self._dense(new, self.scratch)
        self.add(keys, values)
        return dense

    def look(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add tokens, once `commit` is called; returns views of all, for attention to read until then."""
        if not self.stores:
            self.start(keys, values)
        self.settle()
        if self.state.seen == 0:
            self.add(keys, values)
            return keys, values
        self.incoming = {"keys": keys.detach(), "values": values.detach()}
        held = sum(s.length for s in self.state.stores["keys"])
        return View(self, "keys", self.incoming["keys"], held), View(self, "values", self.incoming["values"], held)

    def densified(self) -> dict[str, Tensor]:
        """What the views of `look` stand for, for models that compute on it."""
        if not self.decoded:
            self.densely = True
            self.decoded = dict(zip(SIDES, self._dense(self.incoming, self.scratch), strict=True))
        return self.decoded

    def visible(self) -> Tensor:
        """Positions of what the views of `look` show, in token order."""
        held = np.sort(np.concatenate([s.array for s in self.state.stores["keys"]])).astype(np.int64)
        return torch.from_numpy(np.concatenate([held, np.arange(self.state.seen, self.seen, dtype=np.int64)]))

    def commit(self) -> None:
        """Let the tokens of `look` in; its views are no longer valid."""
        self.decoded = {}
        if self.incoming:
            incoming, self.incoming = self.incoming, {}
            self.add(incoming["keys"], incoming["values"])

    def add(self, keys: Tensor, values: Tensor) -> None:
        """Add tokens without decoding what is held: the pending ones settle, the newest of these wait."""
        if not self.stores:
            self.start(keys, values)
        self.settle()
        new = {"keys": keys.detach(), "values": values.detach()}
        n = keys.shape[2]
        early = n - MAX_PENDING
        if early > 0:
            self._apply({side: x[:, :, :early] for side, x in new.items()}, early, n)
        self.pending = {side: x[:, :, max(early, 0) :].clone() for side, x in new.items()}

    def settle(self) -> None:
        """Let the pending tokens into the tiers."""
        self._check_whole()
        self.commit()
        if self.waiting:
            pending, self.pending = self.pending, {}
            self._apply(pending, pending["keys"].shape[2], pending["keys"].shape[2])

    def _check_whole(self) -> None:
        if self.broken:
            raise CacheError(
                "a layer of the cache must be whole, and an update of this one was interrupted; reset() the cache, or "
                "make a new one"
            )

    def _apply(self, new: dict[str, Tensor], n: int, of: int) -> None:
        self.broken = True
        self._move(new, n, of)
        self.broken = False

    def _move(self, new: dict[str, Tensor], n: int, of: int) -> None:
        self.state, plan = self.placement.advance(self.state, n, of)
        for side in SIDES:
            stores, plans = self.stores[side], plan.sides[side]
            arrivals = [self._collect(p, stores, new[side]) for p in plans]
            for store, x, p in zip(stores, arrivals, plans, strict=True):
                if store is None:
                    continue
                before = store.length
                for part in x:
                    store.append(part)
                # After the arrivals, so that groups close as they would token by token.
                gone = np.concatenate([p.leaving, before + p.passing]) if len(p.passing) else p.leaving
                if len(gone):
                    store.drop(gone)

    def _collect(self, plan: StorePlan, stores: list[Store | None], new: Tensor) -> list[Tensor]:
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

    def _dense(self, new: dict[str, Tensor], scratch: Scratch | None) -> tuple[Tensor, Tensor]:
        out = {}
        for side in SIDES:
            layout, held = self.placement.layout(self.state, side)
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
        """All keys and values held, decoded, in token order; tensors of their own."""
        self._check_whole()
        self.commit()
        return self._dense(self.pending or self.like, None)

    def positions(self) -> Positions:
        """Positions and tiers of all tokens held; the same for keys and values."""
        self.commit()
        held = np.sort(np.concatenate([s.array for s in self.state.stores["keys"]]))
        waiting = np.arange(self.state.seen, self.seen, dtype=np.int64)
        tiers = np.concatenate(
            [self.placement.tier_of(self.state, held), np.full(len(waiting), PENDING, dtype=np.int16)]
        )
        return Positions(np.concatenate([held, waiting]), tiers)

    def exactness(self) -> NDArray[np.int8]:
        """How each position seen is kept: `[1, 1, seen]`, to be broadcast over `[batch, kv_heads, seen]`.

        `EXACT`: key and value are in full stores, pending, or just coming in. `QUANTIZED`: one of them is in another
        store. `DROPPED`: neither is held. It goes by tier: what waits for its group in a per-channel store counts as
        quantized although it is still as it came.
        """
        tiers = zip(self.placement.specs["keys"], self.placement.specs["values"], strict=True)
        kept = [EXACT if k == v == "full" else DROPPED if k == "evict" else QUANTIZED for k, v in tiers]
        found = np.full((1, 1, self.seen), EXACT, dtype=np.int8)
        settled = np.arange(self.state.seen, dtype=np.int64)
        found[..., : len(settled)] = np.asarray(kept, dtype=np.int8)[self.placement.tier_of(self.state, settled)]
        return found

    def crop(self, length: int) -> None:
        """Forget the positions from `length` on. Exact for pending tokens; past descents are kept."""
        self.commit()
        if length > self.state.seen:
            self.pending = {side: x[:, :, : length - self.state.seen].clone() for side, x in self.pending.items()}
            if self.state.through > length:
                self.state, _ = self.placement.crop(self.state, length)
            return
        self.pending = {}
        if length < self.state.seen:
            self.state, drops = self.placement.crop(self.state, length)
            for side, stores in self.stores.items():
                for store, index in zip(stores, drops[side], strict=True):
                    if store is not None and len(index):
                        store.drop(index)

    def select(self, rows: Tensor) -> None:
        """Keep the batch rows `rows`, in that order, repeats included."""
        self.commit()
        for stores in self.stores.values():
            for store in stores:
                if store is not None:
                    store.select(rows)
        for held in (self.pending, self.like):
            for side, x in held.items():
                held[side] = x.index_select(0, rows.to(x.device))

    def to(self, device: torch.device) -> None:
        self.commit()
        for stores in self.stores.values():
            for store in stores:
                if store is not None:
                    store.to(device)
        for held in (self.pending, self.like):
            for side, x in held.items():
                held[side] = x.to(device, non_blocking=True)
