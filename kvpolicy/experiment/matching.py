"""Chooses a parameter of arms so that their effective bits match. Bits are counted, and no model runs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any

from kvpolicy.errors import CompareError, RecipeError
from kvpolicy.experiment.arms import Matched, Matching, Open, is_exact
from kvpolicy.experiment.run import Encoded
from kvpolicy.interfaces.policy import RankPolicy
from kvpolicy.planning.counted import Learnt
from kvpolicy.planning.dry_run import DryRun, unsure
from kvpolicy.planning.shape import ModelShape
from kvpolicy.recipe.load import Recipe
from kvpolicy.recipe.space import Range
from kvpolicy.words import quoted

TOLERANCE = 0.02
"""By how much bits may differ, as a share of them."""
CLOSE = 0.001
"""What is as close as this is not improved on."""
STEPS = 1000
"""Values that a range without steps is divided into."""
FEW = 24
"""So many values are all tried."""
NEARBY = 16
"""Values beside one that makes no recipe that are tried in its place."""
WIDE = 32
"""Values beside the best that are tried if none comes near enough."""
LENGTHS = 6
"""Lengths of samples that are looked at where each must be counted by itself."""
TRIES = 48
"""Numbers of bits that arms are tried to agree on."""


@dataclass(frozen=True)
class Lengths:
    """How long the samples are: by task the tokens of their prompts, part by part, and of their answers."""

    by_task: Mapping[str, Sequence[tuple[tuple[int, ...], int]]]

    @classmethod
    def of(cls, samples: Iterable[tuple[str, Encoded]]) -> Lengths:
        """Those of encoded samples, each with its task."""
        found: dict[str, list[tuple[tuple[int, ...], int]]] = {}
        for task, item in samples:
            # The last token of an answer is predicted and not fed.
            found.setdefault(task, []).append((tuple(map(len, item.parts)), len(item.answer) - 1))
        return cls(found)

    @property
    def longest(self) -> int:
        """Tokens of the longest."""
        return max(sum(parts) + later for samples in self.by_task.values() for parts, later in samples)


@dataclass(frozen=True)
class Counter:
    """Counts the effective bits of recipes on a model, as a run of these samples would measure them."""

    shape: ModelShape
    lengths: Lengths
    attached: bool
    device: str = "cpu"

    def bits(self, recipe: Recipe) -> float:
        """The mean over tasks of the mean over samples.

        Raises:
            RecipeError: the recipe does not fit the model.
        """
        learnt = Learnt()
        count = len(self.shape.layers)
        if any(isinstance(tier.policy, RankPolicy) for i in range(count) for tier in recipe.tiers_of(i, count)):
            means = [self._each(recipe, samples, learnt) for samples in self.lengths.by_task.values()]
        else:
            means = self._by_length(recipe, learnt)
        return sum(means) / len(means)

    def _run(self, recipe: Recipe, learnt: Learnt) -> DryRun:
        return DryRun(recipe, self.shape, 1, self.device, self.attached, learnt)

    def _by_length(self, recipe: Recipe, learnt: Learnt) -> list[float]:
        """Where tokens are placed by their positions, one cache that grows is that of every length."""
        totals = {
            task: [sum(parts) + later for parts, later in samples] for task, samples in self.lengths.by_task.items()
        }
        run, seen, bits = self._run(recipe, learnt), 0, dict[int, float]()
        for length in sorted({length for lengths in totals.values() for length in lengths}):
            run.feed(length - seen)
            seen, bits[length] = length, run.memory().bits_per_value
        return [sum(bits[length] for length in lengths) / len(lengths) for lengths in totals.values()]

    def _each(self, recipe: Recipe, samples: Sequence[tuple[tuple[int, ...], int]], learnt: Learnt) -> float:
        """Where ranks decide, it matters how tokens came. Some lengths stand for all, evenly chosen."""
        ordered = sorted(samples, key=lambda sample: (sum(sample[0]) + sample[1], sample))
        count = min(len(ordered), LENGTHS)
        chosen = [ordered[(2 * i + 1) * len(ordered) // (2 * count)] for i in range(count)]
        found = dict[Any, float]()
        for parts, later in dict.fromkeys(chosen):
            run = self._run(recipe, learnt)
            for tokens in (*parts, *[1] * later):
                run.feed(tokens)
            found[(parts, later)] = run.memory().bits_per_value
        return sum(found[sample] for sample in chosen) / count


@dataclass
class Search:
    """The values of one open arm, and the bits of those that were tried."""

    arm: Open
    counter: Counter
    tried: dict[int, float | None] = field(default_factory=dict)
    """By place in `values`; None for a value that makes no recipe."""
    refusal: RecipeError | None = None

    @cached_property
    def values(self) -> Sequence[Any]:
        """What the parameter may be."""
        among, default = self.arm.tuned.among, self.arm.default
        if isinstance(among, tuple):
            return among
        if isinstance(among, Range):
            return _of_range(among)
        if isinstance(default, bool) or not isinstance(default, int | float) or default < 0:
            raise CompareError(
                f"arm {quoted(self.arm.label)}: {self.arm.tuned.parameter} is no number by default, found "
                f"{default!r}; say which values it may have, in a file as match: {{{self.arm.tuned.parameter}: [...]}}"
            )
        if isinstance(default, int):
            return range(max(self.counter.lengths.longest, default) + 1)
        if default <= 1:
            return [i / STEPS for i in range(1, STEPS + 1)]
        return _of_range(Range.model_validate({"from": default / 64, "to": default * 64, "log": True}))

    @property
    def start(self) -> int:
        """The place of the default, or of what comes next to it."""
        default = self.arm.default
        if default in self.values:
            return self.values.index(default)
        numbers = all(isinstance(x, int | float) for x in (default, *self.values[:1]))
        places = range(len(self.values))
        return min(places, key=lambda i: abs(self.values[i] - default)) if numbers else len(self.values) // 2

    def bits(self, place: int) -> float | None:
        """The bits of a value; None if it makes no recipe for the model."""
        if place not in self.tried:
            try:
                self.tried[place] = self.counter.bits(self.arm.make(self.values[place]))
            except RecipeError as error:
                self.refusal = self.refusal or error
                self.tried[place] = None
        return self.tried[place]

    def known(self) -> dict[int, float]:
        """Values tried that make recipes."""
        return {place: bits for place, bits in sorted(self.tried.items()) if bits is not None}

    def near(self, target: float) -> tuple[int, float]:
        """The place of the value whose bits are nearest to the target, and its bits.

        Bits need not grow with the value: some places over all the range are tried, then halves between any two
        neighbours with the target between them, then what stands beside the best, and more of that if nothing comes
        within the tolerance.

        Raises:
            RecipeError: no value makes a recipe.
        """
        self._spread()
        if not self.known():
            raise self.refusal or RecipeError(f"{self.arm.label}: no value makes a recipe")
        before = -1
        while len(self.tried) != before:
            before = len(self.tried)
            self._halve(target)
            best = self._best(target)
            if self._far(best, target) < CLOSE:
                break
            for step in (-2, -1, 1, 2):
                if 0 <= best + step < len(self.values):
                    self.bits(best + step)
        best = self._best(target)
        if self._far(best, target) > TOLERANCE:
            for place in range(max(best - WIDE, 0), min(best + WIDE + 1, len(self.values))):
                self.bits(place)
            best = self._best(target)
        return best, self.known()[best]

    def _spread(self) -> None:
        if self.tried and len(self.tried) > 1:
            return
        n = len(self.values)
        if n <= FEW:
            places = set(range(n))
        else:
            places = {round((n - 1) * i / 5) for i in range(6)} | {round((n - 1) ** (i / 7)) for i in range(7)} | {0}
        for place in sorted(places | {self.start}):
            self._at(place, -1, n)

    def _at(self, place: int, low: int, high: int) -> int | None:
        """The place, or the nearest one between two others that makes a recipe."""
        for away in range(NEARBY + 1):
            for at in dict.fromkeys((place + away, place - away)):
                if low < at < high and self.bits(at) is not None:
                    return at
        return None

    def _halve(self, target: float) -> None:
        known = list(self.known().items())
        for (low, one), (high, other) in pairwise(known):
            while (one - target) * (other - target) < 0 and high - low > 1:
                middle = self._at((low + high) // 2, low, high)
                if middle is None:
                    break
                bits = self.known()[middle]
                if (one - target) * (bits - target) <= 0:
                    high, other = middle, bits
                else:
                    low, one = middle, bits

    def _best(self, target: float) -> int:
        """Of values that are as near the one next to the default."""
        return min(self.known().items(), key=lambda x: (self._far(x[0], target), abs(x[0] - self.start)))[0]

    def _far(self, place: int, target: float) -> float:
        return abs((self.tried[place] or 0.0) / target - 1)

    def reached(self, target: float) -> list[int]:
        """The places nearest to the target from below and from above."""
        known = self.known().items()
        below = max((x for x in known if x[1] <= target), key=lambda x: x[1], default=None)
        above = min((x for x in known if x[1] >= target), key=lambda x: x[1], default=None)
        return list(dict.fromkeys(x[0] for x in (below, above) if x is not None))

    def found(self, place: int) -> Matched:
        """What is chosen."""
        value = self.values[place]
        bound = bool(unsure(self.arm.make(value), len(self.counter.shape.layers)))
        return Matched(self.arm.label, self.arm.tuned.parameter, value, self.known()[place], bound)


def _of_range(among: Range) -> Sequence[Any]:
    low, high, step = among.low, among.high, among.step
    if among.whole:
        return range(low, high + 1, step or 1)
    if step is not None:
        return [round(low + i * step, 10) for i in range(round((high - low) / step) + 1)]
    if among.log:
        found = [low * (high / low) ** (i / STEPS) for i in range(STEPS + 1)]
    else:
        found = [low + (high - low) * i / STEPS for i in range(STEPS + 1)]
    return list(dict.fromkeys([low, *(float(f"{x:.4g}") for x in found[1:-1]), high]))


def match(opened: Sequence[Open], beside: Mapping[str, Recipe], counter: Counter, bits: float | None) -> Matching:
    """Choose a value for each open arm.

    Args:
        opened: the arms.
        beside: the other arms, which stay as they are; their bits count unless they are exact.
        counter: counts bits.
        bits: what all arms are to come to; None: they agree, on the bits of the other arms where there are some, else
            as near as may be to those of the first arm with its default.

    Raises:
        CompareError: an arm can't come near enough.
    """
    searches = [Search(arm, counter) for arm in opened]
    fixed = {name: counter.bits(recipe) for name, recipe in beside.items() if not is_exact(recipe)}
    if bits is not None or fixed:
        target = next(iter(fixed.values())) if bits is None else bits
        of = "" if bits is not None else f", the bits of {quoted(next(iter(fixed)))}"
        for name, own in fixed.items():
            if abs(own / target - 1) > TOLERANCE:
                raise CompareError(
                    f"arm {quoted(name)}: effective bits must come within {TOLERANCE:.0%} of {target:.4g}{of}, found "
                    f"{own:.4g}; leave one of its parameters open (NAME:parameter=?), or leave the arm out"
                )
        return Matching(target, tuple(_chosen(search, target, of) for search in searches))
    return _agreed(searches)


def _chosen(search: Search, target: float, of: str = "") -> Matched:
    place, bits = search.near(target)
    if abs(bits / target - 1) > TOLERANCE:
        name = search.arm.tuned.parameter
        near = " and ".join(f"{search.known()[x]:.4g} ({name}={search.values[x]})" for x in search.reached(target))
        raise CompareError(
            f"arm {quoted(search.arm.label)}: effective bits must come within {TOLERANCE:.0%} of {target:.4g}{of}, and "
            f"{name} comes to {near} at its nearest; match other bits, or leave another parameter open"
        )
    return search.found(place)


def _agreed(searches: Sequence[Search]) -> Matching:
    """Bits that all arms reach: those of the first with its default, else the next that another arm comes to."""
    first = searches[0]
    start = first.bits(first.start)
    if start is None:
        first._spread()
        start = first.near(next(iter(first.known().values()), 1.0))[1]
    waiting, seen, refusal = [start], set[float](), None
    while waiting and len(seen) < TRIES:
        target = min(waiting, key=lambda x: abs(x / start - 1))
        waiting.remove(target)
        seen.add(target)
        found = [search.near(target) for search in searches]
        reached = [bits for _, bits in found]
        if max(reached) <= (1 + TOLERANCE) * min(reached):
            chosen = tuple(search.found(place) for search, (place, _) in zip(searches, found, strict=True))
            return Matching(target, chosen)
        if refusal is None:
            worst = max(searches, key=lambda search: abs(search.near(target)[1] / target - 1))
            refusal = _refusal(worst, target)
        for search in searches:
            waiting += [b for x in search.reached(target) if (b := search.known()[x]) not in seen and b not in waiting]
    assert refusal is not None
    raise CompareError(refusal)


def _refusal(search: Search, target: float) -> str:
    try:
        _chosen(search, target)
    except CompareError as error:
        return f"{error}. No other number of bits was found that all arms reach"
    return f"arms must come within {TOLERANCE:.0%} of one another, and no number of bits was found that all reach"


def bits_wanted(match: Mapping[str, Any]) -> float | None:
    """The number of an experiment's `match`; None if arms are only to agree."""
    found = match["bits"]
    return None if found is None or not math.isfinite(found) else float(found)
