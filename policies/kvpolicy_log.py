"""Policy `log`: positions whose density falls with their distance."""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from kvpolicy.hookspecs import hookimpl
from kvpolicy.interfaces.component import Budget, budget_tokens
from kvpolicy.interfaces.policy import Policy


class Log(Policy):
    """Keeps tokens at log-spaced distances: each time the budget is passed, every second token leaves.

    Source: LogQuant (arXiv 2503.19950, section 3, algorithm 1). Deviation: the official code thins its window
    and its log-spaced tokens together at a flush; here the same positions result from a `recent` tier with
    `flush` equal to the budget above this one.
    """

    kind: Literal["log"] = "log"
    acts: ClassVar[Literal["arrival", "step"]] = "arrival"
    budget: Budget = Field(42, description="Tokens that stay at most: a number, or a fraction of the tokens seen.")

    def capacity(self, seen: int) -> int:
        return budget_tokens(self.budget, seen)

    def keep(self, positions: NDArray[np.int64], seen: int) -> NDArray[np.bool_]:
        stride, budget = 1, self.capacity(seen)
        while -(-len(positions) // stride) > budget:
            stride *= 2
        keep: NDArray[np.bool_] = np.arange(len(positions)) % stride == 0
        return keep


@hookimpl
def kvpolicy_policies() -> list[type[Policy]]:
    return [Log]
