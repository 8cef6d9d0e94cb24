"""KVQuant: calibrator `kvquant`, and quantizers `nuq` and `nuq-static` by the levels that it finds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, PrivateAttr

from kvpolicy.hookspecs import hookimpl
from kvpolicy.interfaces.calibrator import Calibrator, Watched
from kvpolicy.interfaces.quantizer import Affine, AffineQuantizer, Quantizer, TensorQuantizer
from kvpolicy.interfaces.site import Site
from kvpolicy.storage.packing import looked_up, pack, unpack

if TYPE_CHECKING:
    from torch import Tensor, dtype

Floats = NDArray[np.float64]
BITS = (2, 3, 4)
"""Bits for which levels are found."""
BINS = 1024
"""Parts of [-1, 1] in which normalised numbers are counted."""
COUNTED = ("numbers", "plain", "squares")
"""How many numbers there are in each, their sum, and that of their squares."""


Norm = Literal["auto", True, False]
NORM = (
    "Q-Norm: decoded levels are moved and stretched, so that those of the calibration's numbers have the mean and the "
    "standard deviation of these. auto: with 2 bits."
)


class Nuq(AffineQuantizer):
    """The nearest of the levels of a calibration, which are denser where numbers are, and where they matter.

    The levels of a layer, and of keys or values, lie in [-1, 1]; a group is mapped there from its minimum and maximum.

    Source: KVQuant (arXiv 2401.18079, section 3.3, nuq; Q-Norm, of its first version and of its code). Deviations:
    groups lie within a head, where KVQuant has one for all heads of a token.
    """

    kind: Literal["nuq"] = "nuq"
    independent: ClassVar[bool] = True
    nbits: Literal[2, 3, 4] = Field(4, description="Bits per code.")
    unrotated: bool = Field(False, description="The levels of keys before RoPE, for use behind the transform unrotate.")
    norm: Norm = Field("auto", description=NORM)
    _levels: tuple[float, ...] | None = PrivateAttr(None)

    def at(self, site: Site) -> Nuq:
        placed = self.model_copy()
        placed._levels = tuple(_levels(self.nbits, self.unrotated, site).tolist())
        return placed

    def levels(self, site: Site) -> Tensor:
        return _decoded(self, site)

    def calibrate(self, groups: Tensor) -> Affine:
        assert self._levels is not None
        x = groups.float()
        low, high = torch.aminmax(x, dim=1, keepdim=True)
        half, middle = (high - low) / 2, (high + low) / 2
        codes = _nearest((x - middle) / torch.where(half > 0, half, 1.0), self._levels)
        return Affine(codes, half, middle)


class NuqStatic(TensorQuantizer):
    """As `nuq`, of numbers that the transform `range` has brought to [-1, 1]: codes alone are kept.

    Source: KVQuant (arXiv 2401.18079, sections 3.1 and 3.3: keys by channel, ranges that are found offline).
    """

    kind: Literal["nuq-static"] = "nuq-static"
    nbits: Literal[2, 3, 4] = Field(4, description="Bits per code.")
    unrotated: bool = Field(False, description="The levels of keys before RoPE, for use behind the transform unrotate.")
    norm: Norm = Field("auto", description=NORM)
    _levels: tuple[float, ...] | None = PrivateAttr(None)
    _decoded: tuple[float, ...] | None = PrivateAttr(None)
    _head_dim: int = PrivateAttr(0)

    def at(self, site: Site) -> NuqStatic:
        placed = self.model_copy()
        placed._levels = tuple(_levels(self.nbits, self.unrotated, site).tolist())
        placed._decoded = tuple(_decoded(self, site).tolist())
        placed._head_dim = site.head_dim
        return placed

    def encode(self, x: Tensor) -> dict[str, Tensor]:
        assert self._levels is not None
        return {"codes": pack(_nearest(x.float(), self._levels), self.nbits)}

    def decode(self, encoded: dict[str, Tensor], dtype: dtype) -> Tensor:
        assert self._decoded is not None
        codes = unpack(encoded["codes"], self.nbits, self._head_dim)
        return looked_up(codes, _table(self._decoded, codes.device)[0]).to(dtype)


def _levels(nbits: int, unrotated: bool, site: Site) -> Tensor:
    return site.calibrated(f"levels{nbits}", (2**nbits,), unrotated)


def _decoded(quantizer: Nuq | NuqStatic, site: Site) -> Tensor:
    """What codes stand for: the levels, or by Q-Norm others."""
    levels = _levels(quantizer.nbits, quantizer.unrotated, site)
    if quantizer.norm is False or (quantizer.norm == "auto" and quantizer.nbits != 2):
        return levels
    norm = site.calibrated(f"norm{quantizer.nbits}", (2,), quantizer.unrotated)
    return levels * norm[1] + norm[0]


@lru_cache(maxsize=512)
def _table(levels: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Levels, and the bounds between them."""
    with torch.inference_mode(False):
        table = torch.tensor(levels, device=device)
        return table, (table[1:] + table[:-1]) / 2


