"""Scorer `expected_attention`: the attention that tokens may expect of queries to come."""

from __future__ import annotations

from typing import ClassVar, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from kvpolicy.hookspecs import hookimpl
from kvpolicy.interfaces.component import MOST
from kvpolicy.interfaces.scorer import Given, Scorer
from kvpolicy.interfaces.site import Site


class Moments(NamedTuple):
    """Of queries, for each row and head."""

    mean: Tensor
    """`[batch, heads, head_dim]`."""
    covariance: Tensor | None
    """`[batch, heads, head_dim, head_dim]`."""


class ExpectedAttention(Scorer):
    """Ranks tokens by the attention that queries to come will give them if they are normal with the prompt's moments.

    For such queries q of mean m and covariance C the expectation of exp(q.k / sqrt(d)) is exp(m.k / sqrt(d) + k.Ck /
    2d). Moments are those of the queries before the rotary embedding, rotated as it rotates the coming positions on
    average.

    Source: Expected Attention as kvpress 0.5.5 has it. Deviation: where the model has no rotary embedding, or it is not
    known, queries are taken as they come.
    """

    kind: Literal["expected_attention"] = "expected_attention"
    needs: ClassVar[frozenset[str]] = frozenset({"keys", "values", "query", "positions"})
    pools: ClassVar[bool] = True
    future: int = Field(512, ge=1, le=1 << 20, description="Coming positions over which the rotation is averaged.")
    sinks: int = Field(
        4, ge=0, le=MOST, description="First tokens of the text, which always stay and whose queries don't count."
    )
    covariance: bool = Field(True, description="Whether the spread of the queries counts, or their mean alone.")
    values: bool = Field(True, description="Whether the expected attention is multiplied by the length of the value.")

    def score(self, given: Given, site: Site) -> Tensor:
        first = given.positions < self.sinks
        counted = given.real & ~first
        moments = self._moments(given, counted, site)
        expected = self._expected(given.keys.float(), moments, counted)
        if self.values:
            expected = expected * given.values.float().norm(dim=-1)
        return expected.masked_fill(first, torch.inf)

    def _moments(self, given: Given, counted: Tensor, site: Site) -> Moments:
        """Of the queries to come."""
        query, share = given.query.float(), counted[:, :1].float().unsqueeze(3)
        share = share[:, :, share.shape[2] - query.shape[2] :]
        at, seen = given.positions[:, 0], torch.where(given.real, given.positions + 1, 0).amax((1, 2))
        if site.rotary is not None:
            cos, sin = (x[:, at.shape[1] - query.shape[2] :].unsqueeze(1) for x in site.rotary(at))
            query = _turned(query, cos, -sin, site) / (cos.square() + sin.square()).amax(-1, keepdim=True)
        query = torch.where(share > 0, query, 0.0)
        count = share.sum(2).clamp(min=1.0)
        mean = query.sum(2) / count
        covariance = None
        if self.covariance:
            apart = (query - mean.unsqueeze(2)) * share
            covariance = apart.transpose(2, 3) @ apart / count.unsqueeze(3)
        if site.rotary is not None:
            coming = seen.unsqueeze(1) + torch.arange(self.future, device=seen.device)
            cos, sin = (x.mean(1)[:, None] for x in site.rotary(coming))
            mean = _turned(mean, cos, sin, site)
            if covariance is not None:
                cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
                covariance = _turned(_turned(covariance, cos, sin, site).transpose(2, 3), cos, sin, site)
        return Moments(mean, covariance)

    def _expected(self, keys: Tensor, moments: Moments, counted: Tensor) -> Tensor:
        """The expected attention of each token against that of the others of its update, 1 on average."""
        dim, groups = keys.shape[3], moments.mean.shape[1] // keys.shape[1]
        found = torch.zeros_like(keys[..., 0])
        for group in range(groups):
            scores = (keys @ moments.mean[:, group::groups].unsqueeze(3)).squeeze(3) / dim**0.5
            if moments.covariance is not None:
                scores = scores + ((keys @ moments.covariance[:, group::groups]) * keys).sum(3) / (2 * dim)
            found += scores.masked_fill(~counted, -torch.inf).softmax(-1).nan_to_num(nan=0.0)
        return found / groups * counted.sum(-1, keepdim=True)


def _turned(x: Tensor, cos: Tensor, sin: Tensor, site: Site) -> Tensor:
    """`x` `[..., head_dim]` rotated by a model's cos and sin of its first channels, or by their means."""
    count = cos.shape[-1]
    some = x[..., :count]
    if site.interleaved:
        across = torch.stack([-some[..., 1::2], some[..., ::2]], dim=-1).flatten(-2)
    else:
        across = torch.cat([-some[..., count // 2 :], some[..., : count // 2]], dim=-1)
    turned = some * cos + across * sin
    return turned if count == x.shape[-1] else torch.cat([turned, x[..., count:]], dim=-1)


@hookimpl
def kvpolicy_scorers() -> list[type[Scorer]]:
    return [ExpectedAttention]
