"""Caches as safetensors files."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import torch
from torch import Tensor

from kvpolicy.errors import CacheError, KvpolicyError, RecipeError
from kvpolicy.hf.fingerprint import Fingerprint, fingerprint_of
from kvpolicy.hf.saving_model import check_kinds, check_layers, check_model, devices_of, take_kinds
from kvpolicy.layer.save_header import (
    FORMAT,
    LONGEST,
    READ,
    Damaged,
    Header,
    Held,
    ModelEntry,
    OwnEntry,
    RaggedEntry,
    StateEntry,
    TiersEntry,
    parse,
)
from kvpolicy.layer.save_stores import fill_stores, save_stores
from kvpolicy.layer.save_tables import Filling, Saving, load_padding, save_padding
from kvpolicy.recipe.load import load_yaml
from kvpolicy.recipe.yaml import read_text

if TYPE_CHECKING:
    from kvpolicy.hf.cache import CompressedCache

__all__ = ["load_cache", "save_cache"]

OWN = ("DynamicLayer", "DynamicSlidingWindowLayer", "DummyLayer")
"""Layers of transformers whose whole state is keys, values and a count, or nothing."""


def save_cache(cache: CompressedCache, path: Any) -> None:
    """Write a committed cache; see `CompressedCache.save`."""
    from kvpolicy.hf.layer import TieredLayer

    seen = _seen(cache)
    if not seen:
        raise CacheError("a cache must hold tokens to be saved, found an empty one; run the model with it first")
    if seen > LONGEST:
        raise CacheError(f"a cache can be saved up to {LONGEST} tokens, found {seen}; crop it")
    tensors: dict[str, Tensor] = {}
    saving = Saving(tensors)
    layers: list[TiersEntry | RaggedEntry | OwnEntry] = []
    save_padding(cache.padding, seen, tensors)
    for number, layer in enumerate(cache.layers):
        if not isinstance(layer, TieredLayer):
            layers.append(_own(layer, number, tensors))
            continue
        layers.append(saving.layer(layer.tiers, number))
        save_stores(layer.tiers, number, tensors)
    model = cache.origin.fingerprint()
    header = Header.model_construct(
        recipe=cache.recipe.to_yaml(),
        model_type=cache.origin.model_type,
        layers=layers,
        states=[StateEntry(seen=s.seen, through=s.state.through) for s in saving.steps],
        versions=_versions(),
        model=ModelEntry(config=model.config, weights=model.weights),
    )
    _write(path, header, tensors)


def _seen(cache: CompressedCache) -> int:
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
    import transformers

    import kvpolicy

    return {
        "kvpolicy": kvpolicy.__version__,
        "torch": str(torch.__version__),
        "transformers": str(transformers.__version__),
    }


def _own(layer: Any, number: int, tensors: dict[str, Tensor]) -> OwnEntry:
    kind: Any = type(layer).__name__
    if kind not in OWN:
        raise CacheError(f"layer {number} is a {kind}, whose state can't be saved; only {', '.join(OWN)} can")
    if kind == "DummyLayer" or not layer.is_initialized:
        return OwnEntry(type=kind, seen=0)
    seen = int(layer.get_seq_length())
    first = layer.keys.shape[2] - _held(layer, seen)  # above 0 while it records its past for a rollback
    tensors[f"{number}.own.keys"], tensors[f"{number}.own.values"] = (
        x[:, :, first:] for x in (layer.keys, layer.values)
    )
    return OwnEntry(type=kind, seen=seen)


def _held(layer: Any, seen: int) -> int:
    """Tokens that a layer of transformers holds between updates."""
    window = getattr(layer, "sliding_window", None)
    return min(seen, window - 1) if isinstance(window, int) and window > 1 else seen


def load_cache(path: Any, model: Any, any_model: bool) -> CompressedCache:
    """Read a cache; see `CompressedCache.load`."""
    file, texts, held = _read(path)
    foreign = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
    try:
        return _load(file, parse(texts), held, model, any_model)
    except Damaged as error:
        raise CacheError(f"{file} is damaged: {str(error)[:300]}. Save the cache again") from None
    except RecipeError as error:
        raise CacheError(f"{file} holds a recipe that can't be used here: {str(error)[:300]}") from None
    except (KvpolicyError, torch.cuda.OutOfMemoryError):
        raise
    except foreign as error:  # whatever the checks didn't think of
        text = f"{type(error).__name__}: {str(error)[:200]}"
        raise CacheError(f"{file} is damaged: {text}. Save the cache again") from error


def _load(path: Path, header: Header, held: Held, model: Any, any_model: bool) -> CompressedCache:
    from kvpolicy.hf.cache import make_cache

    if "extends" in read_text(header.recipe, "its recipe").data:
        raise Damaged("a saved recipe stands alone, found one that extends another")
    cache = make_cache(load_yaml(header.recipe), model)
    check_layers(cache, header, path, any_model)
    check_kinds(cache, held, model, path)
    saved = None if header.model is None else Fingerprint(header.model.config, header.model.weights)
    if not any_model:
        check_model(saved, header.versions, model, path)
    cache.origin.loaded = saved or fingerprint_of(cache.origin.text)
    cache.reading.padding = load_padding(held)
    filling = Filling(header.states, held)
    devices = devices_of(model, len(cache.layers))
    for number, (layer, entry, device) in enumerate(zip(cache.layers, header.layers, devices, strict=True)):
        kinds = [x.to(device) for x in take_kinds(cache, number, held)]
        if isinstance(entry, OwnEntry):
            _fill_own(layer, kinds, entry.seen)
            continue
        layer.lazy_initialization(*kinds)
        filling.layer(layer.tiers, number, entry)
        fill_stores(layer.tiers, number, held, device)
    filling.finish()
    _check_whole(cache)
    return cache


def _fill_own(layer: Any, kinds: list[Tensor], seen: int) -> None:
    if (kinds[0].shape[2] != _held(layer, seen)) if kinds else seen:
        found = kinds[0].shape[2] if kinds else 0
        raise Damaged(f"a {type(layer).__name__} that saw {seen} tokens holds {_held(layer, seen)}, found {found}")
    if kinds:
        layer.lazy_initialization(*kinds)
        layer.keys, layer.values = kinds
        if hasattr(layer, "cumulative_length"):
            layer.cumulative_length = seen


def _check_whole(cache: CompressedCache) -> None:
    """All layers must have seen the same tokens, and hold the same ones where one mask serves them."""
    from kvpolicy.hf.layer import TieredLayer

    try:
        seen = _seen(cache)
    except CacheError as error:
        raise Damaged(str(error)) from None
    layers = [layer for layer in cache.layers if isinstance(layer, TieredLayer)]
    batch = layers[0].batch_size if layers else 0
    if cache.padding is not None and layers and cache.padding.real.shape != (batch, seen):
        raise Damaged(f"padding must be known of {batch} rows of {seen} tokens, found {cache.padding.real.shape}")
    held = {layer.tiers.held_after_commit() for layer in layers if not layer.tiers.step.spread and layer.uneven is None}
    if not seen or len(held) > 1:
        raise Damaged("all layers must hold the same number of tokens, at least one seen")


def _path(path: Any) -> Path:
    try:
        return Path(path)
    except TypeError:
        raise CacheError(f"a cache is saved in a file; its path must be text or a Path, found {path!r:.80}") from None


def _read(path: Any) -> tuple[Path, dict[str, str], Held]:
    """The contents of a file whose checksum is right."""
    from safetensors import SafetensorError, safe_open

    path = _path(path)
    what = f"{str(path)!r:.300}" if "\0" in str(path) else str(path)
    try:
        if not path.is_file():
            raise CacheError(f"{what} must be a file written by CompressedCache.save; there is none")
        with safe_open(path, framework="pt") as file:
            texts = file.metadata() or {}
            _check_format(texts, what)
            # Copies: what safetensors gives is a view of the file, which may change or vanish.
            tensors = Held((name, file.get_tensor(name).clone()) for name in file.keys())  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        text = str(error)[:200]
        raise CacheError(f"{what} must be a cache written by CompressedCache.save; it can't be read: {text}") from None
    except MemoryError:
        raise CacheError(f"{what} can't be read: it takes more memory than there is") from None
    if texts.get("checksum") != _checksum(texts, tensors):
        raise CacheError(f"{what} is damaged: its contents don't match its checksum. Save the cache again")
    return path, texts, tensors


def _check_format(texts: dict[str, str], what: str) -> None:
    if texts.get("format") != FORMAT:
        raise CacheError(
            f"{what} must be a cache written by CompressedCache.save, found other safetensors "
            f"(format {texts.get('format')!r:.40})"
        )
    version = texts.get("format_version")
    if version not in READ:
        raise CacheError(
            f"{what} has cache format {str(version)[:40]}, this version of kvpolicy reads {' and '.join(READ)}; "
            f"use the version that wrote it: {texts.get('versions', 'unknown')[:150]}"
        )


def _checksum(texts: dict[str, str], tensors: dict[str, Tensor]) -> str:
    """Over all entries of a header but the checksum's own, and all tensors."""
    digest = hashlib.sha256(json.dumps({**texts, "checksum": ""}, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        if tensor.numel():
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _write(path: Any, header: Header, tensors: dict[str, Tensor]) -> None:
    """Write a file whole, or leave what was there: it is written beside its place and then moved there."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path = _path(path)
    tensors = {name: tensor.to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    texts = header.as_text()
    texts["checksum"] = _checksum(texts, tensors)
    beside: Path | None = None
    try:
        target = Path(os.path.realpath(path))  # of a link the file that it leads to
        if target.exists() and not target.is_file():
            raise OSError("there is something else than a file")
        beside = target.with_name(f".kvpolicy-{uuid4().hex}")
        save_file(tensors, beside, metadata=texts)
        with beside.open("rb") as file:
            os.fsync(file.fileno())
        if target.exists():
            shutil.copymode(target, beside)
        os.replace(beside, target)
        beside = None
    except (OSError, ValueError, SafetensorError) as error:
        raise CacheError(f"the cache could not be written to {str(path)[:300]}: {str(error)[:200]}") from None
    finally:
        if beside is not None:
            beside.unlink(missing_ok=True)
