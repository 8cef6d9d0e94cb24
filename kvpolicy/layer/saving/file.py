"""The file of a saved cache: safetensors with a header that says what they are, and a checksum of both."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal
from uuid import uuid4

import safetensors.torch
import torch
from pydantic import BaseModel, ConfigDict, Field, Json, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kvpolicy.errors import CacheError

FORMAT = "kvpolicy-cache"
FORMAT_VERSION = 2
READ = ("1", "2")
"""Version 1, of kvpolicy 0.1, says nothing of the model's weights and config."""
LONGEST = 2**30
"""Tokens seen. Positions are kept in 32 bits, of which as many are left to go on."""

Count = Annotated[int, Field(ge=0, le=LONGEST)]


class Damaged(CacheError):
    """The contents of a file are impossible. `load_cache` adds the path."""


class _Entry(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class StateEntry(_Entry):
    """A placement by position, which layers with the same tiers share."""

    seen: Count
    prompt: Count | None = None
    """Tokens of the prompt, once it has ended and policies ask for it."""
    through: Literal[0] = 0
    """Of kvpolicy 0.1, where recipes with `placement: update` had another; these are refused by name."""


class TiersEntry(_Entry):
    """A layer placed by position: `state` is a number in `Header.states`."""

    type: Literal["tiers"] = "tiers"
    state: Count


class PerHeadEntry(_Entry):
    """A layer placed by row and head."""

    type: Literal["ragged"] = "ragged"
    rows: Count
    count: Count
    seen: Count
    prompt: Count
    prompting: bool


class OwnEntry(_Entry):
    """A layer of transformers whose whole state is keys, values and a count, or nothing."""

    type: Literal["DynamicLayer", "DynamicSlidingWindowLayer", "DummyLayer"]
    seen: Count


class ModelEntry(_Entry):
    """The fingerprint of the model."""

    model_config = ConfigDict(ser_json_inf_nan="constants")

    config: dict[str, Any]
    weights: dict[str, str | None] | None


class Header(BaseModel):
    """The entries of the header."""

    recipe: str
    model_type: str
    layers: Json[list[Annotated[TiersEntry | PerHeadEntry | OwnEntry, Field(discriminator="type")]]]
    states: Json[list[StateEntry]]
    versions: Json[dict[str, str]]
    model: Json[ModelEntry] | None = None

    def as_text(self) -> dict[str, str]:
        """The entries of a safetensors header, without checksum."""
        return {"format": FORMAT, "format_version": str(FORMAT_VERSION), **self.model_dump(round_trip=True)}


def parse(texts: dict[str, str]) -> Header:
    """The header in the entries of a safetensors header; `Damaged` if it can't be."""
    try:
        header = Header.model_validate(texts)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        raise Damaged(f"{'.'.join(map(str, first['loc']))[:80]} of its header: {first['msg'][:120]}") from None
    if (header.model is None) != (texts["format_version"] == "1"):
        raise Damaged("its header must say which model made it, from version 2 on")
    return header


class Held(dict[str, Tensor]):
    """The tensors of a file, on the CPU. Each is removed when it is used; none may be left in the end."""

    def take(self, name: str, dtype: torch.dtype, ndim: int = 1) -> Tensor:
        """A tensor that must be there, of a type and a number of dimensions."""
        found = self.pop(name, None)
        if found is None:
            raise Damaged(f"it must hold a tensor {name}, found none")
        if found.dtype != dtype or found.ndim != ndim:
            raise Damaged(
                f"{name} must have {ndim} dimensions in {dtype}, found {_short(found.shape)} in {found.dtype}"
            )
        return found

    def below(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose names begin so, by the rest of the name."""
        names = [name for name in self if name.startswith(prefix)]
        return {name[len(prefix) :]: self.pop(name) for name in names}


def _short(shape: Any) -> str:
    text = str(tuple(shape))
    return text if len(text) < 80 else text[:80] + "..."


def _path(path: Any) -> Path:
    try:
        return Path(path)
    except TypeError:
        raise CacheError(f"a cache is saved in a file; its path must be text or a Path, found {path!r:.80}") from None


def read_file(path: Any) -> tuple[Path, dict[str, str], Held]:
    """The contents of a file whose checksum is right."""
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
    if texts.get("checksum") != checksum(texts, tensors):
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


def checksum(texts: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """Over all entries of a header but the checksum's own, and all tensors."""
    digest = hashlib.sha256(json.dumps({**texts, "checksum": ""}, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        if tensor.numel():
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def write_file(path: Any, header: Header, tensors: dict[str, Tensor]) -> None:
    """Write a file under another name and rename it, so that an interruption leaves the old file, or none."""
    path = _path(path)
    try:
        replace_file(path, header.as_text(), tensors)
    except (OSError, ValueError, SafetensorError) as error:
        raise CacheError(f"the cache could not be written to {str(path)[:300]}: {str(error)[:200]}") from None


def replace_file(path: Path, texts: dict[str, str], tensors: Mapping[str, Tensor]) -> None:
    """Write safetensors with these entries of the header, and a checksum, in the place of what is there, if anything.

    Raises:
        OSError, ValueError, SafetensorError: it can't be written. What was there is there still.
    """
    tensors = {name: tensor.to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    texts = {**texts, "checksum": checksum(texts, tensors)}
    beside: Path | None = None
    try:
        target = Path(os.path.realpath(path))  # of a link the file that it leads to
        if target.exists() and not target.is_file():
            raise OSError("there is something else than a file")
        beside = target.with_name(f".kvpolicy-{uuid4().hex}")
        safetensors.torch.save_file(tensors, beside, metadata=texts)
        with beside.open("rb") as file:
            os.fsync(file.fileno())
        if target.exists():
            shutil.copymode(target, beside)
        os.replace(beside, target)
        beside = None
    finally:
        if beside is not None:
            beside.unlink(missing_ok=True)
