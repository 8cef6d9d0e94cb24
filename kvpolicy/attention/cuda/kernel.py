"""Kernels on a card: loaded once, launched with arguments by value."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from kvpolicy.attention.cuda.compile import Source, compiled, resources

__all__ = ["THREADS", "Arguments", "Kernel", "kernel_of", "launch"]

THREADS = 128


class Kernel(NamedTuple):
    """A kernel on a device."""

    run: Callable[..., Any]
    """What launches it."""
    function: Any
    shared: int
    """Bytes of shared memory of a block."""
    slots: int
    """Blocks that the card holds at once; 0 where it has too little shared memory for one."""


@functools.cache
def kernel_of(source: Source, device: int) -> Kernel:
    """A kernel on a device, compiled and loaded at first use."""
    from cuda.bindings import driver

    major, minor = torch.cuda.get_device_capability(device)
    cubin = compiled(source, f"sm_{major}{minor}")
    shared = resources(cubin).shared
    limit = driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
    with torch.cuda.device(device):
        torch.cuda.current_stream()  # there is a context
        if shared > _checked(driver.cuDeviceGetAttribute(limit, _checked(driver.cuCtxGetDevice()))):
            return Kernel(driver.cuLaunchKernel, None, shared, 0)
        library = _checked(driver.cuLibraryLoadData(cubin, [], [], 0, [], [], 0))
        function = _checked(
            driver.cuKernelGetFunction(_checked(driver.cuLibraryGetKernel(library, source.name.encode())))
        )
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        _checked(driver.cuFuncSetAttribute(function, attribute, shared))
        blocks = _checked(driver.cuOccupancyMaxActiveBlocksPerMultiprocessor(function, THREADS, shared))
    blocks = max(1, min(blocks, source.blocks))  # more of them read in too many places at once
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return Kernel(driver.cuLaunchKernel, function, shared, blocks * processors)


class Arguments:
    """Arguments of launches, which may be written to between one and the next."""

    def __init__(self, content: bytes) -> None:
        self.buffer = ctypes.create_string_buffer(content, len(content))
        self._first = ctypes.c_void_p(ctypes.addressof(self.buffer))
        self.address = ctypes.addressof(self._first)
        """Where the address of the only argument of the kernel is."""


def launch(kernel: Kernel, arguments: bytes | Arguments, grid: tuple[int, int, int], device: int) -> None:
    """Launch a kernel on the current stream of a device. Its arguments are copied before this returns."""
    if torch._C._cuda_getDevice() != device:
        with torch.cuda.device(device):
            return launch(kernel, arguments, grid, device)
    given = Arguments(arguments) if isinstance(arguments, bytes) else arguments
    stream = torch._C._cuda_getCurrentRawStream(device)
    result = kernel.run(
        kernel.function, *grid, THREADS, 1, 1, kernel.shared, stream, given.address, 0
    )  # fmt: skip
    if result[0] != 0:
        _checked(result)
    return None


def _checked(result: tuple[Any, ...]) -> Any:
    from cuda.bindings import driver

    if result[0] != driver.CUresult.CUDA_SUCCESS:
        _, text = driver.cuGetErrorString(result[0])
        raise RuntimeError(f"CUDA: {text.decode() if text else result[0]}")
    return result[1] if len(result) > 1 else None
