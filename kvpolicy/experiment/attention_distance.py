"""Mean attention by distance from the query, and the power law that describes it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

SINKS = 4
"""The first tokens of a text, which draw attention at any distance. They are counted apart."""
NEAREST = 8
"""The fit begins at this distance: nearer tokens are in the window of any recipe."""
FEWEST = 5
"""Bins that a fit needs."""
_EDGES = np.unique(np.ceil(2.0 ** (np.arange(4 * 26) / 4)).astype(np.int64))
"""Least distance of each bin: each is 2^(1/4) of the one before, or 1 more."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class PowerLaw:
    """`attention = factor * distance ** -exponent`."""

    exponent: float
    factor: float
    r2: float
    """Coefficient of determination, of logarithms."""
    first: float
    """The least distance that was fitted."""
    last: float
    """The greatest."""

    def __call__(self, distance: Any) -> Any:
        return self.factor * np.asarray(distance, dtype=np.float64) ** -self.exponent


def fit_power_law(distances: Any, attention: Any) -> PowerLaw | None:
    """Least squares of log attention on log distance, each point with the same weight.

    Returns:
        None where fewer than 5 points are above 0.
    """
    x, y = np.asarray(distances, dtype=np.float64), np.asarray(attention, dtype=np.float64)
    x, y = x[y > 0], y[y > 0]
    if len(x) < FEWEST:
        return None
    log_x, log_y = np.log(x), np.log(y)
    slope, intercept = np.polyfit(log_x, log_y, 1)
    total = ((log_y - log_y.mean()) ** 2).sum()
    r2 = 1 - ((log_y - slope * log_x - intercept) ** 2).sum() / total if total else 1.0
    return PowerLaw(float(-slope), math.exp(intercept), float(r2), float(x.min()), float(x.max()))


class Profile:
    """Attention of one layer by distance: query position minus token position, in logarithmic bins."""

    def __init__(self) -> None:
        self.attention: Floats = np.zeros(len(_EDGES))
        self.tokens: Floats = np.zeros(len(_EDGES))
        self.queries, self.sinks, self.own = 0, 0.0, 0.0

    def add(self, weights: Floats) -> None:
        """Add queries: attention `[queries, tokens seen]`, the queries being the newest of the tokens."""
        queries, seen = weights.shape
        positions = np.arange(seen)
        distance = np.arange(seen - queries, seen)[:, None] - positions
        counted = (distance > 0) & (positions >= SINKS)
        bins = np.searchsorted(_EDGES, distance[counted], side="right") - 1
        self.attention += np.bincount(bins, weights[counted], minlength=len(_EDGES))
        self.tokens += np.bincount(bins, minlength=len(_EDGES))
        self.sinks += float(weights[(distance > 0) & (positions < SINKS)].sum())
        self.own += float(weights[distance == 0].sum())
        self.queries += queries

    def merge(self, other: Profile) -> None:
        """Add what another profile counted."""
        self.attention += other.attention
        self.tokens += other.tokens
        self.queries += other.queries
        self.sinks += other.sinks
        self.own += other.own

    def sums(self) -> list[Any]:
        """What was counted, as plain values, from which `of` makes an equal profile."""
        last = int(np.flatnonzero(self.tokens).max(initial=-1)) + 1
        return [self.queries, self.sinks, self.own, self.tokens[:last].tolist(), self.attention[:last].tolist()]

    @classmethod
    def of(cls, sums: Sequence[Any]) -> Profile:
        """The profile whose `sums` these are."""
        made = cls()
        made.queries, made.sinks, made.own, tokens, attention = sums
        made.tokens[: len(tokens)], made.attention[: len(attention)] = tokens, attention
        return made

    def mean(self) -> Floats:
        """Mean attention per token of each bin; nan where fewer than half of the queries reach the whole bin."""
        whole = self.queries * np.diff(_EDGES, append=2 * _EDGES[-1])
        reached = (self.tokens > 0) & (self.tokens >= whole / 2)
        return np.where(reached, self.attention / np.maximum(self.tokens, 1), np.nan)


