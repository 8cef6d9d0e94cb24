"""The attention weights of the only query of an update, those of the query heads of a KV head as one: in one launch."""

from __future__ import annotations

import struct
from typing import NamedTuple

import torch
from torch import Tensor

from kvpolicy.attention.cuda.compile import Build, missing
from kvpolicy.attention.cuda.kernel import THREADS, kernel_of, launch

__all__ = ["Heads", "added", "load"]

COLUMNS = 4
"""Columns of a thread."""
GIVEN = struct.Struct("<3Qf2i4x")
LINES, BLOCKS = (1 << 31) - 1, (1 << 16) - 1
"""Blocks of a launch at most, along both sides of its grid."""


class Heads(NamedTuple):
    """The kernel."""

    columns: int = COLUMNS

    @property
    def build(self) -> Build:
        return Build("heads", blocks=16)

    def defined(self, arch: str) -> dict[str, object]:
        return {"COLUMNS": self.columns}


def load(device: torch.device) -> None:
    """Have the kernel on a device before a graph is captured, in which steps may ask for it that did not before."""
    if missing() is None:
        kernel_of(Heads(), device.index)


def added(scores: Tensor, sums: Tensor, means: list[bool]) -> list[Tensor] | None:
    """What a query attends to, of each KV head; None where that is left to PyTorch, to which it is equal to the bit.

    Args:
        scores: in units of log2, `[batch, kv_heads, groups, columns]`.
        sums: log2 of the sums of their powers, `[batch, kv_heads, groups, 1]`.
        means: whether the mean of the query heads is asked for, or their sum; there is a result for each.

    Returns:
        `[batch, kv_heads, 1, columns]` each.
    """
    batch, kv_heads, groups, columns = scores.shape
    blocks = -(-columns // (THREADS * COLUMNS))
    if not _on_card(scores) or not scores.is_contiguous() or not sums.is_contiguous():
        return None
    if not 0 < batch * kv_heads <= LINES or blocks > BLOCKS:
        return None
    if True in means and groups & (groups - 1):  # PyTorch rounds what it divides by in ways of its own
        return None
    device = scores.get_device()
    kernel = kernel_of(Heads(), device)
    found: dict[bool, Tensor] = {}
    for mean in means:
        if mean not in found:
            out = found[mean] = scores.new_empty((batch, kv_heads, 1, columns))
            addresses = scores.data_ptr(), sums.data_ptr(), out.data_ptr()
            given = GIVEN.pack(*addresses, 1 / groups if mean else 1.0, groups, columns)
            launch(kernel, given, (batch * kv_heads, blocks, 1), device)
    return [found[mean] for mean in means]


def _on_card(x: Tensor) -> bool:
    return x.is_cuda
