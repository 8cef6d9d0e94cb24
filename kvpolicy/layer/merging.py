"""Values of tokens that are being dropped, added to those of tokens that stay."""

from __future__ import annotations

import torch
from torch import Tensor

from kvpolicy.interfaces.merger import Merger, Tokens, shares_of
from kvpolicy.interfaces.site import Site
from kvpolicy.placement.moves import EMPTY
from kvpolicy.placement.planner import Placement
from kvpolicy.placement.ranking import Turn
from kvpolicy.placement.token_table import indices_of
from kvpolicy.storage.base import Store
from kvpolicy.storage.gather import gather_tokens

AT_ONCE = 256
"""Dropped tokens of a row and head that are merged at a time."""


def merge(merger: Merger, placement: Placement, turn: Turn, store: Store, new: dict[str, Tensor], site: Site) -> None:
    """Before the tokens of an update move: change the values in an exact store, and the new ones in `new`.

    How many are dropped at most is known to the host, so no device is waited for.
    """
    work, last, counts = turn.keys, len(placement.policies) - 1, turn.counts
    most = int((counts.before[:last].sum(0) + counts.new - counts.after[:last].sum(0)).max())
    if most <= 0 or work.scores is None:
        return
    real, held = work.positions >= 0, work.bounds[-2]
    positions = turn.step.in_text(work.positions).long()
    attention = work.scores[..., placement.scores.attention[last - 1]]
    stays = real & (work.target < last)
    index = indices_of(real & (work.target == last), most)
    kept = Tokens(positions.masked_fill(~stays, EMPTY), attention)
    added: Tensor | None = None
    for part in index.split(AT_ONCE, dim=2):
        at = part.clamp(min=0)
        gone = Tokens(positions.gather(2, at).masked_fill(part < 0, EMPTY), attention.gather(2, at))
        shares = shares_of(merger, gone, kept, site)
        own = shares.transpose(2, 3) @ _values(store, new["values"], at, held).float()
        added = own if added is None else added + own
    assert added is not None
    if held:
        every = store.parts["exact"].all()
        every.copy_((every.float() + added[:, :, :held]).to(every.dtype))
    if added.shape[2] > held:
        values = new["values"]
        new["values"] = (values.float() + added[:, :, held:]).to(values.dtype)


def _values(store: Store, new: Tensor, index: Tensor, held: int) -> Tensor:
    """The values at `index` among those of a store and the new ones."""
    found = gather_tokens(new, (index - held).clamp(min=0)) if new.shape[2] else None
    if not held:
        assert found is not None
        return found
    old = store.gather(index.clamp(max=held - 1), new.dtype)
    return old if found is None else torch.where((index >= held).unsqueeze(3), found, old)
