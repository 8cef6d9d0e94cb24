"""Tokens that a backend of attention codes in one launch, and writes where their stores keep them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from types import FunctionType
from typing import Any, NamedTuple, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from kvpolicy.interfaces.backend import Backend, Encoding
from kvpolicy.interfaces.component import call
from kvpolicy.interfaces.quantizer import AffineQuantizer
from kvpolicy.interfaces.transform import Transform
from kvpolicy.plugins import registry
from kvpolicy.storage.chain import Chain
from kvpolicy.storage.packing import packed_width
from kvpolicy.storage.pages import Pages
from kvpolicy.storage.scales import E4M3, Scales

__all__ = [
    "Coded",
    "Fused",
    "copied",
    "copiers",
    "divisors_of",
    "encoding_of",
    "fuse",
    "fusing",
    "run_fused",
    "shifted",
]


class Coded(Protocol):
    """A store of packed codes."""

    quantizer: AffineQuantizer
    head_dim: int
    group_size: int
    by_channel: bool
    numbers: int
    scales: Scales
    chain: Chain | None
    parts: dict[str, Pages]

    @property
    def beside(self) -> Any: ...


class Fused(NamedTuple):
    """Who codes, and how."""

    backend: Backend
    encoding: Encoding


_known: WeakKeyDictionary[Any, dict[torch.dtype, Encoding | None]] = WeakKeyDictionary()


@lru_cache
def _encoders(device: str) -> tuple[Backend, ...]:
    """The installed backends that may code tokens on a type of device, in the order in which they are asked."""
    found = (backend for backend in registry().usable_backends() if backend.device in (None, device))
    return tuple(backend for backend in found if type(backend).encodes is not Backend.encodes)


@lru_cache(4096)
def _encoder(device: str, encoding: Encoding) -> Backend | None:
    return next((backend for backend in _encoders(device) if call(backend, "encodes", encoding) is True), None)


def fusing(store: Coded, x: Tensor, size: int) -> Fused | None:
    """Who codes tokens of a store, per channel `size` of them a group, in place of PyTorch; None for nobody."""
    device = x.device.type
    # Without a size all that comes is one group.
    if not _encoders(device) or not x.shape[2] or size != (store.group_size or x.shape[2]):
        return None
    known = _known.setdefault(store, {})
    if x.dtype not in known:
        known[x.dtype] = encoding_of(store, x.dtype)
    encoding = known[x.dtype]
    backend = None if encoding is None else _encoder(device, encoding)
    if backend is None or encoding is None:
        return None
    if store.chain is not None:
        store.chain.begin(x)
        if not (store.chain.fixed if not encoding.divided else _divisors(store, x.dtype) is not None):
            return None
    return Fused(backend, encoding)


def encoding_of(store: Coded, dtype: torch.dtype) -> Encoding | None:
    """What a store does to tokens, if backends have words for it."""
    quantizer, dim = store.quantizer, store.head_dim
    rounding = call(quantizer, "rounding") if _speaks_for(type(quantizer), "rounding") else None
    transforms = () if store.chain is None else store.chain.transforms
    rotates, divides = (len(transforms) == 1 and _is(type(transforms[0]), name) for name in ("butterflies", "divides"))
    if (
        rounding is None
        or not isinstance(quantizer.bits, int)
        or store.beside is not None
        or (transforms and not rotates and not divides)
        or (store.chain is not None and store.chain.asks)
        or quantizer.clip < 1
    ):
        return None
    if not quantizer.independent or quantizer.scale_dtype == "e8m0" or (rotates and dim & (dim - 1)):
        return None
    if quantizer.offsets != (rounding.by == "extremes") or store.scales.uneven is not None:
        return None
    kept = E4M3 if store.scales.small else store.scales.dtype(dtype)
    size = store.group_size
    return Encoding(
        dtype, dim, quantizer.nbits, size, store.by_channel, rounding, rotates, kept, divides and not rotates
    )


def _divisors(store: Coded, dtype: torch.dtype) -> Tensor | None:
    """What a store's transform divides channels by, once it is known for all rows."""
    chain = store.chain
    found = None if chain is None or chain.late.rows is not None else divisors_of(chain)
    return found if found is not None and found.dtype == dtype and found.shape[2:] == (1, store.head_dim) else None


def divisors_of(chain: Chain) -> Tensor | None:
    """What transforms divide channels by, if that is all that they do."""
    if len(chain.transforms) != 1 or not chain.state or chain.by_position:
        return None
    cls, kept = type(chain.transforms[0]), chain.state[0]
    return kept.get(cls.divides or "") if len(kept) == 1 and _is(cls, "divides") else None


