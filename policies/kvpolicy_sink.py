"""Policy `sink`: the first tokens of the context."""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from kvpolicy.hookspecs import hookimpl
from kvpolicy.interfaces.component import MOST
from kvpolicy.interfaces.policy import NEVER, Policy

Ints = NDArray[np.int64]


class Sink(Policy):
    """Keeps the first tokens of the context, which attract attention whatever they say.

    Source: attention sinks of StreamingLLM (arXiv 2309.17453, section 3.1).
    """

    kind: Literal["sink"] = "sink"
    acts: ClassVar[Literal["arrival", "step"]] = "arrival"
    tokens: int = Field(4, ge=1, le=MOST, description="The first positions, which stay.")

    def keep(self, positions: Ints, seen: int) -> NDArray[np.bool_]:
        return positions < self.tokens

    def departures(self, positions: Ints, arrivals: Ints, start: int, stop: int) -> Ints:
        return np.where(positions < self.tokens, NEVER, np.maximum(arrivals, start + 1))


@hookimpl
def kvpolicy_policies() -> list[type[Policy]]:
    return [Sink]
