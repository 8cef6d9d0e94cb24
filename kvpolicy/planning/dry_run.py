"""A cache that counts: the layers of a real one, of which a token is one number.

So placement, groups and pages are those of a cache that runs, and its bytes are counted by the same code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvpolicy.errors import RecipeError
from kvpolicy.hf.model_config import check_stores, tiers_at
from kvpolicy.interfaces.component import call
from kvpolicy.interfaces.policy import RankPolicy
from kvpolicy.interfaces.site import Site
from kvpolicy.layer.commit import commit_all
from kvpolicy.layer.held import Reading
from kvpolicy.layer.layer import MAX_PENDING, LayerCache
from kvpolicy.layer.prompt import AT_ONCE as LAYERS_AT_ONCE
from kvpolicy.layer.prompt import LATE
from kvpolicy.layer.report import Memory, StoreMemory, measure
from kvpolicy.layer.view import Scratch
from kvpolicy.placement.per_head import PerHeadPlacement
from kvpolicy.placement.planner import Placement
from kvpolicy.placement.ranking import NOWHERE, Ranking, Turn
from kvpolicy.placement.selection import highest
from kvpolicy.placement.step import Step
from kvpolicy.planning.counted import Counting, Learnt, Scale
from kvpolicy.planning.counted_pages import PlannedPages
from kvpolicy.planning.shape import LayerShape, ModelShape
from kvpolicy.recipe.load import Recipe
from kvpolicy.storage.pages import planned_for

__all__ = ["DryRun", "unsure"]


@dataclass(frozen=True)
class PlannedSite(Site):
    """A place in a model of which nothing but shapes is known: calibrations and angles are stand-ins."""

    def calibrated(self, name: str, shape: tuple[int, ...] | None = None, unrotated: bool = False) -> Tensor:
        """Numbers of the shape that is asked for, on which no size depends.

        Raises:
            RecipeError: the shape is not said, so that sizes depend on the calibration.
        """
        if shape is None:
            raise RecipeError(
                f"a plan knows no calibration, and {name} of one must have a known shape, found none said; make the "
                "cache itself and ask its memory()"
            )
        count = 1
        for n in shape:
            count *= n
        return torch.linspace(-1.0, 1.0, count).view(shape)


def _still(channels: int) -> Any:
    """A rotary embedding that turns so many channels by nothing."""

    def rotary(positions: Tensor) -> tuple[Tensor, Tensor]:
        shape = (1, positions.shape[-1], channels)
        return torch.ones(shape), torch.zeros(shape)

    return rotary


def unsure(recipe: Recipe, layers: int) -> tuple[str, ...]:
    """What of a recipe attention decides, so that a plan says how much it takes at most."""
    found: dict[str, None] = {}
    for tier, below in {pair for i in range(layers) for pair in _neighbours(recipe.tiers_of(i, layers))}:
        policy = tier.policy
        if not isinstance(policy, RankPolicy):
            continue
        if policy._reads_counts:
            found[f"policy {policy.kind!r} lets attention decide how many tokens stay"] = None
        kept = [tier.keys, tier.values]
        if any(getattr(store, "per", "token") == "channel" for store in kept) and kept != [below.keys, below.values]:
            found[f"policy {policy.kind!r} lets attention decide which groups of channels are needed"] = None
    return tuple(found)


def _neighbours(tiers: Sequence[Any]) -> list[tuple[Any, Any]]:
    return list(zip(tiers, [*tiers[1:], tiers[-1]], strict=True))


class PlannedRanking(Ranking):
    """Ranks of which nothing is known: how many tokens stay is, but where attention decides it."""

    heads = 1
    """Heads that share a budget."""

    def add_features(self, fresh: Tensor, new: Any, slots: Tensor, step: Step) -> None:
        if self.placement.scores.judged is not None:
            fresh[..., self.placement.scores.judged] = NOWHERE

    def _rank(self, policy: RankPolicy, turn: Turn, tier: int) -> Tensor:
        return torch.zeros(turn.keys.target.shape)

    def select(self, turn: Turn, tier: int, rank: Tensor) -> Tensor | None:
        chosen, policy = turn.counts.selections[tier], self.placement.policies[tier]
        if isinstance(policy, RankPolicy) and policy._reads_counts and call(policy, "stay", rank) is not None:
            return torch.from_numpy(chosen.held)
        if isinstance(policy, RankPolicy) and policy._reads_counts:
            most = np.minimum(chosen.held, chosen.budgets * self.heads)
            stays = highest(rank.masked_fill(turn.keys.target != tier, -torch.inf), most)
            turn.keys.target.masked_fill_((turn.keys.target == tier) & ~stays, tier + 1)
            return torch.from_numpy(most)
        return super().select(turn, tier, rank)


class PlannedPlacement(PerHeadPlacement):
    """Tables of one row and head, which stand for all."""

    times = 1
    """Rows and heads that they stand for."""

    def bytes(self, side: str, store: int) -> dict[str, int]:
        return {part: n * self.times for part, n in super().bytes(side, store).items()}


class PlannedScratch(Scratch):
    """Dense buffers of which the size is known."""

    def __init__(self) -> None:
        super().__init__()
        self.held: dict[str, tuple[int, int]] = {}

    def note(self, side: str, size: int, itemsize: int) -> None:
        """So many numbers are decoded."""
        self.held[side] = self.room(self.held.get(side, (0, 0))[0], size), itemsize

    @property
    def bytes(self) -> int:
        return sum(n * itemsize for n, itemsize in self.held.values())


class PlannedLayer(LayerCache):
    """A layer whose tokens are one number each."""

    def __init__(self, start: Step, scratch: PlannedScratch | None, reading: Reading, site: Site, of: Any) -> None:
        self.shape, self.batch, self.dtype, self.learnt = of
        super().__init__(start, scratch, reading, site)
        if self.page_table is not None:
            self.page_table = PlannedPages(self.page_table.reader, self.batch, self.shape.key_dim)

    def start(self, keys: Tensor, values: Tensor) -> None:
        shape, self.stores = self.shape, {}
        dims = {"keys": shape.key_dim, "values": shape.value_dim}
        for side, dim in dims.items():
            self.like[side] = torch.empty((self.batch, shape.kv_heads, 0, dim), dtype=self.dtype)
        apart = shape.kv_heads if self.placement.by_head else 1
        for side, dim in dims.items():
            scale = Scale(self.batch, shape.kv_heads, dim, self.like[side].element_size(), apart, self.dtype)
            count = len(self.placement.first_tier[side])
            specs = [self.placement.store_spec(side, s) for s in range(count)]
            self.stores[side] = [self.learnt.store(spec, self.site_of(side), scale) for spec in specs]

    def feed(self, tokens: int) -> None:
        """An update that brings so many tokens."""
        thin = torch.zeros((1, 1, tokens, 1), dtype=self.dtype)
        if not self.stores:
            self.start(thin, thin)
        self.commit(tokens)
        if self.committed:
            self._decode(tokens)
        if self.wants_queries:
            for store in self.stores["keys"]:
                if isinstance(store, Counting):
                    store.asked = True
        with self._changing():
            self._enter({"keys": thin, "values": thin})

    def _decode(self, tokens: int) -> None:
        """Note what a step keeps that decodes the stores, or reads them."""
        if self.reading.attached and self.told_apart:
            self.columns()
            self.pages()  # as attention asks for them
            return
        for side, like in self.like.items():
            self.planner.layout(side)
            if isinstance(self.scratch, PlannedScratch):
                size = like.shape[0] * like.shape[1] * (self.planner.width + tokens) * like.shape[3]
                self.scratch.note(side, size, like.element_size())

    def by_head(self) -> PerHeadPlacement:
        if not isinstance(self.planner, PlannedPlacement):
            with self._changing():
                site = replace(self.site_of("keys"), kv_heads=1)
                planner = PlannedPlacement(self.step, 1, site, torch.device("cpu"))
                planner.ranking = PlannedRanking(self.placement, [site])
                planner.times = self.batch * (self.shape.kv_heads if self.placement.by_head else 1)
                planner.ranking.heads = self.shape.kv_heads
                for store in (store for stores in self.stores.values() for store in stores if store is not None):
                    store.differ_by_head((1, 1))
                self.planner = planner
        assert isinstance(self.planner, PlannedPlacement)
        return self.planner


class DryRun:
    """The layers of a cache for a model of some shape, some batch rows, and one recipe.

    Layers with the same tiers and the same shape hold the same bytes, so two of them stand for all: two, because layers
    plan together.

    Args:
        recipe: the recipe.
        shape: of the model.
        batch: rows.
        device: the type of the device, on which the size of pages depends.
        attached: whether the model reads the stores, or a step decodes them.
        learnt: what runs for the same model know of stores.

    Raises:
        RecipeError: the recipe does not fit the model.
    """

    def __init__(
        self,
        recipe: Recipe,
        shape: ModelShape,
        batch: int,
        device: str,
        attached: bool,
        learnt: Learnt | None = None,
    ) -> None:
        self.learnt = Learnt() if learnt is None else learnt
        self.shape, self.batch, self.device = shape, batch, device
        self.scratch = None if shape.shares_kv else PlannedScratch()
        self.reading = Reading(attached=attached)
        self.kinds: list[tuple[Any, list[int], list[PlannedLayer]]] = []
        """Tiers and shape, the layers that have them, and the layers that stand for these."""
        self._make(recipe)
        self.own = {i: x.own_layer() for i, x in enumerate(shape.layers) if not x.compressible and x.kv_heads}

    def _make(self, recipe: Recipe) -> None:
        count, starts = len(self.shape.layers), list[tuple[Any, Step]]()
        for i, layer in enumerate(self.shape.layers):
            if not layer.compressible:
                continue
            key = recipe.tiers_of(i, count), layer
            known = next((kind for kind in self.kinds if kind[0] == key), None)
            if known is None:
                known = key, [], []
                self.kinds.append(known)
            known[1].append(i)
            if len(known[2]) < 2:
                known[2].append(self._layer(recipe, i, layer, key[0], starts))

    def _layer(
        self, recipe: Recipe, i: int, layer: LayerShape, tiers: Any, starts: list[tuple[Any, Step]]
    ) -> PlannedLayer:
        fitted = {"planned": torch.zeros(1)} if recipe.calibration else {}
        rotary = _still(layer.rotated) if layer.rotated else None
        site = PlannedSite(i, len(self.shape.layers), kv_heads=layer.kv_heads, rotary=rotary, fitted=fitted)
        start = next((step for known, step in starts if known == tiers), None)
        if start is None:
            try:
                own = tiers_at(tiers, site)
                if not self.learnt.checked(tiers, layer):
                    check_stores(tiers, layer.key_dim if layer.key_dim == layer.value_dim else None, site)
            except RecipeError as error:
                raise RecipeError(f"recipe {recipe.name}: {error}") from None
            start = Step.first(Placement(own))
            starts.append((tiers, start))
        return PlannedLayer(
            start, self.scratch, self.reading, site, (layer, self.batch, self.shape.torch_dtype, self.learnt)
        )

    @torch.no_grad()
    def feed(self, tokens: int) -> None:
        """A forward pass that brings so many tokens.

        Raises:
            CacheError: the model is not attached, and the recipe needs that.
        """
        caches = [cache for _, _, caches in self.kinds for cache in caches]
        for cache in caches:
            cache.check_attached()
        with planned_for(self.device):
            together = any(cache.placement.shared for cache in caches)
            # As a cache does: where a pass may end the prompt, each layer is told by its own update.
            ends = tokens == 1 and not together and any(cache.ends_prompt() for cache in caches)
            if together or (self.reading.attached and not ends):
                commit_all(self._groups(), tokens)
            for cache in caches:
                cache.feed(tokens)
        for i, own in self.own.items():
            layer = self.shape.layers[i]
            sizes = [(self.batch, layer.kv_heads, tokens, dim) for dim in (layer.key_dim, layer.value_dim)]
            own.update(*(torch.empty(size, dtype=self.shape.torch_dtype, device="meta") for size in sizes), i)

    def waiting(self, tokens: int, first: bool) -> int:
        """Bytes of the tokens of a pass that layers keep as they came until several let theirs in together.

        Of the `first` pass only layers keep them whose policies see attention, or whose transforms see queries.
        """
        if not self.reading.attached or self.scratch is None or self.device not in LATE or tokens <= MAX_PENDING:
            return 0
        each: list[int] = []
        for (_, shape), numbers, (layer, *_) in self.kinds:
            asks = layer.placement.attends or layer.asked_for
            if layer.told_apart and (asks or not first):
                queries = shape.heads * shape.key_dim if layer.placement.scores.reads_query() else 0
                each += [shape.kv_heads * (shape.key_dim + shape.value_dim) + queries] * len(numbers)
        return self.batch * tokens * sum(sorted(each)[-LAYERS_AT_ONCE:]) * self.shape.itemsize

    def _groups(self) -> list[list[PlannedLayer]]:
        """Layers that select together, the others each for itself."""
        groups: dict[Any, list[PlannedLayer]] = {}
        for cache in (cache for _, _, caches in self.kinds for cache in caches):
            groups.setdefault(id(cache.placement) if cache.placement.shared else cache, []).append(cache)
        return list(groups.values())

    @property
    def dense(self) -> int:
        """Bytes of all keys and values that the stores stand for, decoded."""
        numbers = 0
        for (_, layer), of, caches in self.kinds:
            width = caches[0].planner.width * (layer.key_dim + layer.value_dim)
            numbers += len(of) * self.batch * layer.kv_heads * width
        return numbers * self.shape.itemsize

    @torch.no_grad()
    def memory(self) -> Memory:
        """What `CompressedCache.memory()` gives for a cache that was fed the same."""
        with planned_for(self.device):
            commit_all(self._groups())
        return self.count()

    def count(self) -> Memory:
        """The same, but the newest tokens may not be in it yet, which wait for the next pass."""
        found = measure(
            [caches[0] for _, _, caches in self.kinds], 0, 0 if self.scratch is None else self.scratch.bytes
        )
        stores = {n: list(own) for n, own in groupby(found.stores, lambda store: store.layer)}
        exact = values = 0
        scratch, shared = found.scratch, found.shared_indices
        by_layer: dict[int, list[StoreMemory]] = {}
        for n, ((tiers, _), numbers, caches) in enumerate(self.kinds):
            by_layer.update((i, [replace(store, layer=i) for store in stores.get(n, [])]) for i in numbers)
            alone = measure(caches[:1], 0, 0)
            exact, values = exact + alone.exact_bytes * len(numbers), values + alone.values * len(numbers)
            if any(tier.policy is not own for tier, own in zip(tiers, caches[0].placement.policies, strict=True)):
                # By a calibration each layer has tokens of its own, and tables of them.
                scratch += alone.scratch * (len(numbers) - 1)
                shared += alone.shared_indices * (len(numbers) - 1)
        for i, own in self.own.items():
            alone = measure([[x for x in (own.keys, own.values) if x is not None]], 0, 0)
            by_layer[i] = [replace(store, layer=i) for store in alone.stores]
            exact, values = exact + alone.exact_bytes, values + alone.values
        every = tuple(store for i in sorted(by_layer) for store in by_layer[i])
        return Memory(every, exact, values, scratch, shared)
