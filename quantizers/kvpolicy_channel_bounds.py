"""Calibrators `skvq` and `wkvquant`: minima and maxima of channels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

import torch

from kvpolicy.hookspecs import hookimpl
from kvpolicy.interfaces.calibrator import Calibrator, Watched
from kvpolicy.interfaces.site import Site

if TYPE_CHECKING:
    from torch import Tensor


class Skvq(Calibrator):
    """The least and the largest number of each channel of keys, keys before RoPE, and values: `low` and `high`.

    The first token of each sample is left out, whose keys are unlike all others.

    Source: SKVQ (arXiv 2405.06219, section 3.2; the official code clusters channels by these two numbers).
    """

    kind: Literal["skvq"] = "skvq"

    def watch(self, given: Watched, state: Mapping[str, Tensor], turn: int) -> dict[str, Tensor]:
        found = {}
        for side in ("keys", "values", "unrotated"):
            x = getattr(given, side)
            if x is not None:
                low, high = torch.aminmax(x[0, :, 1:], dim=1)
                found[f"{side}.low"], found[f"{side}.high"] = low.cpu(), high.cpu()
        if not state:
            return found
        return {n: (torch.minimum if n.endswith("low") else torch.maximum)(t, state[n]) for n, t in found.items()}

    def finish(self, state: Mapping[str, Tensor], site: Site) -> dict[str, Tensor]:
        return dict(state)


class Wkvquant(Skvq):
    """The least and the largest number of each channel, as `skvq` finds them: what `scale` divides channels by.

    Source: WKVQuant (arXiv 2402.12065). Deviations: parameters are not learned.
    """

    kind: Literal["wkvquant"] = "wkvquant"  # type: ignore[assignment]


@hookimpl
def kvpolicy_calibrators() -> list[type[Calibrator]]:
    return [Skvq, Wkvquant]
