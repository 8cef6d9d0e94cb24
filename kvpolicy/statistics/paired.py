"""Tests and intervals of paired differences, by scipy and statsmodels, clustered where samples share a document."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvpolicy.statistics.pairs import Floats

FEW = 10
"""Where fewer pairs (or documents) differ, no approximation holds; differences are bounded by how often they occur."""
FEWEST_RESAMPLED = 40
"""Documents that a bootstrap needs; fewer have Student's interval."""
MOST_RESAMPLED = 2_000
"""Documents beyond which Student's t and resampling agree, and resampling takes long."""
RESAMPLES = 1_999
SIGNS = 9_999
_CELLS = 2_000_000
_SEED = 0


@dataclass(frozen=True)
class Paired:
    """What paired differences say."""

    difference: float
    """Mean of arm minus baseline."""
    low: float | None
    """Ends of the 95% confidence interval; None where there is none."""
    high: float | None
    interval: str
    """How the interval was made."""
    p: float | None
    """Two-sided, of no difference; None where it can't be tested."""
    test: str
    p_equivalent: float | None
    """The larger p of two one-sided tests against the margin; None without one, or where it can't be tested."""
    documents: int
    """Independent units: documents, or samples that stand for themselves."""
    deviation: float | None
    """Standard deviation of the differences of independent units; None for one unit."""
    bounded: bool
    """Whether hardly any pair differs, so that the interval comes from how often pairs differ."""
    agrees: bool
    """Whether test, interval and mean point to one side; without it nothing is better or worse."""
    why: str = ""
    """What keeps the differences from being tested."""


@dataclass(frozen=True)
class _Data:
    differences: Floats
    groups: Any
    """The number of each sample's document."""
    units: int
    differing: int
    """Documents in which some pair differs."""
    binary: bool
    reach: float | None
    """The largest difference that a pair can have."""

    @property
    def clustered(self) -> bool:
        return self.units < len(self.differences)

    @property
    def sums(self) -> Floats:
        return np.bincount(self.groups, self.differences, minlength=self.units).astype(np.float64)

    @property
    def sizes(self) -> Floats:
        return np.bincount(self.groups, minlength=self.units).astype(np.float64)

    @property
    def rare(self) -> bool:
        """Too few differences for an approximation, and most pairs tie."""
        return self.differing < FEW and 2 * self.differing <= self.units


def compare_pairs(
    differences: Floats,
    documents: Sequence[str],
    *,
    binary: bool,
    reach: float | None,
    weighted: bool = False,
    margin: float | None = None,
) -> Paired:
    """Compare an arm with the baseline on samples that both have.

    Right or wrong scores: McNemar's exact test; the interval of Agresti and Min (2005). Others: Wilcoxon's signed-rank
    test; a BCa bootstrap interval, below 40 pairs Student's. Where samples share documents, or are weighted: random
    signs of whole documents (a Monte-Carlo test), and whole documents are resampled. Equivalence: two one-sided
    t tests, with the document-robust error where documents are shared, and the bootstrap interval must lie within the
    margin, too. Where fewer than 10 pairs differ and most tie, the difference is bounded by Clopper-Pearson's limits
    on how often pairs differ.

    Args:
        differences: arm minus baseline, at least one.
        documents: the document of each sample.
        binary: whether both arms' scores are 0 or 1.
        reach: the largest difference that a pair can have; None: unbounded.
        weighted: whether the differences are scaled by task, so that ranks would say nothing.
        margin: within which arms count as equivalent.
    """
    unique, groups = np.unique(np.asarray(documents, dtype=object).astype(str), return_inverse=True)
    differing = len(np.unique(groups[differences != 0]))
    data = _Data(differences, groups, len(unique), differing, binary, reach)
    mean = float(differences.mean())
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        p, test, side = _test(data, weighted)
        low, high, interval = _interval(data, 0.95)
        equivalent = None if margin is None else _equivalence(data, margin)
        deviation = _deviation(data)
    agrees = side * mean > 0 and (low is None or high is None or data.rare or low * mean > 0 < high * mean)
    return Paired(
        mean, low, high, interval, p, test, equivalent, data.units, deviation, data.rare, agrees, _why(data, margin)
    )