@dataclass
class Distances:
    """Mean attention by distance from the query, of the layers of a model."""

    layers: dict[int, Profile] = field(default_factory=dict)
    """By the number of the layer."""

    def profile(self, layer: int) -> Profile:
        """The profile of a layer, to be added to."""
        return self.layers.setdefault(layer, Profile())

    def merge(self, other: Distances) -> None:
        """Add what another run counted."""
        for layer, profile in other.layers.items():
            self.profile(layer).merge(profile)

    def sums(self) -> dict[str, list[Any]]:
        """What was counted, as plain values."""
        return {str(layer): profile.sums() for layer, profile in self.layers.items()}

    @classmethod
    def of(cls, runs: Iterable[Mapping[str, Sequence[Any]]]) -> Distances:
        """What runs counted together, from the `sums` of each."""
        made = cls()
        for sums in runs:
            made.merge(cls({int(layer): Profile.of(counted) for layer, counted in sums.items()}))
        return made

    @property
    def distances(self) -> Floats:
        """The middle (geometric mean) of each bin that at least half of the queries reach."""
        reached = self._reached()
        last = np.append(_EDGES[1:], 2 * _EDGES[-1]) - 1
        middle: Floats = np.sqrt(_EDGES * last.astype(np.float64))[reached]
        return middle

    def curves(self) -> dict[int, Floats]:
        """Mean attention per token of each layer, at `distances`."""
        reached = self._reached()
        return {layer: self.layers[layer].mean()[reached] for layer in sorted(self.layers)}

    def mean(self) -> Floats:
        """Mean attention per token over the layers, at `distances`."""
        curves = list(self.curves().values())
        return np.mean(curves, axis=0) if curves else np.zeros(0)

    def fit(self, layer: int | None = None) -> PowerLaw | None:
        """The power law of a layer, or of the layers' mean.

        Fitted from distance 8 (nearer tokens are in the window of any recipe) to the last that half of the queries
        reach; without the first 4 tokens of the text, whose attention says nothing of their distance.
        """
        attention = self.mean() if layer is None else self.curves()[layer]
        far = self.distances >= NEAREST
        return fit_power_law(self.distances[far], attention[far])

    def shares(self) -> dict[str, float]:
        """Shares of attention that the curves leave out: of the first 4 tokens, and of the query's own."""
        queries = sum(profile.queries for profile in self.layers.values()) or 1
        return {
            "first_tokens": sum(p.sinks for p in self.layers.values()) / queries,
            "own_token": sum(p.own for p in self.layers.values()) / queries,
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "distances": self.distances.tolist(),
            "mean": self.mean().tolist(),
            "layers": {str(layer): curve.tolist() for layer, curve in self.curves().items()},
            "fit": _plain(self.fit()),
            "fit_layers": {str(layer): _plain(self.fit(layer)) for layer in sorted(self.layers)},
            **self.shares(),
        }

    def sentence(self) -> str:
        """The fit in words, beside the claim behind log spacing: that attention falls as distance^-1."""
        fit = self.fit()
        if fit is None:
            return "attention by distance: the answers' queries reach too few tokens for a fit."
        left_out = f"without the first {SINKS} tokens ({100 * self.shares()['first_tokens']:.0f}% of attention)"
        return (
            f"attention by distance (exact cache): alpha = {fit.exponent:.2f}, R² = {fit.r2:.2f}; mean attention per "
            f"token as distance^-alpha, fitted from distance {fit.first:.0f} to {fit.last:.0f}, {left_out}: "
            f"{_verdict(fit)}."
        )

    def _reached(self) -> NDArray[np.bool_]:
        reached: NDArray[np.bool_] = np.full(len(_EDGES), bool(self.layers))
        for profile in self.layers.values():
            reached &= np.isfinite(profile.mean())
        return reached


def _verdict(fit: PowerLaw) -> str:
    if fit.r2 < 0.8:
        return "no power law"
    if 0.75 <= fit.exponent <= 1.25:
        return "as log spacing assumes (alpha = 1)"
    return f"{'slower' if fit.exponent < 1 else 'faster'} than log spacing assumes (alpha = 1)"


def _plain(fit: PowerLaw | None) -> dict[str, float] | None:
    if fit is None:
        return None
    return {"alpha": fit.exponent, "factor": fit.factor, "r2": fit.r2, "first": fit.first, "last": fit.last}
