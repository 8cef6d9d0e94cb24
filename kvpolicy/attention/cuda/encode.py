"""Tokens coded by a kernel that writes codes, scales and offsets where stores keep them."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kvpolicy.attention.cuda.compile import Build
from kvpolicy.attention.cuda.kernel import THREADS, kernel_of, launch
from kvpolicy.interfaces.backend import Encoding

__all__ = ["Encode", "encode", "variant_of"]

PIECES = 32
"""Stores that a launch serves at most."""
TURNS = 4
"""Tokens that a warp codes, or part of a warp."""
SHARED = 1 << 15
"""Bytes of shared memory for the codes of a group of tokens at most."""
KEPT = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2, torch.float8_e4m3fn: 3}
GIVEN = struct.Struct("<9q4i")
EACH, ABSENT = 5, (0, 0)
"""Addresses of a piece, the last of which it may lack."""
Piece = tuple[Tensor, ...]


class Encode(NamedTuple):
    """A variant of the kernel that codes tokens."""

    dim: int
    bits: int
    group: int
    by_channel: bool
    bfloat: bool
    kept: int
    """The type of scales: 0 float16, 1 bfloat16, 2 float32, 3 float8_e4m3."""
    step: float | None = None
    """With it scales are so many times the root mean square, without an offset; None: from minimum to maximum."""
    symmetric: bool = False
    rotated: bool = False
    divided: bool = False
    ranged: bool = False
    """Whether the tokens of a channel share a scale, all that there are: their extremes are found before."""

    @property
    def build(self) -> Build:
        return Build("encode", blocks=4)

    @property
    def tokens(self) -> int:
        """Tokens of a block."""
        return self.group if self.by_channel else THREADS // min(self.dim // 4, 32) * TURNS

    def defined(self, arch: str) -> dict[str, object]:
        return {
            "HEAD_DIM": self.dim,
            "BITS": self.bits,
            "GROUP": self.group,
            "BY_CHANNEL": int(self.by_channel),
            "BFLOAT": int(self.bfloat),
            "RMS": int(self.step is not None),
            "STEP": repr(self.step or 0.0),
            "SYMMETRIC": int(self.symmetric),
            "ROTATED": int(self.rotated),
            "DIVIDED": int(self.divided),
            "RANGED": int(self.ranged),
            "FACTOR": repr(self.dim**-0.5),
            "KEPT": self.kept,
            "PIECES": PIECES,
            "TURNS": TURNS,
            "BLOCKS": self.build.blocks,
        }


def variant_of(encoding: Encoding) -> Encode | None:
    """The kernel for an encoding; None where there is none."""
    dim, rounding = encoding.head_dim, encoding.rounding
    ranged = encoding.by_channel and not encoding.group
    by_channel, group = encoding.by_channel and not ranged, dim if ranged else encoding.group
    if encoding.dtype not in (torch.float16, torch.bfloat16) or encoding.kept not in KEPT:
        return None
    if encoding.by_channel and (encoding.rotated or encoding.divided or rounding.by != "extremes"):
        return None
    if by_channel:
        if dim % 32 or group * dim > SHARED:
            return None
    elif dim not in (32, 64, 128, 256) or group & (group - 1) or not max(4, dim // 32) <= group <= dim:
        return None
    return Encode(
        dim, encoding.nbits, group, by_channel, encoding.dtype == torch.bfloat16, KEPT[encoding.kept],
        rounding.step if rounding.by == "rms" else None, rounding.symmetric, encoding.rotated,
        encoding.divided, ranged,
    )  # fmt: skip


def encode(variant: Encode, pieces: Sequence[Piece]) -> None:
    """Code tokens; see `Backend.encode`. Pieces of one shape share a launch."""
    alike: dict[tuple[object, ...], tuple[Piece, list[int]]] = {}
    made: list[Tensor] = []
    for x, codes, params, *beside in pieces:
        at, lies = x.data_ptr(), x.stride()
        if lies[3] != 1 or at % 16 or any(step % 8 for step in lies[:3]):
            x = x.clone(memory_format=torch.contiguous_format)
            at, lies = x.data_ptr(), x.stride()
            made.append(x)
        if variant.ranged:
            beside = [bound.unsqueeze(2) for bound in torch.aminmax(x, dim=2)]
            made += beside
        key = (x.device, x.shape, lies, codes.stride(), params.stride(), *[_steps(t) for t in beside])
        _, addresses = alike.setdefault(key, ((x, codes, params, *beside), []))
        addresses += at, codes.data_ptr(), params.data_ptr(), *[t.data_ptr() for t in beside], *ABSENT[len(beside) :]
    for first, addresses in alike.values():
        for done in range(0, len(addresses), EACH * PIECES):
            _launch(variant, first, addresses[done : done + EACH * PIECES])


def _launch(variant: Encode, piece: Piece, addresses: list[int]) -> None:
    """Code pieces that lie as `piece` does."""
    x, codes, params, *beside = piece
    batch, heads, tokens = x.shape[:3]
    blocks, wide = -(-tokens // variant.tokens), params.element_size()
    given = GIVEN.pack(
        *x.stride()[:3], *codes.stride()[:2], *(step * wide for step in params.stride()[:2]),
        *(_steps(beside[0]) if beside else (0, 0)), heads, tokens, blocks, 0,
    )  # fmt: skip
    given += struct.pack(f"<{len(addresses)}Q", *addresses)
    device, size = x.get_device(), GIVEN.size + 8 * EACH * PIECES
    grid = batch * heads * blocks, len(addresses) // EACH, 1
    launch(kernel_of(variant, device), given.ljust(size, b"\0"), grid, device)


def _steps(beside: Tensor) -> tuple[int, int]:
    """From row to row and head to head of numbers `[batch or 1, kv_heads or 1, 1, head_dim]`."""
    row, head = (0 if n == 1 else step for n, step in zip(beside.shape[:2], beside.stride()[:2], strict=True))
    return row, head
