"""Policy `residual`: the prompt leaves whole, and what comes after it in blocks."""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from kvpolicy.hookspecs import hookimpl
from kvpolicy.interfaces.component import MOST
from kvpolicy.interfaces.policy import NEVER, Policy

Ints = NDArray[np.int64]


class Residual(Policy):
    """Keeps all tokens while the prompt goes on; at its end all of it leaves, and later ones leave `length` at a time.

    Source: `QuantizedCache` of transformers, whose residual this is for decoding token by token. Deviation: there an
    update of several tokens after the prompt may exceed the residual and leaves with it as a whole; here tokens are
    placed as if fed one by one.
    """

    kind: Literal["residual"] = "residual"
    acts: ClassVar[Literal["arrival", "step"]] = "arrival"
    needs: ClassVar[frozenset[str]] = frozenset({"prompt"})
    length: int = Field(128, ge=1, le=MOST, description="Tokens after the prompt leave once there are this many.")

    def keep(self, positions: Ints, seen: int, prompt: int | None = None) -> NDArray[np.bool_]:
        keep = np.ones(len(positions), dtype=np.bool_)
        if prompt is not None:
            of_prompt = int(np.searchsorted(positions, prompt))
            keep[: of_prompt + (len(positions) - of_prompt) // self.length * self.length] = False
        return keep

    def departures(self, positions: Ints, arrivals: Ints, start: int, stop: int, prompt: int | None = None) -> Ints:
        if prompt is None:
            return np.full(len(positions), NEVER, dtype=np.int64)
        return self._by_keep(positions, arrivals, start, stop, prompt)


@hookimpl
def kvpolicy_policies() -> list[type[Policy]]:
    return [Residual]
