"""Tokens of several layers written to where their stores keep them, in one launch."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from kvpolicy.attention.cuda.kernel import THREADS, kernel_of, launch

__all__ = ["Copy", "copy"]

PIECES = 128
"""Tensors that a launch copies at most."""
UNIT = 16
"""Bytes that a thread copies."""
GIVEN, ADDRESSES = struct.Struct("<6q4i"), 16
MOST = 1 << 31


class Copy(NamedTuple):
    """The kernel that copies tokens."""

    @property
    def name(self) -> str:
        return "copy"

    @property
    def blocks(self) -> int:
        return 16

    @property
    def waits(self) -> bool:
        return False

    def defined(self, arch: str) -> dict[str, object]:
        return {"PIECES": PIECES}


def copy(tokens: Sequence[Tensor], addresses: Sequence[int], steps: tuple[int, int, int]) -> bool:
    """See `Backend.copies`; False: tokens lie in ways that differ."""
    x = tokens[0]
    size, device, dtype, shape, own = x.element_size(), x.get_device(), x.dtype, x.shape, x.stride()
    given = [size * step for step in own[:3]]
    width = size * shape[3]
    if own[3] != 1 or any(n % UNIT for n in (*given, *steps, width)):
        return False
    places: list[int] = []
    for x, to in zip(tokens, addresses, strict=True):
        at = x.data_ptr()
        if (at | to) % UNIT or x.stride() != own or x.shape != shape or x.dtype != dtype or x.get_device() != device:
            return False
        places += at, to
    count = x.numel() * size // UNIT
    if count >= MOST:
        return False
    head = GIVEN.pack(*given, *steps, shape[1], shape[2], width // UNIT, count)
    kernel = kernel_of(Copy(), device)
    for first in range(0, len(places), 2 * PIECES):
        some = places[first : first + 2 * PIECES]
        arguments = (head + struct.pack(f"<{len(some)}Q", *some)).ljust(GIVEN.size + ADDRESSES * PIECES, b"\0")
        launch(kernel, arguments, (-(-count // THREADS), len(some) // 2, 1), device)
    return True
