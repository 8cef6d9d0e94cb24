"""Runs a kernel's source on a CPU: threads of a block take turns, up to where they exchange numbers."""

from __future__ import annotations

import ctypes
import functools
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from kvpolicy.attention.cuda import compile as compiling

COMPILER = shutil.which("g++")
BEFORE = r"""
#include <cmath>
#include <cstring>
#include <algorithm>
#include <ucontext.h>
using std::min; using std::max;
typedef unsigned char u8; typedef unsigned short u16; typedef unsigned int u32;
typedef long long i64; typedef unsigned long long u64;
#define __device__
#define __forceinline__ inline
#define __global__
#define __launch_bounds__(...)
#define __grid_constant__
#define __constant__
#define __shared__
#define __align__(n)
struct uint2 { u32 x, y; };
struct uint4 { u32 x, y, z, w; };
struct float4 { float x, y, z, w; };
static inline uint2 make_uint2(u32 x, u32 y) { return {x, y}; }
static inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
struct Place { u32 x, y, z; };
static Place threadIdx, blockIdx;
alignas(16) unsigned char shared[1 << 16];
static inline float __uint_as_float(u32 x) { float f; memcpy(&f, &x, 4); return f; }
static inline u32 __float_as_uint(float x) { u32 f; memcpy(&f, &x, 4); return f; }
static inline float __fadd_rn(float a, float b) { return a + b; }
static inline float __fsub_rn(float a, float b) { return a - b; }
static inline float __fmul_rn(float a, float b) { return a * b; }
static inline float __fdiv_rn(float a, float b) { return a / b; }
static inline float __fsqrt_rn(float a) { return sqrtf(a); }
static inline float lo(u32 w) { return __uint_as_float(w << 16); }
static inline float half(u32 w) { _Float16 h; u16 s = (u16)w; memcpy(&h, &s, 2); return (float)h; }
static inline u32 as_half(float a) { _Float16 h = (_Float16)a; u16 s; memcpy(&s, &h, 2); return s; }
static inline u32 as_bfloat(float a) {
  u32 u = __float_as_uint(a);
  return a != a ? 0x7fc0u : (u + 0x7fffu + (u >> 16 & 1u)) >> 16;
}
static inline u32 halves(float a, float b) { return as_half(a) | as_half(b) << 16; }
static inline u32 bfloats(float a, float b) { return as_bfloat(a) | as_bfloat(b) << 16; }
#define model_pair(a, b) (BFLOAT ? bfloats(a, b) : halves(a, b))
static void wait_for_last() {}
static ucontext_t fibers[128], home;
static char stacks[128][1 << 16];
static u32 slots[2][128];
static int turn[128], done, self;
static void rest() { int me = self; swapcontext(&fibers[me], &home); self = me; threadIdx.x = me; }
static void __syncthreads() { rest(); }
template <class T> static T __shfl_xor_sync(u32, T x, int lanes) {
  int me = self, at = turn[me]++ & 1;
  memcpy(&slots[at][me], &x, 4);
  rest();
  T y;
  memcpy(&y, &slots[at][me ^ lanes], 4);
  return y;
}
"""
AFTER = r"""
static const Given* given;
static void body() { KERNEL(*given); done++; swapcontext(&fibers[self], &home); }
extern "C" void run(const void* g, u32 x, u32 y) {
  given = (const Given*)g;
  for (blockIdx.y = 0; blockIdx.y < y; blockIdx.y++)
    for (blockIdx.x = 0; blockIdx.x < x; blockIdx.x++) {
      for (int i = 0; i < 128; i++) {
        turn[i] = 0;
        getcontext(&fibers[i]);
        fibers[i].uc_stack.ss_sp = stacks[i];
        fibers[i].uc_stack.ss_size = sizeof stacks[i];
        fibers[i].uc_link = &home;
        makecontext(&fibers[i], body, 0);
      }
      for (done = 0; done < 128;)
        for (int i = 0; i < 128; i++) { self = i; threadIdx.x = i; swapcontext(&home, &fibers[i]); }
    }
}
"""


@functools.cache
def kernel_of(source: Any, device: int) -> Any:
    """What runs a kernel on the CPU; its arithmetic is that of the source, one rounding an operation."""
    text = compiling.source(source, "sm_90")
    folder = Path(compiling.__file__).parent
    text = text.replace((folder / "machine.cuh").read_text(encoding="utf-8"), "")
    return _library(text + AFTER.replace("KERNEL", source.build.name))


def _library(text: str) -> Any:
    assert COMPILER is not None
    with tempfile.TemporaryDirectory() as name:
        path = Path(name, "kernel.cpp")
        path.write_text(BEFORE + text, encoding="utf-8")
        options = ["-O1", "-std=c++17", "-ffp-contract=off", "-w", "-shared", "-fPIC"]
        subprocess.run([COMPILER, *options, "-o", f"{name}/kernel.so", str(path)], check=True)
        return ctypes.CDLL(f"{name}/kernel.so")


def launch(kernel: Any, arguments: bytes, grid: tuple[int, int, int], device: int) -> None:
    buffer = ctypes.create_string_buffer(arguments, len(arguments))
    kernel.run(buffer, ctypes.c_uint32(grid[0]), ctypes.c_uint32(grid[1]))


@functools.cache
def small_numbers() -> list[float]:
    """What the kernels of attention read each byte of float8_e4m3 as, by their source."""
    text = (Path(compiling.__file__).parent / "operands.cuh").read_text(encoding="utf-8")
    number = re.search(r"^template <int T> struct Number \{.*?^\};", text, re.DOTALL | re.MULTILINE)
    assert number is not None
    run = (
        'extern "C" void run(const u8* in, float* out) { for (int i = 0; i < 256; i++) out[i] = Number<3>::at(in, i); }'
    )
    found = (ctypes.c_float * 256)()
    _library("static inline float hi(u32 w) { return __uint_as_float(w & 0xffff0000u); }\n" + number[0] + run).run(
        bytes(range(256)), found
    )
    return list(found)
