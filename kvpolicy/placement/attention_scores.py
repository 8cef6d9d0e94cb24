"""The attention that tokens receive, summed up for policies that rank them by it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvpolicy.interfaces.budget import MOST
from kvpolicy.interfaces.policy import Scores
from kvpolicy.placement.padding import Padding

Bools = NDArray[np.bool_]
LATER = 1 << 18
"""Scores of a layer that are kept until those of other layers are there, at most."""


def counted_queries(kind: Scores, mode: str, real: Bools, seen: Sequence[int], short: bool) -> Bools:
    """Which queries of an update count, `[rows, queries]`.

    Args:
        kind: what is asked for.
        mode: `kind.queries`, or `kind.decode` for a single token; or none.
        real: which of the update's tokens are no padding, `[rows, queries]`.
        seen: real tokens of each row before the update.
        short: whether each query is looked at for itself, since the last of them may yet be taken back.
    """
    counted = real.copy()
    if mode == "all":
        return counted
    if mode == "none":
        return np.zeros_like(real)
    for row, before in enumerate(seen):
        at = np.flatnonzero(real[row])
        if "probe" in mode:
            counted[row, at] = _probes(kind, len(at), before)
        if mode == "newest" and not short:
            counted[row, at[: -kind.newest_of(len(at))]] = False
        if "last" in mode and not short:
            counted[row, np.flatnonzero(counted[row])[:-1]] = False
    return counted


def _probes(kind: Scores, n: int, seen: int) -> Bools:
    """The probes among `n` queries after `seen` tokens."""
    if seen and n < kind.period:
        positions = np.arange(seen, seen + n)
        found = np.zeros(n, dtype=np.bool_)
        for stretch in np.unique(positions // kind.period).tolist():
            chosen = _drawn(kind, kind.period, (stretch,))
            here = positions // kind.period == stretch
            found[here] = chosen[positions[here] % kind.period]
        return found
    return _drawn(kind, n, (seen, n))


@lru_cache(maxsize=64)
def _drawn(kind: Scores, n: int, salt: tuple[int, ...]) -> Bools:
    """Those drawn of `n` queries; not to be written to."""
    found = np.zeros(n, dtype=np.bool_)
    newest = kind.newest_of(n)
    found[n - newest :] = True
    others = n - newest
    generator = np.random.default_rng([kind.seed, *salt])
    found[generator.choice(others, min(others, int(kind.random * n)), replace=False)] = True
    found.flags.writeable = False
    return found


class Counted(NamedTuple):
    """Which queries of an update count, for each kind of scores: the same in all layers."""

    tokens: int
    """New tokens of the update."""
    apart: bool
    """Whether what each query attends to is kept apart, since the last of them may yet be taken back."""
    kinds: tuple[Scores, ...]
    replaces: list[bool]
    """Whether the newest query's attention takes the place of what is known."""
    masks: list[Tensor]
    """`[rows or 1, queries]` of each kind."""
    all: bool
    """Whether there is one query, which counts for all kinds."""
    queries: list[int]
    """The queries that count for some kind."""
    windows: list[int]
    """How many queries count in all, where the newest ones do; else 0."""
    before: Tensor
    """Real tokens of each row before the update, `[rows or 1]`."""

    @classmethod
    def of(
        cls, kinds: Sequence[Scores], tokens: int, seen: int, padding: Padding | None, keep: int, over: bool = False
    ) -> Counted:
        """Of `tokens` new tokens after `seen`; up to `keep` of them their queries are kept apart.

        None counts if it is `over`.
        """
        padded = padding is not None and padding.before(seen + tokens)
        real = np.ones((1, tokens), dtype=np.bool_)
        before = [seen]
        if padding is not None and padded:
            real, before = padding.real[:, seen : seen + tokens], padding.count(0, seen)
        modes = ["none" if over else kind.decode if tokens == 1 and seen else kind.queries for kind in kinds]
        apart = tokens <= keep
        masks = [counted_queries(kind, mode, real, before, apart) for kind, mode in zip(kinds, modes, strict=True)]
        some = np.flatnonzero(np.any([mask.any(0) for mask in masks], axis=0)).tolist()
        every = tokens == 1 and all(mask.all() for mask in masks)
        replaces = ["last" in mode for mode in modes]
        sizes = [kind.newest_of(MOST) for kind in kinds]
        windows = [size if mode == "newest" else 0 for size, mode in zip(sizes, modes, strict=True)]
        found = [torch.from_numpy(mask) for mask in masks]
        return cls(tokens, apart, tuple(kinds), replaces, found, every, some, windows, torch.tensor(before))

    def window(self, k: int) -> tuple[Tensor, Tensor]:
        """Of an update's queries the newest ones, `[rows, queries]`, and how much of what was there is left: `[rows]`.

        The newest of those before were summed up, as many as count in all. Some of them are replaced.
        """
        mask, size = self.masks[k], self.windows[k]
        chosen = mask & (mask.flip(1).cumsum(1).flip(1) <= size)
        left = (size - chosen.sum(1)) / self.before.clamp(min=1, max=size)
        return chosen, left.clamp(max=1.0)

    def select(self, rows: Tensor) -> Counted:
        before = self.before if len(self.before) == 1 else self.before[rows.cpu()]
        return self._replace(masks=[c if len(c) == 1 else c[rows.cpu()] for c in self.masks], before=before)

    def crop(self, tokens: int) -> Counted:
        masks = [c[:, :tokens] for c in self.masks]
        return self._replace(tokens=tokens, masks=masks, all=False, queries=[q for q in self.queries if q < tokens])


