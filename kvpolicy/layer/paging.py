"""The pages of the last tier, from which a reader chooses at each decode step."""

from __future__ import annotations

import torch
from torch import Tensor

from kvpolicy.interfaces.reader import Reader
from kvpolicy.interfaces.reader_checks import page_count, page_scores, summarized
from kvpolicy.interfaces.site import Site
from kvpolicy.placement.held_per_head import HeldPerHead
from kvpolicy.storage.base import Store

NONE = -1
"""The place of a token that a page lacks."""
LOWEST = -(2.0**100)
"""The score of a nan; pages without tokens score minus infinity."""
AT_ONCE = 1 << 14
"""Tokens of a row and head that are summarized at a time."""
MORE = 4
"""A table has room for this part of its pages more."""


def room_for(pages: int) -> int:
    """Pages that a table made for so many has room for, and the one that takes what belongs to none."""
    return pages + pages // MORE + MORE + 1


class PageTable:
    """Where the tokens of each page are, and what a reader keeps of it.

    All is made from the stored keys. So it need not be saved, cropped or reordered: it is forgotten, and made anew at
    the next step. Tokens that only came since the last step are added.

    Pages are cut by the position of a token among the real ones of its row, whatever the padding.
    """

    def __init__(self, reader: Reader) -> None:
        self.reader = reader
        self.forget()

    def forget(self) -> None:
        """All that is known no longer holds."""
        self.places: Tensor | None = None
        """For each page, of a row and head, the places of its tokens in their store: `[batch, kv_heads or 1, pages,
        page]`, int32; the last page takes what belongs to none."""
        self.summary: dict[str, Tensor] = {}
        """`[batch, kv_heads, pages, ...]`."""
        self.settled = 0
        """Tokens of the store that are known and are decoded alike from now on."""

    def pages_of(self, tokens: int) -> int:
        return -(-tokens // self.reader.page)

    @property
    def most(self) -> int:
        """Tokens that a query reads at most."""
        return page_count(self.reader) * self.reader.page

    def bytes(self, tokens: int) -> dict[str, int]:
        """Bytes of the pages of so many tokens, by what they hold, and those reserved."""
        if self.places is None:
            return {}
        pages, room = self.pages_of(tokens), self.places.shape[2]
        summary = sum(t.nbytes for t in self.summary.values())
        used = {"extras": summary * pages // room, "indices": self.places.nbytes * pages // room}
        return {**used, "reserved": summary + self.places.nbytes - used["indices"]}

    def refresh(self, store: Store, planner: HeldPerHead, site: Site, dtype: torch.dtype) -> None:
        """Take note of the tokens that came to the store since the last time; `dtype` is the model's."""
        pages, length = self.pages_of(planner.step.seen), store.length
        if self.places is None or self.places.shape[2] <= pages or self.settled > length:
            self.forget()
            with torch.inference_mode(False):
                shape = (*planner.shape, room_for(pages), self.reader.page)
                self.places = torch.full(shape, NONE, dtype=torch.int32, device=planner.device)
        new = length - self.settled
        if not new:
            return
        where = planner.in_last(self.settled).long()
        none = self.places.shape[2] - 1
        where = where.where(where >= 0, none * self.reader.page)
        own = torch.arange(self.settled, length, dtype=torch.int32, device=where.device)
        self.places.flatten(2).scatter_(2, where, own.expand_as(where))
        if new * self.reader.page < length:
            self._note(store, where // self.reader.page, site, dtype)
        else:
            every = torch.arange(pages, device=where.device)
            for some in every.split(max(1, AT_ONCE // self.reader.page)):
                self._note(store, some.expand(*planner.shape, -1), site, dtype)
        self.settled = length - (store.waiting or 0)

    def _note(self, store: Store, pages: Tensor, site: Site, dtype: torch.dtype) -> None:
        """Summarize some pages anew, `[batch, kv_heads or 1, pages]`."""
        assert self.places is not None
        places = self.places.gather(2, pages.unsqueeze(3).expand(-1, -1, -1, self.reader.page))
        real = places != NONE
        keys = store.gather(places.clamp(min=0).flatten(2), dtype).unflatten(2, places.shape[2:])
        found = summarized(self.reader, keys.masked_fill(~real.unsqueeze(4), 0.0), real, site, self.summary)
        for name, t in found.items():
            if name not in self.summary:
                with torch.inference_mode(False):
                    shape = (*t.shape[:2], self.places.shape[2], *t.shape[3:])
                    self.summary[name] = torch.zeros(shape, dtype=t.dtype, device=t.device)
            at = pages.view(*pages.shape, *[1] * (t.ndim - 3)).expand_as(t)
            self.summary[name].scatter_(2, at, t)

    def choose(self, query: Tensor, seen: int, site: Site) -> Tensor | None:
        """The places of the tokens that a query `[batch, kv_heads, groups, head_dim]` reads; None: all of them.

        Returns:
            `[batch, kv_heads, groups or 1, tokens]`, `NONE` where there is none.
        """
        count, pages = page_count(self.reader), self.pages_of(seen)
        if pages <= count or self.places is None:
            return None
        places = self.places[:, :, :pages]
        summary = {name: t[:, :, :pages] for name, t in self.summary.items()}
        scores = page_scores(self.reader, query, summary, site)
        scores = scores.float().nan_to_num(nan=LOWEST, neginf=LOWEST, posinf=-LOWEST)
        empty = (places == NONE).all(3).unsqueeze(2)
        chosen = scores.masked_fill(empty, -torch.inf).topk(count, dim=3, sorted=False).indices
        flat = chosen.flatten(2).unsqueeze(3).expand(-1, -1, -1, self.reader.page)
        found = places.expand(-1, chosen.shape[1], -1, -1).gather(2, flat)
        tokens: Tensor = found.unflatten(2, chosen.shape[2:]).flatten(3)
        return tokens
