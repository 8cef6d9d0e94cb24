"""The attention that tokens receive, summed up for policies that rank them by it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvpolicy.interfaces.budget import MOST
from kvpolicy.interfaces.policy import Scores
from kvpolicy.placement.padding import Padding

Bools = NDArray[np.bool_]


def counted_queries(kind: Scores, mode: str, real: Bools, seen: Sequence[int], short: bool) -> Bools:
    """Which queries of an update count, `[rows, queries]`.

    Args:
        kind: what is asked for.
        mode: `kind.queries`, or `kind.decode` for a single token.
        real: which of the update's tokens are no padding, `[rows, queries]`.
        seen: real tokens of each row before the update.
        short: whether each query is looked at for itself, since the last of them may yet be taken back.
    """
    counted = real.copy()
    if mode == "all":
        return counted
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


def _drawn(kind: Scores, n: int, salt: tuple[int, ...]) -> Bools:
    found = np.zeros(n, dtype=np.bool_)
    newest = kind.newest_of(n)
    found[n - newest :] = True
    others = n - newest
    generator = np.random.default_rng([kind.seed, *salt])
    found[generator.choice(others, min(others, int(kind.random * n)), replace=False)] = True
    return found


class Observer:
    """What the queries of one update attended to, for each kind of scores that a layer's policies ask for."""

    def __init__(
        self,
        kinds: Sequence[Scores],
        tokens: int,
        seen: int,
        batch: int,
        padding: Padding | None,
        keep: int,
        lines: tuple[int, int],
    ) -> None:
        """Of `tokens` new tokens after `seen`; up to `keep` of them their queries are kept apart."""
        self.heads, self.batch = lines[1], batch
        self.apart = tokens <= keep
        self.tokens = tokens
        self.live = self.held = 0
        """Columns of stored tokens whose scores are kept, and of all stored ones; then come the new tokens."""
        self.index: Tensor | None = None
        """Where the columns are not side by side: the column of each, `[batch, heads, columns]`."""
        padded = padding is not None and padding.before(seen + tokens)
        real = np.ones((1, tokens), dtype=np.bool_)
        before = [seen]
        if padding is not None and padded:
            real, before = padding.real[:, seen : seen + tokens], padding.count(0, seen)
        modes = [kind.decode if tokens == 1 and seen else kind.queries for kind in kinds]
        self.kinds = list(kinds)
        self.replaces = ["last" in mode for mode in modes]
        self.windows = [
            kind.newest_of(MOST) if mode == "newest" else 0 for kind, mode in zip(kinds, modes, strict=True)
        ]
        """How many queries count in all, where the newest ones do; else 0."""
        self.before = torch.tensor(before)
        """Real tokens of each row before the update."""
        self.counted = [
            torch.from_numpy(counted_queries(kind, mode, real, before, self.apart))
            for kind, mode in zip(kinds, modes, strict=True)
        ]
        self.found: list[tuple[Tensor, Tensor] | None] = [None] * len(kinds)

    @property
    def queries(self) -> list[int]:
        """The queries that count for some kind."""
        return torch.stack([c.any(0) for c in self.counted]).any(0).nonzero()[:, 0].tolist()

    def watch(self, at: Tensor, weights: Tensor, visible: Tensor | None, heads: slice, of: int) -> None:
        """Take in what some queries attended to.

        Args:
            at: which queries of the update these are, ascending.
            weights: `[batch, kv_heads, groups, queries, columns]` of some KV heads.
            visible: which columns a query could see, broadcastable to `weights`; None: all.
            heads: which KV heads these are.
            of: how many there are.
        """
        wanted = [counted[:, at] for counted in self.counted]
        if not any(bool(w.any()) for w in wanted):
            return
        columns = self._picked(weights)
        sees = None if visible is None else self._picked(visible.expand_as(weights)[:, :, :1]).squeeze(2)
        own = slice(0, 1) if self.heads == 1 else heads
        partly = weights.shape[1] < of
        for k, (kind, count) in enumerate(zip(self.kinds, wanted, strict=True)):
            if not count.any():
                continue
            reduced = columns.mean(2) if kind.heads == "mean" else columns.sum(2) if kind.heads == "sum" else None
            reduced = columns.amax(2) if reduced is None else reduced
            share = count.to(weights.device, non_blocking=True)[:, None, :, None]
            seen = share.bool().expand(*reduced.shape) if sees is None else sees & share.bool()
            part = reduced * share
            if self.heads == 1:
                part, seen = part.sum(1, keepdim=True).div_(of), seen[:, :1]
            sums, counts = (x[:, own, :, : part.shape[3]] for x in self._totals(k, weights))
            if self.apart:
                sums.index_add_(2, at.to(part.device, non_blocking=True), part)
                counts[:, :, at.to(part.device, non_blocking=True)] |= seen
            else:
                sums.add_(part.sum(2, keepdim=True))
                counts.add_(seen.sum(2, keepdim=True) / (of if self.heads == 1 and partly else 1))

    def _totals(self, k: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Attention summed, and the queries that saw a token: query by query where these are looked at apart."""
        found = self.found[k]
        if found is None:
            shape = (self.batch, self.heads, self.tokens if self.apart else 1, self.live + self.tokens)
            counts = like.new_zeros(shape, dtype=torch.bool if self.apart else torch.float32)
            self.found[k] = found = like.new_zeros(shape), counts
        return found

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
            values, counts = (x[..., at : at + n] for x in found)
            if self.replaces[k]:
                known = self.counted[k].any(1).view(-1, 1, 1).to(scores.device, non_blocking=True)
                for at_kind, x in ((2 * k, values), (2 * k + 1, counts)):
                    scores[..., at_kind] = torch.where(known, self._last(x, self.counted[k]), scores[..., at_kind])
                continue
            if self.windows[k]:
                chosen, left = (x.to(scores.device, non_blocking=True) for x in self._window(k))
                scores[..., 2 * k : 2 * k + 2] *= left.view(-1, 1, 1, 1)
                if self.apart:
                    values, counts = (x * chosen[:, None, :, None] for x in (values, counts))
            scores[..., 2 * k] += values.sum(2)
            scores[..., 2 * k + 1] += counts.sum(2)

    def _window(self, k: int) -> tuple[Tensor, Tensor]:
        """Of an update's queries the newest ones, `[rows, queries]`, and how much of what was there is left: `[rows]`.

        The newest `window` queries were summed up, or all that there were. Some of them are replaced.
        """
        counted, window = self.counted[k], self.windows[k]
        later = counted.flip(1).cumsum(1).flip(1)
        chosen = counted & (later <= window)
        there = self.before.clamp(max=window)
        left = (window - chosen.sum(1)) / there.clamp(min=1)
        return chosen, left.clamp(max=1.0)

    def _last(self, values: Tensor, counted: Tensor) -> Tensor:
        """What the newest query of each row gave."""
        if not self.apart:
            return values[:, :, 0]
        order = torch.arange(1, counted.shape[1] + 1)
        newest = (counted * order).amax(1).clamp(min=1).sub(1).to(values.device, non_blocking=True)
        index = newest.view(-1, 1, 1, 1).expand(values.shape[0], values.shape[1], 1, values.shape[3])
        return values.gather(2, index).squeeze(2)

    def crop(self, tokens: int) -> None:
        """Take the queries from `tokens` on back."""
        self.tokens = tokens
        self.counted = [c[:, :tokens] for c in self.counted]
        self.found = [
            None if x is None else (x[0][:, :, :tokens].clone(), x[1][:, :, :tokens].clone()) for x in self.found
        ]

    def select(self, rows: Tensor) -> None:
        self.batch = len(rows)
        self.counted = [c if len(c) == 1 else c[rows.cpu()] for c in self.counted]
        self.before = self.before if len(self.before) == 1 else self.before[rows.cpu()]
        self.found = [None if x is None else (_rows(x[0], rows), _rows(x[1], rows)) for x in self.found]

    def to(self, device: torch.device) -> None:
        self.found = [None if x is None else (x[0].to(device), x[1].to(device)) for x in self.found]


def _rows(x: Tensor, rows: Tensor) -> Tensor:
    return x.index_select(0, rows.to(x.device))
