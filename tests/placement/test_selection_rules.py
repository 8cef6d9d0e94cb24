"""Policies that rank tokens: what stays in random histories is what a plain replay of the rules says."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from examples import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import HEAD_DIM, Layer
from torch import Tensor

from kvpolicy import Recipe, load_recipe

HEADS = 2


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield


@st.composite
def rank_options(draw: st.DrawFn, coarsest: int) -> dict[str, Any]:
    options: dict[str, Any] = {
        "kind": "rank",
        "scorer": "key_norm",
        "share": draw(st.sampled_from(["model", "layer", "head"][coarsest:])),
        "among": draw(st.sampled_from(["tier", "arrival", "pairs"])),
        "budget": draw(st.sampled_from([1, 5, 12, 0.2, 0.5])),
    }
    if options["among"] != "arrival" and draw(st.booleans()):
        options["when"] = "prompt"
    else:
        options["every"] = draw(st.sampled_from([1, 1, 4, 10]))
    if options["among"] != "arrival":
        options["of"] = draw(st.sampled_from(["seen", "prompt"]))
    special = draw(st.sampled_from(["none", "none", "threshold", "heads"]))
    if special == "threshold" and options["among"] != "pairs":
        options["threshold"] = draw(st.sampled_from([-4.5, -4.0, -3.5]))
        del options["budget"]
        options.pop("of", None)
    elif special == "heads" and options["among"] != "pairs" and options["share"] == "head":
        options |= {"heads": "scores", "floor": draw(st.sampled_from([0.0, 0.2, 1.0]))}
    return options


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    first = draw(rank_options(0))
    policies = [first]
    if draw(st.booleans()):
        policies.append(draw(rank_options(["model", "layer", "head"].index(first["share"]))))
    if draw(st.booleans()):
        policies = [{"kind": "recent", "window": draw(st.sampled_from([1, 7]))}, *policies]
    stores = draw(st.sampled_from(["full", "evict", "int"]))
    last: Any = {"kind": "int", "nbits": 8, "group_size": 8, "per": draw(st.sampled_from(["token", "channel"]))}
    tiers = [{"policy": policy, "store": "full"} for policy in policies]
    return load_recipe({"tiers": [*tiers, {"store": last if stores == "int" else stores}]})


@dataclass
class Row:
    """One row: for each head and tier the slots held, and those that competed in their tier."""

    recipe: Recipe
    held: list[list[list[int]]] = field(init=False)
    judged: set[tuple[int, int, int]] = field(default_factory=set)
    slots: list[int] = field(default_factory=list)
    """The real tokens seen."""
    prompt: int | None = None

    def __post_init__(self) -> None:
        self.held = [[[] for _ in self.recipe.tiers] for _ in range(HEADS)]

    def commit(self, slots: list[int], scores: Tensor, ends: bool = False) -> None:
        """Let tokens in; `scores` are `[heads, slots]` of all tokens."""
        before = len(self.slots)
        self.slots += slots
        for head in self.held:
            head[0] += slots
        for number, tier in enumerate(self.recipe.tiers[:-1]):
            policy = tier.policy
            assert policy is not None
            if policy.kind == "recent":
                newest = set(self.slots[max(0, len(self.slots) - policy.window) :])  # type: ignore[attr-defined]
                stay = [[s for s in head[number] if s in newest] for head in self.held]
            elif self.due(policy, before, ends):
                stay = self.selected(policy, number, scores)
            else:
                continue
            for head, kept in zip(self.held, stay, strict=True):
                head[number + 1] += [s for s in head[number] if s not in kept]
                head[number] = kept

    def due(self, policy: Any, before: int, ends: bool) -> bool:
        seen = len(self.slots)
        if policy.when == "prompt":
            return ends
        # At the prompt's end all look again, if any policy waits for it: to share budgets out twice changes them.
        asked = any(getattr(tier.policy, "when", "") == "prompt" for tier in self.recipe.tiers)
        again = ends and asked and seen % policy.every == 0
        return again or any(n % policy.every == 0 for n in range(before + 1, seen + 1))

    def selected(self, policy: Any, tier: int, scores: Tensor) -> list[list[int]]:
        """What stays in a tier, head by head."""
        if policy.share != "head":
            scores = scores.mean(0, keepdim=True).expand(HEADS, -1)
        compete = [
            [s for s in head[tier] if policy.among != "arrival" or (h, tier, s) not in self.judged]
            for h, head in enumerate(self.held)
        ]
        stay = []
        for h, own in enumerate(compete):
            rank = {s: float(scores[h, s]) for s in own}
            if policy.threshold is not None:
                best = [s for s in own if rank[s] >= policy.threshold]
            elif policy.among == "pairs":
                best = self.paired(sorted(own), rank, self.budget(policy, len(own)))
            else:
                count = self.budget(policy, len(own))
                if policy.heads == "scores":
                    count = self.shared_out(policy, compete, scores)[h]
                best = sorted(own, key=lambda s: -rank[s])[:count]
            stay.append([s for s in self.held[h][tier] if s not in own or s in best])
            self.judged |= {(h, tier, s) for s in stay[-1]}
        return stay

    def budget(self, policy: Any, competing: int) -> int:
        prompt = len(self.slots) if self.prompt is None else self.prompt
        of = competing if policy.among == "arrival" else len(self.slots) if policy.of == "seen" else prompt
        return policy.budget if isinstance(policy.budget, int) else max(1, int(policy.budget * of))

    def paired(self, own: list[int], rank: dict[int, float], budget: int) -> list[int]:
        while len(own) > budget:
            own = [max(own[i : i + 2], key=lambda s: rank[s]) for i in range(0, len(own), 2)]
        return own

    def shared_out(self, policy: Any, compete: list[list[int]], scores: Tensor) -> list[int]:
        even = [self.budget(policy, len(own)) for own in compete]
        ranked = sorted((-float(scores[h, s]), h) for h, own in enumerate(compete) for s in own)
        best = [h for _, h in ranked[: sum(even)]]
        shares = [(1 - policy.floor) * best.count(h) + policy.floor * even[h] for h in range(HEADS)]
        return [round(torch.tensor(share).round().item()) for share in shares]


class History:
    """A layer, and each row of it replayed."""

    def __init__(self, recipe: Recipe, data: st.DataObject) -> None:
        self.recipe, self.data = recipe, data
        self.batch = data.draw(st.integers(1, 2))
        self.layer = Layer(recipe)
        self.rows = [Row(recipe) for _ in range(self.batch)]
        self.scores = torch.empty(self.batch, HEADS, 0)
        self.real = torch.empty(self.batch, 0, dtype=torch.bool)
        self.pending = 0

    def commit(self) -> None:
        stop = self.real.shape[1]
        waiting = range(stop - self.pending, stop)
        for r, row in enumerate(self.rows):
            row.commit([s for s in waiting if self.real[r, s]], self.scores[r])
        self.pending = 0

    def update(self) -> None:
        n = self.data.draw(st.one_of(st.just(1), st.integers(1, 30), st.integers(60, 90)), "tokens")
        first = self.real.shape[1]
        real = torch.ones(self.batch, n, dtype=torch.bool)
        if n > 1 and self.data.draw(st.booleans()):
            real[-1, : self.data.draw(st.integers(0, n))] = False
        generator = torch.Generator().manual_seed(first)
        query = torch.randn(self.batch, 4, n, HEAD_DIM, generator=generator)
        keys, values = torch.randn(2, self.batch, HEADS, n, HEAD_DIM, generator=generator)
        self.commit()
        if n == 1 and first and self.rows[0].prompt is None:
            for r, row in enumerate(self.rows):
                row.prompt = len(row.slots)
                row.commit([], self.scores[r], ends=True)
        self.layer(query, keys, values, real)
        self.scores = torch.cat([self.scores, -keys.float().norm(dim=-1)], dim=2)
        self.real = torch.cat([self.real, real], dim=1)
        self.pending = n
        if n > 64 and not any(getattr(tier.policy, "share", "") == "model" for tier in self.recipe.tiers):
            self.commit()

    def crop(self) -> None:
        n = self.data.draw(st.integers(0, max(self.pending - 1, 0)), "crop")
        if n:
            self.layer.cache.crop(-n)
            self.real, self.scores = self.real[:, :-n], self.scores[..., :-n]
            self.pending -= n

    def check(self) -> None:
        held = self.layer.held()
        self.commit()
        evicts = self.recipe.tiers[-1].keys == "evict"
        for r, row in enumerate(self.rows):
            for h, head in enumerate(row.held):
                found = held[r % len(held)][h % len(held[0])]
                expected = [sorted(tier) for tier in head]
                assert found == ([*expected[:-1], []] if evicts else expected)


@settings(max_examples=examples(80), deadline=None)
@given(st.data())
def test_what_stays_is_what_the_rules_say(data: st.DataObject) -> None:
    history = History(data.draw(recipes()), data)
    for step in data.draw(st.lists(st.sampled_from(["update", "update", "crop", "check"]), min_size=2, max_size=12)):
        getattr(history, step)()
    history.update()
    history.check()


def test_the_replay_can_tell_rules_apart() -> None:
    """So that the test above is able to fail."""
    found = []
    for options in ({}, {"among": "pairs"}, {"among": "arrival"}, {"when": "prompt"}, {"share": "layer"}):
        recipe = load_recipe(
            {
                "tiers": [
                    {"policy": {"kind": "rank", "scorer": "key_norm", "budget": 9, **options}, "store": "full"},
                    {"store": "evict"},
                ]
            }
        )
        row, generator = Row(recipe), torch.Generator().manual_seed(0)
        scores = torch.rand(HEADS, 60, generator=generator)
        row.commit(list(range(30)), scores)
        row.prompt = 30
        row.commit([], scores, ends=True)
        row.commit(list(range(30, 60)), scores)
        found.append(str(row.held))
    assert len(set(found)) == len(found)
