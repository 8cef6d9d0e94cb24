"""Variants of the kernels, compiled at run time and kept on disk."""

from __future__ import annotations

import functools
import hashlib
import os
import struct
import tempfile
from pathlib import Path
from typing import NamedTuple, Protocol

__all__ = [
    "FEW",
    "MANY",
    "THREADS",
    "Build",
    "Resources",
    "Source",
    "Variant",
    "cache_directory",
    "compiled",
    "missing",
    "resources",
    "source",
]

THREADS = 128
"""Threads of a block of most kernels."""
STAGES = 3
"""Tiles of a warp on their way or at work."""
MEMORY = {"sm_80": 160, "sm_90": 224, "sm_100": 224, "sm_103": 224}
"""KB of shared memory of a multiprocessor that blocks can have; 98 for others."""
FEW, MANY = (40, 32), (360, 240)
"""Runs and pages that a launch's arguments hold: 4 KB of them, or nearly the 32 KB that CUDA 12.1 allows."""
OPTIONS = ("-std=c++17",)
HEADERS = ("machine.cuh", "plan.cuh", "operands.cuh", "keys.cuh", "values.cuh", "merge.cuh", "observed.cuh")


class Build(NamedTuple):
    """How a kernel is compiled and launched."""

    name: str
    """Of the kernel, and of its file."""
    blocks: int
    """Blocks that a multiprocessor is to hold at once."""
    threads: int = THREADS
    """Threads of a block."""
    waits: bool = False
    """Whether it waits itself for launches before it."""
    feature: str = ""
    """What stands after the architecture where it needs what no other has: `a`, or nothing."""


class Source(Protocol):
    """A kernel, and what it is compiled for."""

    def __hash__(self) -> int: ...

    @property
    def build(self) -> Build:
        """How it is compiled and launched."""

    def defined(self, arch: str) -> dict[str, object]:
        """What stands before the file, by name."""


class Variant(NamedTuple):
    """What attention on stores is compiled for."""

    dims: tuple[int, int]
    """Channels of keys and of values."""
    rows: int
    """Columns of a product for query heads: 4 or 8."""
    bfloat: bool
    """Whether the model's type is bfloat16, or float16."""
    kinds: tuple[str, ...]
    """The kinds of runs, as types of the headers."""
    room: tuple[int, int] = FEW
    """Runs and pages at most."""
    mask: int = 0
    """0: none, 1: boolean, 2: float32, 3: bfloat16, 4: float16."""
    places: int = 0
    """Bytes of a number that says which column of the mask a token has; 0: no token needs one."""
    causal: bool = False
    softcap: bool = False
    wide: bool = False
    """Whether the output is float32, not of the model's type."""
    scores: bool = False
    """Whether scores are written, for policies that rank tokens by attention."""

    @property
    def build(self) -> Build:
        wide = max(self.dims) > 128 and any("<3," in kind for kind in self.kinds)
        return Build("attend", 1 if wide else 2, waits=True)

    def defined(self, arch: str) -> dict[str, object]:
        return {
            "KEY_DIM": self.dims[0],
            "VALUE_DIM": self.dims[1],
            "ROWS": self.rows,
            "BFLOAT": int(self.bfloat),
            "FLOAT": int(self.wide),
            "KINDS": len(self.kinds),
            "RUNS": self.room[0],
            "PAGES": self.room[1],
            "STAGES": STAGES,
            "MEMORY": MEMORY.get(arch, 98),
            "BLOCKS": self.build.blocks,
            "MASK": self.mask,
            "PLACES": self.places,
            "CAUSAL": int(self.causal),
            "SOFTCAP": int(self.softcap),
            "SCORES": int(self.scores),
            **{f"KIND_{i}": kind for i, kind in enumerate(self.kinds)},
        }


class Resources(NamedTuple):
    """What a compiled kernel takes."""

    registers: int
    stack: int
    """Bytes of local memory of a thread; spilled registers are among them."""
    shared: int
    """Bytes of shared memory of a block, dynamic."""


@functools.cache
def missing() -> str | None:
    """Why nothing can be compiled, or None."""
    try:
        import cuda.bindings.driver  # noqa: F401
        from cuda.core import Program  # noqa: F401
    except ImportError as error:
        return f"{error.name or 'cuda-core'} is not installed"
    try:
        _compiler()
    except Exception as error:
        return f"NVRTC can't be loaded ({type(error).__name__}: {error})"
    return None


def source(kernel: Source, arch: str) -> str:
    """The source of a kernel for an architecture, whole."""
    folder = Path(__file__).parent
    text = (folder / f"{kernel.build.name}.cu").read_text(encoding="utf-8")
    for name in HEADERS:
        text = text.replace(f'#include "{name}"\n', (folder / name).read_text(encoding="utf-8"))
    return "".join(f"#define {name} {value}\n" for name, value in kernel.defined(arch).items()) + text


def cache_directory() -> Path:
    """Where compiled kernels are kept."""
    chosen = os.environ.get("KVPOLICY_CACHE")
    if chosen:
        return Path(chosen) / "cuda"
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "kvpolicy" / "cuda"


@functools.cache
def _compiler() -> str:
    from cuda.bindings import nvrtc

    return ".".join(map(str, nvrtc.nvrtcVersion()[1:]))


@functools.cache
def compiled(kernel: Source, arch: str) -> bytes:
    """The cubin of a kernel for an architecture such as `sm_90`; from disk where it was compiled before."""
    from cuda.core import Program, ProgramOptions

    text, arch = source(kernel, arch), arch + kernel.build.feature
    key = hashlib.sha256("\0".join([text, arch, _compiler(), *OPTIONS]).encode()).hexdigest()
    path = cache_directory() / f"{key}.cubin"
    try:
        return path.read_bytes()
    except OSError:
        pass
    program = Program(text, "c++", ProgramOptions(arch=arch, std="c++17", name=f"{kernel.build.name}.cu"))
    found = bytes(program.compile("cubin").code)
    _keep(path, found)
    return found


def _keep(path: Path, content: bytes) -> None:
    """Write a file whole or not at all; a directory that can't be written to only means compiling again."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.replace(name, path)
    except OSError:
        pass


def resources(cubin: bytes) -> Resources:
    """Registers, stack and shared memory of a kernel, read off its cubin (an ELF file)."""
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, strings = struct.unpack_from("<HHH", cubin, 0x3A)
    headers = [struct.unpack_from("<IIQQQQIIQQ", cubin, table + i * size) for i in range(count)]
    at = headers[strings][4]
    registers = stack = shared = 0
    for head in headers:
        name = cubin[at + head[0] : cubin.index(b"\0", at + head[0])].decode()
        data = cubin[head[4] : head[4] + head[5]] if head[1] != 8 else b""
        if name == ".nv.info":
            registers, stack = _most(data, 0x2F), _most(data, 0x11)
        elif name.startswith(".nv.constant3") and len(data) >= 4:
            (shared,) = struct.unpack_from("<i", data)
    return Resources(registers, stack, shared)


def _most(info: bytes, wanted: int) -> int:
    """The largest number that `.nv.info` gives with an attribute: 0x2f registers, 0x11 bytes of a frame."""
    at, most = 0, 0
    while at + 4 <= len(info):
        form, attribute, size = info[at], info[at + 1], struct.unpack_from("<H", info, at + 2)[0]
        if form == 4:
            if attribute == wanted:
                most = max(most, struct.unpack_from("<II", info, at + 4)[1])
            at += size
        at += 4
    return most
