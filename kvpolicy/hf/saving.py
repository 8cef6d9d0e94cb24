"""Caches as safetensors files."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol, TypeAlias, TypeVar

import torch
import transformers
from torch import Tensor, nn

from kvpolicy.errors import CacheError, KvpolicyError, RecipeError
from kvpolicy.hf.calibration import by_layer, flat
from kvpolicy.hf.fingerprint import Fingerprint, Origin, blocks_of, differences, fingerprint_of
from kvpolicy.hf.layer import TieredLayer
from kvpolicy.hf.model_config import head_dim_of, layer_config
from kvpolicy.layer.held import Reading
from kvpolicy.layer.saving.file import (
    LONGEST,
    Damaged,
    Header,
    Held,
    ModelEntry,
    OwnEntry,
    PerHeadEntry,
    StateEntry,
    TiersEntry,
    parse,
    read_file,
    write_file,
)
from kvpolicy.layer.saving.stores import fill_stores, save_stores
from kvpolicy.layer.saving.tables import Filling, Saving, load_padding, save_padding
from kvpolicy.recipe.load import Recipe, load_yaml
from kvpolicy.recipe.yaml import read_text

OWN = ("DynamicLayer", "DynamicSlidingWindowLayer", "DummyLayer")
"""Layers of transformers whose whole state is keys, values and a count, or nothing."""
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
PLAIN = {"head_dim", "num_key_value_heads"}
"""What a config says of the heads of keys and values where all layers are equal."""


class Savable(Protocol):
    """What of a cache is saved: `CompressedCache`."""

    layers: list[Any]
    recipe: Recipe
    origin: Origin
    reading: Reading


C = TypeVar("C", bound=Savable)
Make: TypeAlias = Callable[[Recipe, Any, dict[int, dict[str, Tensor]]], C]
CALIBRATION = "calibration."
"""How the names of tensors begin that a cache was given by a calibration."""


OF_A_TOKEN = 1 << 20
"""Numbers of a token that are believed of a cache that holds none."""


def save_cache(cache: Savable, path: Any) -> None:
    """Write a committed cache; see `CompressedCache.save`."""
    seen = _seen(cache)
    if not seen:
        raise CacheError("a cache must hold tokens to be saved, found an empty one; run the model with it first")
    if seen > LONGEST:
        raise CacheError(f"a cache can be saved up to {LONGEST} tokens, found {seen}; crop it")
    tensors: dict[str, Tensor] = {}
    saving = Saving(tensors)
    layers: list[TiersEntry | PerHeadEntry | OwnEntry] = []
    save_padding(cache.reading.padding, seen, tensors)
    for number, layer in enumerate(cache.layers):
        if not isinstance(layer, TieredLayer):
            layers.append(_own(layer, number, tensors))
            continue
        layers.append(saving.layer(layer.tiers, number))
        save_stores(layer.tiers, number, tensors)
        tensors.update(flat({number: layer.tiers.site.fitted}, CALIBRATION))
    model = cache.origin.fingerprint()
    header = Header.model_construct(
        recipe=cache.recipe.to_yaml(),
        model_type=cache.origin.model_type,
        layers=layers,
        states=[StateEntry(seen=s.seen, prompt=s.prompt) for s in saving.steps],
        versions=_versions(),
        model=ModelEntry(config=model.config, weights=model.weights),
    )
    write_file(path, header, tensors)


def _seen(cache: Savable) -> int:
    """Tokens that all layers have seen; those that cache other things, or nothing, don't count."""
    others = ("DynamicLayer", "DummyLayer")
    seen = [int(layer.get_seq_length()) for layer in cache.layers if type(layer).__name__ not in others]
    if len(set(seen)) > 1:
        raise CacheError(
            f"all layers of a cache must have seen the same tokens, found {str(seen)[:200]}, as after an update that "
            "was interrupted; reset() the cache, or make a new one"
        )
    return seen[0] if seen else 0


def _versions() -> dict[str, str]:
    return {
        "kvpolicy": version("kvpolicy"),
        "torch": str(torch.__version__),
        "transformers": str(transformers.__version__),
    }


def _own(layer: Any, number: int, tensors: dict[str, Tensor]) -> OwnEntry:
    name: Any = type(layer).__name__
    if name not in OWN:
        raise CacheError(f"layer {number} is a {name}, whose state can't be saved; only {', '.join(OWN)} can")
    if name == "DummyLayer" or not layer.is_initialized:
        return OwnEntry(type=name, seen=0)
    seen = int(layer.get_seq_length())
    first = layer.keys.shape[2] - _held(layer, seen)  # above 0 while it records its past for a rollback
    tensors[f"{number}.own.keys"], tensors[f"{number}.own.values"] = (
        x[:, :, first:] for x in (layer.keys, layer.values)
    )
    return OwnEntry(type=name, seen=seen)


