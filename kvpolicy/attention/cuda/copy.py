"""Tokens of several layers written to where their stores keep them, or moved there, in one launch."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kvpolicy.attention.cuda.compile import Build
from kvpolicy.attention.cuda.kernel import THREADS, kernel_of, launch

__all__ = ["Copy", "copy", "shift"]

PIECES = 128
"""Tensors that a launch copies at most."""
UNIT, SMALL = 16, 4
"""Bytes that a thread copies, and those of tokens of few bytes."""
GIVEN, SHIFT = struct.Struct("<6q4i"), struct.Struct("<7q4i")
MOST = 1 << 31


class Copy(NamedTuple):
    """A kernel that copies tokens."""

    name: str
    unit: int = UNIT
    """Bytes that a thread copies."""

    @property
    def build(self) -> Build:
        return Build(self.name, blocks=16)

    def defined(self, arch: str) -> dict[str, object]:
        return {"PIECES": PIECES, "UNIT": self.unit}


def copy(tokens: Sequence[Tensor], addresses: Sequence[int], steps: tuple[int, int, int]) -> bool:
    """See `Backend.copies`; False: tokens lie in ways that differ."""
    x = tokens[0]
    size, device, dtype, shape, own = x.element_size(), x.get_device(), x.dtype, x.shape, x.stride()
    given = _steps(x)
    width = size * shape[3]
    if own[3] != 1 or any(n % UNIT for n in (*given, *steps, width)):
        return False
    places: list[int] = []
    for x, to in zip(tokens, addresses, strict=True):
        at, lies = x.data_ptr(), x.stride()
        if (at | to) % UNIT or x.shape != shape or x.dtype != dtype or x.get_device() != device:
            return False
        if lies != own:
            if lies[3] != 1 or _steps(x) != given:
                return False
            own = lies
        places += at, to
    count = x.numel() * size // UNIT
    if count >= MOST:
        return False
    head = GIVEN.pack(*given, *steps, shape[1], shape[2], width // UNIT, count)
    _launch(Copy("copy"), head, places, 2, count, device)
    return True


def _steps(x: Tensor) -> list[int]:
    """Bytes from row to row, head to head and token to token, 0 where there is one."""
    size = x.element_size()
    return [size * step if count > 1 else 0 for step, count in zip(x.stride()[:3], x.shape[:3], strict=True)]


def shift(pages: Sequence[Tensor], sources: Sequence[Tensor], places: Sequence[Tensor]) -> bool:
    """See `Backend.shifts`; False: tokens lie in ways that differ."""
    page, device = pages[0], pages[0].get_device()
    like = [(x.shape, x.stride(), x.dtype) for x in (page, sources[0], places[0])]
    steps = [page.element_size() * step for step in page.stride()]
    width, tokens = page.element_size() * page.shape[3], places[0].shape[2]
    if any(dtype != torch.int64 or own[2] != 1 for _, own, dtype in like[1:]):
        return False
    unit = SMALL if any(n % UNIT for n in (*steps[:3], width)) else UNIT
    if page.stride(3) != 1 or any(n % unit for n in (*steps[:3], width)) or sources[0].shape != places[0].shape:
        return False
    addresses: list[int] = []
    for (shape, step, dtype), every in zip(like, (pages, sources, places), strict=True):
        if any(x.shape != shape or x.stride() != step or x.dtype != dtype or x.get_device() != device for x in every):
            return False
    for own, source, place in zip(pages, sources, places, strict=True):
        at = own.data_ptr()
        if at % unit:
            return False
        addresses += at, source.data_ptr(), place.data_ptr()
    count = page.shape[0] * page.shape[1] * tokens * (width // unit)
    if count >= MOST:
        return False
    index = [step if size > 1 else 0 for x in (sources[0], places[0]) for step, size in _ahead(x)]
    head = SHIFT.pack(*steps[:3], *index, page.shape[1], tokens, width // unit, count)
    _launch(Copy("shift", unit), head, addresses, 3, count, device)
    return True


def _ahead(x: Tensor) -> list[tuple[int, int]]:
    """Strides and sizes of rows and heads."""
    return list(zip(x.stride()[:2], x.shape[:2], strict=True))


def _launch(source: Copy, head: bytes, addresses: list[int], each: int, count: int, device: int) -> None:
    """Launch a kernel on so many words of tensors, of which each has so many addresses."""
    kernel = kernel_of(source, device)
    for first in range(0, len(addresses), each * PIECES):
        some = addresses[first : first + each * PIECES]
        arguments = (head + struct.pack(f"<{len(some)}Q", *some)).ljust(len(head) + 8 * each * PIECES, b"\0")
        launch(kernel, arguments, (-(-count // THREADS), len(some) // each, 1), device)