def _why(data: _Data, margin: float | None) -> str:
    if data.units == 1:
        return "one sample" if len(data.differences) == 1 else "all samples share one document"
    if not data.differing:
        return f"all {len(data.differences)} pairs tie"
    if _constant(data):
        return "all differences are the same number"
    if margin is not None and data.rare and data.reach is None:
        return f"only {data.differing} pairs differ, too few to bound the mean"
    return ""


def _constant(data: _Data) -> bool:
    spread = float(np.ptp(data.differences))
    return spread <= 1e-12 * float(np.abs(data.differences).max(initial=0.0))


def _test(data: _Data, weighted: bool) -> tuple[float | None, str, int]:
    """p, the name of the test, and the side to which it points."""
    from scipy import stats
    from statsmodels.stats.contingency_tables import mcnemar

    d = data.differences
    side = int(np.sign(d.mean()))
    if data.clustered or weighted:
        if data.units > MOST_RESAMPLED:
            return (*_robust(data, 0.0, "two-sided"), side)
        name = "random signs of documents" if data.clustered else "random signs"
        return (1.0 if not data.differing else _random_signs(data), name, side)
    if data.binary:
        rise, fall = int((d > 0).sum()), int((d < 0).sum())
        p = float(mcnemar([[0, rise], [fall, 0]], exact=True).pvalue) if rise + fall else 1.0
        return p, "McNemar, exact", side
    if not data.differing:
        return 1.0, "Wilcoxon", 0
    greater = float(stats.wilcoxon(d, alternative="greater").pvalue)
    return float(stats.wilcoxon(d).pvalue), "Wilcoxon", 1 if greater < 0.5 else -1


