"""Launches within a CUDA graph, which take new arguments each time that the graph is replayed."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["Launch", "Recording", "change", "current", "recording"]

ROOM = 1 << 22
"""Numbers in float32 that the launches of a graph have for what their blocks find, one launch after the other."""
COUNTERS = 1 << 14
_state = threading.local()


class Launch(NamedTuple):
    """A launch that a graph has recorded."""

    node: Any
    """The node of the graph."""
    stores: tuple[Any, ...]
    """The stores that it reads."""
    call: tuple[Any, ...]
    """Query, new tokens, mask and options of the call."""
    tensors: tuple[Any, ...]
    """What it reads besides and writes."""
    mapped: tuple[Any, ...] = ()
    """Queries that went through transforms."""
    chains: tuple[tuple[str, int, Any], ...] = ()
    """The transforms that the graph computes: side and number of their store among those that have any, and their twins
    in the graph."""
    spaces: tuple[Any, ...] = ()
    """The numbers of the stores whose transforms make spaces of keys, and of values."""


class Recording:
    """What is recorded while a graph is captured."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        with torch.inference_mode(False):
            self.partials = torch.empty(ROOM, dtype=torch.float32, device=device)
            self.counters = torch.zeros(COUNTERS, dtype=torch.int32, device=device)
        self.shared: dict[tuple[int, ...], Tensor] = {}
        """What a launch writes and the next kernels read before another one writes, by its shape."""
        self.launches: list[Launch] = []
        self.chains: dict[int, Any] = {}
        """Twins of the transforms of stores, made before, by the identity of the transforms."""
        self.unfit: str | None = None
        """Why the graph can't be replayed."""

    def room(self, *shape: int) -> Tensor:
        """Numbers in float32 that the launches of all layers write in turn."""
        if shape not in self.shared:
            self.shared[shape] = torch.empty(shape, dtype=torch.float32, device=self.device)
        return self.shared[shape]

    def add(self, device: int, **about: Any) -> None:
        """Note the launch that the current stream has just captured; `about` are fields of `Launch`."""
        from cuda.bindings import driver

        found = driver.cuStreamGetCaptureInfo(torch._C._cuda_getCurrentRawStream(device))
        if found[0] != driver.CUresult.CUDA_SUCCESS or len(found[4]) != 1:
            self.unfit = "its launches can't be told apart"
            return
        self.launches.append(Launch(found[4][0], **about))


def current() -> Recording | None:
    """What the capture of this thread records, if there is one."""
    found: Recording | None = getattr(_state, "recording", None)
    return found


@contextmanager
def recording(found: Recording) -> Iterator[None]:
    """Within it, launches of this thread are recorded."""
    _state.recording = found
    try:
        yield
    finally:
        _state.recording = None


def change(graph: int, node: Any, kernel: Any, arguments: bytes, grid: tuple[int, int, int], threads: int) -> None:
    """Give a launch of an instantiated graph other arguments; they are copied before this returns.

    Raises:
        RuntimeError: the driver refuses.
    """
    from cuda.bindings import driver

    buffer = ctypes.create_string_buffer(arguments, len(arguments))
    pointer = ctypes.c_void_p(ctypes.addressof(buffer))
    found = driver.CUDA_KERNEL_NODE_PARAMS()
    found.func = driver.CUfunction(int(kernel.function))
    found.gridDimX, found.gridDimY, found.gridDimZ = grid
    found.blockDimX, found.blockDimY, found.blockDimZ = threads, 1, 1
    found.sharedMemBytes = kernel.shared
    found.kernelParams = ctypes.addressof(pointer)
    (result,) = driver.cuGraphExecKernelNodeSetParams(driver.CUgraphExec(graph), node, found)
    if result != driver.CUresult.CUDA_SUCCESS:
        raise RuntimeError(f"CUDA: a launch of a graph could not be changed ({result})")
