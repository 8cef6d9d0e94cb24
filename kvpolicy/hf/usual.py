"""Which calls of an attached model are decode steps that a graph can replay."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from kvpolicy.hf.cache import CompressedCache
from kvpolicy.hf.calls import BY_NAME, WORDS, Call
from kvpolicy.hf.layer import TieredLayer
from kvpolicy.hf.modes import watching

TENSORS = ("input_ids", "position_ids", "cache_position")
PLAIN = (bool, int, float, str, type(None))
_counting: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
_recipes: WeakKeyDictionary[CompressedCache, str] = WeakKeyDictionary()


class Unusual(Exception):
    """A step that can't be replayed; its text says why."""


def usual(call: Call, owner: nn.Module) -> tuple[CompressedCache, dict[str, Tensor], Any]:
    """Cache, tensors and kind of a step that may be replayed.

    Raises:
        Unusual: it may not.
    """
    cache, ids = call.compressed(), call.get("input_ids")
    if not isinstance(cache, CompressedCache) or not cache.reading.attached:
        raise Unusual("no compressed cache")
    if not isinstance(ids, Tensor) or ids.device.type != "cuda" or ids.shape[1:] != (1,):
        raise Unusual("not one token on a GPU")
    if not hasattr(torch.cuda.CUDAGraph, "raw_cuda_graph_exec"):
        raise Unusual(f"PyTorch {torch.__version__}, whose graphs can't be changed")
    if torch.is_grad_enabled() or torch.cuda.is_current_stream_capturing() or torch.is_autocast_enabled("cuda"):
        raise Unusual("gradients, autocast or another capture")
    if watching.get() is not None:
        raise Unusual("attention that is watched")
    seen = cache.get_seq_length()
    if not all(isinstance(layer, TieredLayer) for layer in cache.layers) or not seen:
        raise Unusual("layers that are not compressed, or hold nothing")
    if any(layer.batch_size != len(ids) for layer in cache.layers):
        raise Unusual("other rows than those of the cache")
    mask = call.get("attention_mask")
    if mask is not None:
        shown = mask.shape == (len(ids), seen + 1) and cache.padding is None
        if not shown or not bool(mask.all()):
            raise Unusual("a mask that hides tokens")
    others = {name: call.get(name) for name in named(call) if name not in (*TENSORS, *WORDS, "attention_mask")}
    if not all(isinstance(x, PLAIN) for x in others.values()):
        raise Unusual("other arguments")
    given = {name: call.get(name) for name in TENSORS if isinstance(call.get(name), Tensor)}
    if "position_ids" not in given:
        if "position_ids" not in call.names or not _counts_tokens(owner):
            raise Unusual("no positions")
        given["position_ids"] = torch.full((1, 1), seen, dtype=torch.int64, device=ids.device)
    shapes = tuple((name, x.shape, x.dtype, x.device) for name, x in given.items())
    modes = torch.is_inference_mode_enabled(), len(cache.layers), torch.cuda.current_stream(ids.device).cuda_stream
    return cache, given, (shapes, tuple(sorted(others.items())), modes, _recipe(cache))


def _counts_tokens(owner: nn.Module) -> bool:
    """Whether a model that is given no positions counts the tokens seen: one with plain rotary embeddings does."""
    found = _counting.get(owner)
    if found is None:
        config: Any = getattr(owner, "config", None)
        text = config.get_text_config(decoder=True) if config is not None else None
        rotary = getattr(text, "rope_parameters", None) or getattr(text, "rope_theta", None)
        odd = "mrope" in str(rotary) or any(hasattr(m, "rope_deltas") for m in owner.modules())
        found = _counting[owner] = bool(rotary) and not odd
    return found


def _recipe(cache: CompressedCache) -> str:
    """What tells recipes apart: whether a step can be replayed depends on them."""
    found = _recipes.get(cache)
    if found is None:
        found = _recipes[cache] = repr(cache.recipe)
    return found


def named(call: Call) -> list[str]:
    """The names of the arguments that a call gives."""
    places = call.names[: call.names.index(BY_NAME)] if BY_NAME in call.names else call.names
    return [*places[: len(call.args)], *call.kwargs]
