"""Scorer `kvzip`: the most attention that a token receives as the model repeats the context."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from kvpolicy.hookspecs import hookimpl
from kvpolicy.interfaces.component import MOST
from kvpolicy.interfaces.prompt_scorer import PromptScorer
from kvpolicy.interfaces.scorer import Scorer
from kvpolicy.interfaces.site import Site


class KVzip(PromptScorer):
    """Ranks pairs of key and value by the highest weight with which any query of a repeated context reads them.

    The context is fed again in chunks. The softmax is over the first tokens, the chunk, and what is fed. The score is
    the share of pairs, of all layers and heads together, that receive less: so a threshold of 0.7 keeps 30% of all.

    Source: KVzip (arXiv 2505.23416; official code, commit 5d84729).
    """

    kind: Literal["kvzip"] = "kvzip"
    chunk: int = Field(2048, ge=1, le=MOST, description="Tokens of the context that are fed again at a time.")
    sinks: int = Field(4, ge=0, le=MOST, description="First tokens, which are always kept.")

    def spans(self, length: int) -> Sequence[tuple[int, int]]:
        return [(first, min(first + self.chunk, length)) for first in range(0, length, self.chunk)]

    def note(self, query: Tensor, keys: Tensor, span: tuple[int, int], scaling: float, site: Site) -> Tensor:
        fed, every = query.shape[2], keys.shape[2]
        first, last = span
        sinks = torch.arange(min(self.sinks, first), device=keys.device)
        own = torch.arange(first, last, device=keys.device)
        new = torch.arange(every - fed, every, device=keys.device)
        seen = keys.index_select(2, torch.cat([sinks, own, new])).float().unsqueeze(2)
        found: Tensor | None = None
        for part in range(0, fed, 256):
            rows = query[:, :, part : part + 256].float().unflatten(1, (keys.shape[1], -1))
            weights = rows @ seen.transpose(3, 4) * scaling
            later = new > (every - fed + part + torch.arange(rows.shape[3], device=keys.device))[:, None]
            weights[..., -fed:].masked_fill_(later, -torch.inf)
            own_weights = weights.softmax(-1)[..., len(sinks) : len(sinks) + last - first].amax((2, 3))
            found = own_weights if found is None else torch.maximum(found, own_weights)
        assert found is not None
        return found

    def settle(self, scores: Mapping[int, Tensor]) -> dict[int, Tensor]:
        kept = {layer: x.clone() for layer, x in scores.items()}
        for x in kept.values():
            x[..., : self.sinks] = torch.inf
        device = next(iter(kept.values())).device
        every = torch.cat([x.flatten().to(device) for x in kept.values()]).sort().values
        return {layer: torch.searchsorted(every, x.to(device)).to(x.device) / len(every) for layer, x in kept.items()}


@hookimpl
def kvpolicy_scorers() -> list[type[Scorer]]:
    """The scorer of this file."""
    return [KVzip]