@lru_cache
def _is(cls: type[Transform], name: str) -> bool:
    """Whether a class of transforms says by `name` what it is, and that holds of it."""
    return bool(getattr(cls, name)) and _speaks_for(cls, name)


def _speaks_for(cls: type[AffineQuantizer | Transform], name: str) -> bool:
    """Whether what a class says by `name` holds of it: no subclass of what said it replaced anything that this had."""
    said = next(i for i, c in enumerate(cls.__mro__) if name in vars(c))
    had = {n for c in cls.__mro__[said:] for n in vars(c)}
    return not any(n in had and _written(n, own) for c in cls.__mro__[:said] for n, own in vars(c).items())


def _written(name: str, own: Any) -> bool:
    """Whether an attribute of a class was written by its author, not added by Python or pydantic."""
    if str(getattr(own, "__module__", None)).startswith("pydantic") or name in ("model_config", "_abc_impl"):
        return False
    return not name.startswith("__") or (isinstance(own, FunctionType) and not name.startswith("__annotate"))


def fuse(store: Coded, x: Tensor, size: int, later: Any = None) -> bool:
    """Have tokens of a store coded by a backend, or leave that to `later`, if that is given; False where none does."""
    found = fusing(store, x, size)
    if found is not None and later is not None:
        later.add(store, x, size)
    elif found is not None:
        run_fused([(store, x, found)])
    return found is not None


def run_fused(asked: Sequence[tuple[Any, Tensor, Fused]]) -> None:
    """Have tokens of stores coded, those that are coded alike in one go. Stores keep them in the order given."""
    pieces: dict[Fused, list[tuple[Tensor, ...]]] = {}
    apart: list[tuple[list[Tensor], Tensor]] = []
    before, kept = None, []
    for store, x, fused in asked:
        if (fused, x.shape) != before:  # they are the same of stores that are coded alike
            before, kept = (fused, x.shape), _kept(store, x)
        places = []
        for part, width, tokens, dtype in kept:
            pages = store.parts[part]
            like = (
                pages.pages[0] if pages.pages else torch.empty((*x.shape[:2], 0, width), dtype=dtype, device=x.device)
            )
            room = pages.room(like, tokens)
            place = room[0] if len(room) == 1 else like.new_empty((*x.shape[:2], tokens, width))
            if len(room) > 1:  # over two pages
                apart.append((room, place))
            places.append(place)
        divisors = _divisors(store, x.dtype) if fused.encoding.divided else None
        beside = () if divisors is None else (divisors,)
        pieces.setdefault(fused, []).append((x, places[0], places[1], *beside))
    for fused, own in pieces.items():
        call(fused.backend, "encode", fused.encoding, own)
    for room, x in apart:
        for place, some in zip(room, x.split([place.shape[2] for place in room], dim=2), strict=True):
            place.copy_(some)


@lru_cache
def copiers(device: str) -> tuple[Backend, ...]:
    """The installed backends that may copy tokens on a type of device."""
    found = (backend for backend in registry().usable_backends() if backend.device in (None, device))
    return tuple(backend for backend in found if type(backend).copies is not Backend.copies)


def copied(tokens: Sequence[Tensor], addresses: Sequence[int], steps: tuple[int, int, int]) -> bool:
    """Whether a backend has written tokens to where they belong, all in one go; see `Backend.copies`."""
    backends = copiers(tokens[0].device.type)
    return any(call(backend, "copies", tokens, addresses, steps) is True for backend in backends)


def shifted(pages: Sequence[Tensor], sources: Sequence[Tensor], places: Sequence[Tensor]) -> bool:
    """Whether a backend has moved tokens within pages, all in one go; see `Backend.shifts`."""
    backends = copiers(pages[0].device.type)
    return any(call(backend, "shifts", pages, sources, places) is True for backend in backends)


def _kept(store: Coded, x: Tensor) -> list[tuple[str, int, int, torch.dtype]]:
    """Of codes, and of scales and offsets: their part, bytes or numbers, how many, and their type."""
    tokens = x.shape[2]
    groups = tokens // (store.group_size or tokens) if store.by_channel else tokens
    numbers = store.numbers * (2 if store.quantizer.offsets else 1)
    width = packed_width(store.head_dim, store.quantizer.nbits)
    return [("codes", width, tokens, torch.uint8), ("params", numbers, groups, store.scales.dtype(x.dtype))]
