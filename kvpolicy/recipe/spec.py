"""The recipe as a value: tiers, and which layers they apply to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field, InstanceOf, PrivateAttr, SerializeAsAny, model_validator

from kvpolicy.errors import PluginError, RecipeError
from kvpolicy.interfaces.budget import find_overlaps, layers_named
from kvpolicy.interfaces.component import TRY, Component, call, check_answer
from kvpolicy.interfaces.merger import Merger
from kvpolicy.interfaces.policy import Policy, RankPolicy
from kvpolicy.interfaces.quantizer import AffineQuantizer, Quantizer, known_grouping, precision_of
from kvpolicy.interfaces.reader import Reader
from kvpolicy.interfaces.site import Site
from kvpolicy.recipe.yaml import BAD, SPEC_VERSION, Path_, dump_yaml, path_text
from kvpolicy.words import clip

Store = Literal["full", "evict"] | SerializeAsAny[InstanceOf[Quantizer]]
"""`full`, `evict`, or a quantizer."""


class Tier(BaseModel):
    """One stage of the descent: which tokens stay here, and how their keys and values are stored."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    policy: SerializeAsAny[InstanceOf[Policy]] | None = Field(
        default=None, description="Which tokens stay; the others descend to the next tier. The last tier has none."
    )
    keys: Store = Field(description="How keys are stored: full, evict, or a quantizer.")
    values: Store = Field(description="How values are stored: full, evict, or a quantizer.")
    read: SerializeAsAny[InstanceOf[Reader]] | None = Field(
        default=None,
        description="Of the last tier: who chooses which of its tokens each query of a decode step reads. All by "
        "default.",
    )
    merge: SerializeAsAny[InstanceOf[Merger]] | None = Field(
        default=None,
        description="Of the last tier, with store: evict: who adds the values of what is dropped to those that stay.",
    )

    def of_layer(self, layer: int, layers: int) -> Tier:
        """With the options that a layer of a model of `layers` layers has of its own."""
        policy = None if self.policy is None else self.policy.of_layer(layer, layers)
        return self if policy is self.policy else self.model_copy(update={"policy": policy})

    def at(self, site: Site) -> Tier:
        """With the policy for a place in a model.

        Raises:
            RecipeError: it can't work there.
            PluginError: it raised, or gave something else.
        """
        if (policy := self.policy) is None:
            return self
        found = call(policy, "at", site)
        if type(found) is not type(policy):
            raise PluginError(
                f"policy {policy.kind!r}: at must return itself or a copy, found {type(found).__name__}. {TRY}"
            )
        return self if found is policy else self.model_copy(update={"policy": found})

    def plain(self) -> dict[str, Any]:
        """As YAML writes it, every option spelt out."""
        tier: dict[str, Any] = {} if self.policy is None else {"policy": plain(self.policy)}
        more = {n: plain(own) for n in ("read", "merge") if (own := getattr(self, n)) is not None}
        if self.keys == self.values:
            return {**tier, "store": plain(self.keys), **more}
        return {**tier, "keys": plain(self.keys), "values": plain(self.values), **more}


MOST_LAYERS = 9999
FULL_TIERS = (Tier(keys="full", values="full"),)
"""The tiers of a layer that is kept exactly."""


