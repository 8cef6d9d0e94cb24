"""Caches as safetensors files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from kvpolicy.errors import CacheError, KvpolicyError, RecipeError
from kvpolicy.placement import Growing, Placement, State
from kvpolicy.recipe import load_yaml

if TYPE_CHECKING:
    from kvpolicy.cache import CompressedCache

__all__ = ["load_cache", "save_cache"]

FORMAT = "kvpolicy-cache"
FORMAT_VERSION = 1
OWN = ("DynamicLayer", "DynamicSlidingWindowLayer")
"""Layers of transformers whose whole state is keys, values and a count."""


def save_cache(cache: CompressedCache, path: Path) -> None:
    """Write a settled cache; see `CompressedCache.save`."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    from kvpolicy.cache import TieredLayer

    if not cache.get_seq_length():
        raise CacheError("a cache must hold tokens to be saved, found an empty one; run the model with it first")
    tensors: dict[str, Tensor] = {}
    states: list[State] = []
    layers: list[dict[str, Any]] = []
    for number, layer in enumerate(cache.layers):
        if isinstance(layer, TieredLayer):
            tiers = layer.tiers
            group = next((i for i, state in enumerate(states) if state is tiers.state), len(states))
            if group == len(states):
                states.append(tiers.state)
            layers.append({"type": "tiers", "state": group})
            for side, like in tiers.like.items():
                tensors[f"{number}.{side}.like"] = like
                for s, store in enumerate(tiers.stores[side]):
                    for name, tensor in (store.tensors() if store is not None else {}).items():
                        tensors[f"{number}.{side}.{s}.{name}"] = tensor
            continue
        layers.append(_own(layer, number, tensors))
    for group, state in enumerate(states):
        for i, held in enumerate(state.tiers):
            tensors[f"state.{group}.tier.{i}"] = torch.from_numpy(held.copy())
        for side, orders in state.stores.items():
            for s, order in enumerate(orders):
                tensors[f"state.{group}.{side}.{s}"] = torch.from_numpy(order.array.copy())
    header = {
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION),
        "recipe": cache.recipe.to_yaml(),
        "layers": json.dumps(layers),
        "states": json.dumps([{"seen": s.seen, "through": s.through} for s in states]),
        "versions": json.dumps(_versions()),
    }
    try:
        save_file({k: v.contiguous().clone() for k, v in tensors.items()}, path, metadata=header)
    except (OSError, SafetensorError) as error:
        raise CacheError(f"the cache could not be written to {path}: {error}") from None


def _versions() -> dict[str, str]:
    import transformers

    import kvpolicy

    return {
        "kvpolicy": kvpolicy.__version__,
        "torch": str(torch.__version__),
        "transformers": str(transformers.__version__),
    }


def _own(layer: Any, number: int, tensors: dict[str, Tensor]) -> dict[str, Any]:
    kind = type(layer).__name__
    if kind not in OWN:
        raise CacheError(f"layer {number} is a {kind}, whose state can't be saved; only {', '.join(OWN)} can")
    if layer.is_initialized:
        tensors[f"{number}.own.keys"], tensors[f"{number}.own.values"] = layer.keys, layer.values
    return {"type": kind, "seen": layer.get_seq_length()}


def load_cache(path: Path, model_or_config: Any) -> CompressedCache:
    """Read a cache; see `CompressedCache.load`."""
    from kvpolicy.cache import TieredLayer, make_cache

    header, tensors = _read(path, getattr(model_or_config, "device", torch.device("cpu")))
    try:
        layers, states = json.loads(header["layers"]), json.loads(header["states"])
        recipe = load_yaml(header["recipe"])
        cache = make_cache(recipe, model_or_config)
        found = ["tiers" if isinstance(x, TieredLayer) else type(x).__name__ for x in cache.layers]
        saved = [x["type"] for x in layers]
        if found != saved:
            raise CacheError(
                f"{path} must be of a model with the same layers: it holds {len(saved)} layers {sorted(set(saved))}, "
                f"the model has {len(found)} {sorted(set(found))}"
            )
        made: dict[int, State] = {}
        for number, (layer, entry) in enumerate(zip(cache.layers, layers, strict=True)):
            if isinstance(layer, TieredLayer):
                _fill(layer, number, entry["state"], states, made, tensors, path)
            elif f"{number}.own.keys" in tensors:
                _fill_own(layer, tensors[f"{number}.own.keys"], tensors[f"{number}.own.values"], entry["seen"])
    except KvpolicyError as error:
        if isinstance(error, RecipeError):
            raise CacheError(f"{path} holds a recipe that can't be used here: {error}") from None
        raise
    except (KeyError, ValueError, IndexError, TypeError, RuntimeError, AttributeError) as error:
        raise CacheError(f"{path} is damaged: {type(error).__name__}: {error}. Save the cache again") from None
    _check_shapes(cache, model_or_config, path)
    return cache


