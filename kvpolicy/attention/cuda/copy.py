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


def copy(places: Sequence[Tensor], tokens: Sequence[Tensor]) -> bool:
    """Write each of `tokens`, `[batch, kv_heads, tokens, width]`, to its place; False: they lie in ways that differ."""
    x, place = tokens[0], places[0]
    size, device = x.element_size(), x.get_device()
    shape, steps, own = x.shape, x.stride(), place.stride()
    strides = [size * step for step in (*steps[:3], *own[:3])]
    width = size * shape[3]
    if steps[3] != 1 or own[3] != 1 or place.shape != shape or any(n % UNIT for n in (*strides, width)):
        return False
    addresses: list[int] = []
    for to, given in zip(places, tokens, strict=True):
        if given.stride() != steps or to.stride() != own or given.shape != shape:
            return False
        if given.dtype != to.dtype or given.get_device() != device:
            return False
        addresses += given.data_ptr(), to.data_ptr()
    count = x.numel() * size // UNIT
    if any(address % UNIT for address in addresses) or count >= MOST:
        return False
    head = GIVEN.pack(*strides, shape[1], shape[2], width // UNIT, count)
    kernel = kernel_of(Copy(), device)
    for first in range(0, len(addresses), 2 * PIECES):
        some = addresses[first : first + 2 * PIECES]
        arguments = (head + struct.pack(f"<{len(some)}Q", *some)).ljust(GIVEN.size + ADDRESSES * PIECES, b"\0")
        launch(kernel, arguments, (-(-count // THREADS), len(some) // 2, 1), device)
    return True
