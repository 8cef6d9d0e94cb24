"""What the file of a saved cache says of itself."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, Json, ValidationError
from torch import Tensor

from kvpolicy.errors import CacheError

__all__ = [
    "FORMAT",
    "LONGEST",
    "READ",
    "Damaged",
    "Header",
    "Held",
    "ModelEntry",
    "OwnEntry",
    "RaggedEntry",
    "StateEntry",
    "TiersEntry",
    "parse",
]

FORMAT = "kvpolicy-cache"
FORMAT_VERSION = 2
READ = ("1", "2")
"""Version 1, of kvpolicy 0.1, says nothing of the model's weights and config."""
LONGEST = 2**30
"""Tokens seen. Positions are kept in 32 bits, of which as many are left to go on."""

Count = Annotated[int, Field(ge=0, le=LONGEST)]


class Damaged(CacheError):
    """What a file holds can't be; without the path, which `load_cache` adds."""


class _Entry(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class StateEntry(_Entry):
    """What layers share whose tokens are in the same places in all rows and heads."""

    seen: Count
    through: Count


class TiersEntry(_Entry):
    """A layer that goes by a state."""

    type: Literal["tiers"] = "tiers"
    state: Count


class RaggedEntry(_Entry):
    """A layer whose tokens differ by row or head."""

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
    """What a file says of itself."""

    recipe: str
    model_type: str
    layers: Json[list[Annotated[TiersEntry | RaggedEntry | OwnEntry, Field(discriminator="type")]]]
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
    """The tensors of a file, on the CPU. What the cache has taken is gone, so that nothing is left unread."""

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