def _random_signs(data: _Data) -> float:
    """As if each document's difference had come from either arm: their signs drawn anew."""
    from scipy import stats

    sums, rng = np.abs(data.sums), np.random.default_rng(_SEED)

    def draw(size: tuple[int, ...]) -> Floats:
        signs: Floats = rng.choice(np.array([-1.0, 1.0]), size=size)
        return sums * signs

    found = stats.monte_carlo_test(
        data.sums, draw, lambda x, axis: x.sum(axis), n_resamples=SIGNS, batch=max(1, _CELLS // data.units)
    )
    return float(min(1.0, found.pvalue))


def _robust(data: _Data, null: float, alternative: str) -> tuple[float | None, str]:
    """Student's t test of the mean against `null`; its error allows for shared documents."""
    from scipy import stats

    mean, error, freedom = _student(data)
    if not error:
        return None, "Student's t"
    t = (mean - null) / error
    p = {"two-sided": 2 * stats.t.sf(abs(t), freedom), "less": stats.t.cdf(t, freedom)}
    return float(p.get(alternative, stats.t.sf(t, freedom))), "Student's t"


def _student(data: _Data) -> tuple[float, float, int]:
    """Mean, its standard error and degrees of freedom; the error is 0 without spread."""
    from statsmodels.regression.linear_model import OLS
    from statsmodels.stats.weightstats import DescrStatsW

    d = data.differences
    if data.units < 2 or _constant(data):
        return float(d.mean()), 0.0, 1
    if not data.clustered:
        return float(d.mean()), float(DescrStatsW(d).std_mean), len(d) - 1
    fit = OLS(d, np.ones(len(d))).fit(cov_type="cluster", cov_kwds={"groups": data.groups}, use_t=True)
    error = float(fit.bse[0])
    return float(fit.params[0]), 0.0 if math.isnan(error) else error, data.units - 1


def _deviation(data: _Data) -> float | None:
    """As of independent units: sqrt(units) times the standard error."""
    if data.units < 2:
        return None
    return _student(data)[1] * math.sqrt(data.units)


def _interval(data: _Data, level: float) -> tuple[float | None, float | None, str]:
    if data.rare:
        return _bounds(data, level)
    if data.binary and not data.clustered:
        low, high = _agresti_min(data).zconfint_mean(1 - level)
        return max(float(low), -1.0), min(float(high), 1.0), "Agresti-Min"
    if data.units < 2 or _constant(data):
        return None, None, ""
    if FEWEST_RESAMPLED <= data.units <= MOST_RESAMPLED:
        found = _bootstrap(data, level)
        if found is not None:
            return (*found, "BCa, documents resampled" if data.clustered else "BCa")
    from scipy import stats

    mean, error, freedom = _student(data)
    if not error:
        return None, None, ""
    low, high = stats.t.interval(level, freedom, mean, error)
    if data.reach is not None:
        low, high = max(low, -data.reach), min(high, data.reach)
    return float(low), float(high), "Student's t, documents clustered" if data.clustered else "Student's t"


def _bootstrap(data: _Data, level: float) -> tuple[float, float] | None:
    from scipy import stats

    def ratio(sums: Floats, sizes: Floats, axis: int = -1) -> Any:
        return sums.sum(axis) / sizes.sum(axis)

    found = stats.bootstrap(
        (data.sums, data.sizes),
        ratio,
        paired=True,
        vectorized=True,
        confidence_level=level,
        n_resamples=RESAMPLES,
        batch=max(1, _CELLS // data.units),
        method="BCa",
        rng=np.random.default_rng(_SEED),
    ).confidence_interval
    low, high = float(found.low), float(found.high)
    return (low, high) if math.isfinite(low) and math.isfinite(high) else None


def _agresti_min(data: _Data) -> Any:
    """Half a pair is added to each cell of the table of two arms: two of them are ties."""
    from statsmodels.stats.weightstats import DescrStatsW

    rise, fall = (data.differences > 0).sum(), (data.differences < 0).sum()
    ties = len(data.differences) - rise - fall
    return DescrStatsW(np.array([1.0, -1.0, 0.0]), weights=np.array([rise + 0.5, fall + 0.5, ties + 1.0]))


def _bounds(data: _Data, level: float) -> tuple[float | None, float | None, str]:
    """From Clopper-Pearson's limits on how often pairs rise and fall, each at half of the error."""
    from statsmodels.stats.proportion import proportion_confint

    if data.reach is None:
        return None, None, ""
    d, n = data.differences, data.units
    alpha = (1 - level) / 2
    rise, fall = (
        proportion_confint(len(np.unique(data.groups[found])), n, alpha=alpha, method="beta")
        for found in (d > 0, d < 0)
    )
    reach = data.reach * float(data.sizes.max() / data.sizes.mean())
    if data.binary and not data.clustered:
        low, high = rise[0] - fall[1], rise[1] - fall[0]
    else:
        low, high = -fall[1] * reach, rise[1] * reach
    return max(float(low), -data.reach), min(float(high), data.reach), "Clopper-Pearson"


def _equivalence(data: _Data, margin: float) -> float | None:
    """The larger p of two one-sided tests: that the difference is at least the margin, below and above."""
    pairs = data.binary and not data.clustered
    if data.rare or (pairs and data.differing < FEW):
        return _bounded_equivalence(data, margin)
    if pairs:
        return float(_agresti_min(data).ztost_mean(-margin, margin)[0])
    if data.units < 2 or _constant(data):
        return None
    below, _ = _robust(data, -margin, "greater")
    above, _ = _robust(data, margin, "less")
    if below is None or above is None:
        return None
    p = max(below, above)
    if p < 0.05 and FEWEST_RESAMPLED <= data.units <= MOST_RESAMPLED:
        found = _bootstrap(data, 0.90)
        if found is not None and not (-margin < found[0] and found[1] < margin):
            return max(p, 0.05)
    return p


def _bounded_equivalence(data: _Data, margin: float) -> float | None:
    """The error at which the bounds just reach the margin."""
    from scipy import optimize

    if data.reach is None:
        return None

    def beyond(alpha: float) -> float:
        low, high, _ = _bounds(data, 1 - 2 * alpha)
        assert low is not None
        assert high is not None
        return max(-low, high) - margin

    if beyond(0.499) >= 0:
        return 0.5
    if beyond(1e-9) <= 0:
        return 1e-9
    return float(optimize.brentq(beyond, 1e-9, 0.499, xtol=1e-9))
