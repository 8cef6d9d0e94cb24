"""Builds a recipe from a document: inheritance, parameters, plugins."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from kvpolicy.component import Component
from kvpolicy.errors import RecipeError
from kvpolicy.plugins import PluginInfo, Registry, registry, suggest
from kvpolicy.policy import Policy
from kvpolicy.quantizer import Quantizer
from kvpolicy.recipe_spec import SPEC_VERSION, Recipe, Tier, find_clash, find_overlap, find_problem
from kvpolicy.recipe_yaml import Document, Path_, read_file

__all__ = ["BUNDLED", "TIER_KEYS", "TOP_KEYS", "build", "bundled", "bundled_names"]

BUNDLED = Path(__file__).parent / "recipes"
TOP_KEYS = ("version", "name", "summary", "source", "extends", "placement", "params", "tiers", "layers")
TIER_KEYS = ("policy", "store", "keys", "values")
_NAME = re.compile(r"[A-Za-z_]\w*")
_REFERENCE = re.compile(r"\$([A-Za-z_]\w*)")


def bundled_names() -> list[str]:
    """The recipes that kvpolicy brings along."""
    return sorted(path.stem for path in BUNDLED.glob("*.yaml"))


def bundled(name: str) -> Document:
    """The document of a bundled recipe."""
    return read_file(BUNDLED / f"{name}.yaml")


def build(document: Document, given: Mapping[str, Any]) -> Recipe:
    """The recipe that a document declares, with the parameters given."""
    chain = [Path(document.file).resolve()] if document.base else []
    document = _inherit(document, chain)
    values = _parameters(document, given)
    return _Builder(document, values, registry()).recipe()


def _inherit(document: Document, chain: list[Path]) -> Document:
    """`extends` resolved: keys of the child win, `params` are merged."""
    _check_top(document)
    data = dict(document.data)
    parent_name = data.pop("extends", None)
    default_name = Path(document.file).stem if document.base else "custom"
    if parent_name is None:
        data.setdefault("name", default_name)
        if "tiers" not in data:
            document.fail((), "a recipe must have tiers (or extends), found neither")
        return Document(data, document.file, document.base, document.marks)
    if not isinstance(parent_name, str) or not parent_name:
        document.fail(("extends",), f"extends must name a bundled recipe or a file, found {_found(parent_name)}")
    path = BUNDLED / f"{parent_name}.yaml"
    if parent_name not in bundled_names():
        path = (document.base or Path.cwd()) / parent_name
        if not path.is_file():
            names = bundled_names()
            document.fail(
                ("extends",),
                f"extends must name a bundled recipe or a file relative to this one, found {parent_name!r}"
                f"{suggest(parent_name, names)}; bundled: {', '.join(names)}",
            )
    if path.resolve() in chain:
        names = [p.name for p in [*chain, path.resolve()]]
        document.fail(("extends",), f"a recipe must not extend itself, found {' -> '.join(names)}")
    parent = _inherit(read_file(path), [*chain, path.resolve()])
    if document.base:
        data.setdefault("name", default_name)
    marks = {p: mark for p, mark in parent.marks.items() if p[:1] == ("params",) or p[0] not in data}
    marks.update(document.marks)
    merged = {**parent.data, **data}
    params = dict(data.get("params") or {})
    inherited = {k: v for k, v in dict(parent.data.get("params") or {}).items() if k not in params}
    used = _references(merged)
    merged["params"] = {**{k: v for k, v in inherited.items() if k in used}, **params}
    return Document(merged, document.file, document.base, marks)


def _check_top(document: Document) -> None:
    data = document.data
    version = data.get("version", SPEC_VERSION)
    if type(version) is not int or version < 1:
        document.fail(("version",), f"version must be {SPEC_VERSION}, found {_found(version)}")
    if version > SPEC_VERSION:
        document.fail(
            ("version",),
            f"this kvpolicy reads recipes of version {SPEC_VERSION}, found version {version}; upgrade kvpolicy",
        )
    for key in data:
        if key not in TOP_KEYS:
            document.fail((key,), f"unknown key {key!r}{suggest(key, TOP_KEYS)}; allowed: {', '.join(TOP_KEYS)}")
    params = data.get("params")
    if params is None:
        return
    if not isinstance(params, dict):
        document.fail(("params",), f"params must be a mapping of names to values, found {_found(params)}")
    for name, value in params.items():
        if not _NAME.fullmatch(name):
            document.fail(("params", name), f"a parameter's name has letters, digits and _ only, found {name!r}")
        _check_value(document, name, value)


def _check_value(document: Document, name: str, value: Any, given: bool = False) -> None:
    plain = value is None or isinstance(value, str | int | float)
    if not plain or (isinstance(value, str) and _REFERENCE.fullmatch(value)):
        what = "the value given" if given else "its default"
        message = f"parameter {name!r}: {what} must be a number, a word or true/false, found {_found(value)}"
        document.fail(() if given else ("params", name), message)


def _references(data: Mapping[str, Any]) -> set[str]:
    """Names of the parameters used."""
    found: set[str] = set()

    def walk(value: Any) -> None:
        if isinstance(value, dict):
            for item in value.values():
                walk(item)
        elif isinstance(value, list):
            for item in value:
                walk(item)
        elif isinstance(value, str) and (match := _REFERENCE.fullmatch(value)):
            found.add(match[1])

    walk({key: value for key, value in data.items() if key != "params"})
    return found


def _parameters(document: Document, given: Mapping[str, Any]) -> dict[str, Any]:
    """Values of all parameters; None where one was neither given nor has a default."""
    declared: dict[str, Any] = dict(document.data.get("params") or {})
    names = ", ".join(declared) or "none"
    for name, value in given.items():
        if name not in declared:
            document.fail((), f"unknown parameter {name!r}{suggest(name, declared)}; this recipe has: {names}")
        _check_value(document, name, value, given=True)
    used = _references(document.data)
    for name in declared:
        if name not in used:
            document.fail(("params", name), f"parameter {name!r} must be used as ${name} somewhere, found nowhere")
    return {**declared, **given}


class _Builder:
    """Builds the parts of a recipe, knowing for each its path in the document."""

    def __init__(self, document: Document, values: dict[str, Any], plugins: Registry) -> None:
        self.document, self.values, self.plugins = document, values, plugins
        self.filled: dict[Path_, str] = {}
        data = {key: value for key, value in document.data.items() if key != "params"}
        self.data: dict[str, Any] = self._fill(data, ())

    def fail(self, path: Path_, message: str) -> None:
        name = self.filled.get(path)
        self.document.fail(path, message + (f" (from parameter {name!r})" if name else ""))

    def _fill(self, value: Any, path: Path_) -> Any:
        if isinstance(value, dict):
            return {key: self._fill(item, (*path, key)) for key, item in value.items()}
        if isinstance(value, list):
            return [self._fill(item, (*path, i)) for i, item in enumerate(value)]
        match = _REFERENCE.fullmatch(value) if isinstance(value, str) else None
        if match is None:
            return value
        name = match[1]
        if name not in self.values:
            declared = ", ".join(self.values) or "none"
            self.fail(path, f"${name} must be declared in params{suggest(name, self.values)}; declared: {declared}")
        if self.values[name] is None:
            self.fail(path, f"parameter {name!r} has no default and must be given, found nothing; say {name}=...")
        self.filled[path] = name
        return self.values[name]

    def recipe(self) -> Recipe:
        data = self.data
        for key in ("name", "summary", "source"):
            value = data.get(key, "")
            if not isinstance(value, str) or (key == "name" and not value.strip()):
                self.fail((key,), f"{key} must be text, found {_found(value)}")
        placement = data.get("placement", "token")
        if placement not in ("token", "update"):
            self.fail(("placement",), f"placement must be token or update, found {_found(placement)}")
        tiers = self._tiers(data["tiers"], ("tiers",))
        layers = self._layers(data.get("layers"))
        clash = find_clash(placement, [tiers, *(own for own in layers.values() if own != "full")])
        if clash:
            self.fail(("placement",), clash)
        recipe = Recipe(
            name=data["name"],
            summary=data.get("summary", ""),
            source=data.get("source", ""),
            placement=placement,
            params=self.values,
            tiers=tiers,
            layers=layers,
        )
        template = {key: self.document.data[key] for key in TOP_KEYS if key in self.document.data and key != "params"}
        params = {"params": self.values} if self.values else {}
        recipe._template = {"version": SPEC_VERSION, **{k: v for k, v in template.items() if k != "tiers"}, **params}
        recipe._template["tiers"] = template["tiers"]
        return recipe

    def _layers(self, layers: Any) -> dict[str, Any]:
        if layers is None:
            return {}
        if not isinstance(layers, dict):
            self.fail(("layers",), f'layers must be a mapping such as {{"0": full}}, found {_found(layers)}')
        built: dict[str, Any] = {}
        for key, tiers in layers.items():
            path = ("layers", key)
            try:
                overlap = find_overlap([*built, key])
            except RecipeError as error:
                self.fail(path, str(error))
            else:
                if overlap:
                    self.fail(path, overlap)
            if isinstance(tiers, str) and tiers != "full":
                self.fail(path, f"a layer must have a list of tiers or full, found {tiers!r}")
            built[key] = tiers if tiers == "full" else self._tiers(tiers, path)
        return built

    def _tiers(self, tiers: Any, path: Path_) -> tuple[Tier, ...]:
        if not isinstance(tiers, list) or not tiers:
            self.fail(path, f"tiers must be a list of at least one tier, found {_found(tiers)}")
        built = tuple(self._tier(tier, (*path, i)) for i, tier in enumerate(tiers))
        problem = find_problem(built)
        if problem:
            where = [*path, *problem[0]]
            if len(problem[0]) == 2 and problem[0][1] not in tiers[problem[0][0]]:
                where[-1] = "store"
            self.fail(tuple(where), problem[1])
        return built

    def _tier(self, tier: Any, path: Path_) -> Tier:
        if not isinstance(tier, dict):
            self.fail(path, f"a tier must be a mapping with policy and store, found {_found(tier)}")
        for key in tier:
            if key not in TIER_KEYS:
                hint = suggest(key, TIER_KEYS)
                self.fail((*path, key), f"unknown key {key!r} of a tier{hint}; allowed: {', '.join(TIER_KEYS)}")
        sides = [side for side in ("keys", "values") if side in tier]
        if len(sides) != (0 if "store" in tier else 2):
            found = ", ".join(key for key in TIER_KEYS[1:] if key in tier) or "none of them"
            self.fail(path, f"a tier must have either store, or keys and values, found {found}")
        raw = tier.get("policy")
        policy = None if raw is None else self._component(raw, (*path, "policy"), Policy)
        if "store" in tier:
            store = self._store(tier["store"], (*path, "store"))
            return Tier(policy=policy, keys=store, values=store)
        keys, values = (self._store(tier[side], (*path, side)) for side in ("keys", "values"))
        return Tier(policy=policy, keys=keys, values=values)

    def _store(self, value: Any, path: Path_) -> Any:
        if isinstance(value, str):
            if value in ("full", "evict"):
                return value
            kinds = self.plugins.quantizers
            hint = f"; write {{kind: {value}}}" if value in kinds else suggest(value, ["full", "evict", *kinds])
            self.fail(path, f"a store must be full, evict or a mapping with a quantizer's kind, found {value!r}{hint}")
        return self._component(value, path, Quantizer)

    def _component(self, value: Any, path: Path_, base: type[Component]) -> Any:
        what = "policy" if issubclass(base, Policy) else "quantizer"
        known: Mapping[str, PluginInfo[Any]] = self.plugins.policies if what == "policy" else self.plugins.quantizers
        if isinstance(value, base):
            return value
        if not isinstance(value, dict):
            hint = f"; write {{kind: {value}}}" if isinstance(value, str) and value in known else ""
            self.fail(path, f"a {what} must be a mapping with kind and options, found {_found(value)}{hint}")
        kind = value.get("kind")
        if not isinstance(kind, str):
            kinds = ", ".join(sorted(known)) or "none"
            at = (*path, "kind") if "kind" in value else path
            self.fail(at, f"a {what} must say its kind, found {_found(kind)}; installed: {kinds}")
        assert isinstance(kind, str)
        try:
            info = (self.plugins.policy if what == "policy" else self.plugins.quantizer)(kind)
        except RecipeError as error:
            self.fail((*path, "kind"), str(error))
        return self._instance(info, value, path)

    def _instance(self, info: PluginInfo[Any], options: dict[str, Any], path: Path_) -> Any:
        for name, option in options.items():
            if not _is_plain(option):
                self.fail((*path, name), f"an option must be plain data, found {_found(option)}")
        try:
            return info.cls.model_validate_json(json.dumps(options), strict=True)
        except ValidationError as error:
            at, message = _explain(info, error, options)
            self.fail((*path, *at), message)
        except RecipeError as error:
            self.fail(path, str(error))
        except Exception as error:
            self.fail(path, f"{info.kind!r} of {info.home} failed: {type(error).__name__}: {error}")


def _explain(info: PluginInfo[Any], error: ValidationError, options: Mapping[str, Any]) -> tuple[Path_, str]:
    """Where a plugin's options are wrong, and how, said once."""
    problems = error.errors(include_url=False)
    allowed = [name for name in info.cls.model_fields if name != "kind"]
    known = f"; options of {info.kind}: {', '.join(allowed) or 'none'}"
    first = next((p for p in problems if p["type"] == "extra_forbidden"), problems[0])
    name = str(first["loc"][0]) if first["loc"] else ""
    at: Path_ = (name,) if name in options else ()
    if first["type"] == "extra_forbidden":
        return at, f"unknown option {name!r} of {info.kind}{suggest(name, allowed)}{known}"
    if first["type"] == "missing":
        return at, f"option {name!r} of {info.kind} has no default and must be given, found nothing{known}"
    reasons: list[str] = []
    for problem in problems:
        if name == (str(problem["loc"][0]) if problem["loc"] else ""):
            raw = problem.get("ctx", {}).get("error")
            reason = str(raw) if raw is not None else problem["msg"].replace("Input should be", "must be")
            reasons += [reason] if reason not in reasons else []
    message = " or ".join(reasons)
    if "found" not in message and name:
        message += f", found {_found(options.get(name, 'the default'))}"
    return at, message


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(_is_plain(item) for item in value.values())
    if isinstance(value, list):
        return all(_is_plain(item) for item in value)
    return value is None or type(value) in (str, int, float, bool)


def _found(value: Any) -> str:
    if isinstance(value, float) and math.isnan(value):
        return "nan"
    if value == [] or value == {}:
        return "an empty list" if value == [] else "an empty mapping"
    named = {dict: "a mapping", list: "a list", type(None): "nothing"}
    text = named.get(type(value), repr(value))
    return text if len(text) <= 80 else text[:77] + "..."
