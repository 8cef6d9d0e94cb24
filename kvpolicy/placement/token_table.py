"""Where the tokens of a store come from, where they differ by row or KV head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kvpolicy.placement.moves import EMPTY, Flat, Ints
from kvpolicy.storage.front import Front
from kvpolicy.storage.pages import Leaving, Pages


class Run(NamedTuple):
    """Tokens that are neighbours in the text, all in the first tier."""

    first: int
    """The slot of the first one."""
    tokens: int
    blank: tuple[float, ...]
    """Their scores."""

    def tensors(self, table: TokenTable) -> tuple[Tensor, Tensor, Tensor]:
        """What `TokenTable.append` takes."""
        slots = torch.arange(self.first, self.first + self.tokens, dtype=torch.int32, device=table.device)
        tiers = torch.zeros_like(slots, dtype=table.tier_dtype)
        scores = torch.zeros((1, 1, self.tokens, len(self.blank)), device=table.device)
        for column, known in enumerate(self.blank):
            if known:
                scores[..., column] = known
        shape = *table.shape, self.tokens
        return slots.expand(shape), tiers.expand(shape), scores.expand(*shape, -1)


class TokenTable:
    """Position and tier of each token of a store, by row and head, and the attention it received.

    Positions are slots of the padded text. All rows and heads have the same number of places; a place may be `EMPTY`.
    What is read is a view to be written to, but of a table with a `front`: `lift` it first.
    """

    def __init__(self, shape: tuple[int, int], device: torch.device, scored: bool, tier_dtype: torch.dtype) -> None:
        self.shape, self.device, self.tier_dtype = shape, device, tier_dtype
        self._parts = {name: Pages(whole=True) for name in ("positions", "tiers", *(["scores"] if scored else []))}
        self._run: Run | None = None
        """Its last tokens, which are still to be written."""
        self._written = 0
        """Tokens before these."""
        self.gaps = False
        """Whether some place may be empty."""
        self.flat: Ints | None = None
        """How many tokens each row and head has of the first ones in the store, `[batch, kv_heads or 1]`, once each
        takes no more room than it needs; `front` is then what this table has of them, unless it was lifted."""
        self.wide = 0
        """Places that these are of, of each row and head."""

    @property
    def parts(self) -> dict[str, Pages]:
        """What is kept, by name."""
        if self._run is not None:
            for part, x in zip(self._parts.values(), self._columns(*self._run.tensors(self)), strict=True):
                if part.length > self._written:  # memory was short before, or it was interrupted
                    part.shorten(self._written)
                part.append(x)
            self._run = None
        return self._parts

    @property
    def front(self) -> Front | None:
        """The first tokens, where rows and heads of the table take no more room than each needs."""
        return self._parts["positions"].front

    @property
    def room(self) -> int:
        """Tokens of all rows and heads for which the store has room."""
        if self.flat is None:
            return self.shape[0] * self.shape[1] * self.length
        return int((self.flat + self.length - self.wide).sum())

    @classmethod
    def stacked(cls, tables: Sequence[TokenTable]) -> TokenTable:
        """The rows of several tables, one after the other."""
        first = tables[0]
        shape = sum(table.shape[0] for table in tables), first.shape[1]
        out = cls(shape, first.device, False, first.tier_dtype)
        out._parts = {name: Pages.stacked([t.parts[name] for t in tables]) for name in first.parts}
        out.gaps = first.gaps
        return out

    def rows(self, first: int, last: int) -> TokenTable:
        """Some rows, where they lie."""
        out = TokenTable((last - first, self.shape[1]), self.device, False, self.tier_dtype)
        out._parts = {name: part.rows(first, last) for name, part in self.parts.items()}
        out.gaps = self.gaps
        return out

    @property
    def length(self) -> int:
        return self._parts["positions"].length if self._run is None else self._written + self._run.tokens

    def _view(self, name: str, dtype: torch.dtype) -> Tensor:
        part = self.parts[name]
        if not part.length:
            return torch.empty((*self.shape, 0), dtype=dtype, device=self.device)
        return self._filled(part.all(), EMPTY if name == "positions" else torch.iinfo(dtype).max).squeeze(3)

    def _filled(self, x: Tensor, absent: int) -> Tensor:
        """What was read, `[batch, kv_heads or 1, places, width]`, with `absent` in places without room."""
        if self.front is None:
            return x
        counts = self.front.bounds[1].view(*self.shape, 1)
        places = torch.arange(x.shape[2], device=x.device)
        gone = (places >= counts) & (places < self.front.length)
        return x.masked_fill(gone.unsqueeze(3), absent)

    def flatten(self, counts: Ints) -> Flat:
        """Let rows and heads, which hold so many tokens, take no more room than that; returns what stays."""
        counts = np.broadcast_to(counts, self.shape)
        places = indices_of(self.positions != EMPTY, int(counts.max()))
        for part in self.parts.values():
            part.flatten(places, counts)
        self.gaps = bool((counts < counts.max()).any())
        self.flat, self.wide = counts if places.shape[2] else None, places.shape[2]
        return Flat(places, counts)

    def lift(self) -> None:
        """Give all places room, so that what is read can be written to."""
        if self.front is not None:
            known = {"positions": self.positions, "tiers": self.tiers, "scores": self.scores}
            for name, part in self.parts.items():
                part.lift()
                x = known[name]
                assert x is not None
                part.all().copy_(x.view_as(part.all()))

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
        return self._filled(part.all(), 0) if part is not None and part.length else None

    def tensors(self) -> dict[str, Tensor]:
        """All that is held, by name, for saving: `[batch, kv_heads or 1, places, width]`."""
        scores = self.scores
        own = {"positions": self.positions.unsqueeze(3), "tiers": self.tiers.unsqueeze(3)}
        return own if scores is None else {**own, "scores": scores}

    def append(self, positions: Tensor, tiers: Tensor, scores: Tensor | None) -> None:
        for part, x in zip(self.parts.values(), self._columns(positions, tiers, scores), strict=True):
            part.append(x)

    def _columns(self, positions: Tensor, tiers: Tensor, scores: Tensor | None) -> list[Tensor]:
        """What each of `parts` keeps of tokens."""
        found = [positions.to(torch.int32).unsqueeze(3), tiers.to(self.tier_dtype).unsqueeze(3)]
        if "scores" in self._parts:
            assert scores is not None
            found.append(scores)
        return found

    def append_run(self, run: Run) -> None:
        """`append` tokens, the same in all rows and heads; they are written once somebody asks for what is kept."""
        known = self._run
        if known is not None and (known.first + known.tokens, known.blank) == (run.first, run.blank):
            self._run = Run(known.first, known.tokens + run.tokens, run.blank)
            return
        self._written, self._run = self.parts["positions"].length, run

    def surplus(self, n: int) -> Leaving:
        """`n` empty places of each row and head, the last ones; without `gaps` there are no others."""
        empty = self.positions == EMPTY
        if n == 1:
            index = last_of(empty) if self.gaps else first_of(empty)
        elif self.gaps:
            from_end = empty.flip(2).cumsum(2, dtype=torch.int32).flip(2)
            index = indices_of(empty.logical_and_(from_end <= n), n)
        else:
            index = indices_of(empty, n)
        return Leaving.of(index, self.length)

    def remove(self, leaving: Leaving) -> None:
        for part in self.parts.values():
            part.remove(leaving)

    def select(self, rows: Tensor) -> None:
        parts = self.parts  # what is still to be written is of the rows, and on the device, that were before
        self.shape = (len(rows), self.shape[1])
        self.flat = self.flat[rows.cpu().numpy()] if self.flat is not None else None
        for part in parts.values():
            part.select(rows)

    def to(self, device: torch.device) -> None:
        parts, self.device = self.parts, device
        for part in parts.values():
            part.to(device)

    def bytes(self) -> dict[str, int]:
        """Bytes used, by what they hold: indices and scores."""
        used = {name: part.used() for name, part in self.parts.items()}
        bounds = sum(part.bounds() for part in self.parts.values())
        return {"indices": used["positions"] + used["tiers"] + bounds, "scores": used.get("scores", 0)}

    def reserved(self) -> int:
        return sum(part.reserved() for part in self.parts.values())


def indices_of(mask: Tensor, most: int) -> Tensor:
    """Where `mask`, `[batch, heads, places]`, is True: `[batch, heads, most]`, filled up with `EMPTY`.

    `most` is what the host knows to be enough, so that no device is asked for a number. If it is 1, the first counts.
    """
    if most == 1 and mask.shape[2]:
        first = first_of(mask)
        return first.masked_fill_(~mask.gather(2, first), EMPTY)
    index = mask.new_full((*mask.shape[:2], most + 1), EMPTY, dtype=torch.int64)
    at = mask.cumsum(2, dtype=torch.int32).sub_(1).masked_fill_(~mask, most).long()
    places = torch.arange(mask.shape[2], device=mask.device).expand_as(at)
    return index.scatter_(2, at, places)[:, :, :most]


def first_of(mask: Tensor) -> Tensor:
    """The first place of each row and head where `mask` is True, `[batch, heads, 1]`, if there is any."""
    return mask.view(torch.uint8).max(2, keepdim=True).indices


def last_of(mask: Tensor) -> Tensor:
    """The last such place."""
    return mask.shape[2] - 1 - first_of(mask.flip(2))


def in_order(tables: list[TokenTable], most: int) -> tuple[Tensor, Tensor]:
    """The tokens of all tables by position, and the positions; the `most` last places, of which some may be empty."""
    positions = torch.cat([t.positions for t in tables], dim=2)
    order = positions.argsort(dim=2, stable=True)[:, :, positions.shape[2] - most :]
    return order, positions.gather(2, order)


def _by_slot(tables: list[TokenTable], seen: int, what: Tensor, absent: int) -> Tensor:
    """For each of the `seen` slots what belongs to its token, `[batch, kv_heads or 1, seen + 1]`; the last is none."""
    positions = torch.cat([t.positions for t in tables], dim=2)
    found = what.new_full((*positions.shape[:2], seen + 1), absent)
    found.scatter_(2, torch.where(positions < 0, seen, positions).long(), what)
    found[..., seen] = absent
    return found


def present(tables: list[TokenTable], seen: int) -> Tensor:
    """The position of each slot whose token is in a table, else `EMPTY`; and `EMPTY` for what is no slot."""
    return _by_slot(tables, seen, torch.cat([t.positions for t in tables], dim=2).long(), EMPTY)


def codes_of(tables: list[TokenTable], seen: int, codes: list[int], absent: int) -> Tensor:
    """The code of the tier of each slot, int8; `absent` where its token is in no table."""
    tiers = torch.cat([t.tiers for t in tables], dim=2).long()
    known = torch.tensor([*codes, absent], dtype=torch.int8, device=tiers.device)
    return _by_slot(tables, seen, known[tiers.clamp(max=len(codes))], absent)[..., :seen]
