"""Scorer `qaq`: the bits that a token's value needs."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from kvpolicy.hookspecs import hookimpl
from kvpolicy.interfaces.scorer import Given, Scorer
from kvpolicy.interfaces.scores import Scores
from kvpolicy.interfaces.site import Site


class Qaq(Scorer):
    """Scores a token by the bits that its value needs, before they are rounded up, for an error that attention allows.

    The error of an output may have a standard deviation of `error`. Of T tokens each may add as much, so the value of a
    token that attention weighs with S may be off by `error / (sqrt(T) * S)`. Rounding to one of 2**B parts of a range
    r is off by `r / 2**B / sqrt(12)`. So B is `log2(r * sqrt(T) * S / (sqrt(12) * error))`: with `threshold: 4` tokens
    stay that need more than 4 bits.

    Source: QAQ (arXiv 2403.04643, section 4.1, values). Deviations: S is the attention of the newest query, the largest
    of the query heads, where the paper takes the largest of the last n queries; the range is that of one head.
    """

    kind: Literal["qaq"] = "qaq"
    needs: ClassVar[frozenset[str]] = frozenset({"values", "attention", "positions"})
    error: float = Field(
        1.0, gt=0, description="Standard deviation of the error that attention outputs may have, in units of values."
    )

    def scores(self) -> Scores:
        return Scores("last", "last", "max")

    def score(self, given: Given, site: Site) -> Tensor:
        low, high = torch.aminmax(given.values.float(), dim=3)
        return torch.log2(high - low)

    def again(self, noted: Tensor, given: Given, site: Site) -> Tensor:
        tokens = given.positions + given.ages
        return noted + torch.log2(given.attention) + 0.5 * torch.log2(tokens) - math.log2(math.sqrt(12) * self.error)


@hookimpl
def kvpolicy_scorers() -> list[type[Scorer]]:
    return [Qaq]
