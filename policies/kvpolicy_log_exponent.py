"""Calibrator `log`: how a model's attention falls with distance."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
import torch

from kvpolicy.hookspecs import hookimpl
from kvpolicy.interfaces.calibrator import Calibrator, Watched
from kvpolicy.interfaces.site import Site

if TYPE_CHECKING:
    from torch import Tensor

    from kvpolicy.experiment.attention_distance import Distances, Profile


class Log(Calibrator):
    """The exponent a of each layer, where mean attention falls as distance^-a: `keys.exponent`, and `keys.r2`.

    Attention of the newest 256 tokens of each sample over all is the mean over heads, in logarithmic bins of distance
    from 8 on, without the first 4 tokens of a text. A layer whose samples are too short for a fit has no entry. Of all
    layers together the exponent is said: `exponent` of policy `log`, where 1 is the spacing that LogQuant assumes.

    Source: LogQuant (arXiv 2503.19950, section 3), which assumes that attention falls with the logarithm of distance.
    """

    kind: Literal["log"] = "log"
    turns: ClassVar[tuple[frozenset[str], ...]] = (frozenset({"attention"}),)

    def watch(self, given: Watched, state: Mapping[str, Tensor], turn: int) -> dict[str, Tensor]:
        profile = _read(state)
        assert given.attention is not None
        profile.add(given.attention.double().cpu().numpy())
        counts = torch.tensor([profile.queries, profile.sinks, profile.own], dtype=torch.float64)
        return {
            "attention": torch.from_numpy(profile.attention.copy()),
            "tokens": torch.from_numpy(profile.tokens.copy()),
            "counts": counts,
        }

    def finish(self, state: Mapping[str, Tensor], site: Site) -> dict[str, Tensor]:
        fit = _all({site.layer: state}).fit(site.layer)
        found = {f"keys.{name}": state[name].float() for name in ("attention", "tokens", "counts")}
        if fit is None:
            return found
        return {**found, "keys.exponent": torch.tensor([fit.exponent]), "keys.r2": torch.tensor([fit.r2])}

    def sentence(self, found: Mapping[int, Mapping[str, Tensor]]) -> str:
        states = {
            layer: {name: tensors[f"keys.{name}"].double() for name in ("attention", "tokens", "counts")}
            for layer, tensors in found.items()
        }
        fit = _all(states).fit()
        if fit is None:
            return "The samples are too short to say how attention falls with distance; ask for more --tokens."
        return (
            f"Attention falls as distance^-{fit.exponent:.2f} (R² {fit.r2:.2f}), the mean of all layers: exponent "
            f"{fit.exponent:.2f} of policy log."
        )


def _read(state: Mapping[str, Tensor]) -> Profile:
    from kvpolicy.experiment.attention_distance import Profile

    profile = Profile()
    if state:
        profile.attention = np.asarray(state["attention"]).astype(np.float64)
        profile.tokens = np.asarray(state["tokens"]).astype(np.float64)
        queries, profile.sinks, profile.own = state["counts"].tolist()
        profile.queries = int(queries)
    return profile


def _all(states: Mapping[int, Mapping[str, Tensor]]) -> Distances:
    from kvpolicy.experiment.attention_distance import Distances

    return Distances({layer: _read(state) for layer, state in states.items()})


@hookimpl
def kvpolicy_calibrators() -> list[type[Calibrator]]:
    return [Log]