class Observer:
    """What the queries of one update attended to, for each kind of scores that a layer's policies ask for."""

    def __init__(self, counted: Counted, batch: int, heads: int) -> None:
        self.counted, self.batch, self.heads = counted, batch, heads
        self.live = self.held = 0
        """Columns of stored tokens whose scores are kept, and of all stored ones; then come the new tokens."""
        self.index: Tensor | None = None
        """Where the columns are not side by side: the column of each, `[batch, heads, columns]`."""
        self._found: list[tuple[Tensor, Tensor | None] | None] = [None] * len(counted.kinds)
        self.raw: tuple[Tensor, Tensor] | None = None
        """What `found` is to be made of; see `watch_later`."""
        self.room = 0
        """Columns that the attention weights have at least: more than there are, where a graph is to go on."""

    @property
    def found(self) -> list[tuple[Tensor, Tensor | None] | None]:
        """Of each kind the attention, and the queries that saw a token. None in their place: the only query did, and
        the attention is that of all columns, unless there is an index."""
        if self.raw is not None:
            (scores, sums), self.raw = self.raw, None
            self._watch_whole(torch.sub(scores, sums).exp2_().unsqueeze(3))
        return self._found

    @found.setter
    def found(self, found: list[tuple[Tensor, Tensor | None] | None]) -> None:
        self._found, self.raw = found, None

    @property
    def queries(self) -> list[int]:
        """The queries that count for some kind."""
        return self.counted.queries

    @property
    def tokens(self) -> int:
        return self.counted.tokens

    @property
    def sums(self) -> bool:
        """Whether weights summed over the queries that count, and over the heads of a KV head, are all it asks for."""
        counted = self.counted
        return not (counted.apart or counted.all or any(kind.heads == "max" for kind in counted.kinds))

    def add_sums(self, k: int, weights: Tensor, seen: Tensor, heads: int) -> None:
        """Add weights of a kind, summed over queries and over `heads` of each KV head; see `Backend.observe`."""
        if self.counted.kinds[k].heads == "mean":
            weights = weights / heads
        if self.heads == 1:
            weights, seen = (x.mean(1, keepdim=True) for x in (weights, seen))
        sums, counts = self._totals(k, weights)
        sums.add_(weights.unsqueeze(2))
        counts.add_(seen.unsqueeze(2))

    @property
    def told(self) -> bool:
        """Whether it was told of any query that counts."""
        return any(x is not None for x in self.found)

    @property
    def kind(self) -> Hashable:
        """What observers have in common that can be stacked."""
        if self.raw is not None:
            shapes: tuple[Any, ...] = ("raw", *(x.shape for x in self.raw))
        else:
            shapes = tuple(x if x is None else (x[0].shape, x[1] is None) for x in self.found)
        places = self.live, self.held, self.index is None
        return self.counted.apart, self.tokens, self.heads, self.batch, places, shapes

    @classmethod
    def stacked(cls, observers: Sequence[Observer]) -> Observer:
        """Those of several layers as one, their rows one layer's after another's."""
        first, many = observers[0], len(observers)
        if many == 1:
            return first
        masks = [mask if len(mask) == 1 else mask.repeat(many, 1) for mask in first.counted.masks]
        before = first.counted.before
        before = before if len(before) == 1 else before.repeat(many)
        found = cls(first.counted._replace(masks=masks, before=before), first.batch * many, first.heads)
        found.live, found.held, found.index = first.live, first.held, first.index
        raw = [observer.raw for observer in observers if observer.raw is not None]
        if len(raw) == many:
            scores, sums = zip(*raw, strict=True)
            found.raw = torch.cat(scores), torch.cat(sums)
            return found
        for k, known in enumerate(first.found):
            if known is not None:
                parts = [x for observer in observers if (x := observer.found[k]) is not None]
                sees = [x for _, x in parts if x is not None]
                found.found[k] = torch.cat([x for x, _ in parts]), torch.cat(sees) if sees else None
        return found

    def watch_later(self, scores: Tensor, sums: Tensor) -> bool:
        """Keep what the only query's attention weights follow from, if it counts: those of several layers are then made
        in one go. False: it is to be told of the weights, as it is while a graph is captured, where calls cost little.

        Args:
            scores: in units of log2, `[batch, kv_heads, groups, columns]`.
            sums: log2 of the sums of their powers, `[batch, kv_heads, groups, 1]`.
        """
        if not self.counted.all or self.index is not None or self.room or scores.numel() > LATER:
            return False
        self.raw = scores, sums
        return True

    def watch(self, at: Tensor, weights: Tensor, visible: Tensor | None, heads: slice, of: int) -> None:
        """Take in what some queries attended to.

        Args:
            at: which queries of the update these are, ascending.
            weights: `[batch, kv_heads, groups, queries, columns]` of some KV heads.
            visible: which columns a query could see, broadcastable to `weights`; None: all.
            heads: which KV heads these are.
            of: how many there are.
        """
        counted = self.counted
        wanted = counted.masks if counted.all else [mask[:, at] for mask in counted.masks]
        if not counted.all and not any(bool(w.any()) for w in wanted):
            return
        partly = weights.shape[1] < of
        if counted.all and visible is None and not partly:
            self.raw = None
            self._watch_whole(weights)
            return
        columns = self._picked(weights)
        sees = None if visible is None else self._picked(visible.expand_as(weights)[:, :, :1]).squeeze(2)
        for k, (kind, count) in enumerate(zip(counted.kinds, wanted, strict=True)):
            if counted.all or count.any():
                self._note(k, at, _reduced(columns, kind), sees, count, heads, of)

    def by_heads(self, kv_heads: int) -> list[bool] | None:
        """Of each kind whether it asks for the mean of the query heads of a KV head, or their sum, of the only query.

        None where something else is asked for; else `watch_heads` may be told instead of `watch`.
        """
        counted = self.counted
        plain = counted.all and self.index is None and (self.heads > 1 or kv_heads == 1)
        if not plain or any(kind.heads == "max" for kind in counted.kinds):
            return None
        return [kind.heads == "mean" for kind in counted.kinds]

    def watch_heads(self, weights: Sequence[Tensor]) -> None:
        """Take in what the only query attended to, which saw all: `[batch, kv_heads, 1, columns]` of each kind."""
        self.found = [(x, None) for x in weights]

    def _watch_whole(self, weights: Tensor) -> None:
        """Take in what the only query attended to, which saw all columns."""
        columns = weights if self.index is None else self._picked(weights)
        for k, kind in enumerate(self.counted.kinds):
            reduced = _reduced(columns, kind)
            alone = self.heads > 1 or reduced.shape[1] == 1
            self._found[k] = reduced if alone else reduced.mean(1, keepdim=True), None

    def _note(
        self, k: int, at: Tensor, reduced: Tensor, sees: Tensor | None, count: Tensor, heads: slice, of: int
    ) -> None:
        """Add what some queries attended to, `[batch, kv_heads, queries, columns]`, to the sums of a kind."""
        partly = reduced.shape[1] < of
        own = slice(0, 1) if self.heads == 1 else heads
        share = count.to(reduced.device, non_blocking=True)[:, None, :, None]
        seen = share.bool().expand(*reduced.shape) if sees is None else sees & share.bool()
        part = reduced * share
        if self.heads == 1:
            part, seen = part.sum(1, keepdim=True).div_(of), seen[:, :1]
        sums, counts = (x[:, own, :, : part.shape[3]] for x in self._totals(k, reduced))
        if self.counted.apart:
            at = at.to(part.device, non_blocking=True)
            sums.index_add_(2, at, part)
            counts[:, :, at] |= seen
        else:
            sums.add_(part.sum(2, keepdim=True))
            counts.add_(seen.sum(2, keepdim=True) / (of if self.heads == 1 and partly else 1))

    def _totals(self, k: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Attention summed, and the queries that saw a token: query by query where these are looked at apart."""
        found = self.found[k]
        apart = self.counted.apart
        if found is None or found[1] is None:
            shape = (self.batch, self.heads, self.tokens if apart else 1, self.live + self.tokens)
            counts = like.new_zeros(shape, dtype=torch.bool if apart else torch.float32)
            found = like.new_zeros(shape), counts
            self.found[k] = found
        sums, counted = found
        assert counted is not None
        return sums, counted

    def _picked(self, x: Tensor) -> Tensor:
        """Of all columns those whose scores are kept, and the new tokens'."""
        if self.index is not None:
            index = self.index[:, :, None, None].expand(*x.shape[:4], -1)
            return x.gather(4, index)
        if self.live == self.held:
            return x
        return torch.cat([x[..., : self.live], x[..., self.held :]], dim=4)

    def add(self, scores: Tensor, at: int, n: int) -> None:
        """Add the columns from `at` to `at + n` to `scores`, `[batch, heads, n, 2 x kinds]`."""
        for k, found in enumerate(self.found):
            if found is None:
                continue
            values, counts = found
            first = at if at < self.live or counts is not None or self.index is not None else at - self.live + self.held
            values = values[..., first : first + n]
            counts = None if counts is None else counts[..., at : at + n]
            into, chosen = (scores[..., 2 * k], scores[..., 2 * k + 1]), None
            if self.counted.windows[k]:
                chosen, left = (x.to(scores.device, non_blocking=True) for x in self.counted.window(k))
                scores[..., 2 * k : 2 * k + 2].mul_(left.view(-1, 1, 1, 1))
            if counts is None:
                values = values.squeeze(2)
                if self.counted.replaces[k]:
                    into[0].copy_(values), into[1].fill_(1.0)
                else:
                    into[0].add_(values), into[1].add_(1.0)
            elif self.counted.replaces[k]:
                mask = self.counted.masks[k]
                known = mask.any(1).view(-1, 1, 1).to(scores.device, non_blocking=True)
                for x, own in zip((values, counts), into, strict=True):
                    own.copy_(torch.where(known, self._last(x, mask), own))
            else:
                if chosen is not None and self.counted.apart:
                    values, counts = (x * chosen[:, None, :, None] for x in (values, counts))
                into[0].add_(values.sum(2))
                into[1].add_(counts.sum(2))

    def _last(self, values: Tensor, counted: Tensor) -> Tensor:
        """What the newest query of each row gave."""
        if not self.counted.apart:
            return values[:, :, 0]
        order = torch.arange(1, counted.shape[1] + 1)
        newest = (counted * order).amax(1).clamp(min=1).sub(1).to(values.device, non_blocking=True)
        index = newest.view(-1, 1, 1, 1).expand(values.shape[0], values.shape[1], 1, values.shape[3])
        return values.gather(2, index).squeeze(2)

    def crop(self, tokens: int) -> None:
        """Take the queries from `tokens` on back."""
        self.counted = self.counted.crop(tokens)
        self.found = self._each(lambda x: x[:, :, :tokens].clone())

    def select(self, rows: Tensor) -> None:
        self.batch = len(rows)
        self.counted = self.counted.select(rows)
        self.found = self._each(lambda x: x.index_select(0, rows.to(x.device)))

    def to(self, device: torch.device) -> None:
        self.found = self._each(lambda x: x.to(device))

    def _each(self, make: Callable[[Tensor], Tensor]) -> list[tuple[Tensor, Tensor | None] | None]:
        return [None if x is None else (make(x[0]), None if x[1] is None else make(x[1])) for x in self.found]


def _reduced(weights: Tensor, kind: Scores) -> Tensor:
    """Weights `[batch, kv_heads, groups, queries, columns]` of a kind, the query heads of a KV head as one."""
    if kind.heads == "max":
        return weights.amax(2)
    return weights.mean(2) if kind.heads == "mean" else weights.sum(2)