def _held(layer: Any, seen: int) -> int:
    """Tokens that a layer of transformers holds between updates."""
    window = getattr(layer, "sliding_window", None)
    return min(seen, window - 1) if isinstance(window, int) and window > 1 else seen


def load_cache(path: Any, model: Any, any_model: bool, make: Make[C]) -> C:
    """Read a cache; see `CompressedCache.load`. `make` makes an empty one of a recipe, for a model, with what the file
    holds of a calibration."""
    file, texts, held = read_file(path)
    foreign = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
    try:
        return _load(file, parse(texts), held, model, any_model, make)
    except Damaged as error:
        raise CacheError(f"{file} is damaged: {str(error)[:300]}. Save the cache again") from None
    except RecipeError as error:
        raise CacheError(f"{file} holds a recipe that can't be used here: {str(error)[:300]}") from None
    except (KvpolicyError, torch.cuda.OutOfMemoryError):
        raise
    except foreign as error:  # whatever the checks didn't think of
        text = f"{type(error).__name__}: {str(error)[:200]}"
        raise CacheError(f"{file} is damaged: {text}. Save the cache again") from error


def _load(path: Path, header: Header, held: Held, model: Any, any_model: bool, make: Make[C]) -> C:
    if "extends" in read_text(header.recipe, "its recipe").data:
        raise Damaged("a saved recipe stands alone, found one that extends another")
    cache = make(load_yaml(header.recipe), model, by_layer(held.below(CALIBRATION)))
    _check_layers(cache, header, path, any_model)
    _check_examples(cache, held, model, path)
    saved = None if header.model is None else Fingerprint(header.model.config, header.model.weights)
    if not any_model:
        _check_model(saved, header.versions, model, path)
    cache.origin.loaded = saved or fingerprint_of(cache.origin.text)
    cache.reading.padding = load_padding(held)
    filling = Filling(header.states, held)
    devices = _devices_of(model, len(cache.layers))
    for number, (layer, entry, device) in enumerate(zip(cache.layers, header.layers, devices, strict=True)):
        examples = [x.to(device) for x in _take_examples(cache, number, held)]
        if isinstance(entry, OwnEntry):
            _fill_own(layer, examples, entry.seen)
            continue
        layer.lazy_initialization(*examples)
        filling.layer(layer.tiers, number, entry)
        fill_stores(layer.tiers, number, held, device)
        layer.tiers.settle()
    filling.finish()
    _check_whole(cache)
    return cache


def _fill_own(layer: Any, examples: list[Tensor], seen: int) -> None:
    if (examples[0].shape[2] != _held(layer, seen)) if examples else seen:
        found = examples[0].shape[2] if examples else 0
        raise Damaged(f"a {type(layer).__name__} that saw {seen} tokens holds {_held(layer, seen)}, found {found}")
    if examples:
        layer.lazy_initialization(*examples)
        layer.keys, layer.values = examples
        if hasattr(layer, "cumulative_length"):
            layer.cumulative_length = seen


def _check_whole(cache: Savable) -> None:
    """All layers must have seen the same tokens, and hold the same ones where one mask serves them."""
    try:
        seen = _seen(cache)
    except CacheError as error:
        raise Damaged(str(error)) from None
    layers = [layer for layer in cache.layers if isinstance(layer, TieredLayer)]
    batch = layers[0].batch_size if layers else 0
    padding = cache.reading.padding
    if padding is not None and layers and padding.real.shape != (batch, seen):
        raise Damaged(f"padding must be known of {batch} rows of {seen} tokens, found {padding.real.shape}")
    even = [layer.tiers for layer in layers if not layer.tiers.step.by_head and layer.uneven is None]
    held = {tiers.held_after_commit() for tiers in even}
    if not seen or len(held) > 1:
        raise Damaged("all layers must hold the same number of tokens, at least one seen")


def _check_layers(cache: Savable, header: Header, path: Path, any_model: bool) -> None:
    """The layers must have the types that the model caches, and the model the type in the header."""
    if header.model_type != cache.origin.model_type and not any_model:
        raise CacheError(
            f"{path} must be of a {cache.origin.model_type} model, found a cache of {header.model_type[:80]}; "
            "load it with the model that made it"
        )
    found = ["tiers" if isinstance(x, TieredLayer) else type(x).__name__ for x in cache.layers]
    saved = ["tiers" if x.type == "ragged" else x.type for x in header.layers]
    if found != saved:
        raise CacheError(
            f"{path} must be of a model with the same layers: it holds {len(saved)} layers {sorted(set(saved))}, "
            f"the model has {len(found)} {sorted(set(found))}"
        )