def _read(path: Path, device: Any) -> tuple[dict[str, str], dict[str, Tensor]]:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise CacheError(f"{path} must be a file written by CompressedCache.save; there is none")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            if header.get("format") != FORMAT:
                raise CacheError(
                    f"{path} must be a cache written by CompressedCache.save, found other safetensors "
                    f"(format {header.get('format')!r})"
                )
            if header.get("format_version") != str(FORMAT_VERSION):
                raise CacheError(
                    f"{path} has cache format {header.get('format_version')}, this version of kvpolicy reads "
                    f"{FORMAT_VERSION}; use the version that wrote it: {header.get('versions')}"
                )
            move: Callable[[str, Tensor], Tensor] = lambda name, t: (  # noqa: E731
                t if name.startswith("state.") or name.endswith(".sizes") else t.to(device)
            )
            return header, {name: move(name, file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CacheError(f"{path} must be a cache written by CompressedCache.save; it can't be read: {error}") from None


def _fill(
    layer: Any,
    number: int,
    group: int,
    states: list[dict[str, int]],
    made: dict[int, State],
    tensors: dict[str, Tensor],
    path: Path,
) -> None:
    tiers = layer.tiers
    if group not in made:
        placement = tiers.placement
        held = tuple(tensors[f"state.{group}.tier.{i}"].numpy() for i in range(len(placement.policies) - 1))
        stores = {
            side: tuple(_growing(tensors[f"state.{group}.{side}.{s}"].numpy()) for s in range(len(first)))
            for side, first in placement.first_tier.items()
        }
        if placement.alike:
            stores["values"] = stores["keys"]
        made[group] = State(states[group]["seen"], held, stores, states[group]["through"])
        _check_state(made[group], placement, path)
    layer.lazy_initialization(tensors[f"{number}.keys.like"], tensors[f"{number}.values.like"])
    tiers.state = made[group]
    for side, held_stores in tiers.stores.items():
        for s, store in enumerate(held_stores):
            prefix = f"{number}.{side}.{s}."
            parts = {name[len(prefix) :]: t for name, t in tensors.items() if name.startswith(prefix)}
            expected = tiers.state.stores[side][s].length
            if store is None:
                continue
            if parts:
                try:
                    store.restore(parts)
                except CacheError as error:
                    raise CacheError(f"{path} is damaged: layer {number}, {side}, store {s}: {error}") from None
            if store.length != expected:
                raise CacheError(
                    f"{path} is damaged: layer {number} must hold {expected} {side} in store {s}, found {store.length}"
                )


def _check_state(state: State, placement: Placement, path: Path) -> None:
    """What the tiers hold must be what their stores hold; the last tier takes what is left."""
    for side, orders in state.stores.items():
        for s, order in enumerate(orders):
            covers = placement.tiers_of_store(side, s)
            tiers = np.concatenate([np.empty(0, dtype=np.int64), *(state.tiers[covers.start : covers.stop])])
            fits = np.isin(tiers, order.array).all() and (covers.stop > len(state.tiers) or len(tiers) == order.length)
            if not fits and placement.store_spec(side, s) != "evict":
                raise CacheError(f"{path} is damaged: the tiers and the {side} of store {s} must hold the same tokens")


def _growing(array: Any) -> Growing:
    return Growing(np.ascontiguousarray(array, dtype=np.int32), len(array))


def _fill_own(layer: Any, keys: Tensor, values: Tensor, seen: int) -> None:
    layer.lazy_initialization(keys, values)
    layer.keys, layer.values = keys, values
    if hasattr(layer, "cumulative_length"):
        layer.cumulative_length = seen


def _check_shapes(cache: CompressedCache, model_or_config: Any, path: Path) -> None:
    from kvpolicy.cache import TieredLayer

    config = getattr(model_or_config, "config", model_or_config).get_text_config(decoder=True)
    heads = getattr(config, "num_key_value_heads", None)
    if getattr(config, "kv_lora_rank", None) or not isinstance(heads, int):
        return
    for number, layer in enumerate(cache.layers):
        if isinstance(layer, TieredLayer):
            found = layer.tiers.like["keys"].shape
            dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
            if (found[1], found[3]) != (heads, dim):
                raise CacheError(
                    f"{path} must be of a model with {heads} KV heads of {dim} channels; "
                    f"layer {number} holds {found[1]} of {found[3]}"
                )
