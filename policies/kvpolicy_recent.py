"""Policy `recent`: a window of the newest tokens."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from kvpolicy.hookspecs import hookimpl
from kvpolicy.interfaces.component import MOST, Window, budget_tokens
from kvpolicy.interfaces.policy import NEVER, Policy

Ints = NDArray[np.int64]


class Recent(Policy):
    """Keeps the newest tokens; what is older leaves, oldest first, in blocks.

    Source: the recent window of StreamingLLM (arXiv 2309.17453, section 3.2) with `flush: 1`; the residual of
    KIVI (arXiv 2402.02750, section 3.3) with `window: 0`; the window of LogQuant (arXiv 2503.19950, section 3)
    with `flush` equal to `window`. Between `window` and `window + flush - 1` tokens stay.
    """

    kind: Literal["recent"] = "recent"
    window: Window = Field(
        128, description="Newest tokens that always stay: a number of tokens, 0, or a fraction of the tokens seen."
    )
    flush: int = Field(
        1, ge=1, le=MOST, description="Overdue tokens leave once there are this many, in multiples of it."
    )

    def _newest_overdue(self, seen: Ints) -> Ints:
        window: Any = self.window
        if isinstance(window, float):
            window = np.maximum(1, np.floor(window * seen).astype(np.int64))
        newest: Ints = seen - 1 - window
        return newest

    def keep(self, positions: Ints, seen: int) -> NDArray[np.bool_]:
        window = budget_tokens(self.window, seen) if self.window else 0
        overdue = int(np.searchsorted(positions, seen - 1 - window, side="right"))
        keep = np.ones(len(positions), dtype=np.bool_)
        keep[: overdue // self.flush * self.flush] = False
        return keep

    def departures(self, positions: Ints, arrivals: Ints, start: int, stop: int) -> Ints:
        left = np.full(len(positions), NEVER, dtype=np.int64)
        if stop == start + 1:  # a step of decoding: there is one time to leave
            left[~self.keep(positions, stop)] = stop
            return left
        if len(arrivals) > 1 and (np.diff(np.maximum(arrivals, start)) < 0).any():
            return super().departures(positions, arrivals, start, stop)
        steps = np.arange(start + 1, stop + 1, dtype=np.int64)
        overdue = start + 1 + np.searchsorted(self._newest_overdue(steps), positions, side="left")
        ready = np.maximum(overdue, arrivals)
        last = np.arange(self.flush - 1, len(positions), self.flush)
        events = ready[last]
        gone = int((events <= stop).sum())
        left[: gone * self.flush] = np.repeat(events[:gone], self.flush)
        return left


@hookimpl
def kvpolicy_policies() -> list[type[Policy]]:
    return [Recent]
