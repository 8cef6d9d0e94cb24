"""How many tokens each tier holds after a step, as far as the host can know it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from kvpolicy.interfaces.policy import RankPolicy
from kvpolicy.placement.planner import Placement, State
from kvpolicy.placement.selection import due, halvings

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


class Selection(NamedTuple):
    """What a tier's policy chooses now, by row and head: `[rows or 1, heads or 1]`."""

    now: Bools
    """Which rows select, `[rows]`."""
    held: Ints
    """Tokens in the tier before."""
    budgets: Ints
    stay: Ints
    """How many tokens will be in the tier, where the host knows."""
    rounds: Ints
    """Of pairs, how often they are halved."""


class Counts(NamedTuple):
    """How many tokens each tier holds, by row and head: `[tiers, rows or 1, heads or 1]`."""

    before: Ints
    after: Ints
    """Of a tier that ranks its tokens, what its policy will have let stay."""
    judged: Ints
    """Of these, those that competed already."""
    new: Ints
    """Real tokens that an update brings, `[rows, 1]`."""
    selections: dict[int, Selection]
    """Of each tier that selects now."""

    def of_layers(self, layers: int) -> Counts:
        """The same with selections of the rows of so many layers, one layer's after another's."""
        if layers == 1:
            return self
        found = {tier: Selection(*(_tiled(x, layers) for x in chosen)) for tier, chosen in self.selections.items()}
        return self._replace(selections=found)


def _tiled(x: Any, layers: int) -> Any:
    return x if len(x) == 1 else np.concatenate([x] * layers)


_latest: WeakKeyDictionary[Placement, tuple[Any, Counts]] = WeakKeyDictionary()
"""What the latest step of layers with a placement led to, and what that followed from."""


class Change(NamedTuple):
    """A step, as far as numbers of tokens follow from it."""

    placement: Placement
    before: tuple[State, ...]
    rows: tuple[State, ...]
    """The tiers by position before and after the step, of all rows alike or of each."""
    prompts: Sequence[int | None]
    """Tokens of the prompt, by row; None while it goes on."""
    ended: bool
    """Whether the prompt ended in this step."""

    def counts(self, before: Ints, judged: Ints, known: Mapping[int, Ints]) -> Counts:
        """How many tokens each tier holds after this step; see `Step.counts`."""
        if known or len(self.rows) > 1:
            return self._counts(before, judged, known)
        # Where a step lets as many tokens come and go as the one before, numbers are the same.
        key = self._asked(), before.shape, before.tobytes(), judged.shape, judged.tobytes()
        kept = _latest.get(self.placement)
        if kept is None or kept[0] != key:
            kept = _latest[self.placement] = key, self._counts(before, judged, known)
        return kept[1]

    def _asked(self) -> tuple[Any, ...]:
        """All of a step with one row that numbers follow from, besides those before."""
        (before,), (row,), (prompt,) = self.before, self.rows, self.prompts
        end = row.seen if prompt is None else prompt
        budgets: list[int | None] = []
        for tier in range(self.placement.ranked, len(self.placement.policies) - 1):
            policy = self.placement.policies[tier]
            assert isinstance(policy, RankPolicy)
            budget: int | None = None  # of a policy that does not act now; others may have one of 0
            if due(policy, before.seen, row.seen, self.ended):
                budget = end if policy.among == "arrival" else policy._budget(row.seen, end)
            budgets.append(budget)
        return row.seen - before.seen, *map(len, row.tiers), *budgets

    def _counts(self, before: Ints, judged: Ints, known: Mapping[int, Ints]) -> Counts:
        placement, ranked, rows = self.placement, self.placement.ranked, len(self.rows)
        shapes = (before.shape[1:], judged.shape[1:], *(stayed.shape for stayed in known.values()))
        shape = (len(before), *np.broadcast_shapes((rows, 1), *shapes))
        before, judged = np.broadcast_to(before, shape), np.broadcast_to(judged, shape).copy()
        after = before.copy()
        for tier in range(ranked):
            after[tier] = np.array([len(row.tiers[tier]) for row in self.rows], dtype=np.int64)[:, None]
        new = np.array([b.seen - a.seen for a, b in zip(self.before, self.rows, strict=True)], dtype=np.int64)[:, None]
        entering = new - (after[:ranked] - before[:ranked]).sum(0)
        selections = {}
        for tier in range(ranked, len(after) - 1):
            policy = placement.policies[tier]
            assert isinstance(policy, RankPolicy)
            held = before[tier] + entering
            seen = [(a.seen, b.seen) for a, b in zip(self.before, self.rows, strict=True)]
            now = np.array([due(policy, *pair, self.ended) for pair in seen])
            if tier in known:
                after[tier] = known[tier]
            else:
                after[tier] = held
                selection = self._selection(policy, now, held, judged[tier]) if now.any() and held.any() else None
                if selection is not None:
                    selections[tier] = selection
                    after[tier] = held if policy._reads_counts else selection.stay
            if policy.among == "arrival":
                judged[tier] = np.where(now[:, None], after[tier], judged[tier])
            entering = held - after[tier]
        after[-1] = 0 if placement.specs["keys"][-1] == "evict" else before[-1] + entering
        return Counts(before, after, judged, new, selections)

    def _selection(self, policy: RankPolicy, now: Bools, held: Ints, judged: Ints) -> Selection | None:
        """What a policy that acts now has to choose, None if all stay."""
        old = judged if policy.among == "arrival" else np.zeros_like(held)
        prompts = [row.seen if n is None else n for row, n in zip(self.rows, self.prompts, strict=True)]
        seen = [[row.seen] * held.shape[1] for row in self.rows]
        asked = held - old if policy.among == "arrival" else np.broadcast_to(np.array(seen), held.shape)
        budgets = _budgets(policy, asked, prompts)
        if policy._reads_counts:
            return Selection(now, held, budgets, held, np.zeros_like(held))
        rounds = halvings(held, budgets) if policy.among == "pairs" else np.zeros_like(held)
        stay = -(-held // 2**rounds) if policy.among == "pairs" else old + np.minimum(held - old, budgets)
        stay = np.where(now[:, None], np.where(budgets > 0, stay, old), held)
        competing = policy.among == "arrival" and (held > old).any()
        return Selection(now, held, budgets, stay, rounds) if competing or (stay < held).any() else None


def _budgets(policy: RankPolicy, asked: Ints, prompts: Sequence[int]) -> Ints:
    """The budget of each row and head, for as many tokens as `asked` says; `prompts` of all rows alike, or of each."""
    found = np.empty_like(asked)
    for row, prompt in enumerate(prompts if len(prompts) == len(asked) else [*prompts] * len(asked)):
        for n in np.unique(asked[row]).tolist():
            found[row][asked[row] == n] = policy._budget(n, prompt)
    return found