def _nearest(x: Tensor, levels: tuple[float, ...]) -> Tensor:
    return torch.bucketize(x.nan_to_num(0).contiguous(), _table(levels, x.device)[1]).to(torch.uint8)


class Kvquant(Calibrator):
    """Ranges of channels, and non-uniform levels, by which `nuq-static` codes keys and `nuq` values.

    In the first turn the range of each channel of keys is found, before and after RoPE: all but `share` of its numbers
    lie within. In the second, numbers within their range, normalised by it, are counted, weighted by the square of the
    loss's derivative times that of the range. For 2, 3 and 4 bits, levels are the k-means of what was counted. Of
    values a range is that of a token in a head, without its largest numbers. Numbers are counted without weights, too:
    by these the nearest levels have another mean and standard deviation than the numbers, which Q-Norm makes up for.

    Source: KVQuant (arXiv 2401.18079, sections 3.1 to 3.4 and appendix E, equation 7). Deviations: weights have the
    square of the range, as in the appendix; the official code leaves it out. The k-means is the best one for counts in
    1,024 bins, where the code takes one of scikit-learn's. The first token of a sample is left out.
    """

    kind: Literal["kvquant"] = "kvquant"
    turns: ClassVar[tuple[frozenset[str], ...]] = (frozenset(), frozenset({"gradients"}))
    share: float = Field(0.01, ge=0, lt=0.5, description="Share of numbers that are outliers.")

    def watch(self, given: Watched, state: Mapping[str, Tensor], turn: int) -> dict[str, Tensor]:
        keys = {side: x[0, :, 1:] for side in ("keys", "unrotated") if (x := getattr(given, side)) is not None}
        if turn == 0:
            return self._extremes(keys, state, given.length)
        found = self._ranges(state) if "count" in state else dict(state)
        for side, x in keys.items():
            low, high = (found[f"{side}.{name}"].to(x.device).unsqueeze(1) for name in ("low", "high"))
            half = torch.where(high > low, (high - low) / 2, 1.0)
            y, weights = (x - (high + low) / 2) / half, given.gradients[side][0, :, 1:].square() * half.square()
            _count(found, side, y, weights, y.abs() <= 1)
        x, within = given.values[0, :, 1:], self._within(given.values[0, :, 1:])
        low = torch.where(within, x, torch.inf).amin(-1, keepdim=True)
        high = torch.where(within, x, -torch.inf).amax(-1, keepdim=True)
        half = torch.where(high > low, (high - low) / 2, 1.0)
        y, weights = (x - (high + low) / 2) / half, given.gradients["values"][0, :, 1:].square() * half.square()
        _count(found, "values", y, weights, within)
        return found

    def _extremes(self, keys: Mapping[str, Tensor], state: Mapping[str, Tensor], length: int) -> dict[str, Tensor]:
        """Of each channel as many of the largest and smallest numbers as their percentiles take."""
        most, found = int(length * self.share / 2) + 2, {}
        for side, x in keys.items():
            for name, largest in (("top", True), ("bottom", False)):
                known = state.get(f"{side}.{name}")
                whole = x if known is None else torch.cat([x, known.to(x.device)], dim=1)
                found[f"{side}.{name}"] = whole.topk(min(most, whole.shape[1]), dim=1, largest=largest).values.cpu()
        count = next(iter(keys.values())).shape[1] + int(state.get("count", torch.zeros(1)))
        return {**found, "count": torch.tensor([count])}

    def _ranges(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The percentiles of each channel, between two numbers as far along as they say."""
        rank, found = (int(state["count"]) - 1) * self.share / 2, {}
        first, part = int(rank), rank - int(rank)
        for whole in state:
            if whole != "count":
                side, name = whole.split(".")
                x = state[whole]
                one, other = x[:, min(first, x.shape[1] - 1)], x[:, min(first + 1, x.shape[1] - 1)]
                found[f"{side}.{'high' if name == 'top' else 'low'}"] = one + (other - one) * part
        return found

    def _within(self, x: Tensor) -> Tensor:
        """All but the largest numbers of each token and head: as many as the extra `sparse` keeps."""
        within = torch.ones_like(x, dtype=torch.bool)
        if self.share:
            largest = x.abs().topk(max(1, int(self.share * x.shape[-1])), dim=-1).indices
            within.scatter_(-1, largest, False)
        return within

    def finish(self, state: Mapping[str, Tensor], site: Site) -> dict[str, Tensor]:
        found = {name: t for name, t in state.items() if name.endswith((".low", ".high"))}
        for side in ("keys", "unrotated", "values"):
            if f"{side}.weights" in state:
                tables = _means(state[f"{side}.weights"].numpy(), state[f"{side}.sums"].numpy())
                found |= {f"{side}.levels{nbits}": torch.from_numpy(tables[nbits]) for nbits in BITS}
                counted = np.stack([state[f"{side}.{name}"].numpy() for name in COUNTED])
                found |= {f"{side}.norm{nbits}": torch.from_numpy(_norm(counted, tables[nbits])) for nbits in BITS}
        return found


def _count(found: dict[str, Tensor], side: str, y: Tensor, weights: Tensor, within: Tensor) -> None:
    """Add numbers within [-1, 1] to the counts of a side: in each bin their weights and weighted sum, and `COUNTED`."""
    y, weights = (t[within].double() for t in (y, weights))
    index = ((y + 1) * (BINS / 2)).long().clamp(0, BINS - 1)
    unweighted = zip(COUNTED, (torch.ones_like(y), y, y * y), strict=True)
    for name, added in (("weights", weights), ("sums", weights * y), *unweighted):
        before = found.get(f"{side}.{name}")
        counted = torch.bincount(index, added, minlength=BINS).cpu()
        found[f"{side}.{name}"] = counted if before is None else before + counted


def _means(weights: Floats, sums: Floats) -> dict[int, NDArray[np.float32]]:
    """For each number of bits the best k-means of weighted numbers in bins: levels, ascending."""
    held = weights > 0
    w, x = weights[held], sums[held] / weights[held]
    order = np.argsort(x)
    w, x = w[order] / max(w.sum(), 1e-300), x[order]
    total, first, second = (np.concatenate([[0.0], np.cumsum(t)]) for t in (w, w * x, w * x * x))
    n, most = len(w), 2 ** max(BITS)
    # cost[i, j]: the error of one level for the numbers i to j - 1.
    share = np.maximum(total[None, :] - total[:, None], 1e-300)
    cost = (second[None, :] - second[:, None]) - (first[None, :] - first[:, None]) ** 2 / share
    cost = np.where(np.arange(n + 1)[:, None] < np.arange(n + 1)[None, :], np.maximum(cost, 0.0), np.inf)
    best, cuts = cost[0].copy(), [np.zeros(n + 1, dtype=np.int64)]
    tables: dict[int, NDArray[np.float32]] = {}
    for count in range(1, most + 1):
        if count > 1:
            step = best[:, None] + cost
            cuts.append(step.argmin(0))
            best = step.min(0)
        if count in (2**nbits for nbits in BITS):
            tables[round(math.log2(count))] = _filled(_centres(cuts, total, first, min(count, n)), count)
    return tables


def _norm(counted: Floats, levels: NDArray[np.float32]) -> NDArray[np.float32]:
    """Offset and scale by which decoded levels have the mean and standard deviation of the numbers that they code."""
    count, plain, squares = counted
    n = max(count.sum(), 1.0)
    chosen = levels.astype(np.float64)[np.abs((plain / np.maximum(count, 1.0))[:, None] - levels).argmin(1)]
    means = plain.sum() / n, (count * chosen).sum() / n
    first, second = squares.sum() / n - means[0] ** 2, (count * chosen**2).sum() / n - means[1] ** 2
    scale = math.sqrt(first / second) if first > 0 and second > 0 else 1.0
    return np.array([means[0] - means[1] * scale, scale], dtype=np.float32)


def _centres(cuts: list[NDArray[np.int64]], total: Floats, first: Floats, count: int) -> Floats:
    """The means of the cells of the best division into `count`."""
    found, end = [], len(total) - 1
    for cell in range(count - 1, -1, -1):
        start = int(cuts[cell][end])
        found.append((first[end] - first[start]) / max(total[end] - total[start], 1e-300))
        end = start
    return np.array(found[::-1])


def _filled(levels: Floats, count: int) -> NDArray[np.float32]:
    """As many levels as asked for, each other than the next: where there are fewer numbers, more between them."""
    found = np.unique(levels.astype(np.float32))
    while len(found) < count:
        ends = np.concatenate([[-1.0], found, [1.0]])
        gap = int(np.diff(ends).argmax())
        found = np.unique(np.append(found, np.float32((ends[gap] + ends[gap + 1]) / 2)))
    return found


@hookimpl
def kvpolicy_quantizers() -> list[type[Quantizer]]:
    return [Nuq, NuqStatic]


@hookimpl
def kvpolicy_calibrators() -> list[type[Calibrator]]:
    return [Kvquant]
