"""Pages that count: what a reader keeps of them, known from one page."""

from __future__ import annotations

import torch

from kvpolicy.interfaces.reader import Reader
from kvpolicy.interfaces.reader_checks import summarized
from kvpolicy.interfaces.site import Site
from kvpolicy.layer.paging import PageTable, room_for
from kvpolicy.placement.held_per_head import HeldPerHead
from kvpolicy.storage.base import Store

__all__ = ["PlannedPages"]


class PlannedPages(PageTable):
    """A table of pages of which only the number is known.

    Args:
        reader: that chooses among them.
        batch: rows.
        dim: channels of a key.
    """

    def __init__(self, reader: Reader, batch: int, dim: int) -> None:
        super().__init__(reader)
        self.batch, self.dim = batch, dim

    def forget(self) -> None:
        super().forget()
        self.room = 0
        self.of_page = 0, 0
        """Bytes of a page's summary, and of its places."""

    def refresh(self, store: Store, planner: HeldPerHead, site: Site, dtype: torch.dtype) -> None:
        pages = self.pages_of(planner.step.seen)
        if not self.room or self.room <= pages or self.settled > store.length:
            self.forget()
            self.room = room_for(pages)
        places = self.batch * (site.kv_heads if planner.placement.by_head else 1) * self.reader.page * 4
        summary = self.of_page[0]
        if store.length > self.settled and not summary:
            keys = torch.zeros((1, site.kv_heads, 1, self.reader.page, self.dim), dtype=dtype)
            real = torch.ones((1, site.kv_heads, 1, self.reader.page), dtype=torch.bool)
            found = summarized(self.reader, keys, real, site)
            summary = self.batch * sum(t.nbytes for t in found.values())
        self.of_page, self.settled = (summary, places), store.length - (store.waiting or 0)

    def bytes(self, tokens: int) -> dict[str, int]:
        if not self.room:
            return {}
        pages, (summary, places) = self.pages_of(tokens), self.of_page
        used = {"extras": summary * pages, "indices": places * pages}
        return {**used, "reserved": self.room * (summary + places) - used["indices"]}
