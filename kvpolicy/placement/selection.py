"""Selection: when policies select, what their tokens are ranked by, and which stay."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvpolicy.errors import PluginError
from kvpolicy.interfaces.checks import versions
from kvpolicy.interfaces.component import TRY, Component, call
from kvpolicy.interfaces.policy import RankPolicy
from kvpolicy.interfaces.scorer import BESIDE, Given, Scorer
from kvpolicy.interfaces.site import Site
from kvpolicy.placement.token_table import last_of

Ints = NDArray[np.int64]
LOWEST = -(2.0**100)
"""The rank of a nan, and of minus infinity."""
UNORDERED = {"cpu"}
"""Devices whose `topk` takes any of equal ones; others take the first."""


def due(policy: RankPolicy, start: int, stop: int, ended: bool) -> bool:
    """Whether a policy selects as the tokens seen grow from `start` to `stop`, or as the prompt `ended` after these."""
    if policy.when == "prompt":
        return ended
    return stop // policy.every > start // policy.every or (ended and stop % policy.every == 0)


def halvings(held: Ints, budgets: Ints) -> Ints:
    """How often `held` tokens are halved, one of each two staying and an odd one, to be no more than `budgets`."""
    rounds, left = np.zeros_like(held), held.copy()
    while (over := (left > budgets) & (left > 1)).any():
        left = np.where(over, -(-left // 2), left)
        rounds += over
    return rounds


def _checked(asker: Component, method: str, shown: tuple[Any, ...], given: tuple[Tensor, ...], shape: Any) -> Tensor:
    """What `method` of a plugin returns: floats of a shape, on the device of what it was given and left as it was."""
    before, device = versions(given), given[0].device
    found = call(asker, method, *shown)
    if not isinstance(found, Tensor) or found.shape != shape or not found.is_floating_point():
        raise PluginError(
            f"{asker._role} {asker.kind!r}: {method} must return a float tensor {tuple(shape)}, found "
            f"{getattr(found, 'dtype', type(found).__name__)} {tuple(getattr(found, 'shape', ()))}. {TRY}"
        )
    if found.device != device or versions(given) != before:
        wrong = f"one on {found.device}" if found.device != device else "changed arguments"
        raise PluginError(
            f"{asker._role} {asker.kind!r}: {method} must return a tensor on {device} and leave its arguments as they "
            f"are, found {wrong}. {TRY}"
        )
    return found


def scored(scorer: Scorer, shown: dict[str, Tensor], site: Site) -> Tensor:
    """What a scorer gives to tokens, `[batch, kv_heads or 1, tokens]`, in float32.

    Args:
        scorer: the scorer.
        shown: all that can be shown of the tokens.
        site: where they are.

    Raises:
        PluginError: it returns something else, or raises.
    """
    needs = scorer.needs | {beside for name, beside in BESIDE.items() if name in scorer.needs}
    given = {name: x for name, x in shown.items() if name in needs}
    shape = next((x.shape[:3] for name, x in given.items() if name in ("keys", "values")), None)
    shape = next(iter(given.values())).shape if shape is None else shape
    return _checked(
        scorer, "score", (Given(f"scorer {scorer.kind!r}", **given), site), tuple(given.values()), shape
    ).float()


def scored_again(scorer: Scorer, noted: Tensor, shown: dict[str, Tensor], site: Site) -> Tensor:
    """What a scorer makes of what it gave to tokens as they came, of its shape, in float32.

    Raises:
        PluginError: it returns something else, or raises.
    """
    needs = scorer.needs | ({"ages"} if "positions" in scorer.needs else set())
    given = {name: x for name, x in shown.items() if name in needs}
    asked = noted, Given(f"scorer {scorer.kind!r}", **given), site
    return _checked(scorer, "again", asked, (noted, *given.values()), noted.shape).float()


def ranked(policy: RankPolicy, attention: Tensor, queries: Tensor, ages: Tensor) -> Tensor:
    """What a policy ranks tokens by without a scorer, `[batch, kv_heads or 1, tokens]`.

    Raises:
        PluginError: the policy returns something else.
    """
    shown = attention, queries, ages
    return _checked(policy, "rank", shown, shown, attention.shape).float()


def shared(policy: RankPolicy, rank: Tensor) -> Tensor:
    """The mean over the heads that select the same tokens."""
    rank = rank if policy.share == "head" else rank.mean(1, keepdim=True)
    # Above what is no candidate at all, also after a mean over layers.
    return rank.nan_to_num(nan=LOWEST, posinf=torch.inf, neginf=LOWEST)


def highest(rank: Tensor, budgets: Ints, stable: bool = False) -> Tensor:
    """True at the highest of each row and head, `budgets` of them: `[rows or 1, heads or 1]`.

    `stable`: of equal ones the first. It costs time, and equal ranks are rare where tokens are ranked each for itself.
    """
    most = max(0, min(int(budgets.max()), rank.shape[2]))
    alike = bool((budgets == budgets.flat[0]).all())
    if stable:
        best = rank.argsort(dim=2, descending=True, stable=True)[..., :most]
    else:  # to put them in order costs many calls of a device; on a CPU it says which of equal ones are taken
        best = rank.topk(most, dim=2, sorted=not alike or rank.device.type in UNORDERED).indices
    chosen = torch.zeros_like(rank, dtype=torch.bool)
    if alike:
        return chosen.scatter_(2, best, True)
    return chosen.scatter_(2, best, _below(most, torch.from_numpy(budgets).to(rank.device, non_blocking=True), best))


def lowest(rank: Tensor, candidates: Tensor) -> Tensor:
    """The one of some candidates that ranks lowest in each row and head, `[rows, heads, 1]`; of equal ones the last.

    Each row and head has a candidate. It is the one that `highest` leaves over, where it takes the first of equal ones.
    """
    least = torch.where(candidates, rank, torch.inf).amin(2, keepdim=True)
    return last_of((rank == least).logical_and(candidates))


def _below(most: int, budgets: Tensor, like: Tensor) -> Tensor:
    return (torch.arange(most, device=like.device) < budgets.unsqueeze(-1)).expand_as(like)


def best_of_pairs(rank: Tensor, candidates: Tensor, positions: Tensor, rounds: Ints) -> Tensor:
    """The better of each two candidates that are neighbours by position, `rounds` times; of equal ones the first."""
    last = torch.iinfo(positions.dtype).max
    order = positions.masked_fill(~candidates, last).argsort(dim=2, stable=True)
    stays, rank = candidates.gather(2, order), rank.gather(2, order)
    many = torch.from_numpy(rounds).to(rank.device, non_blocking=True).unsqueeze(-1)
    for turn in range(int(rounds.max())):
        place = stays.cumsum(2) - 1  # among those that are left
        into = torch.where(stays, place, rank.shape[2])
        left = rank.new_full((*rank.shape[:2], rank.shape[2] + 1), -torch.inf).scatter_(2, into, rank)
        other = (place ^ 1).clamp(min=0, max=rank.shape[2])  # no token: minus infinity
        against = left.gather(2, other)
        none = other >= stays.sum(2, keepdim=True)
        better = none | (rank > against) | ((rank == against) & (place % 2 == 0))
        stays = stays & torch.where(many > turn, better, True)
    return torch.zeros_like(candidates).scatter_(2, order, stays)


def by_count_read(policy: RankPolicy, rank: Tensor, budgets: Ints) -> Tensor:
    """True at the tokens that stay by a threshold, or by budgets of each head.

    Raises:
        PluginError: the policy returns something else.
    """
    stays = call(policy, "stay", rank)
    if stays is not None:
        if not isinstance(stays, Tensor) or (stays.dtype, stays.shape) != (torch.bool, rank.shape):
            raise PluginError(
                f"policy {policy.kind!r}: stay must return a mask {tuple(rank.shape)} or None, found "
                f"{getattr(stays, 'dtype', type(stays).__name__)} {tuple(getattr(stays, 'shape', ()))}. {TRY}"
            )
        return stays
    shown = torch.from_numpy(np.array(np.broadcast_to(budgets, rank.shape[:2]))).to(rank.device)
    found = call(policy, "head_budgets", rank, shown)
    found = shown if found is None else found
    whole = isinstance(found, Tensor) and found.dtype in (torch.int64, torch.int32) and found.shape == shown.shape
    if not whole:
        raise PluginError(
            f"policy {policy.kind!r}: head_budgets must return integers {tuple(shown.shape)} or None, found "
            f"{getattr(found, 'dtype', type(found).__name__)} {tuple(getattr(found, 'shape', ()))}. {TRY}"
        )
    order = rank.argsort(dim=2, descending=True, stable=True)
    return torch.zeros_like(rank, dtype=torch.bool).scatter_(2, order, _below(rank.shape[2], found, order))
