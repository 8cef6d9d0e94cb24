"""The hooks that a plugin may implement."""

from __future__ import annotations

import pluggy

from kvpolicy.interfaces.backend import Backend
from kvpolicy.interfaces.calibrator import Calibrator
from kvpolicy.interfaces.extra import Extra
from kvpolicy.interfaces.merger import Merger
from kvpolicy.interfaces.policy import Policy
from kvpolicy.interfaces.quantizer import Quantizer
from kvpolicy.interfaces.reader import Reader
from kvpolicy.interfaces.scorer import Scorer
from kvpolicy.interfaces.transform import Transform

__all__ = [
    "hookimpl",
    "hookspec",
    "kvpolicy_backends",
    "kvpolicy_calibrators",
    "kvpolicy_extras",
    "kvpolicy_mergers",
    "kvpolicy_policies",
    "kvpolicy_quantizers",
    "kvpolicy_readers",
    "kvpolicy_scorers",
    "kvpolicy_transforms",
]

hookspec = pluggy.HookspecMarker("kvpolicy")
hookimpl = pluggy.HookimplMarker("kvpolicy")


@hookspec
def kvpolicy_policies() -> list[type[Policy]]:
    """The token-selection policies of this plugin, as classes."""
    raise AssertionError("a specification is not called")


@hookspec
def kvpolicy_quantizers() -> list[type[Quantizer]]:
    """The quantizers of this plugin, as classes."""
    raise AssertionError("a specification is not called")


@hookspec
def kvpolicy_scorers() -> list[type[Scorer]]:
    """The scorers of this plugin, as classes."""
    raise AssertionError("a specification is not called")


@hookspec
def kvpolicy_readers() -> list[type[Reader]]:
    """The readers of this plugin, as classes: what a query reads of the last tier."""
    raise AssertionError("a specification is not called")


@hookspec
def kvpolicy_mergers() -> list[type[Merger]]:
    """The mergers of this plugin, as classes: what becomes of values that are dropped."""
    raise AssertionError("a specification is not called")


@hookspec
def kvpolicy_transforms() -> list[type[Transform]]:
    """The transforms of this plugin, as classes."""
    raise AssertionError("a specification is not called")


@hookspec
def kvpolicy_extras() -> list[type[Extra]]:
    """The extras of this plugin, as classes."""
    raise AssertionError("a specification is not called")


@hookspec
def kvpolicy_backends() -> list[type[Backend]]:
    """The backends of attention of this plugin, as classes."""
    raise AssertionError("a specification is not called")


@hookspec
def kvpolicy_calibrators() -> list[type[Calibrator]]:
    """The calibrators of this plugin, as classes: methods of `kvpolicy calibrate`."""
    raise AssertionError("a specification is not called")
