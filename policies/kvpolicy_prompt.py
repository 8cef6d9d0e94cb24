"""Policy `prompt`: the tokens of the prompt."""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from kvpolicy.hookspecs import hookimpl
from kvpolicy.interfaces.policy import NEVER, Policy

Ints = NDArray[np.int64]


class Prompt(Policy):
    """Keeps the tokens of the prompt; those that come later leave. So a prompt may be stored otherwise than they.

    Source: GEAR (arXiv 2403.05527), which gives the error of the prompt another rank than that of later blocks.
    """

    kind: Literal["prompt"] = "prompt"
    acts: ClassVar[Literal["arrival", "step"]] = "arrival"
    needs: ClassVar[frozenset[str]] = frozenset({"prompt"})

    def keep(self, positions: Ints, seen: int, prompt: int | None = None) -> NDArray[np.bool_]:
        if prompt is None:
            return np.ones(len(positions), dtype=np.bool_)
        kept: NDArray[np.bool_] = positions < prompt
        return kept

    def departures(self, positions: Ints, arrivals: Ints, start: int, stop: int, prompt: int | None = None) -> Ints:
        kept = self.keep(positions, stop, prompt)
        return np.where(kept, NEVER, np.maximum(arrivals, start + 1))


@hookimpl
def kvpolicy_policies() -> list[type[Policy]]:
    return [Prompt]
