"""Reader `quest`: the pages in which a query may find the largest product."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from kvpolicy.hookspecs import hookimpl
from kvpolicy.interfaces.reader import Reader
from kvpolicy.interfaces.site import Site


class Quest(Reader):
    """Ranks pages by a bound of the product of the query with any key of them.

    The bound is the sum over channels of the larger of q * low and q * high, low and high being those of the page's
    keys. Each query head reads pages of its own, three or more.

    Source: Quest (arXiv 2406.10774, section 3.2; official code, commit 01c1623).
    """

    kind: Literal["quest"] = "quest"

    def count(self) -> int:
        return max(3, self.budget // self.page)

    def summarize(self, keys: Tensor, real: Tensor, site: Site) -> dict[str, Tensor]:
        none = ~real.unsqueeze(4)
        return {
            "low": keys.masked_fill(none, torch.inf).amin(3),
            "high": keys.masked_fill(none, -torch.inf).amax(3),
        }

    def score(self, query: Tensor, summary: Mapping[str, Tensor], site: Site) -> Tensor:
        low, high = (summary[name].float().transpose(2, 3) for name in ("low", "high"))
        return query.clamp(max=0) @ low + query.clamp(min=0) @ high


@hookimpl
def kvpolicy_readers() -> list[type[Reader]]:
    """The reader of this file."""
    return [Quest]