def _take_examples(cache: Savable, number: int, held: Held) -> list[Tensor]:
    """Keys and values that show the shapes and types of a layer's; none where it holds none."""
    found = _examples(cache, number, held)
    return [held.pop(name) for name in found]


def _examples(cache: Savable, number: int, held: Held) -> dict[str, Tensor]:
    tiered = isinstance(cache.layers[number], TieredLayer)
    names = [f"{number}.{side}.like" if tiered else f"{number}.own.{side}" for side in ("keys", "values")]
    if not tiered and not any(name in held for name in names):
        return {}
    missing = [name for name in names if name not in held]
    if missing:
        raise Damaged(f"it must hold a tensor {missing[0]}, found none")
    return {name: held[name] for name in names}


def _check_examples(cache: Savable, held: Held, model_or_config: Any, path: Path) -> None:
    """Keys and values must be of one batch, in the model's type, with heads of its shape."""
    config = getattr(model_or_config, "config", model_or_config)
    text = config.get_text_config(decoder=True)
    dtype = getattr(model_or_config, "dtype", None)
    if any(map(torch.is_autocast_enabled, ("cpu", "cuda"))):
        dtype = None  # which type keys and values have is then up to each model
    bits = 8 * sum(x.numel() * x.element_size() for x in held.values())
    batch: int | None = None
    for number, layer in enumerate(cache.layers):
        examples, tiered = list(_examples(cache, number, held).values()), isinstance(layer, TieredLayer)
        for like in examples:
            batch = like.shape[0] if batch is None and like.ndim else batch
            fits = like.ndim == 4 and like.shape[:3] == (batch, *examples[0].shape[1:3]) and like.dtype in FLOATS
            # Those of a token take a bit each at least, if any token is held.
            numbers = math.prod((*like.shape[:2], *like.shape[3:]))
            if not fits or not 0 < numbers <= max(bits, OF_A_TOKEN) or (tiered and like.shape[2]):
                found = [f"{tuple(x.shape)} in {x.dtype}" for x in examples]
                raise Damaged(f"layer {number} must hold heads in {batch} rows, found {found}")
            if isinstance(dtype, torch.dtype) and like.dtype != dtype:
                raise CacheError(
                    f"{path} holds {like.dtype}, the model computes in {dtype}; use model.to({like.dtype})"
                )
        own = layer_config(text, number)
        plain = {name for name in own.to_dict() if "head_dim" in name or "key_value_heads" in name} <= PLAIN
        # A config with other entries gives the heads of other layers in them; of our own layers keys are checked still.
        checked = examples if plain else examples[:1] if tiered else []
        for like in checked:
            _check_heads(like, text, number, path)


def _check_heads(like: Tensor, text: Any, number: int, path: Path) -> None:
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


def _check_model(saved: Fingerprint | None, versions: dict[str, str], model_or_config: Any, path: Path) -> None:
    """The model must be the one that made the cache, as far as config and weights tell."""
    found = fingerprint_of(model_or_config)
    if found.weights is not None and (saved is None or saved.weights is None):
        why = "kvpolicy 0.1 wrote it" if saved is None else "its cache was made from a config, or outlived its model"
        warnings.warn(
            f"whether {path} is a cache of this model can't be told: it says nothing of the model's weights, because "
            f"{why}. Make caches with make_cache(recipe, model), and save them again",
            stacklevel=5,
        )
    told = differences(saved, found, versions.get("transformers") == transformers.__version__) if saved else []
    if told:
        more = f"; and {len(told) - 3} more" if len(told) > 3 else ""
        raise CacheError(
            f"{path} must be loaded for the model that made it, found another one: {'; '.join(told[:3])}{more}. "
            "Use that model, or any_model=True where keys and values of both mean the same"
        )


def _devices_of(model: Any, count: int) -> list[torch.device]:
    """Where each layer of a model computes; a config has no device."""
    whole = getattr(model, "device", torch.device("cpu"))
    blocks = blocks_of(model, count)
    return [whole] * count if blocks is None else [_device(block, whole) for block in list(blocks)[:count]]


def _device(block: nn.Module, whole: torch.device) -> torch.device:
    for module in block.modules():  # accelerate keeps offloaded weights elsewhere than it computes
        device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
        if device is not None:
            return torch.device(device)
    weight = next(block.parameters(), None)
    return whole if weight is None else weight.device
