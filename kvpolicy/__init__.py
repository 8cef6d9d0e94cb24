"""Every KV-cache compression method as a recipe: YAML that composes policies and quantizers into a cache."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvpolicy.experiment.calibration import calibrate as calibrate
    from kvpolicy.experiment.comparison import compare as compare
    from kvpolicy.experiment.tune import tune as tune
    from kvpolicy.hf.attach import Attached as Attached
    from kvpolicy.hf.attach import attach as attach
    from kvpolicy.hf.cache import CompressedCache as CompressedCache
    from kvpolicy.hf.cache import make_cache as make_cache
    from kvpolicy.hf.prepare import prepare as prepare
    from kvpolicy.hf.source import ModelSource as ModelSource
    from kvpolicy.hookspecs import hookimpl as hookimpl
    from kvpolicy.interfaces.backend import AttentionOptions as AttentionOptions
    from kvpolicy.interfaces.backend import AttentionSpec as AttentionSpec
    from kvpolicy.interfaces.backend import Backend as Backend
    from kvpolicy.interfaces.backend import Part as Part
    from kvpolicy.interfaces.calibrator import Calibrator as Calibrator
    from kvpolicy.interfaces.calibrator import Watched as Watched
    from kvpolicy.interfaces.extra import Extra as Extra
    from kvpolicy.interfaces.extra import Grouping as Grouping
    from kvpolicy.interfaces.merger import Merger as Merger
    from kvpolicy.interfaces.merger import Tokens as Tokens
    from kvpolicy.interfaces.policy import Policy as Policy
    from kvpolicy.interfaces.policy import RankPolicy as RankPolicy
    from kvpolicy.interfaces.prompt_scorer import PromptScorer as PromptScorer
    from kvpolicy.interfaces.quantizer import Affine as Affine
    from kvpolicy.interfaces.quantizer import AffineQuantizer as AffineQuantizer
    from kvpolicy.interfaces.quantizer import Quantizer as Quantizer
    from kvpolicy.interfaces.quantizer import TensorQuantizer as TensorQuantizer
    from kvpolicy.interfaces.reader import Reader as Reader
    from kvpolicy.interfaces.scorer import Given as Given
    from kvpolicy.interfaces.scorer import Scorer as Scorer
    from kvpolicy.interfaces.scores import Scores as Scores
    from kvpolicy.interfaces.site import Site as Site
    from kvpolicy.interfaces.transform import Transform as Transform
    from kvpolicy.planning.check import check as check
    from kvpolicy.planning.plan import plan as plan
    from kvpolicy.recipe.load import Recipe as Recipe
    from kvpolicy.recipe.load import load_recipe as load_recipe

    __version__: str

__all__ = [
    "Affine",
    "AffineQuantizer",
    "Attached",
    "AttentionOptions",
    "AttentionSpec",
    "Backend",
    "Calibrator",
    "CompressedCache",
    "Extra",
    "Given",
    "Grouping",
    "Merger",
    "ModelSource",
    "Part",
    "Policy",
    "PromptScorer",
    "Quantizer",
    "RankPolicy",
    "Reader",
    "Recipe",
    "Scorer",
    "Scores",
    "Site",
    "TensorQuantizer",
    "Tokens",
    "Transform",
    "Watched",
    "__version__",
    "attach",
    "calibrate",
    "check",
    "compare",
    "hookimpl",
    "load_recipe",
    "make_cache",
    "plan",
    "prepare",
    "tune",
]

# Loaded at first use: torch and transformers take seconds, and `kvpolicy --help` needs neither.
_HOMES = {
    "AttentionOptions": "interfaces.backend",
    "AttentionSpec": "interfaces.backend",
    "Backend": "interfaces.backend",
    "Part": "interfaces.backend",
    "Affine": "interfaces.quantizer",
    "AffineQuantizer": "interfaces.quantizer",
    "Attached": "hf.attach",
    "Calibrator": "interfaces.calibrator",
    "CompressedCache": "hf.cache",
    "Extra": "interfaces.extra",
    "Given": "interfaces.scorer",
    "Grouping": "interfaces.extra",
    "ModelSource": "hf.source",
    "Policy": "interfaces.policy",
    "Quantizer": "interfaces.quantizer",
    "RankPolicy": "interfaces.policy",
    "Merger": "interfaces.merger",
    "PromptScorer": "interfaces.prompt_scorer",
    "Reader": "interfaces.reader",
    "Tokens": "interfaces.merger",
    "Recipe": "recipe.load",
    "Scorer": "interfaces.scorer",
    "Scores": "interfaces.scores",
    "Site": "interfaces.site",
    "TensorQuantizer": "interfaces.quantizer",
    "Transform": "interfaces.transform",
    "Watched": "interfaces.calibrator",
    "attach": "hf.attach",
    "calibrate": "experiment.calibration",
    "check": "planning.check",
    "compare": "experiment.comparison",
    "hookimpl": "hookspecs",
    "load_recipe": "recipe.load",
    "make_cache": "hf.cache",
    "plan": "planning.plan",
    "prepare": "hf.prepare",
    "tune": "experiment.tune",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        value: Any = version("kvpolicy")
    elif name in _HOMES:
        value = getattr(import_module(f"kvpolicy.{_HOMES[name]}"), name)
    else:
        raise AttributeError(f"module 'kvpolicy' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
