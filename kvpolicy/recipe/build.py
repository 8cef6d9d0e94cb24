"""Builds a recipe from a document: fills in parameters, makes the policies and quantizers."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from pydantic import ValidationError

from kvpolicy.errors import RecipeError
from kvpolicy.interfaces.budget import find_overlaps
from kvpolicy.interfaces.component import Component
from kvpolicy.interfaces.extra import Extra
from kvpolicy.interfaces.merger import Merger
from kvpolicy.interfaces.policy import Policy
from kvpolicy.interfaces.quantizer import Quantizer
from kvpolicy.interfaces.reader import Reader
from kvpolicy.interfaces.scorer import Scorer
from kvpolicy.interfaces.transform import Transform
from kvpolicy.plugins import PluginInfo, Registry, registry
from kvpolicy.recipe.explain import explain
from kvpolicy.recipe.inherit import BUNDLED, REFERENCE, TOP_KEYS, inherit, parameters
from kvpolicy.recipe.spec import MOST_LAYERS, Recipe, Tier, find_problems
from kvpolicy.recipe.yaml import BAD, SPEC_VERSION, Document, Path_, path_text
from kvpolicy.words import a, clip, in_words, listed, quoted, suggest

LISTS: dict[str, type[Component]] = {"transforms": Transform, "extras": Extra}
"""Options of quantizers that are lists of other plugins."""
ONE: dict[str, type[Component]] = {"scorer": Scorer}
"""Options of policies that are another plugin."""
TIER_KEYS = ("policy", "store", "keys", "values", "read", "merge")
STORES = ("store", "keys", "values")
OF_TIER: dict[str, type[Component]] = {"read": Reader, "merge": Merger}
"""Keys of a tier that are a plugin each."""
STORE = "a store must be full, evict or a mapping with a quantizer's kind"
LAYER = "a layer must have a list of tiers or full"


def build(document: Document, given: Mapping[str, Any]) -> Recipe:
    """The recipe that a document declares, with the parameters given.

    Raises:
        RecipeError: a line for each problem.
    """
    document = inherit(document)
    values = parameters(document, given)
    return _Builder(document, values, set(given), registry()).recipe()


class _Row(NamedTuple):
    """A tier as far as it is valid."""

    policy: Any
    keys: Any
    values: Any
    read: Any = None
    merge: Any = None


class _Builder:
    """Builds the parts of a recipe, each with its path in the document; notes every problem, and raises once."""

    def __init__(self, document: Document, values: dict[str, Any], given: set[str], plugins: Registry) -> None:
        self.document, self.values, self.given, self.plugins = document, values, given, plugins
        self.filled: dict[Path_, str] = {}
        self.told: set[tuple[str, str]] = set()
        data = {key: value for key, value in document.data.items() if key != "params"}
        self.data: dict[str, Any] = self._fill(data, ())

    def note(self, path: Path_, message: str) -> None:
        """Note a problem at a path. If the value there came from a parameter, the parameter is named."""
        name = self.filled.get(path)
        if name is None:
            below = {
                self.filled[p]: None for p in self.filled if p[: len(path)] == path and self.filled[p] in self.given
            }
            also = f" (parameters there: {', '.join(below)})" if path and below else ""
            self.document.note(path, message + also)
        elif name not in self.given:
            self.document.note(path, f"{message} (from parameter {quoted(name)})")
        elif (name, message) not in self.told:  # once, however often the parameter is used
            self.told.add((name, message))
            self.document.note(path, f"{message} (at {path_text(path)})", shown=f"parameter {quoted(name)}")

    def _fill(self, value: Any, path: Path_) -> Any:
        if isinstance(value, dict):
            return {key: self._fill(item, (*path, key)) for key, item in value.items()}
        if isinstance(value, list):
            return [self._fill(item, (*path, i)) for i, item in enumerate(value)]
        match = REFERENCE.fullmatch(value) if isinstance(value, str) else None
        if match is None:
            return value
        name = match[1]
        if name not in self.values:
            declared = listed(self.values) or "none"
            hint = suggest(name, self.values)
            self.note(path, f"${clip(name, 40)} must be declared in params{hint}; declared: {declared}")
            return BAD
        if self.values[name] is None:
            shown = clip(name, 40)
            self.note(path, f"parameter {shown!r} has no default and must be given, found nothing; say {shown}=...")
            return BAD
        self.filled[path] = name
        return self.values[name]

    def recipe(self) -> Recipe:
        data = self.data
        for key in ("name", "summary", "source", "calibration"):
            value = data.get(key, "")
            if value is not BAD and (not isinstance(value, str) or (key == "name" and not value.strip())):
                self.note((key,), f"{key} must be text, found {in_words(value)}")
        model_layers = data.get("model_layers")
        whole = type(model_layers) is int and 1 <= model_layers <= MOST_LAYERS
        if model_layers is not None and model_layers is not BAD and not whole:
            found = in_words(model_layers)
            self.note(("model_layers",), f"model_layers must be a number from 1 to {MOST_LAYERS}, found {found}")
        tiers = self._tiers(data["tiers"], ("tiers",))
        layers = self._layers(data.get("layers"))
        self.document.check()
        calibration = self._calibration(data.get("calibration", ""))
        recipe = Recipe(
            name=data["name"],
            summary=data.get("summary", ""),
            source=data.get("source", ""),
            calibration=calibration,
            params=self.values,
            model_layers=model_layers,
            tiers=_built(tiers),
            layers={key: own if own == "full" else _built(own) for key, own in layers.items()},
        )
        template = {key: self.document.data[key] for key in TOP_KEYS if key in self.document.data and key != "params"}
        if calibration and ("calibration",) not in self.filled:
            template["calibration"] = calibration
        params = {"params": self.values} if self.values else {}
        recipe._template = {"version": SPEC_VERSION, **{k: v for k, v in template.items() if k != "tiers"}, **params}
        recipe._template["tiers"] = template["tiers"]
        return recipe

    def _calibration(self, written: str) -> str:
        """The path of a calibration, which is relative to the recipe where that is a file and says so itself."""
        name, base = self.filled.get(("calibration",)), self.document.base
        if not written or base is None or base == BUNDLED or name in self.given:
            return written
        path = str(base / written)
        if name is not None:
            self.values[name] = path
        return path

    def _layers(self, layers: Any) -> dict[str, Any]:
        if layers is None or layers is BAD:
            return {}
        if not isinstance(layers, dict):
            self.note(("layers",), f'layers must be a mapping such as {{"0": full}}, found {in_words(layers)}')
            return {}
        for key, problem in find_overlaps(layers).items():
            self.note(("layers", key), problem)
        built: dict[str, Any] = {}
        for key, tiers in layers.items():
            path = ("layers", key)
            if isinstance(tiers, str) and tiers != "full":
                self.note(path, f"{LAYER}, found {in_words(tiers)}")
            else:
                built[key] = tiers if tiers == "full" else self._tiers(tiers, path)
        return built

    def _tiers(self, tiers: Any, path: Path_) -> list[_Row]:
        if tiers is BAD:
            return []
        if not isinstance(tiers, list) or not tiers:
            what = "tiers must be a list of at least one tier" if path == ("tiers",) else LAYER
            dash = "; begin each tier with a dash" if isinstance(tiers, dict) and tiers else ""
            self.note(path, f"{what}, found {in_words(tiers)}{dash}")
            return []
        rows = [self._tier(tier, (*path, i)) for i, tier in enumerate(tiers)]
        for place, message in find_problems(rows):
            number, *part = place
            assert isinstance(number, int)
            # A tier may have given its keys and values together.
            part = ["store", *part[1:]] if part and part[0] not in tiers[number] else part
            self.note((*path, number, *part), message)
        return rows

    def _tier(self, tier: Any, path: Path_) -> _Row:
        if not isinstance(tier, dict):
            if tier is not BAD:
                self.note(path, f"a tier must be a mapping with policy and store, found {in_words(tier)}")
            return _Row(BAD, BAD, BAD)
        unknown = [key for key in tier if key not in TIER_KEYS]
        for key in unknown:
            hint = suggest(key, TIER_KEYS) or self._where_it_belongs(key)
            self.note((*path, key), f"unknown key {quoted(key)} of a tier{hint}; allowed: {', '.join(TIER_KEYS)}")
        sides = [side for side in ("keys", "values") if side in tier]
        whole = len(sides) == (0 if "store" in tier else 2)
        if not whole and not unknown:
            given = ", ".join(key for key in STORES if key in tier) or "none of them"
            self.note(path, f"a tier must have either store, or keys and values, found {given}")
        raw = tier.get("policy")
        policy = None if raw is None else self._component(raw, (*path, "policy"), Policy)
        stores = {name: self._store(tier[name], (*path, name)) for name in STORES if name in tier}
        named = {key: base for key, base in OF_TIER.items() if tier.get(key) is not None}
        more = {key: self._member(tier[key], (*path, key), base) for key, base in named.items()}
        if not whole:
            return _Row(policy, BAD, BAD, **more)
        keys, values = (stores.get(side, stores.get("store")) for side in ("keys", "values"))
        return _Row(policy, keys, values, **more)

    def _where_it_belongs(self, key: str) -> str:
        """What to do with a key of a tier that is one of a plugin."""
        if key == "quantizer":
            return " (did you mean 'store'?)"
        for what, place in (("policy", "policy"), ("quantizer", "store")):
            if key != "kind" and any(key in info.cls.model_fields for info in self.plugins.known(what).values()):
                return f"; an option of a {what} stands beside its kind: {place}: {{kind: ..., {key}: ...}}"
        return "; a kind stands within policy or store: policy: {kind: ...}" if key == "kind" else ""

    def _store(self, value: Any, path: Path_) -> Any:
        if isinstance(value, dict) and value.get("kind") in ("full", "evict"):
            word, options = value["kind"], [key for key in value if key != "kind"]
            found, more = "a mapping", ""
            if options:
                found = ", ".join(map(quoted, options))
                more = f" alone, or the kind of a quantizer: {listed(sorted(self.plugins.quantizers)) or 'none'}"
            self.note(path, f"{word} has no options and must be a plain word, found {found}; write {word}{more}")
            return BAD
        if isinstance(value, dict | Quantizer) or value is BAD:
            return self._component(value, path, Quantizer)
        if isinstance(value, str) and value in ("full", "evict"):
            return value
        hint = ""
        if isinstance(value, str):
            kinds = self.plugins.quantizers
            hint = f"; write {{kind: {value}}}" if value in kinds else suggest(value, ["full", "evict", *kinds])
        self.note(path, f"{STORE}, found {in_words(value)}{hint}")
        return BAD

    def _component(self, value: Any, path: Path_, base: type[Component]) -> Any:
        what, known = base._role, self.plugins.known(base._role)
        if isinstance(value, base) or value is BAD:
            return value
        if not isinstance(value, dict):
            either = "a kind or " if base in (*LISTS.values(), *ONE.values(), *OF_TIER.values()) else ""
            hint = ""
            if isinstance(value, str):
                hint = f"; write {{kind: {value}}}" if value in known else self.plugins.instead(what, value)
            found = f"found {in_words(value)}{hint}"
            self.note(path, f"{a(what)} must be {either}a mapping with kind and options, {found}")
            return BAD
        kind = value.get("kind")
        if kind is BAD:
            return BAD
        if not isinstance(kind, str):
            at = (*path, "kind") if "kind" in value else path
            kinds = listed(sorted(known)) or "none"
            hint = _kind_elsewhere(value, known)
            self.note(at, f"{a(what)} must say its kind, found {in_words(kind)}{hint}; installed: {kinds}")
            return BAD
        try:
            info = self.plugins.find(what, kind)
        except RecipeError as error:
            self.note((*path, "kind"), str(error))
            return BAD
        return self._instance(info, value, path)

    def _instance(self, info: PluginInfo[Any], options: dict[str, Any], path: Path_) -> Any:
        """The plugin with its options; BAD if one of them is not valid."""
        valid: dict[str, Any] = {}
        lists: dict[str, Any] = {}
        for name, option in options.items():
            if name in LISTS and name in info.cls.model_fields:
                made = self._list(option, (*path, name), LISTS[name])
                if not any(item is BAD for item in made):
                    valid[name], lists[name] = [], made
            elif name in ONE and name in info.cls.model_fields:
                if (one := self._member(option, (*path, name), ONE[name])) is not BAD:
                    valid[name], lists[name] = {}, one
            elif _is_plain(option):
                valid[name] = option
            elif not _holds_bad(option):
                self.note((*path, name), f"an option must be plain data, found {in_words(option)}")
        spoilt = set(options) - set(valid)
        try:
            component = info.cls.model_validate_json(json.dumps(valid), strict=True, context=lists)
        except ValidationError as error:
            for at, message in explain(info, error, valid, spoilt):
                self.note((*path, *at), message)
        except RecipeError as error:
            self.note((*path, *error.place), str(error))
        except Exception as error:
            message = f"{info.kind!r} of {info.home} failed: {type(error).__name__}: {clip(str(error), 300)}"
            self.note(path, message)
        else:
            return BAD if spoilt else component
        return BAD

    def _list(self, value: Any, path: Path_, base: type[Component]) -> list[Any]:
        if isinstance(value, list):
            return [self._member(item, (*path, i), base) for i, item in enumerate(value)]
        name = path[-1]
        if value is not BAD:
            if value is None:
                hint = f"; leave it out, or write {name}: []"
            elif isinstance(value, dict):
                hint = f"; write {name}: [{{...}}]"
            elif isinstance(value, str) and value in self.plugins.known(base._role):
                hint = f"; write {name}: [{value}]"
            else:
                hint = self.plugins.instead(base._role, str(value))
            self.note(path, f"must be a list, found {in_words(value)}{hint}")
        return [BAD]

    def _member(self, value: Any, path: Path_, base: type[Component]) -> Any:
        """One of a list of plugins; a kind alone stands for it with its default options."""
        plain = isinstance(value, str) and value in self.plugins.known(base._role)
        return self._component({"kind": value} if plain else value, path, base)


def _built(rows: Sequence[_Row]) -> tuple[Tier, ...]:
    return tuple(Tier(**row._asdict()) for row in rows)


def _kind_elsewhere(value: dict[str, Any], known: Collection[str]) -> str:
    """What to do where a kind was written in some other way."""
    for key, item in value.items():
        if key.startswith("kind:"):
            return "; a colon is followed by a space: kind: ..."
        if key in known:
            options = ", ..." if item else ""
            return f"; write {{kind: {key}{options}}}"
    kind = value.get("kind")
    named = next((key for key in kind if key in known), None) if isinstance(kind, dict | list) else None
    return f"; write kind: {named}, and options beside it" if named else ""


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(_is_plain(item) for item in value.values())
    if isinstance(value, list):
        return all(_is_plain(item) for item in value)
    return value is None or type(value) in (str, int, float, bool)


def _holds_bad(value: Any) -> bool:
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return value is BAD or any(map(_holds_bad, items))
