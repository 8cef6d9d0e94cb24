"""Policy `rank`: the tokens that a scorer ranks highest."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from kvpolicy.hookspecs import hookimpl
from kvpolicy.interfaces.component import LayerBudget, Pyramid, budget_tokens
from kvpolicy.interfaces.policy import Policy, RankPolicy
from kvpolicy.interfaces.scorer import Scorer
from kvpolicy.plugins import ScorerOption


class Rank(RankPolicy):
    """Keeps the tokens that a scorer ranks highest: as many as the budget says, or those above a threshold.

    Source of `heads: scores`: Ada-KV (arXiv 2407.11550, section 3, algorithm 1 and the floor of its code). The budgets
    of a layer's heads go together to the highest ranks of all its heads; each has a part `floor` of its own at least.
    """

    kind: Literal["rank"] = "rank"
    scorer: ScorerOption = Field(description="What tokens are ranked by.", examples=[{"kind": "key_norm"}])
    budget: LayerBudget = Field(
        0.1,
        description=(
            "Tokens that stay at most, in each KV head: a number, or a fraction of the tokens that `of` names; a list "
            "of such, one for each layer, a mapping of layers (such as 2-5) to such, or {kind: pyramid, tokens: 2048, "
            "window: 32, beta: 20}."
        ),
    )
    of: Literal["seen", "prompt"] = Field(
        "seen", description="What a fraction is taken of: the tokens seen, or those of the prompt."
    )
    threshold: float | None = Field(
        None,
        description="Tokens that score at least this stay, and no others, however many; the budget is then not used.",
    )
    heads: Literal["even", "scores"] = Field(
        "even",
        description="Whether KV heads have the same budget, or share that of the layer out by the highest scores.",
    )
    floor: float = Field(
        0.2, ge=0.0, le=1.0, description="With heads: scores the part of an even budget that each head has for certain."
    )

    @model_validator(mode="after")
    def _check_use(self) -> Rank:
        """Options that would do nothing are refused."""
        fields = type(self).model_fields
        found = {
            name: f"{name}: {getattr(self, name)}"
            for name in ("budget", "of", "heads", "floor")
            if getattr(self, name) != fields[name].default
        }
        idle = next((name for name in ("budget", "of", "heads") if name in found), None)
        if self.threshold is not None and idle:
            raise ValueError(
                f"option {idle!r} must stand without a threshold, found {found[idle]} and threshold: {self.threshold}; "
                "remove one of them"
            )
        if self.heads == "even" and "floor" in found:
            raise ValueError(f"option 'floor' must go with heads: scores, found {found['floor']} without; remove it")
        if self.heads == "scores" and self.share != "head":
            raise ValueError(f"option 'heads: scores' must go with share: head, found share: {self.share}")
        if isinstance(self.budget, Pyramid) and self.of != "prompt":
            raise ValueError(f"a budget of kind pyramid must go with of: prompt, found of: {self.of}")
        if self.among == "arrival" and self.of == "prompt":
            raise ValueError("option 'of: prompt' must go with among: tier or pairs, found among: arrival")
        return self

    @property
    def _reads_counts(self) -> bool:
        return self.threshold is not None or self.heads == "scores"

    def ranked_by(self) -> Scorer | None:
        return self.scorer

    def budget_tokens(self, seen: int, prompt: int) -> int:
        if self.threshold is not None:
            return seen
        return budget_tokens(self.budget, seen if self.of == "seen" else prompt)

    def stay(self, rank: Tensor) -> Tensor | None:
        return None if self.threshold is None else rank >= self.threshold

    def head_budgets(self, rank: Tensor, budgets: Tensor) -> Tensor | None:
        if self.heads == "even":
            return None
        candidates = (rank > -torch.inf).sum(2)
        order = rank.flatten(1).argsort(dim=1, descending=True, stable=True)
        place = torch.empty_like(order).scatter_(
            1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
        )
        best = (place < budgets.sum(1, keepdim=True)).view_as(rank) & (rank > -torch.inf)
        shares = (1 - self.floor) * best.sum(2) + self.floor * budgets
        return torch.minimum(shares.round().long(), candidates)


@hookimpl
def kvpolicy_policies() -> list[type[Policy]]:
    return [Rank]
