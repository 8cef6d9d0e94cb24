"""Every KV-cache compression method as a recipe: YAML that composes policies and quantizers into a cache."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvpolicy.attention import Attached as Attached
    from kvpolicy.attention import attach as attach
    from kvpolicy.cache import CompressedCache as CompressedCache
    from kvpolicy.cache import make_cache as make_cache
    from kvpolicy.comparison import compare as compare
    from kvpolicy.hookspecs import hookimpl as hookimpl
    from kvpolicy.policy import Policy as Policy
    from kvpolicy.policy import RankPolicy as RankPolicy
    from kvpolicy.policy import Scores as Scores
    from kvpolicy.quantizer import Affine as Affine
    from kvpolicy.quantizer import AffineQuantizer as AffineQuantizer
    from kvpolicy.quantizer import Quantizer as Quantizer
    from kvpolicy.quantizer import TensorQuantizer as TensorQuantizer
    from kvpolicy.recipe import Recipe as Recipe
    from kvpolicy.recipe import load_recipe as load_recipe

    __version__: str

__all__ = [
    "Affine",
    "AffineQuantizer",
    "Attached",
    "CompressedCache",
    "Policy",
    "Quantizer",
    "RankPolicy",
    "Recipe",
    "Scores",
    "TensorQuantizer",
    "__version__",
    "attach",
    "compare",
    "hookimpl",
    "load_recipe",
    "make_cache",
]

# Loaded at first use: torch and transformers take seconds, and `kvpolicy --help` needs neither.
_HOMES = {
    "Affine": "quantizer",
    "AffineQuantizer": "quantizer",
    "Attached": "attention",
    "CompressedCache": "cache",
    "Policy": "policy",
    "Quantizer": "quantizer",
    "RankPolicy": "policy",
    "Recipe": "recipe",
    "Scores": "policy",
    "TensorQuantizer": "quantizer",
    "attach": "attention",
    "compare": "comparison",
    "hookimpl": "hookspecs",
    "load_recipe": "recipe",
    "make_cache": "cache",
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
