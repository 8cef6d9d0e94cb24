"""What policies that rank their tokens do in an update: score, rank, let descend."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvpolicy.interfaces.policy import RankPolicy
from kvpolicy.interfaces.site import Site
from kvpolicy.placement.candidates import Candidates
from kvpolicy.placement.counts import Counts, Selection
from kvpolicy.placement.moves import EMPTY
from kvpolicy.placement.planner import Placement
from kvpolicy.placement.selection import (
    UNORDERED,
    best_of_pairs,
    by_count_read,
    highest,
    lowest,
    ranked,
    scored,
    scored_again,
    shared,
)
from kvpolicy.placement.step import Step

Ints = NDArray[np.int64]
NOWHERE = -1
"""The tier of a token that did not compete yet."""
AT_ONCE = 1 << 24
"""Tokens of all rows and heads whose attention a policy is shown at once, about."""


@dataclass
class Turn:
    """An update that is being planned."""

    step: Step
    """Where it leads."""
    slots: Tensor
    """Of the new tokens, `[batch, kv_heads or 1, tokens]`."""
    counts: Counts
    keys: Candidates
    known: dict[int, Ints] = field(default_factory=dict)
    """Of tiers that selected, how many tokens stayed, where it had to be read from the device."""


class Ranking:
    """The scores, ranks and selections of one layer, or of several whose rows come one after the other."""

    def __init__(self, placement: Placement, sites: Sequence[Site]) -> None:
        self.placement, self.sites = placement, sites

    def add_features(self, fresh: Tensor, new: Sequence[Mapping[str, Tensor]], slots: Tensor, step: Step) -> None:
        """Score the new tokens of each layer, where scorers do that as they arrive."""
        columns = self.placement.scores
        if columns.judged is not None:
            fresh[..., columns.judged] = NOWHERE
        if columns.features:
            count = len(self.sites)
            for own in zip(fresh.chunk(count), new, slots.chunk(count), self.sites, strict=True):
                self._add_features(*own, step)

    def _add_features(self, fresh: Tensor, new: Mapping[str, Tensor], slots: Tensor, site: Site, step: Step) -> None:
        columns = self.placement.scores
        for scorer, at in zip(columns.features, columns.kind_of_feature, strict=True):
            if step.prompt is not None and scorer in columns.once:
                continue
            shown = {**new, "positions": step.in_text(slots), "ages": step.ages(slots), "real": slots >= 0}
            if at is not None:
                shown |= {"attention": fresh[..., at], "queries": fresh[..., at + 1]}
            found = scored(scorer, shown, site)
            found = found if found.shape[1] == fresh.shape[1] else found.mean(1, keepdim=True)
            fresh[..., columns.feature(scorer)] = found

    def rank(self, turn: Turn, tier: int) -> Tensor:
        """What a tier's policy ranks its tokens by; where places differ, in token order."""
        policy = self.placement.policies[tier]
        assert isinstance(policy, RankPolicy)
        rank = self._rank(policy, turn, tier)
        return shared(policy, rank.gather(2, self._order(turn, tier)) if self._apart(policy) else rank)

    def _apart(self, policy: RankPolicy) -> bool:
        """Whether heads or layers that select the same tokens may have them in different places."""
        return policy.share != "head" and self.placement.shares > 1

    def _order(self, turn: Turn, tier: int) -> Tensor:
        """The places of a tier's tokens in token order, `[batch, kv_heads or 1, tokens]`; then others, in some rows."""
        work, most = turn.keys, int(turn.counts.selections[tier].held.max())
        positions = work.positions
        last = torch.iinfo(positions.dtype).max
        return positions.masked_fill(work.target != tier, last).argsort(dim=2, stable=True)[..., :most]

    def _rank(self, policy: RankPolicy, turn: Turn, tier: int) -> Tensor:
        columns, work = self.placement.scores, turn.keys
        scorer = columns.scorer[tier]
        noted = work.column(columns.feature(scorer)) if scorer is not None and scorer in columns.features else None
        if noted is not None and scorer is not None and not scorer._again:
            return noted
        if scorer is None:
            return self._by_attention(policy, turn, columns.attention[tier])
        positions = work.positions
        shown = {"positions": turn.step.in_text(positions), "ages": turn.step.ages(positions)}
        if work.noted is not None and (at := columns.attention.get(tier)) is not None:
            shown |= {"attention": work.column(at), "queries": work.column(at + 1)}
        if noted is not None:
            return scored_again(scorer, noted, shown, self.sites[0])
        here = work.target == tier
        order = positions.masked_fill(~here, EMPTY).argsort(dim=2, stable=True)
        real = here.gather(2, order)
        found = scored(scorer, {name: x.gather(2, order) * real for name, x in shown.items()}, self.sites[0])
        return torch.empty_like(found).scatter_(2, order, found)

    def _by_attention(self, policy: RankPolicy, turn: Turn, at: int) -> Tensor:
        """What a policy makes of the attention in some columns: of many tokens some layers at a time, for memory."""
        work, layers = turn.keys, len(self.sites)
        rows = work.target.shape[0]
        step = rows // layers * max(1, layers * AT_ONCE // max(1, work.target.numel()))
        found = []
        for first in range(0, rows, step):
            some = slice(first, first + step)
            ages = work.ages_of(some, turn.step)
            found.append(ranked(policy, work.column(at, some), work.column(at + 1, some), ages))
            del ages
        return torch.cat(found) if len(found) > 1 else found[0]

    def select(self, turn: Turn, tier: int, rank: Tensor) -> Tensor | None:
        """Let tokens descend; returns how many stayed, `[rows, heads]`, where the host can't know."""
        policy, work, chosen = self.placement.policies[tier], turn.keys, turn.counts.selections[tier]
        assert isinstance(policy, RankPolicy)
        target = work.target
        candidates, judged = target == tier, self.placement.scores.judged
        if not chosen.now.all():
            candidates &= torch.from_numpy(chosen.now).to(target.device, non_blocking=True).view(-1, 1, 1)
        compete = candidates
        if policy.among == "arrival":
            assert work.scores is not None
            compete = candidates & (work.scores[..., judged] != tier)
        if self._apart(policy):
            order = self._order(turn, tier)
            rank = rank.new_zeros(compete.shape).scatter_(2, order, rank.expand_as(order))
        if self._one_descends(policy, chosen, target.device):
            target.scatter_(2, lowest(rank, compete), tier + 1)
        else:
            stays = self._stays(policy, turn, tier, rank, compete)
            target.masked_fill_(compete & ~stays, tier + 1)
        if policy.among == "arrival":
            assert work.scores is not None
            work.scores[..., judged].masked_fill_(candidates & (target == tier), tier)
        return (target == tier).sum(2) if policy._reads_counts else None

    def _one_descends(self, policy: RankPolicy, chosen: Selection, device: torch.device) -> bool:
        """Whether one token of each row and head descends, and it is the last of those that rank lowest."""
        alike = policy.among != "pairs" and not policy._reads_counts
        return alike and device.type not in UNORDERED and bool((chosen.held - chosen.stay == 1).all())

    def _stays(self, policy: RankPolicy, turn: Turn, tier: int, rank: Tensor, compete: Tensor) -> Tensor:
        """True at the tokens that stay, and at some that do not compete."""
        chosen = turn.counts.selections[tier]
        rank = torch.where(compete, rank, -torch.inf)
        if policy._reads_counts:
            return by_count_read(policy, rank, chosen.budgets)
        if policy.among == "pairs":
            stays = best_of_pairs(rank, compete, turn.keys.positions, chosen.rounds)
            return stays.logical_and_(highest(rank, np.where(chosen.budgets > 0, rank.shape[2], 0)))
        scorer = self.placement.scores.scorer[tier]
        return highest(rank, chosen.budgets, stable=scorer is not None and scorer.pools)

    def read(self, stayed: Tensor, turn: Turn, tier: int) -> Ints:
        """How many tokens stayed in a tier, asked of the device."""
        found: Ints = stayed.cpu().numpy()
        return found
