"""Kernels on a card: loaded once, launched with arguments by value."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from kvpolicy.attention.cuda.compile import MEMORY, THREADS, Source, compiled, resources

__all__ = ["THREADS", "Arguments", "Kernel", "kernel_of", "large_tiles", "launch", "prepared"]

ROOM, BYTES = 224, 16
"""For larger tiles a multiprocessor must have so many KB of shared memory, and get so many bytes of memory in a clock.
Of an H100 it gets 13: there it waits for them, and larger tiles read in too many places. Of an H200 it gets 18."""
EARLY = 12030
"""The driver from which on a graph can capture launches that overlap."""


class Kernel(NamedTuple):
    """A kernel on a device."""

    function: Any
    shared: int
    """Bytes of shared memory of a block."""
    threads: int
    """Threads of a block."""
    slots: int
    """Blocks that the card holds at once; 0 where it has too little shared memory for one."""
    early: bool = False
    """Whether it may be launched before the launch ahead of it has ended, for which it waits itself."""


@functools.cache
def large_tiles(device: int) -> bool:
    """Whether a device is faster with larger tiles."""
    if device < 0:
        return False
    major, minor = torch.cuda.get_device_capability(device)
    with torch.cuda.device(device):
        torch.cuda.current_stream()  # there is a context
        read = _attribute("MEMORY_CLOCK_RATE") * 2 * _attribute("GLOBAL_MEMORY_BUS_WIDTH") / 8
        clocks = _attribute("CLOCK_RATE") * _attribute("MULTIPROCESSOR_COUNT")
    return MEMORY.get(f"sm_{major}{minor}", 0) >= ROOM and read >= BYTES * clocks


@functools.cache
def kernel_of(source: Source, device: int) -> Kernel:
    """A kernel on a device, compiled and loaded at first use."""
    driver, build = _driver(), source.build
    major, minor = torch.cuda.get_device_capability(device)
    cubin = compiled(source, f"sm_{major}{minor}")
    shared = resources(cubin).shared
    with torch.cuda.device(device):
        torch.cuda.current_stream()  # there is a context
        if shared > _attribute("MAX_SHARED_MEMORY_PER_BLOCK_OPTIN"):
            return Kernel(None, shared, build.threads, 0)
        early = build.waits and major >= 9 and _checked(driver.cuDriverGetVersion()) >= EARLY
        if early:  # no more blocks find room, or those of the next launch crowd together on some multiprocessors
            whole = _attribute("MAX_SHARED_MEMORY_PER_MULTIPROCESSOR") // (build.blocks + 1)
            shared = max(shared, whole - _attribute("RESERVED_SHARED_MEMORY_PER_BLOCK") + 16)
        library = _checked(driver.cuLibraryLoadData(cubin, [], [], 0, [], [], 0))
        function = _checked(
            driver.cuKernelGetFunction(_checked(driver.cuLibraryGetKernel(library, build.name.encode())))
        )
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        _checked(driver.cuFuncSetAttribute(function, attribute, shared))
        blocks = _checked(driver.cuOccupancyMaxActiveBlocksPerMultiprocessor(function, build.threads, shared))
        processors = _attribute("MULTIPROCESSOR_COUNT")
    blocks = max(1, min(blocks, build.blocks))  # more of them read in too many places at once
    return Kernel(function, shared, build.threads, blocks * processors, early)


def _attribute(name: str) -> int:
    """An attribute of the current device."""
    driver = _driver()
    which = getattr(driver.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}")
    return int(_checked(driver.cuDeviceGetAttribute(which, _checked(driver.cuCtxGetDevice()))))


class Arguments:
    """Arguments of launches, which may be written to between one and the next."""

    def __init__(self, content: bytes) -> None:
        self.buffer = ctypes.create_string_buffer(content, len(content))
        self._first = ctypes.c_void_p(ctypes.addressof(self.buffer))
        self.address = ctypes.addressof(self._first)
        """Where the address of the only argument of the kernel is."""


def launch(kernel: Kernel, arguments: bytes | Arguments, grid: tuple[int, int, int], device: int) -> None:
    """Launch a kernel on the current stream of a device. Its arguments are copied before this returns."""
    given = Arguments(arguments) if isinstance(arguments, bytes) else arguments
    prepared(kernel, given, grid, device, torch._C._cuda_getCurrentRawStream(device))()


def prepared(
    kernel: Kernel, arguments: Arguments, grid: tuple[int, int, int], device: int, stream: int
) -> Callable[[], None]:
    """What launches a kernel on a stream of a device, each time with the arguments as they are then."""
    about = (*grid, kernel.threads, 1, 1, kernel.shared, stream)
    if kernel.early:
        run = functools.partial(_driver().cuLaunchKernelEx, _configuration(*about), kernel.function)
    else:
        run = functools.partial(_driver().cuLaunchKernel, kernel.function, *about)
    run = functools.partial(run, arguments.address, 0)

    def launched() -> None:
        if torch._C._cuda_getDevice() != device:
            with torch.cuda.device(device):
                return launched()
        result = run()
        if result[0] != 0:
            _checked(result)
        return None

    return launched


@functools.cache
def _driver() -> Any:
    from cuda.bindings import driver

    return driver


@functools.lru_cache(maxsize=256)
def _configuration(*about: int) -> Any:
    driver = _driver()
    attribute, found = driver.CUlaunchAttribute(), driver.CUlaunchConfig()
    attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    attribute.value.programmaticStreamSerializationAllowed = 1
    found.gridDimX, found.gridDimY, found.gridDimZ, found.blockDimX, found.blockDimY, found.blockDimZ = about[:6]
    found.sharedMemBytes, found.hStream = about[6:]
    found.attrs, found.numAttrs = [attribute], 1
    return found


def _checked(result: tuple[Any, ...]) -> Any:
    driver = _driver()
    if result[0] != driver.CUresult.CUDA_SUCCESS:
        _, text = driver.cuGetErrorString(result[0])
        raise RuntimeError(f"CUDA: {text.decode() if text else result[0]}")
    return result[1] if len(result) > 1 else None
