"""Where the tokens of a store come from, where they differ by row or KV head."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from kvpolicy.storage.pages import Pages

EMPTY = -1
"""The position of a place that holds no token: rows shorter than others have such."""


class ColumnMap(NamedTuple):
    """The order in which attention has the tokens of a layer side by side."""

    keys: list[int | Tensor]
    """For each store of keys where its tokens stand: an offset, or an index for each."""
    values: list[int | Tensor]
    width: int
    gaps: bool
    """Whether some columns hold no token."""
    positions: Callable[[], Tensor]
    """The position of each column, `EMPTY` where no token is: `[columns]` or `[batch, kv_heads or 1, columns]`."""


class Candidates(NamedTuple):
    """The tokens that may move in an update, side by side: those of some stores, then the new ones."""

    live: list[int]
    """The stores among them."""
    bounds: list[int]
    """Where each store begins, where the new tokens begin, and the end."""
    positions: Tensor
    target: Tensor
    """The tier that each is to be in."""
    scores: Tensor | None


class TokenTable:
    """Position and tier of each token of a store, by row and head, and the attention it received.

    Positions are slots of the padded text. All rows and heads have the same number of places; a place may be `EMPTY`.
    """

    def __init__(self, lines: tuple[int, int], device: torch.device, scored: bool, tier_dtype: torch.dtype) -> None:
        self.lines, self.device, self.tier_dtype = lines, device, tier_dtype
        self.parts = {name: Pages(whole=True) for name in ("positions", "tiers", *(["scores"] if scored else []))}
        self.gaps = False
        """Whether some place may be empty."""

    @property
    def length(self) -> int:
        return self.parts["positions"].length

    def _view(self, name: str, dtype: torch.dtype) -> Tensor:
        part = self.parts[name]
        if not part.length:
            return torch.empty((*self.lines, 0), dtype=dtype, device=self.device)
        return part.all().squeeze(3)

    @property
    def positions(self) -> Tensor:
        """`[batch, kv_heads or 1, places]`, int32."""
        return self._view("positions", torch.int32)

    @property
    def tiers(self) -> Tensor:
        """`[batch, kv_heads or 1, places]`, int8, or int16 where there are so many tiers."""
        return self._view("tiers", self.tier_dtype)

    @property
    def scores(self) -> Tensor | None:
        """`[batch, kv_heads or 1, places, 2 x kinds]`, or None."""
        part = self.parts.get("scores")
        return part.all() if part is not None and part.length else None

    def append(self, positions: Tensor, tiers: Tensor, scores: Tensor | None) -> None:
        self.parts["positions"].append(positions.to(torch.int32).unsqueeze(3))
        self.parts["tiers"].append(tiers.to(self.tier_dtype).unsqueeze(3))
        if "scores" in self.parts:
            assert scores is not None
            self.parts["scores"].append(scores)

    def surplus(self) -> Tensor | None:
        """Empty places that no row needs, as many in each: `[batch, kv_heads or 1, places]`, the last ones first."""
        empty = self.positions == EMPTY
        counts = empty.sum(2)
        self.gaps = bool(counts.max() > counts.min())
        n = int(counts.min())
        if not n:
            return None
        from_end = empty.flip(2).cumsum(2).flip(2)
        return (empty & (from_end <= n)).nonzero()[:, 2].view(*empty.shape[:2], n)

    def remove(self, index: Tensor) -> None:
        for part in self.parts.values():
            part.remove(index)

    def select(self, rows: Tensor) -> None:
        self.lines = (len(rows), self.lines[1])
        for part in self.parts.values():
            part.select(rows)

    def to(self, device: torch.device) -> None:
        self.device = device
        for part in self.parts.values():
            part.to(device)

    def bytes(self) -> dict[str, int]:
        """Bytes used, by what they hold: indices and scores."""
        used = {name: part.used() for name, part in self.parts.items()}
        return {"indices": used["positions"] + used["tiers"], "scores": used.get("scores", 0)}

    def reserved(self) -> int:
        return sum(part.reserved() for part in self.parts.values())


def indices_of(mask: Tensor) -> Tensor | None:
    """Where `mask`, `[batch, heads, places]`, is True: for each head an index, filled up with `EMPTY`."""
    counts = mask.sum(2)
    most = int(counts.max()) if counts.numel() else 0
    if not most:
        return None
    found = mask.nonzero()
    if len(found) == most * counts.numel():
        return found[:, 2].view(*counts.shape, most)
    order = (mask.cumsum(2) - 1)[mask]
    index = torch.full((*counts.shape, most), EMPTY, dtype=torch.int64, device=mask.device)
    index[found[:, 0], found[:, 1], order] = found[:, 2]
    return index


def in_order(tables: list[TokenTable]) -> tuple[Tensor, Tensor]:
    """The tokens of all tables by position, and the positions; of empty places only as many as some row needs."""
    positions = torch.cat([t.positions for t in tables], dim=2)
    order = positions.argsort(dim=2, stable=True)
    found = positions.gather(2, order)
    surplus = int((found < 0).sum(2).min()) if found.numel() else 0
    return order[:, :, surplus:], found[:, :, surplus:]
