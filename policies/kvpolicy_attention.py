"""Policy `attention`: the tokens that received the most attention."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from kvpolicy.hookspecs import hookimpl
from kvpolicy.interfaces.component import MOST, LayerBudget, Pyramid, budget_tokens
from kvpolicy.interfaces.policy import Policy, Queries, RankPolicy, Scores

Share = Annotated[float, Field(ge=0.0, le=1.0)]


class Attention(RankPolicy):
    """Keeps the tokens with the highest attention score.

    Source: accumulated scores of all queries, H2O (arXiv 2306.14048, section 4, algorithm 1); divided by the number
    of queries that could see the token, MAS of RoCo (arXiv 2402.06262, section 3) and ZipCache (arXiv 2405.14256,
    section 4.2), whose probe queries (section 4.3) are the newest 5% and 5% at random. Deviations: tokens are selected
    after the last token of an update, not within it; a token that was let go never comes back; attention is that over
    the tokens held, as they are stored.
    """

    kind: Literal["attention"] = "attention"
    budget: LayerBudget = Field(
        0.1,
        description=(
            "Tokens that stay at most: a number, or a fraction of the tokens that `of` names; a list of such, one for "
            "each layer, a mapping of layers (such as 2-5) to such, or {kind: pyramid, tokens: 2048, window: 32, "
            "beta: 20}."
        ),
    )
    of: Literal["seen", "prompt"] = Field(
        "seen", description="What a fraction is taken of: the tokens seen, or those of the prompt."
    )
    score: Literal["accumulated", "normalised", "last"] = Field(
        "accumulated",
        description=(
            "accumulated: attention summed over queries; normalised: that, divided by the number of queries that "
            "`count` names; last: the newest query's attention alone."
        ),
    )
    queries: Literal["all", "probe"] = Field(
        "all",
        description="Queries that count: all, or probes (the newest ones and some at random) alone.",
    )
    newest: Annotated[int, Field(ge=1, le=MOST)] | Share = Field(
        0.05, description="Share of an update's queries that are probes, from the newest on; or their number."
    )
    random: Share = Field(0.05, description="Share of its queries that are probes, drawn at random.")
    seed: int = Field(0, ge=0, le=MOST, description="Seed of the random probes.")
    count: Literal["seen", "causal"] = Field(
        "seen",
        description=(
            "Queries that a normalised score is divided by: those summed that could see the token, or all tokens from "
            "it on, whether summed or not."
        ),
    )
    decode: Literal["same", "last"] = Field(
        "same",
        description="Scores while decoding: as for the prompt, or those of the newest query alone, undivided.",
    )
    heads: Literal["mean", "sum", "max"] = Field(
        "mean", description="How the query heads of a KV head are put together, query by query."
    )

    @model_validator(mode="after")
    def _check_use(self) -> Attention:
        """Options that would do nothing are refused."""
        idle: dict[str, str] = {"of": "among: tier or pairs"} if self.among == "arrival" else {}
        if self.queries != "probe":
            idle |= dict.fromkeys(("newest", "random", "seed"), "queries: probe")
        if self.score != "normalised":
            idle["count"] = "score: normalised"
        for name, needed in idle.items():
            if getattr(self, name) != type(self).model_fields[name].default:
                found = f"{name}: {getattr(self, name)}"
                raise ValueError(f"option {name!r} must go with {needed}, found {found} without; remove it")
        if isinstance(self.budget, Pyramid) and self.of != "prompt":
            raise ValueError(f"a budget of kind pyramid must go with of: prompt, found of: {self.of}")
        return self

    def scores(self) -> Scores:
        queries: Queries = self.queries
        if self.score == "last":
            queries = "last" if queries == "all" else "last probe"
        decode: Queries = queries if self.decode == "same" else "last"
        if self.queries != "probe":
            return Scores(queries, decode, self.heads)
        period = self.every if self.every > 1 else 100
        return Scores(queries, decode, self.heads, self.newest, self.random, period, self.seed)

    def budget_tokens(self, seen: int, prompt: int) -> int:
        return budget_tokens(self.budget, seen if self.of == "seen" else prompt)

    def rank(self, attention: Tensor, queries: Tensor, ages: Tensor) -> Tensor:
        if self.score != "normalised":
            return attention
        divided = attention / (ages if self.count == "causal" else queries.clamp(min=1.0))
        if self.decode == "same":
            return divided
        return torch.where(queries.amax(-1, keepdim=True) > 1, divided, attention)  # one query: that of a decode step


@hookimpl
def kvpolicy_policies() -> list[type[Policy]]:
    return [Attention]
