"""Scorer `window_attention`: what the newest queries attended to, smoothed over neighbours."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional

from kvpolicy.hookspecs import hookimpl
from kvpolicy.interfaces.component import MOST
from kvpolicy.interfaces.scorer import Given, Scorer
from kvpolicy.interfaces.scores import Scores
from kvpolicy.interfaces.site import Site


class WindowAttention(Scorer):
    """Ranks tokens by the attention of the newest queries, pooled over neighbours; these queries' own tokens first.

    Source: SnapKV (arXiv 2404.14469). Deviations: the query heads of a KV head are put together before
    neighbours are pooled; neighbours are those of the tier.
    """

    kind: Literal["window_attention"] = "window_attention"
    needs: ClassVar[frozenset[str]] = frozenset({"attention", "positions"})
    pools: ClassVar[bool] = True
    window: int = Field(32, ge=1, le=MOST, description="Newest queries that count. Their own tokens always stay.")
    heads: Literal["mean", "sum", "max"] = Field(
        "mean", description="How the query heads of a KV head are put together, query by query."
    )
    pool: Literal["max", "mean", "none"] = Field(
        "max",
        description="What stands for a token: the highest attention of it and its neighbours, their mean (with zeros "
        "beyond the ends), or its own.",
    )
    size: int = Field(7, ge=1, le=MOST, description="Tokens that are pooled, the token in the middle: an odd number.")

    @model_validator(mode="after")
    def _check_use(self) -> WindowAttention:
        """Options that would do nothing are refused."""
        if self.size % 2 == 0:
            raise ValueError(f"option 'size' must be odd, with the token in the middle, found {self.size}")
        if self.pool == "none" and self.size != type(self).model_fields["size"].default:
            raise ValueError(f"option 'size' must go with pool: max or mean, found size: {self.size} with pool: none")
        return self

    def scores(self) -> Scores:
        return Scores("newest", "newest", self.heads, newest=self.window)

    def score(self, given: Given, site: Site) -> Tensor:
        own = given.ages <= self.window
        attention = given.attention.masked_fill(own, 0.0)
        if self.pool == "max":
            attention = functional.max_pool1d(attention, self.size, 1, self.size // 2)
        elif self.pool == "mean":
            attention = functional.avg_pool1d(attention, self.size, 1, self.size // 2)
        return attention.masked_fill(own, torch.inf)


@hookimpl
def kvpolicy_scorers() -> list[type[Scorer]]:
    return [WindowAttention]
