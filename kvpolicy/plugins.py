"""Finds the installed plugins: by entry points, the built-in ones like everyone's."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.metadata import Distribution, EntryPoint, PackageNotFoundError, distribution, entry_points
from importlib.util import find_spec
from itertools import pairwise
from types import ModuleType
from typing import Annotated, Any, Generic, TypeVar, get_args

import pluggy
from pydantic import (
    PlainSerializer,
    PlainValidator,
    SerializationInfo,
    ValidationError,
    ValidationInfo,
    WithJsonSchema,
)

from kvpolicy import hookspecs
from kvpolicy.errors import CalibrationError, PluginError, RecipeError
from kvpolicy.interfaces.backend import Backend
from kvpolicy.interfaces.calibrator import SHOWN as WATCHED
from kvpolicy.interfaces.calibrator import Calibrator
from kvpolicy.interfaces.component import Component
from kvpolicy.interfaces.extra import AXES, Extra
from kvpolicy.interfaces.merger import Merger
from kvpolicy.interfaces.policy import Policy
from kvpolicy.interfaces.quantizer import AffineQuantizer, Quantizer, TensorQuantizer
from kvpolicy.interfaces.reader import Reader
from kvpolicy.interfaces.scorer import SHOWN, Scorer
from kvpolicy.interfaces.transform import NEEDS, Transform
from kvpolicy.words import a, clip, listed, quoted, suggest

__all__ = ["GROUP", "BrokenPlugin", "PluginInfo", "Registry", "ScorerOption", "calibrator_of", "registry"]

GROUP = "kvpolicy"
RESERVED = {"full", "evict"}
C = TypeVar("C", bound=Component)
HOOKS: dict[str, tuple[str, type[Component]]] = {
    "policy": ("policies", Policy),
    "scorer": ("scorers", Scorer),
    "reader": ("readers", Reader),
    "merger": ("mergers", Merger),
    "quantizer": ("quantizers", Quantizer),
    "transform": ("transforms", Transform),
    "extra": ("extras", Extra),
    "backend": ("backends", Backend),
    "calibrator": ("calibrators", Calibrator),
}
"""For each type of plugin the table of `Registry` that holds it, and its base class; hooks are named by the table."""


@dataclass(frozen=True)
class PluginInfo(Generic[C]):
    """A plugin that is installed, and where it comes from."""

    kind: str
    cls: type[C]
    distribution: str
    version: str
    file: str
    entry_point: str

    @property
    def home(self) -> str:
        return f"{self.distribution} {self.version}".strip()

    @property
    def missing(self) -> str | None:
        """The library that it requires and that is not installed, or None. Nothing is imported."""
        wanted = getattr(self.cls, "requires", None)
        if not wanted:
            return None
        library = _library_of_extra(self.distribution, wanted)
        return None if _installed(library) else library


@dataclass(frozen=True)
class BrokenPlugin:
    """An entry point that gives no plugin, and why."""

    name: str
    distribution: str
    version: str
    value: str
    cause: str


@dataclass
class Registry:
    """All plugins of some entry points, by kind."""

    policies: dict[str, PluginInfo[Policy]] = field(default_factory=dict)
    scorers: dict[str, PluginInfo[Scorer]] = field(default_factory=dict)
    readers: dict[str, PluginInfo[Reader]] = field(default_factory=dict)
    mergers: dict[str, PluginInfo[Merger]] = field(default_factory=dict)
    quantizers: dict[str, PluginInfo[Quantizer]] = field(default_factory=dict)
    transforms: dict[str, PluginInfo[Transform]] = field(default_factory=dict)
    extras: dict[str, PluginInfo[Extra]] = field(default_factory=dict)
    backends: dict[str, PluginInfo[Backend]] = field(default_factory=dict)
    calibrators: dict[str, PluginInfo[Calibrator]] = field(default_factory=dict)
    broken: list[BrokenPlugin] = field(default_factory=list)

    @classmethod
    def load(cls, found: Iterable[EntryPoint]) -> Registry:
        """Load each entry point by itself, so that one that fails stops no other.

        Raises:
            PluginError: two distributions give the same name or kind, or a hook is misspelt.
        """
        points = sorted(found, key=lambda point: (point.name, _home(point)))
        for one, other in pairwise(points):
            if one.name == other.name:
                raise PluginError(
                    f"each plugin must have a name of its own, found {one.name!r} in both {' '.join(_home(one))} "
                    f"({one.value}) and {' '.join(_home(other))} ({other.value}); uninstall one of them"
                )
        self = cls()
        manager = pluggy.PluginManager(GROUP)
        manager.add_hookspecs(hookspecs)
        for point in points:
            self._load_one(manager, point)
        return self

    def usable_backends(self) -> list[Backend]:
        """Those whose libraries are there, in the order in which they are asked."""
        found = [info.cls(kind=info.kind) for info in self.backends.values() if info.missing is None]
        return sorted(found, key=lambda backend: (-backend.priority, backend.kind))

    def _load_one(self, manager: pluggy.PluginManager, point: EntryPoint) -> None:
        try:
            module = point.load()
            manager.register(module, name=point.name)
        except (Exception, SystemExit) as error:
            self._report(point, error)
            return
        try:
            manager.check_pending()
        except pluggy.PluginValidationError as error:
            raise PluginError(f"plugin {point.name!r} of {' '.join(_home(point))}: {_misspelt(module)}") from error
        try:
            found = {what: _classes(manager, module, f"kvpolicy_{t}", base) for what, (t, base) in HOOKS.items()}
            if not any(found.values()):
                words = [f"kvpolicy_{table}" for table, _ in HOOKS.values()]
                raise PluginError(
                    f"it gives no {' and no '.join(HOOKS)}; a plugin module must have a function "
                    f"{', '.join(words[:-1])} or {words[-1]} decorated with @kvpolicy.hookimpl"
                )
        except (Exception, SystemExit) as error:
            self._report(point, error)
            return
        for what, classes in found.items():
            self._add(self.known(what), what, classes, point)

    def known(self, what: str) -> dict[str, PluginInfo[Any]]:
        """The plugins of one type (policy, scorer, quantizer, and so on), by kind."""
        found: dict[str, PluginInfo[Any]] = getattr(self, HOOKS[what][0])
        return found

    def _report(self, point: EntryPoint, error: BaseException) -> None:
        cause = str(error) if isinstance(error, PluginError) else f"{type(error).__name__}: {error}"
        self.broken.append(BrokenPlugin(point.name, *_home(point), point.value, cause))

    def _add(self, known: dict[str, PluginInfo[C]], what: str, classes: list[type[C]], point: EntryPoint) -> None:
        for cls in classes:
            distribution, version = _home(point)
            try:
                file = inspect.getfile(cls)
            except (OSError, TypeError):
                file = point.value
            info = PluginInfo(_kind(cls), cls, distribution, version, file, point.name)
            other = known.get(info.kind)
            if other is not None:
                raise PluginError(
                    f"each {what} must have a kind of its own, found kind {info.kind!r} in both {other.home} "
                    f"(plugin {other.entry_point!r}) and {info.home} (plugin {point.name!r}); uninstall one of them"
                )
            known[info.kind] = info

    def policy(self, kind: str) -> PluginInfo[Policy]:
        """The policy of that kind, or a `RecipeError`."""
        return self.find("policy", kind)

    def quantizer(self, kind: str) -> PluginInfo[Quantizer]:
        """The quantizer of that kind, or a `RecipeError`."""
        return self.find("quantizer", kind)

    def find(self, what: str, kind: str) -> PluginInfo[Any]:
        """The plugin of one type (policy, scorer, quantizer, and so on) of that kind, or a `RecipeError`."""
        known = self.known(what)
        if kind in known:
            return known[kind]
        for plugin in self.broken:
            if plugin.name == kind:
                raise RecipeError(
                    f"{what} {kind!r} can't be used: plugin {plugin.name!r} ({plugin.value}) of "
                    f"{plugin.distribution} {plugin.version} failed to load: {plugin.cause}"
                )
        failed = f"; plugins that failed to load: {', '.join(p.name for p in self.broken)}" if self.broken else ""
        raise RecipeError(f"no {what} of kind {quoted(kind)}{self.instead(what, kind)}{failed}")

    def instead(self, what: str, kind: str) -> str:
        """What may have been meant by a kind that no plugin of one type has: the end of a message."""
        known = self.known(what)
        other = next((role for role in HOOKS if kind in self.known(role)), None)
        hint = suggest(kind, known) if other is None else f", which is {a(other)}"
        return f"{hint}; installed: {listed(sorted(known)) or 'none'}"


def _library_of_extra(home: str, extra: str) -> str:
    """The distribution that an extra brings; without such an extra its name is that of the library."""
    try:
        requirements = distribution(home).requires or []
    except PackageNotFoundError:
        requirements = []
    pattern = re.compile(rf"([\w.-]+).*;.*extra == ['\"]{re.escape(extra)}['\"]")
    return next((match[1] for match in map(pattern.match, requirements) if match), extra)


def _installed(library: str) -> bool:
    try:
        distribution(library)
    except (PackageNotFoundError, ValueError):
        try:
            return find_spec(library.partition(".")[0]) is not None
        except (ImportError, ValueError):
            return False
    return True


def _home(point: EntryPoint) -> tuple[str, str]:
    return ("an unknown distribution", "") if point.dist is None else _named(point.dist)


@lru_cache(maxsize=256)
def _named(dist: Distribution) -> tuple[str, str]:
    """Name and version. Kept, since each look parses all of the metadata, the README included."""
    metadata = dist.metadata
    return metadata["Name"], metadata["Version"]


def _hooks() -> list[str]:
    return [name for name in hookspecs.__all__ if name.startswith("kvpolicy_")]


def _misspelt(module: ModuleType) -> str:
    hooks = _hooks()
    marked = [n for n, f in vars(module).items() if hasattr(f, f"{GROUP}_impl") and n not in hooks]
    wrong = ", ".join(f"{name!r}{suggest(name, hooks)}" for name in marked)
    return f"every function marked hookimpl must be one of {', '.join(hooks)}, found {wrong}"


def _classes(manager: pluggy.PluginManager, module: ModuleType, hook: str, base: type[Component]) -> list[type[Any]]:
    """What one plugin gives for one hook. Asked one plugin at a time, so that a failure has a name."""
    found: list[type[Any]] = []
    for impl in getattr(manager.hook, hook).get_hookimpls():
        if impl.plugin is not module:
            continue
        classes = impl.function()
        if not isinstance(classes, list | tuple):
            raise PluginError(f"{hook} must return a list of classes, found {classes!r}")
        for cls in classes:
            _check_class(cls, hook, base)
            found.append(cls)
    return found


def _check_class(cls: Any, hook: str, base: type[Component]) -> None:
    if not (isinstance(cls, type) and issubclass(cls, base)):
        raise PluginError(f"{hook} must return subclasses of kvpolicy.{base.__name__}, found {cls!r}")
    missing = sorted(getattr(cls, "__abstractmethods__", ()))
    if missing:
        raise PluginError(f"class {cls.__name__} must define {', '.join(missing)}")
    if base is Quantizer and not issubclass(cls, AffineQuantizer | TensorQuantizer):
        raise PluginError(f"class {cls.__name__} must be a subclass of AffineQuantizer or of TensorQuantizer")
    acts, requires = getattr(cls, "acts", "step"), getattr(cls, "requires", None)
    if acts not in ("arrival", "step") or not isinstance(requires, str | None):
        raise PluginError(
            f"class {cls.__name__}: acts must be arrival or step and requires the name of a library or None, found "
            f"{acts!r} and {requires!r}"
        )
    allowed = {Transform: NEEDS, Policy: frozenset({"prompt"}), Scorer: SHOWN}.get(base, frozenset())
    needs: Any = getattr(cls, "needs", frozenset())
    if allowed and not (isinstance(needs, frozenset) and needs <= allowed and (needs or base is not Scorer)):
        raise PluginError(
            f"class {cls.__name__}: needs must be a frozenset of {', '.join(sorted(allowed))}, found {needs!r}"
        )
    if not isinstance(getattr(cls, "pools", False), bool):
        raise PluginError(f"class {cls.__name__}: pools must be True or False, found {getattr(cls, 'pools', None)!r}")
    turns: Any = getattr(cls, "turns", ())
    if base is Calibrator and not (
        isinstance(turns, tuple) and turns and all(isinstance(t, frozenset) and t < WATCHED for t in turns)
    ):
        raise PluginError(
            f"class {cls.__name__}: turns must be a tuple of frozensets, each empty or of one of "
            f"{', '.join(sorted(WATCHED))}, found {turns!r}"
        )
    axes: Any = getattr(cls, "axes", {})
    if not isinstance(axes, Mapping) or not set(axes.values()) <= set(AXES):
        raise PluginError(f"class {cls.__name__}: axes must map names to {', '.join(AXES)}, found {axes!r}")
    kind = _kind(cls)
    if not isinstance(kind, str) or not kind or kind in RESERVED:
        raise PluginError(
            f'class {cls.__name__} must declare its name as `kind: Literal["name"] = "name"` '
            f"(not one of {', '.join(sorted(RESERVED))}), found {kind!r}"
        )


def _kind(cls: type[Component]) -> Any:
    info = cls.model_fields["kind"]
    choices = get_args(info.annotation)
    return choices[0] if len(choices) == 1 and choices[0] == info.default else None


@lru_cache(maxsize=1)
def registry() -> Registry:
    """The plugins of this environment, loaded at first use."""
    return Registry.load(entry_points(group=GROUP))


def calibrator_of(text: str) -> Calibrator:
    """The calibrator that a kind, maybe with options, stands for: `name:key=value,key=value`.

    Raises:
        CalibrationError: there is none of that kind, or it has no such options.
    """
    kind, _, given = text.partition(":")
    try:
        cls = registry().find("calibrator", kind).cls
        options = dict(part.split("=", 1) for part in given.split(",")) if given else {}
        made = cls.model_validate_strings({"kind": kind, **options}, strict=False)
        assert isinstance(made, Calibrator)
        return made
    except RecipeError as error:
        raise CalibrationError(str(error)) from None
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        told = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        raise CalibrationError(f"calibrator {kind!r} must have valid options, found {clip(text)}: {told}") from None
    except ValueError:
        raise CalibrationError(
            f"options of a calibrator are written {kind}:key=value,key=value, found {clip(text)}"
        ) from None


def _scorer(value: Any, info: ValidationInfo) -> Scorer:
    given = (info.context or {}).get(info.field_name, value)  # made by whoever builds a recipe
    options = {"kind": given} if isinstance(given, str) else given
    if isinstance(options, dict) and isinstance(kind := options.get("kind"), str):
        try:
            given = registry().find("scorer", kind).cls.model_validate(options, strict=True)
        except RecipeError as error:
            raise ValueError(str(error)) from None
    if not isinstance(given, Scorer):
        raise ValueError(f"must be a scorer, or a mapping with its kind, found {type(given).__name__}")
    return given


def _written(scorer: Scorer, info: SerializationInfo) -> dict[str, Any]:
    return scorer.model_dump(mode=info.mode)


ScorerOption = Annotated[Scorer, PlainValidator(_scorer), PlainSerializer(_written), WithJsonSchema({"type": "object"})]
"""An option of a policy that is a scorer: an instance, a mapping with kind and options, or a kind alone."""
