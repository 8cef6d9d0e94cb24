"""Stores behind transforms: queries go through them to the keys, and weighted sums of values back.

Where all that they do is to divide channels one launch does that, with PyTorch's results to the bit.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvpolicy.attention.cuda.compile import Build
from kvpolicy.attention.cuda.kernel import THREADS, Kernel, kernel_of, launch
from kvpolicy.attention.cuda.layout import MAPS
from kvpolicy.storage.fused import divisors_of

__all__ = ["Join", "joined", "mapped"]

TYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}
HEAD, ADDRESSES = struct.Struct(f"<{4 + 2 * MAPS}q6i"), struct.Struct(f"<{2 + MAPS}Q")
MOST = 1 << 31
UNIT = 4
"""Channels of a thread."""
Shape = tuple[int, ...]


class Join(NamedTuple):
    """A kernel that multiplies numbers of several spaces by divisors, and adds them up."""

    given: int
    """The type of the numbers, as `TYPES` has them."""
    kept: int
    """That of divisors."""
    result: int
    heads_first: bool = False
    """Whether heads come before queries."""

    @property
    def build(self) -> Build:
        return Build("join", blocks=16, waits=True)

    def defined(self, arch: str) -> dict[str, object]:
        return {
            "FROM": self.given,
            "KEPT": self.kept,
            "TO": self.result,
            "HEADS_FIRST": int(self.heads_first),
            "SPACES": MAPS,
        }


class Ready(NamedTuple):
    """A launch before its addresses."""

    kernel: Kernel
    grid: tuple[int, int, int]
    head: bytes
    device: int

    def run(self, x: Tensor, divisors: Sequence[Tensor | None], out: Tensor) -> None:
        kept = [0 if d is None else d.data_ptr() for d in divisors]
        addresses = ADDRESSES.pack(x.data_ptr(), out.data_ptr(), *kept, *(0,) * (MAPS - len(kept)))
        launch(self.kernel, self.head + addresses, self.grid, self.device)


def mapped(chain: Any, query: Tensor, kv_heads: int, out: Tensor | None = None) -> Tensor:
    """Queries for keys behind transforms, in float16: `[batch, heads, queries, head_dim]`; `out` is room for them."""
    divisors = [divisors_of(chain)]
    ready = None if divisors[0] is None else _launch_of(query, divisors, kv_heads, torch.float16, True)
    if ready is not None:
        out = query.new_empty(query.shape, dtype=torch.float16) if out is None else out
        ready.run(query, divisors, out)
        return out
    rows = query.float().unflatten(1, (kv_heads, -1)).flatten(2, 3)
    found: Tensor = chain.adjoint(rows).to(torch.float16).contiguous()
    return found.view(query.shape)


def joined(x: Tensor, chains: Sequence[Any], kv_heads: int, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """Outputs of all spaces of values as one, `[batch, queries, heads, head_dim]`, in a type.

    Args:
        x: of one space that, in float32; of several `[spaces, batch, queries, heads, head_dim]`.
        chains: of each the transforms; None for the model's own.
        kv_heads: KV heads.
        dtype: the type.
        out: room for the result.
    """
    divisors = [None if chain is None else divisors_of(chain) for chain in chains]
    more = [d is None and chain is not None for d, chain in zip(divisors, chains, strict=True)]
    ready = None if True in more else _launch_of(x, divisors, kv_heads, dtype, False)
    if ready is not None:
        out = x.new_empty(x.shape[-4:], dtype=dtype) if out is None else out
        ready.run(x, divisors, out)
        return out
    return _by_pytorch(x, chains, kv_heads).to(dtype)


def _by_pytorch(out: Tensor, chains: Sequence[Any], kv_heads: int) -> Tensor:
    queries, total = out.shape[-3], None
    for x, chain in zip(out if len(chains) > 1 else out.unsqueeze(0), chains, strict=True):
        if chain is not None:
            rows = x.transpose(1, 2).unflatten(1, (kv_heads, -1)).flatten(2, 3)
            x = chain.inverse(rows, None).unflatten(2, (-1, queries)).flatten(1, 2).transpose(1, 2)
        total = x if total is None else total + x
    assert isinstance(total, Tensor)
    return total


def _on_card(x: Tensor) -> bool:
    return x.is_cuda


def _launch_of(
    x: Tensor, divisors: Sequence[Tensor | None], kv_heads: int, dtype: torch.dtype, heads_first: bool
) -> Ready | None:
    """What multiplies numbers by divisors; None where that is left to PyTorch."""
    if not _on_card(x):
        return None
    forms = tuple([None if d is None else (d.dtype, d.shape, d.is_contiguous()) for d in divisors])
    return _ready(x.shape, x.stride(), x.dtype, dtype, forms, kv_heads, heads_first, x.get_device())


@functools.lru_cache(maxsize=256)
def _ready(
    shape: Shape,
    steps: Shape,
    given: torch.dtype,
    result: torch.dtype,
    forms: tuple[tuple[torch.dtype, Shape, bool] | None, ...],
    kv_heads: int,
    heads_first: bool,
    device: int,
) -> Ready | None:
    """The launch for numbers of a shape; None where it can't be.

    Args:
        shape: `[batch, queries, heads, head_dim]`, or heads before queries; with several spaces, their number first.
        steps: along each dimension.
        given: the type of the numbers.
        result: that of the results.
        forms: of the divisors of each space type, shape, and whether they are contiguous; None where nothing divides.
        kv_heads: KV heads.
        heads_first: whether heads come before queries.
        device: the number of the device.
    """
    kept = {form[0] for form in forms if form is not None}
    if len(kept) != 1 or not {given, result, *kept} <= TYPES.keys() or len(forms) > MAPS:
        return None
    batch, first, second, dim = shape[-4:]
    count = batch * first * second * dim // UNIT
    if dim % UNIT or steps[-1] != 1 or any(step % UNIT for step in steps[:-1]) or count >= MOST - THREADS:
        return None
    lines = [(0, 0)] * MAPS
    for i, form in enumerate(forms):
        if form is not None:
            rows, heads, *rest = form[1]
            if not form[2] or rest != [1, dim] or rows not in (1, batch) or heads not in (1, kv_heads):
                return None
            lines[i] = (heads * dim if rows > 1 else 0, dim if heads > 1 else 0)
    rows_and_heads = [own[i] for i in (0, 1) for own in lines]
    groups = (first if heads_first else second) // kv_heads
    space = steps[0] if len(forms) > 1 else 0
    head = HEAD.pack(space, *steps[-4:-1], *rows_and_heads, first, second, dim // UNIT, groups, len(forms), count)
    kernel = kernel_of(Join(TYPES[given], TYPES[kept.pop()], TYPES[result], heads_first), device)
    return Ready(kernel, (-(-count // THREADS), 1, 1), head, device)
