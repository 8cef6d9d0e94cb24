"""Selection: what tokens are ranked by, which rank highest, and layers that select together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvpolicy.errors import PluginError
from kvpolicy.interfaces.checks import versions
from kvpolicy.interfaces.component import TRY, call
from kvpolicy.interfaces.policy import RankPolicy

LOWEST = -(2.0**100)
"""The rank of a nan, and of minus infinity."""


def due(policy: RankPolicy, start: int, stop: int) -> bool:
    """Whether a policy selects anew as the tokens seen grow from `start` to `stop`."""
    return stop // policy.every > start // policy.every


def ranked(policy: RankPolicy, attention: Tensor, queries: Tensor, ages: Tensor) -> Tensor:
    """What a policy ranks tokens by, `[batch, kv_heads or 1, tokens]`.

    Raises:
        PluginError: the policy returns something else.
    """
    shown = (attention, queries, ages)
    before = versions(shown)
    rank = call(policy, "rank", *shown)
    if not isinstance(rank, Tensor) or rank.shape != attention.shape or not rank.is_floating_point():
        raise PluginError(
            f"policy {policy.kind!r}: rank must return a float tensor {tuple(attention.shape)}, found "
            f"{getattr(rank, 'dtype', type(rank).__name__)} {tuple(getattr(rank, 'shape', ()))}. {TRY}"
        )
    if rank.device != attention.device or versions(shown) != before:
        found = f"one on {rank.device}" if rank.device != attention.device else "changed arguments"
        raise PluginError(
            f"policy {policy.kind!r}: rank must return a tensor on {attention.device} and leave its arguments as they "
            f"are, found {found}. {TRY}"
        )
    rank = rank.float() if policy.select == "head" else rank.float().mean(1, keepdim=True)
    # Above what is no candidate at all, also after a mean over layers.
    return rank.nan_to_num(nan=LOWEST, posinf=torch.inf, neginf=LOWEST)


def highest(rank: Tensor, budgets: Sequence[int]) -> Tensor:
    """True at the `budgets[row]` highest of each head of a row."""
    most = max(0, min(max(budgets), rank.shape[2]))
    best = rank.topk(most, dim=2).indices
    chosen = torch.zeros_like(rank, dtype=torch.bool)
    if len(set(budgets)) == 1:
        return chosen.scatter_(2, best, True)
    allowed = torch.tensor(budgets).to(rank.device, non_blocking=True).view(-1, 1, 1)
    within = (torch.arange(most, device=rank.device) < allowed).expand_as(best)
    return chosen.scatter_(2, best, within)
