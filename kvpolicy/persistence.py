"""Caches as safetensors files."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from kvpolicy.errors import CacheError, KvpolicyError, RecipeError
from kvpolicy.layer import Tiers
from kvpolicy.packing import packed_width
from kvpolicy.persistence_ragged import fill_ragged, load_padding, save_padding, save_ragged
from kvpolicy.placement import Growing, Placement, State
from kvpolicy.recipe import load_yaml
from kvpolicy.recipe_yaml import read_text
from kvpolicy.stores import NamedStore, PackedStore, Store

if TYPE_CHECKING:
    from kvpolicy.cache import CompressedCache

__all__ = ["load_cache", "save_cache"]

FORMAT = "kvpolicy-cache"
FORMAT_VERSION = 1
OWN = ("DynamicLayer", "DynamicSlidingWindowLayer", "DummyLayer")
"""Layers of transformers whose whole state is keys, values and a count, or nothing."""
LONGEST = 2**31 - 1
"""Positions are kept in 32 bits."""


def save_cache(cache: CompressedCache, path: Path) -> None:
    """Write a settled cache; see `CompressedCache.save`."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    from kvpolicy.cache import TieredLayer

    if not cache.get_seq_length():
        raise CacheError("a cache must hold tokens to be saved, found an empty one; run the model with it first")
    tensors: dict[str, Tensor] = {}
    states: list[State] = []
    groups: list[list[State]] = []
    layers: list[dict[str, Any]] = []
    save_padding(cache.padding, tensors)
    for number, layer in enumerate(cache.layers):
        if isinstance(layer, TieredLayer):
            tiers = layer.tiers
            if tiers.ragged is not None:
                layers.append(save_ragged(tiers.ragged, number, groups, tensors))
                _add_stores(tiers, number, tensors)
                continue
            group = next((i for i, state in enumerate(states) if state is tiers.state), len(states))
            if group == len(states):
                states.append(tiers.state)
            layers.append({"type": "tiers", "state": group})
            _add_stores(tiers, number, tensors)
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
        "model_type": cache.model_type,
        "layers": json.dumps(layers),
        "states": json.dumps([{"seen": s.seen, "through": s.through} for s in states]),
        "versions": json.dumps(_versions()),
    }
    tensors = {name: tensor.to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    header["checksum"] = _checksum(header, tensors)
    try:
        save_file(tensors, path, metadata=header)
    except (OSError, SafetensorError) as error:
        raise CacheError(f"the cache could not be written to {path}: {error}") from None


def _add_stores(tiers: Tiers, number: int, tensors: dict[str, Tensor]) -> None:
    for side, like in tiers.like.items():
        tensors[f"{number}.{side}.like"] = like
        for s, store in enumerate(tiers.stores[side]):
            for name, tensor in (store.tensors() if store is not None else {}).items():
                tensors[f"{number}.{side}.{s}.{name}"] = tensor


def _checksum(header: dict[str, str], tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(json.dumps({**header, "checksum": ""}, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        if tensor.numel():
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


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
    if kind == "DummyLayer":
        return {"type": kind, "seen": 0}
    if layer.is_initialized:
        tensors[f"{number}.own.keys"], tensors[f"{number}.own.values"] = layer.keys, layer.values
    return {"type": kind, "seen": layer.get_seq_length()}


def load_cache(path: Path, model_or_config: Any) -> CompressedCache:
    """Read a cache; see `CompressedCache.load`."""
    from kvpolicy.cache import TieredLayer, make_cache

    header, tensors = _read(path)
    try:
        if "extends" in read_text(header["recipe"], "its recipe").data:
            raise CacheError(f"{path} is damaged: a saved recipe stands alone, found one that extends another")
        layers, states = json.loads(header["layers"]), json.loads(header["states"])
        recipe = load_yaml(header["recipe"])
        cache = make_cache(recipe, model_or_config)
        if header["model_type"] != cache.model_type:
            raise CacheError(
                f"{path} must be of a {cache.model_type} model, found a cache of {header['model_type']}; "
                "load it with the model that made it"
            )
        found = ["tiers" if isinstance(x, TieredLayer) else type(x).__name__ for x in cache.layers]
        saved = ["tiers" if x["type"] == "ragged" else x["type"] for x in layers]
        if found != saved:
            raise CacheError(
                f"{path} must be of a model with the same layers: it holds {len(saved)} layers {sorted(set(saved))}, "
                f"the model has {len(found)} {sorted(set(found))}"
            )
        _check_model(cache, tensors, model_or_config, path)
        devices = _devices(model_or_config, len(layers))
        for name, tensor in tensors.items():
            if not name.startswith("state.") and not name.endswith(".sizes"):
                tensors[name] = tensor.to(devices[int(name.split(".")[0])])
        made: dict[Any, Any] = {}
        cache.padding = load_padding(tensors, path)
        for number, (layer, entry) in enumerate(zip(cache.layers, layers, strict=True)):
            if isinstance(layer, TieredLayer):
                layer.lazy_initialization(tensors[f"{number}.keys.like"], tensors[f"{number}.values.like"])
                if entry["type"] == "ragged":
                    fill_ragged(layer.tiers, number, entry, made, cache.padding, tensors, path)
                else:
                    _fill(layer, entry["state"], states, made, tensors, path)
                _fill_stores(layer.tiers, number, tensors, path)
            else:
                _fill_own(layer, _kinds(layer, number, tensors), entry["seen"], path)
    except KvpolicyError as error:
        if isinstance(error, RecipeError):
            raise CacheError(f"{path} holds a recipe that can't be used here: {error}") from None
        raise
    except torch.cuda.OutOfMemoryError:
        raise
    except (KeyError, ValueError, IndexError, TypeError, RuntimeError, AttributeError) as error:
        raise CacheError(f"{path} is damaged: {type(error).__name__}: {error}. Save the cache again") from None
    return cache


def _devices(model: Any, count: int) -> list[torch.device]:
    """Where each layer of a model computes; a config has no device."""
    whole = getattr(model, "device", torch.device("cpu"))
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    modules = decoder.modules() if isinstance(decoder, nn.Module) else ()
    blocks = next((m for m in modules if isinstance(m, nn.ModuleList) and len(m) >= count), [whole] * count)
    return [_device(block, whole) if isinstance(block, nn.Module) else whole for block in blocks]


def _device(block: nn.Module, whole: torch.device) -> torch.device:
    for module in block.modules():  # accelerate keeps offloaded weights elsewhere than it computes
        device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
        if device is not None:
            return torch.device(device)
    weight = next(block.parameters(), None)
    return whole if weight is None else weight.device


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
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
            # Copies: what safetensors gives is a view of the file, which may change or vanish.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CacheError(f"{path} must be a cache written by CompressedCache.save; it can't be read: {error}") from None
    if header.get("checksum") != _checksum(header, tensors):
        raise CacheError(f"{path} is damaged: its contents don't match its checksum. Save the cache again")
    return header, tensors


def _fill(
    layer: Any,
    group: int,
    states: list[dict[str, int]],
    made: dict[Any, Any],
    tensors: dict[str, Tensor],
    path: Path,
) -> None:
    tiers = layer.tiers
    placement = tiers.placement
    key = (id(placement), group)
    if key not in made:
        held = tuple(tensors[f"state.{group}.tier.{i}"].numpy() for i in range(len(placement.policies) - 1))
        stores = {
            side: tuple(_growing(tensors[f"state.{group}.{side}.{s}"].numpy()) for s in range(len(first)))
            for side, first in placement.first_tier.items()
        }
        if placement.alike:
            stores["values"] = stores["keys"]
        made[key] = State(states[group]["seen"], held, stores, states[group]["through"])
        _check_state(made[key], placement, path)
    tiers.state = made[key]


def _fill_stores(tiers: Tiers, number: int, tensors: dict[str, Tensor], path: Path) -> None:
    for side, held_stores in tiers.stores.items():
        for s, store in enumerate(held_stores):
            prefix = f"{number}.{side}.{s}."
            parts = {name[len(prefix) :]: t for name, t in tensors.items() if name.startswith(prefix)}
            if store is None:
                continue
            expected = tiers.expected_length(side, s)
            if parts:
                try:
                    store.restore(parts)
                    _check_parts(store, tiers.like[side])
                except CacheError as error:
                    raise CacheError(f"{path} is damaged: layer {number}, {side}, store {s}: {error}") from None
            if store.length != expected:
                raise CacheError(
                    f"{path} is damaged: layer {number} must hold {expected} {side} in store {s}, found {store.length}"
                )


def _check_parts(store: Store, like: Tensor) -> None:
    """What was restored must be keys or values of the kind of `like`."""
    if isinstance(store, PackedStore) and store.by_channel and store.lines is not None:
        groups, count = store.parts["groups"], store.parts["params"].length
        if groups.length and not (int(groups.all().min()) >= 0 and int(groups.all().max()) < count):
            raise CacheError(f"tokens must belong to one of {count} groups, found others")
    elif isinstance(store, PackedStore) and store.by_channel:
        sizes, largest = store.sizes, store.group_size or store.length
        if sizes.dtype != np.int64 or sizes.ndim != 1 or (sizes < 1).any() or (sizes > largest).any():
            raise CacheError(f"a group must have 1 to {largest} tokens, found {np.unique(sizes)[:8]}")
    for name, part in store.parts.items():
        dtype, width = like.dtype, like.shape[3]
        if isinstance(store, PackedStore) and name == "codes":
            dtype, width = torch.uint8, packed_width(width, store.quantizer.nbits)
        elif isinstance(store, PackedStore) and name == "params":
            dtype = store.params_dtype(dtype)
            width = 2 * (width if store.by_channel else width // store.group_size)
        elif isinstance(store, PackedStore) and name == "groups":
            dtype, width = torch.int32, 1
        for page in part.pages:
            fits = isinstance(store, NamedStore) or (page.dtype == dtype and page.shape[3] == width)
            lines = store.lines if isinstance(store, PackedStore) and name == "groups" else tuple(like.shape[:2])
            if tuple(page.shape[:2]) != lines or not fits:
                expected = (*like.shape[:2], page.shape[2], width)
                raise CacheError(f"{name} must be {expected} in {dtype}, found {tuple(page.shape)} in {page.dtype}")


def _check_state(state: State, placement: Placement, path: Path) -> None:
    """What the tiers hold must be what their stores hold; the last tier takes what is left."""
    damaged, seen = f"{path} is damaged: ", state.seen
    if not type(seen) is type(state.through) is int or not 0 <= state.through <= seen <= LONGEST:
        raise CacheError(f"{damaged}tokens seen must be counted, found {seen!r} and {state.through!r}")
    for tier in state.tiers:
        if tier.dtype != np.int64 or tier.ndim != 1 or (np.diff(tier) <= 0).any():
            raise CacheError(f"{damaged}the positions of a tier must be integers that ascend")
    evicts = placement.specs["keys"][-1] == "evict"
    held = {side: np.sort(np.concatenate([order.array for order in orders])) for side, orders in state.stores.items()}
    for positions in held.values():
        if positions.ndim != 1 or (np.diff(positions) == 0).any() or ((positions < 0) | (positions >= seen)).any():
            raise CacheError(f"{damaged}positions must be different and below the {seen} tokens seen")
        if not evicts and len(positions) != seen:
            raise CacheError(f"{damaged}the stores must hold all {seen} tokens seen, found {len(positions)}")
    if not np.array_equal(held["keys"], held["values"]):
        raise CacheError(f"{damaged}keys and values must be of the same tokens")
    for side, orders in state.stores.items():
        for s, order in enumerate(orders):
            covers = placement.tiers_of_store(side, s)
            tiers = np.concatenate([np.empty(0, dtype=np.int64), *(state.tiers[covers.start : covers.stop])])
            takes_rest = covers.stop > len(state.tiers) and placement.store_spec(side, s) != "evict"
            fits = np.isin(tiers, order.array).all() and (takes_rest or len(tiers) == order.length)
            if len(np.unique(tiers)) != len(tiers) or not fits:
                raise CacheError(f"{damaged}the tiers and the {side} of store {s} must hold the same tokens")


def _growing(array: Any) -> Growing:
    return Growing(np.ascontiguousarray(array, dtype=np.int32), len(array))


def _fill_own(layer: Any, kinds: list[Tensor], seen: Any, path: Path) -> None:
    if type(seen) is not int or not (kinds[0].shape[2] <= seen <= LONGEST if kinds else seen == 0):
        raise CacheError(f"{path} is damaged: a {type(layer).__name__} must have seen what it holds, found {seen!r}")
    if not kinds:
        return
    layer.lazy_initialization(*kinds)
    layer.keys, layer.values = kinds
    if hasattr(layer, "cumulative_length"):
        layer.cumulative_length = seen


def _kinds(layer: Any, number: int, tensors: dict[str, Tensor]) -> list[Tensor]:
    """Keys and values that show what kind a layer holds, or nothing where it holds nothing."""
    from kvpolicy.cache import TieredLayer

    tiered = isinstance(layer, TieredLayer)
    names = [f"{number}.{side}.like" if tiered else f"{number}.own.{side}" for side in ("keys", "values")]
    return [tensors[name] for name in names] if tiered or any(name in tensors for name in names) else []


def _check_model(cache: CompressedCache, tensors: dict[str, Tensor], model_or_config: Any, path: Path) -> None:
    """Keys and values must be of one batch, in the model's type, with heads of its shape."""
    from kvpolicy.cache import TieredLayer

    text = getattr(model_or_config, "config", model_or_config).get_text_config(decoder=True)
    dtype = getattr(model_or_config, "dtype", None)
    if any(map(torch.is_autocast_enabled, ("cpu", "cuda"))):
        dtype = None  # which type keys and values have is then up to each model
    batch: int | None = None
    for number, layer in enumerate(cache.layers):
        kinds = _kinds(layer, number, tensors)
        for like in kinds:
            batch = like.shape[0] if batch is None else batch
            fits = like.ndim == 4 and like.shape[:3] == (batch, *kinds[0].shape[1:3]) and like.is_floating_point()
            if not fits or 0 in (batch, like.shape[1], like.shape[3]):
                found = [f"{tuple(x.shape)} in {x.dtype}" for x in kinds]
                raise CacheError(f"{path} is damaged: layer {number} must hold heads in {batch} rows, found {found}")
            if isinstance(dtype, torch.dtype) and like.dtype != dtype:
                raise CacheError(
                    f"{path} holds {like.dtype}, the model computes in {dtype}; use model.to({like.dtype})"
                )
        if isinstance(layer, TieredLayer):  # others may have heads of a shape that each config names its own way
            _check_heads(kinds[0], text, number, path)


def _check_heads(like: Tensor, text: Any, number: int, path: Path) -> None:
    from kvpolicy.fitting import head_dim_of, layer_config

    dim, own = head_dim_of(text, number), layer_config(text, number)
    if dim is None:
        return
    heads = getattr(own, "num_key_value_heads", None)
    known = [heads] if isinstance(heads, int) else [1, getattr(own, "num_attention_heads", None)]
    if like.shape[3] != dim or like.shape[1] not in known:
        raise CacheError(
            f"{path} must be of a model with {known[-1]} KV heads of {dim} channels; "
            f"layer {number} holds {like.shape[1]} of {like.shape[3]}"
        )
