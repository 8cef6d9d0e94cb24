"""Selection by attention: what tokens are ranked by, and layers that select alone or together."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any

import torch
from torch import Tensor

from kvpolicy.errors import PluginError
from kvpolicy.interfaces.checks import versions
from kvpolicy.interfaces.component import TRY, call
from kvpolicy.interfaces.policy import RankPolicy

Selection = Generator[Tensor, Tensor, None]
"""Yields what a policy with `select: shared` ranks this layer's tokens by, and takes the mean over all layers."""

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
    allowed = torch.tensor(budgets, device=rank.device).view(-1, 1, 1)
    within = (torch.arange(most, device=rank.device) < allowed).expand_as(best)
    return torch.zeros_like(rank, dtype=torch.bool).scatter_(2, best, within)


def alone(selection: Selection) -> None:
    """Let one layer select by itself."""
    together([selection])


def together(selections: list[Selection]) -> None:
    """Let layers select together, by the mean of what each ranks its tokens by."""
    ranks = [_asked(selection, None) for selection in selections]
    while ranks and None not in ranks:
        mean = torch.stack([rank.to(ranks[0].device) for rank in ranks]).mean(0)
        ranks = [_asked(s, mean.to(rank.device)) for s, rank in zip(selections, ranks, strict=True)]


def _asked(selection: Selection, answer: Any) -> Any:
    try:
        return selection.send(answer)
    except StopIteration:
        return None