class Recipe(BaseModel):
    """A cache, declared: parameters are filled in, policies and quantizers are instances."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    version: int = Field(default=SPEC_VERSION, strict=True, description="Version of the recipe format.")
    name: str = Field(default="custom", description="Name of the recipe.")
    summary: str = Field(default="", description="What it does, in a sentence or two.")
    source: str = Field(default="", description="Where the method comes from, such as the address of a paper.")
    calibration: str = Field(
        default="",
        description="A file that kvpolicy calibrate made for the model: relative to the folder of the recipe's file, "
        "but to the working directory where the recipe is a bundled one or the path is given as a parameter.",
    )
    params: dict[str, str | int | float | bool] = Field(
        default_factory=dict,
        description="Parameters with their values. `$name` stands for one, as the whole value of a key below "
        "tiers and layers.",
    )
    model_layers: int | None = Field(
        default=None,
        strict=True,
        ge=1,
        le=MOST_LAYERS,
        description="Layers that a model must have: for tiers that were chosen for one model. Without it, any number.",
    )
    tiers: tuple[Tier, ...] = Field(description="Tiers from the newest tokens down.")
    layers: dict[str, Literal["full"] | tuple[Tier, ...]] = Field(
        default_factory=dict,
        description='Other tiers for some layers: "0", "-1" (the last) or "2-5", each a list of tiers or full.',
    )

    _template: dict[str, Any] | None = PrivateAttr(None)
    _by_layer: list[tuple[Tier, ...]] | None = PrivateAttr(None)
    """Tiers of each layer of the model asked for last."""

    @model_validator(mode="after")
    def _check(self) -> Recipe:
        lists: list[tuple[Path_, Sequence[Tier]]] = [(("tiers",), self.tiers)]
        lists += [(("layers", key), tiers) for key, tiers in self.layers.items() if tiers != "full"]
        found = [
            f"{path_text((*path, *place))}: {message}"
            for path, tiers in lists
            for place, message in find_problems(tiers)
        ]
        found += find_overlaps(self.layers).values()
        if found:
            problems = dict.fromkeys(found)
            raise RecipeError("\n".join(f"recipe {clip(self.name)}: {problem}" for problem in problems))
        if self.model_layers is not None:
            self._resolve(self.model_layers)
        return self

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Recipe) and dict(self) == dict(other)

    def __hash__(self) -> int:
        return hash((self.name, self.tiers))

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Recipe:
        """A copy with some fields changed. Its parameters are spent: their values stand in the tiers."""
        if not update:
            return super().model_copy(deep=deep)
        copied = super().model_copy(update={"params": {}, **update}, deep=deep)
        copied._template = copied._by_layer = None
        return copied

    def tiers_of(self, layer: int, layers: int) -> tuple[Tier, ...]:
        """The tiers of a layer of a model that has `layers` of them."""
        resolved = self._by_layer
        if resolved is None or len(resolved) != layers:
            resolved = self._by_layer = self._resolve(layers)
        return resolved[layer]

    def _resolve(self, layers: int) -> list[tuple[Tier, ...]]:
        if self.model_layers not in (None, layers):
            raise RecipeError(
                f"recipe {clip(self.name)}: the model must have {self.model_layers} layers, for which the recipe was "
                f"made, found {layers}; use a recipe that was made for this model, or one without model_layers"
            )
        found: list[tuple[Path_, tuple[Tier, ...]]] = [(("tiers",), self.tiers)] * layers
        used: dict[int, str] = {}
        for key, tiers in self.layers.items():
            try:
                named = layers_named(key, layers)
            except RecipeError as error:
                raise RecipeError(f"recipe {clip(self.name)}: layers.{key} {error}") from None
            for i in named:
                if i in used:
                    raise RecipeError(
                        f"recipe {clip(self.name)}: a layer may be named once, found layer {i} of {layers} in both "
                        f"layers.{used[i]} and layers.{key}"
                    )
                used[i] = key
                found[i] = ("layers", key), FULL_TIERS if tiers == "full" else tiers
        return [
            tuple(self._own(tier, (*path, number), i, layers) for number, tier in enumerate(tiers))
            for i, (path, tiers) in enumerate(found)
        ]

    def _own(self, tier: Tier, path: Path_, layer: int, layers: int) -> Tier:
        try:
            return tier.of_layer(layer, layers)
        except RecipeError as error:
            where = path_text((*path, "policy", *error.place))
            raise RecipeError(f"recipe {clip(self.name)}: {where}: {error}") from None

    def to_yaml(self, resolved: bool = False) -> str:
        """YAML that loads as an equal recipe.

        Args:
            resolved: write the values of parameters in their places, and every option of every plugin.
        """
        if self._template is not None and not resolved:
            return dump_yaml(plain(self._template))
        written: dict[str, Any] = {"version": self.version, "name": self.name}
        written.update({k: getattr(self, k) for k in ("summary", "source", "calibration") if getattr(self, k)})
        if self.model_layers is not None:
            written["model_layers"] = self.model_layers
        written["tiers"] = [tier.plain() for tier in self.tiers]
        if self.layers:
            written["layers"] = {
                key: tiers if tiers == "full" else [tier.plain() for tier in tiers]
                for key, tiers in self.layers.items()
            }
        return dump_yaml(written)


def plain(value: Any) -> Any:
    """Instances of plugins as the mappings that YAML writes."""
    if isinstance(value, Component):
        return value.model_dump(mode="json")
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


class _TierLike(Protocol):
    @property
    def policy(self) -> Any: ...
    @property
    def keys(self) -> Any: ...
    @property
    def values(self) -> Any: ...
    @property
    def read(self) -> Any: ...
    @property
    def merge(self) -> Any: ...


def find_problems(tiers: Sequence[_TierLike]) -> Iterator[tuple[Path_, str]]:
    """The rules that a list of tiers breaks, each with its path. What is BAD breaks none."""
    if not tiers:
        yield (), "a list of tiers must not be empty"
    for i, tier in enumerate(tiers):
        last = i == len(tiers) - 1
        if last and tier.policy is not None and tier.policy is not BAD:
            yield (
                (i, "policy"),
                "the last tier takes whatever reaches it and must have no policy, "
                f"found {tier.policy.kind!r}; remove it, or add a tier below",
            )
        if not last and tier.policy is None:
            yield (i,), "every tier but the last must have a policy, found none; without one nothing descends"
        clash = None if last or not i else _misplaced(tiers[i - 1].policy, tier.policy)
        if clash:
            yield (i, "policy"), clash
        for side in ("keys", "values"):
            yield from _store_problems(tiers, i, side)
    yield from _reader_problems(tiers)
    yield from _merger_problems(tiers)
    if len(tiers) == 1 and tiers[0].keys == tiers[0].values == "evict":
        yield (0,), "the only tier must not evict: nothing would be kept"


def _reader_problems(tiers: Sequence[_TierLike]) -> Iterator[tuple[Path_, str]]:
    """What is wrong where a tier names who reads it."""
    for i, tier in enumerate(tiers[:-1]):
        if tier.read is not None:
            last = f"found it in tier {i} of {len(tiers)}; move it to the last tier"
            yield (i, "read"), f"read must stand in the last tier, from which no token descends, {last}"
    *above, last_tier = tiers
    if last_tier.read in (None, BAD):
        return
    path = (len(above), "read")
    if last_tier.keys == "evict":
        yield path, "read must stand in a tier that holds tokens, found store: evict; remove one of them"
    for tier in above:
        if isinstance(tier.policy, RankPolicy) and _asks_attention(tier.policy):
            yield (
                path,
                "read must stand below policies that need no attention, since what is not read receives none, found "
                f"{tier.policy.kind!r}; select by position, or by keys or values",
            )
    whole = [t for t in tiers if BAD not in (t.keys, t.values)]
    for one, other in pairwise(whole):
        same = [one.keys == other.keys, one.values == other.values]
        coded = other is last_tier and all(same) and (other.keys, other.values) != ("full", "full")
        if same[0] != same[1] or coded:
            yield (
                path,
                "read must go with keys and values that change their stores in the same tiers, and with quantizers of "
                "its own tier alone, found others; give keys and values other stores in the same tier",
            )
            return


def _merger_problems(tiers: Sequence[_TierLike]) -> Iterator[tuple[Path_, str]]:
    """What is wrong where a tier names who merges what is dropped."""
    for i, tier in enumerate(tiers):
        if tier.merge in (None, BAD):
            continue
        if i < len(tiers) - 1 or tier.keys != "evict":
            yield (
                (i, "merge"),
                "merge must stand in the last tier, with store: evict, found it elsewhere; move it there",
            )
            continue
        stores = [store for t in tiers[:-1] for store in (t.keys, t.values) if store is not BAD]
        if any(store != "full" for store in stores):
            found = next(_name(store) for store in stores if store != "full")
            yield (i, "merge"), f"merge must stand below exact tiers alone, found {found}; use store: full there"
        policy = tiers[i - 1].policy if i else None
        ranks = isinstance(policy, RankPolicy) and policy._scores() is not None and policy.share == "head"
        if not ranks and policy is not BAD:
            kind = None if policy is None else policy.kind
            yield (
                (i, "merge"),
                "merge must stand below a policy by attention that selects for each head, from which it takes the "
                f"attention received, found {kind!r}; use policy attention with share: head",
            )


def _asks_attention(policy: RankPolicy) -> bool:
    scorer = policy._scorer()
    return policy._scores() is not None or (scorer is not None and "query" in scorer.needs)


def _store_problems(tiers: Sequence[_TierLike], i: int, side: str) -> Iterator[tuple[Path_, str]]:
    tier, store = tiers[i], getattr(tiers[i], side)
    if store is BAD:
        return
    whole = tier.keys is not BAD and tier.values is not BAD
    if store == "evict" and whole and (i < len(tiers) - 1 or tier.keys != tier.values):
        yield (
            (i, side),
            "evict must stand in the last tier and for keys and values alike, "
            f"found keys {_name(tier.keys)} and values {_name(tier.values)} in tier {i} of {len(tiers)}",
        )
    for place, message in _grouping_problems(store, i):
        yield (i, side, *place), message
    above = getattr(tiers[i - 1], side) if i else BAD
    if above not in (BAD, "evict") and _precision(store) > _precision(above):
        yield (
            (i, side),
            f"precision must never rise down the list, found {_name(store)} below {_name(above)}; exchange the tiers",
        )


def _grouping_problems(store: Any, tier: int) -> Iterator[tuple[Path_, str]]:
    """What is wrong with the groups of a quantizer, as far as it can be told without head_dim."""
    if not isinstance(store, AffineQuantizer):
        return
    if store.group_size == "arrival" and store.per != "channel":
        yield (
            ("group_size",),
            "group_size: arrival must go with per: channel, found per: token; give a number or auto",
        )
    elif store.group_size == "arrival" and tier == 0:
        yield (
            ("group_size",),
            "group_size: arrival must stand below a tier whose tokens leave in blocks, found tier 0; give a number or "
            "auto",
        )
    elif (grouping := known_grouping(store)) is not None:
        for number, extra in enumerate(store.extras):
            try:
                check_answer(extra, "check_grouping", grouping)
            except RecipeError as error:
                yield ("extras", number, *error.place), str(error)


def _misplaced(above: Any, below: Any) -> str | None:
    """Why a policy can't stand below another, if it can't."""
    if not isinstance(above, RankPolicy) or below is BAD:
        return None
    if not isinstance(below, RankPolicy):
        kind = below.kind if below is not None else None
        return (
            f"below a policy by attention ({above.kind!r}) another such or the last tier must stand, found {kind!r}; "
            "put policies by position above it"
        )
    order = ("model", "layer", "head")
    if order.index(below.share) < order.index(above.share):
        return (
            f"below a tier with share: {above.share} a tier must select as finely, found share: {below.share}; "
            f"use share: {above.share} in both"
        )
    return None


def _precision(store: Any) -> float:
    return {"full": float("inf"), "evict": 0.0}[store] if isinstance(store, str) else precision_of(store)


def _name(store: Any) -> str:
    return store if isinstance(store, str) else f"{store.kind} ({precision_of(store):g} bits)"
