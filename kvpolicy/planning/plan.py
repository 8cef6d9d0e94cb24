"""What recipes will take and give on a model, before there are weights or a GPU."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvpolicy.errors import PlanError
from kvpolicy.layer.report import Memory
from kvpolicy.planning.counted import Learnt
from kvpolicy.planning.dry_run import DryRun, unsure
from kvpolicy.planning.read import read_shape
from kvpolicy.planning.result import Plan, Planned
from kvpolicy.planning.shape import ModelShape
from kvpolicy.planning.sizes import MOST_ROWS, MOST_TOKENS, check_sizes, memory_bytes
from kvpolicy.recipe.load import Recipe, load_recipe

__all__ = ["plan"]

AT_ONCE = 1 << 25
"""Numbers that are coded at a time at most, in float32."""
COPIES = 4
"""Copies of these while they are coded."""


def plan(
    recipes: Any,
    model: Any,
    *,
    tokens: int | Sequence[int] = 8192,
    batch: int = 1,
    generated: int | None = None,
    memory: str | int | None = None,
    dtype: str | None = None,
    device: str = "cuda",
    attach: bool = True,
    chunk: int | None = None,
) -> Plan:
    """Say what recipes will take on a model: bytes by part, peaks, what fits, and how much faster a step can get.

    Bytes of caches are those that `memory()` of a real cache gives after the same passes, without a weight or a number
    of it: tokens are placed, grouped and paged as in a cache that runs.

    Args:
        recipes: what `load_recipe` takes, or several of these.
        model: a config.json or a directory that holds one, an id of the Hugging Face hub, a config of transformers, a
            model, or a mapping as in config.json.
        tokens: tokens that the cache has seen, or several such lengths.
        batch: rows.
        generated: how many of the tokens came one by one after the prompt. By default none; 1 for a recipe that
            selects as the prompt ends, which keeps everything before.
        memory: of the device, in bytes or such as `"80GiB"`. Says what fits.
        dtype: of weights, keys and values: `float32`, `float16` or `bfloat16`; by default as the config says.
        device: the type of device, on which the size of pages depends: `cuda`, `cpu` and so on.
        attach: whether the model reads the compressed stores (`kvpolicy.attach`); else a step decodes them.
        chunk: tokens of a pass of the prefill at most; by default the prompt is one pass.

    Returns:
        A `Plan` for each recipe and length.

    Raises:
        RecipeError: a recipe is not valid, or does not fit the model.
        CacheError: `attach` is false, and a recipe needs an attached model.
        PlanError: the model's config can't be read, or an argument is out of range.
    """
    lengths = [tokens] if isinstance(tokens, int) else list(tokens)
    check_sizes(lengths, batch, generated, chunk, device)
    limit = None if memory is None else memory_bytes(memory)
    single = isinstance(recipes, str | os.PathLike | Mapping | Recipe)
    loaded = [load_recipe(recipe) for recipe in ([recipes] if single else recipes)]
    if not loaded:
        raise PlanError("a plan must have at least one recipe, found none")
    shape = read_shape(model, dtype)
    if limit is not None and shape.weights >= limit:
        raise PlanError(
            f"the weights of {shape.name} must fit into memory, and take {shape.weights:,} of {limit:,} bytes; nothing "
            "fits beside them"
        )
    found = []
    for recipe in loaded:
        setting = Setting(recipe, shape, batch, generated, device, attach, chunk)
        found += [setting.planned(n, limit) for n in lengths]
    return Plan(shape, tuple(found), batch, limit, device, attach)


@dataclass
class Setting:
    """One recipe on one model."""

    recipe: Recipe
    shape: ModelShape
    batch: int
    generated: int | None
    device: str
    attach: bool
    chunk: int | None

    def __post_init__(self) -> None:
        count = len(self.shape.layers)
        self.learnt = Learnt()
        self.bounds = unsure(self.recipe, count)
        tiers = {tier for i in range(count) for tier in self.recipe.tiers_of(i, count)}
        self.prompted = any(tier.policy is not None and tier.policy._prompted for tier in tiers)

    def split(self, tokens: int) -> tuple[int, int]:
        """Tokens of the prompt, and those generated."""
        later = (1 if self.prompted else 0) if self.generated is None else self.generated
        return max(tokens - later, 1), min(later, tokens - 1)

    def workspace(self, batch: int, passed: int) -> int:
        """Bytes of what one layer computes of the tokens of a pass, and of coding them; an estimate."""
        shape = self.shape
        activations = batch * passed * (2 * shape.hidden + shape.widest) * shape.itemsize + batch * shape.vocab * 4
        widest = max((x.kv_heads * max(x.key_dim, x.value_dim) for x in shape.layers), default=0)
        coded = any(store not in ("full", "evict") for tier in self.recipe.tiers for store in (tier.keys, tier.values))
        coding = min(batch * passed * widest, AT_ONCE) * 4 * COPIES if coded else 0
        return activations + coding

    def needed(self, batch: int, tokens: int, quickly: bool = False) -> tuple[int, int, DryRun, Memory]:
        """Bytes at the peak of the prefill and while decoding; and the cache in the end.

        `quickly`: the cache is filled by one pass, which changes some pages.
        """
        prompt, later = self.split(tokens)
        run = DryRun(self.recipe, self.shape, batch, self.device, self.attach, self.learnt)
        passed = min(self.chunk or prompt, prompt)
        step = prompt if quickly else passed
        for first in range(0, prompt, step):
            run.feed(min(step, prompt - first))
        waiting = run.waiting(passed, first=passed == prompt)
        peak = self.shape.weights + run.count().reserved + self.workspace(batch, passed) + waiting
        for _ in range(later):
            run.feed(1)
        memory = run.memory()
        decoding = self.shape.weights + memory.reserved + self.workspace(batch, 1)
        return peak, decoding, run, memory

    def planned(self, tokens: int, limit: int | None) -> Planned:
        peak, decoding, run, memory = self.needed(self.batch, tokens)
        weights = self.shape.weights_read(self.batch)
        read = weights + memory.bytes + (0 if self.attach else 2 * run.dense)
        largest = longest = None
        if limit is not None:
            largest = _largest(lambda n: max(self.needed(n, tokens, quickly=True)[:2]), limit, self.batch, MOST_ROWS)
            longest = _largest(lambda n: max(self.needed(self.batch, n, quickly=True)[:2]), limit, tokens, MOST_TOKENS)
        prompt, later = self.split(tokens)
        return Planned(
            recipe=self.recipe.name,
            tokens=tokens,
            prompt=prompt,
            generated=later,
            memory=memory,
            weights=self.shape.weights,
            prefill_peak=peak,
            decoding=decoding,
            read=read,
            read_exact=weights + memory.exact_bytes,
            rows=self.batch,
            at_most=self.bounds,
            largest_batch=largest,
            longest_context=longest,
        )


def _largest(need: Callable[[int], int], limit: int, start: int, cap: int) -> int:
    """The largest number up to `cap` of which the need is within the limit, and that of the next is not; 0 if none is.

    Needs grow nearly in proportion, so that few numbers are tried.
    """
    low, high, at = (0, 0), (cap + 1, 0), min(max(start, 1), cap)
    while high[0] - low[0] > 1:
        found = need(at)
        low, high = ((at, found), high) if found <= limit else (low, (at, found))
        if high[1] == 0:  # nothing was too much yet
            guess = int(at * min(limit / max(found, 1) * 1.05 + 1, 16))
        elif low[0] == 0:
            guess = int(at * limit / found)
        else:
            guess = low[0] + int((limit - low[1]) * (high[0] - low[0]) / max(high[1] - low[1], 1))
        at = min(max(guess, low[0] + 1), high[0] - 1)
    return low[0]
