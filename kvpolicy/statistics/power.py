"""The smallest difference that so many samples can show, known before a run."""

from __future__ import annotations

import math

from kvpolicy.errors import CompareError
from kvpolicy.words import in_words


def minimum_effect(
    n: int,
    *,
    deviation: float | None = None,
    comparisons: int = 1,
    alpha: float = 0.05,
    power: float = 0.8,
) -> float | None:
    """The smallest true difference that a comparison of `n` pairs finds with probability `power`.

    Without a deviation: of right or wrong scores, in the best case that all samples that differ differ in one
    direction (McNemar's exact test). With one: of a paired t test, to which Wilcoxon's is close. The first step of
    Holm's method is assumed, which is the hardest.

    Args:
        n: pairs, or documents if samples share them.
        deviation: standard deviation of the paired differences, in the metric's units.
        comparisons: arms times tasks that are judged together.
        alpha: probability that any comparison is wrongly called better or worse.
        power: probability that the difference is found.

    Returns:
        The difference, in the metric's units; None where no difference can be shown.

    Raises:
        CompareError: an argument is out of range.
    """
    from scipy import optimize, stats
    from statsmodels.stats.power import TTestPower

    for name, value in (("n", n), ("comparisons", comparisons)):
        if isinstance(value, bool) or not isinstance(value, int) or value < (name == "comparisons"):
            raise CompareError(f"{name} must be a number of at least {int(name != 'n')}, found {in_words(value)}")
    for name, share in (("alpha", alpha), ("power", power)):
        if not 0 < share < 1:
            raise CompareError(f"{name} must lie between 0 and 1, found {in_words(share)}")
    if deviation is not None and not (math.isfinite(deviation) and deviation >= 0):
        raise CompareError(f"deviation must be a number of at least 0, found {in_words(deviation)}")
    level = alpha / comparisons
    if deviation is None:
        # The fewest pairs that differ, all in one direction, for which 2 * 0.5 ** pairs < level.
        fewest = math.floor(math.log2(2 / level)) + 1
        if n < fewest:
            return None
        return float(optimize.brentq(lambda share: stats.binom.sf(fewest - 1, n, share) - power, 1e-12, 1 - 1e-12))
    if n < 2:
        return None
    if deviation == 0:
        return 0.0

    def short(effect: float) -> float:
        # One side at half the level: the far side adds nothing, and its distribution is nan for large effects.
        return float(TTestPower().power(effect, n, level / 2, alternative="larger")) - power

    high = 1.0
    while short(high) < 0 and high < 1e6:
        high *= 2
    return float(deviation * optimize.brentq(short, 0.0, high)) if short(high) >= 0 else None
