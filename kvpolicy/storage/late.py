"""Rows that have no token yet as a store finds out what it keeps of its first tokens."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["LateRows"]


class LateRows:
    """In a padded batch a row may bring nothing but empty places at first, which are zeros.

    What is kept of the first tokens is found again for such rows, once they bring some: as if each were alone.
    """

    def __init__(self) -> None:
        self.apart = False
        """Whether rows may differ at all."""
        self.full = False
        """Whether the host knows that the tokens which come now leave out no row."""
        self.rows: Tensor | None = None
        """Which have none so far, `[batch]`; None for no row."""

    def note(self, x: Tensor) -> None:
        """Tokens `[batch, kv_heads, tokens, head_dim]` came, as the first ones or while some rows had none.

        The device is asked, but only then, and only what the host does not know.
        """
        if not self.apart or (x.shape[0] == 1 and self.rows is None):
            return
        if self.full:
            self.rows = None
            return
        rows = ~(x != 0).flatten(1).any(1)
        rows = rows if self.rows is None else rows & self.rows
        self.rows = rows if bool(rows.any()) else None

    def chosen(self, kept: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What is kept, for late rows as it was found now."""
        rows = self.rows
        if rows is None:
            return dict(kept)
        each = {
            name: t.shape[0] == len(rows) and name in found and found[name].shape == t.shape for name, t in kept.items()
        }
        return {
            name: torch.where(rows.view(-1, *[1] * (t.ndim - 1)), found[name], t) if each[name] else t
            for name, t in kept.items()
        }

    def select(self, rows: Tensor) -> None:
        if self.rows is not None:
            self.rows = self.rows.index_select(0, rows.to(self.rows.device, non_blocking=True))

    def to(self, device: torch.device) -> None:
        if self.rows is not None:
            self.rows = self.rows.to(device, non_blocking=True)
