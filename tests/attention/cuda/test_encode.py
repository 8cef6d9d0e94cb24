"""Tokens coded by a kernel are those that PyTorch codes, to the bit."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import pytest
import torch
from kernel_on_cpu import COMPILER, kernel_of, launch, small_numbers
from kvpolicy_hadamard import Hadamard
from kvpolicy_int import Int
from kvpolicy_scale import Scale
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kvpolicy.attention.cuda import encode as module
from kvpolicy.attention.cuda.compile import compiled, missing, resources
from kvpolicy.attention.cuda.encode import Encode, encode, variant_of
from kvpolicy.interfaces.backend import Backend
from kvpolicy.storage import fused
from kvpolicy.storage.affine import AffineStore
from kvpolicy.storage.later import Later

ROTATED = {"transforms": (Hadamard(),)}
RMS = {"range": "rms", "group_size": "head", **ROTATED}
SMALL = {"scale_dtype": "float8_e4m3"}
CHANNEL = {"per": "channel", "group_size": 32}
FEW: list[dict[str, Any]] = [
    {"nbits": 3, **RMS, "scale_dtype": "float32"},
    {"nbits": 2, **RMS, **SMALL},
    {"nbits": 2, "group_size": 64},
    {"nbits": 4, **CHANNEL, **SMALL},
    {"nbits": 3, **CHANNEL},
    {"nbits": 1, "group_size": 16, "symmetric": True, **ROTATED, **SMALL},
    {"nbits": 4, "per": "channel", "group_size": "arrival"},
    {"nbits": 2, "group_size": "head", "transforms": (Scale(),)},
    {"nbits": 3, "per": "channel", "group_size": "arrival", "symmetric": True, **SMALL},
]
absent = missing()
unable = "no CUDA device" if not torch.cuda.is_available() else absent


def tokens(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Numbers `[batch, tokens, kv_heads, head_dim]` of many sizes, zeros, equal ones, infinities and nan among them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * torch.exp(2 * torch.randn(shape[:3], generator=generator))[..., None]
    if shape[1] > 40:
        x[0, 0, 0], x[0, 1, 0], x[0, 2, 0, 5], x[0, 35, 0, 7] = 0.0, 0.25, torch.inf, torch.nan
        x[0, 5, -1] = torch.linspace(-1, 1, shape[3])  # between levels
        x[1, :, 0, 3] = 1.5
    return x.to(dtype)


def held(options: dict[str, Any], dim: int, dtype: torch.dtype, device: str, together: bool) -> list[dict[str, Tensor]]:
    """What a store, or two `together`, hold after a prompt and some tokens more."""
    quantizer = Int(**options)
    stores = [AffineStore(quantizer, dim) for _ in range(1 + together)]
    for turn, count in enumerate((70, 33, 1)):
        coder = Later() if together and turn else None
        for number, store in enumerate(stores):
            x = tokens((2, count, 2, dim), dtype, turn + 10 * number).transpose(1, 2).to(device)
            store.append(x, later=coder)
        if coder is not None:
            coder.run()
    return [store.tensors() for store in stores]


def same(found: list[dict[str, Tensor]], expected: list[dict[str, Tensor]]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        for name, x in one.items():
            assert x.dtype == other[name].dtype
            torch.testing.assert_close(x, other[name], rtol=0, atol=0, equal_nan=True)


class LikeGpu(TorchDispatchMode):
    """What PyTorch does otherwise on a GPU: it divides by a number as by its reciprocal, and rounds roots correctly.

    Means are those of pairs there.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.div.Tensor and not isinstance(args[1], Tensor):
            return args[0] * (torch.tensor(1.0) / torch.tensor(args[1], dtype=torch.float32))
        if func is torch.ops.aten.mean.dim and args[1] == [1]:
            x = args[0]
            while x.shape[1] > 1:
                x = x[:, ::2] + x[:, 1::2]
            return x / x.new_tensor(args[0].shape[1])
        if func is torch.ops.aten.sqrt_.default:
            return args[0].copy_(args[0].double().sqrt())
        return func(*args, **(kwargs or {}))


class OnCpu(Backend):
    """Runs the kernel's source on the CPU."""

    kind: Literal["on-cpu"] = "on-cpu"
    device: ClassVar[str | None] = "cpu"

    def refuses(self, spec: Any) -> str | None:
        return "it codes alone"

    def attend(self, query: Any, part: Any, mask: Any, options: Any) -> Any:
        raise AssertionError

    def encodes(self, encoding: Any) -> bool:
        return variant_of(encoding) is not None

    def encode(self, encoding: Any, pieces: Any) -> None:
        variant = variant_of(encoding)
        assert variant is not None
        encode(variant, pieces)


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    calls: list[int] = []
    monkeypatch.setattr(module, "kernel_of", kernel_of)
    monkeypatch.setattr(module, "launch", lambda *given: calls.append(1) or launch(*given))
    monkeypatch.setattr(fused, "_encoders", lambda device: (OnCpu(),))
    fused._encoder.cache_clear()
    yield calls
    fused._encoder.cache_clear()


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
@pytest.mark.parametrize("options", FEW, ids=str)
def test_the_source_on_a_cpu_codes_as_pytorch_does(
    options: dict[str, Any], on_cpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    at = FEW.index(options)
    dim, dtype = ((128, torch.bfloat16), (64, torch.float16), (256, torch.bfloat16))[at % 3]
    found = held(options, dim, dtype, "cpu", together=bool(at % 2))
    assert on_cpu
    monkeypatch.setattr(fused, "_encoders", lambda device: ())
    with LikeGpu():
        expected = held(options, dim, dtype, "cpu", together=bool(at % 2))
    same(found, expected)


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
def test_a_store_that_comes_twice_keeps_all_that_came(on_cpu: Any) -> None:
    together, alone = (AffineStore(Int(nbits=2, group_size=64), 64) for _ in range(2))
    later = Later()
    for seed, n in enumerate((32, 32, 64)):
        x = torch.randn(1, 1, n, 64, generator=torch.Generator().manual_seed(seed)).bfloat16()
        together.append(x, later=later)
        alone.append(x)
    later.run()
    assert on_cpu
    one, other = together.tensors(), alone.tensors()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_what_lies_on_several_devices_is_no_single_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[tuple[str, int]] = []
    monkeypatch.setattr(module, "_launch", lambda _, piece, given: launched.append((piece[0].device.type, len(given))))
    piece = tokens((1, 1, 64, 64), torch.bfloat16), torch.zeros(1, 1, 64, 16), torch.zeros(1, 1, 64, 2)
    encode(variant({"nbits": 2, "group_size": 64}, 64), [piece, tuple(x.to("meta") for x in piece)])
    assert launched == [("cpu", module.EACH), ("meta", module.EACH)]


def variant(options: dict[str, Any], dim: int) -> Encode:
    store = AffineStore(Int(**options), dim)
    encoding = fused.encoding_of(store, torch.bfloat16)
    assert encoding is not None
    found = variant_of(encoding)
    assert found is not None
    return found


@pytest.mark.skipif(absent is not None, reason=f"the kernels can't be compiled: {absent}")
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_120"])
def test_the_kernel_compiles_without_spills(arch: str) -> None:
    for number, options in enumerate(FEW):
        if arch == "sm_90" or number in (1, 3):
            found = resources(compiled(variant(options, 256 if number == 0 else 128), arch))
            assert found.stack == 0
            assert found.registers <= 128
            assert found.shared <= 48 * 1024


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
def test_attention_reads_scales_of_8_bits_as_pytorch_does_nan_too() -> None:
    expected = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    assert expected.isnan().sum() == 2
    torch.testing.assert_close(torch.tensor(small_numbers()), expected, rtol=0, atol=0, equal_nan=True)


class Doubling(Hadamard):
    def forward(self, x: Tensor, state: Any, positions: Any) -> Tensor:
        return 2 * super().forward(x, state, positions)


class Signed(Hadamard):
    def fit(self, x: Tensor, queries: Any, site: Any) -> dict[str, Tensor]:
        return {}


class Floor(Int):
    def calibrate(self, groups: Tensor) -> Any:
        return super().calibrate(groups)


class Larger(Int):
    def _by_size(self, x: Tensor) -> Any:
        return super()._by_size(2 * x)


class Half:
    def highest(self, groups: Tensor) -> int:
        return 1


class Mixed(Half, Int): ...  # type: ignore[misc]


class Static(Int):
    _percentiles: ClassVar[Any] = staticmethod(lambda x: (x, x))


class Named(Int):
    """Another name alone."""

    kind: Literal["named"] = "named"  # type: ignore[assignment]
    more: int = 0


class Sure(Larger):
    def rounding(self) -> Any:
        return Int.rounding(self)


@pytest.mark.parametrize(
    "quantizer",
    [
        Floor(nbits=2),
        Int(nbits=2, clip=0.9),
        Int(nbits=2, range="percentiles"),
        Int(nbits=2, scale_dtype="e8m0"),
        Int(nbits=2, transforms=(Doubling(),)),
        Int(nbits=2, transforms=(Hadamard(), Hadamard())),
        Int(nbits=2, transforms=(Signed(),)),
        Larger(nbits=2, **RMS),
        Mixed(nbits=2),
        Static(nbits=2),
    ],
    ids=str,
)
def test_what_a_kernel_has_no_words_for_is_left_to_pytorch(quantizer: Int) -> None:
    assert fused.encoding_of(AffineStore(quantizer, 64), torch.bfloat16) is None


@pytest.mark.parametrize("quantizer", [Named(nbits=2), Sure(nbits=2)], ids=str)
def test_a_subclass_that_changes_nothing_or_says_so_has_words(quantizer: Int) -> None:
    assert fused.encoding_of(AffineStore(quantizer, 64), torch.bfloat16) is not None


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
def test_signs_and_rows_that_come_late_are_left_to_pytorch(on_cpu: Any) -> None:
    store = AffineStore(Int(nbits=2, transforms=(Hadamard(seed=1),)), 64)
    store.append(torch.randn(1, 1, 5, 64, dtype=torch.bfloat16))
    late = AffineStore(Int(nbits=2, transforms=(Hadamard(),)), 64)
    late.differ_by_head((2, 1))
    x = torch.randn(2, 1, 5, 64, dtype=torch.bfloat16)
    x[1] = 0
    late.append(x)
    assert not on_cpu
    late.append(torch.randn(2, 1, 5, 64, dtype=torch.bfloat16))
    assert not on_cpu
    late.append(torch.randn(2, 1, 5, 64, dtype=torch.bfloat16))
    assert on_cpu


MATRIX: list[dict[str, Any]] = [
    {"nbits": bits, **how, "scale_dtype": kept}
    for bits in (1, 2, 3, 4, 8)
    for kept in ("model", "float32", "float8_e4m3")
    for how in (
        RMS,
        {"range": "rms", "group_size": 32},
        {"group_size": 64},
        {"group_size": 16, "symmetric": True},
        {"group_size": "head", **ROTATED},
        {"per": "channel", "group_size": 16},
        {"per": "channel", "group_size": 64},
        {"per": "channel", "group_size": 48, "symmetric": True},
    )
]


@pytest.mark.skipif(unable is not None, reason=f"the kernels can't run: {unable}")
@pytest.mark.parametrize("dim", [64, 96, 128, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_gpu_codes_as_pytorch_does(dim: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.no_grad():
        for options in MATRIX:
            if dim == 96 and options.get("per") != "channel":
                continue
            found = [held(options, dim, dtype, "cuda", together) for together in (False, True)]
            with monkeypatch.context() as patched:
                patched.setattr(fused, "_encoders", lambda device: ())
                expected = held(options, dim, dtype, "cuda", together=True)
            same(found[0], expected[:1])
            same(found[1], expected)


@pytest.mark.skipif(unable is not None, reason=f"the kernels can't run: {unable}")
@pytest.mark.parametrize("options", FEW, ids=str)
def test_a_gpu_codes_in_one_launch_and_waits_for_nothing(options: dict[str, Any]) -> None:
    store = AffineStore(Int(**options), 128)
    x = torch.randn(2, 4, 256, 128, device="cuda", dtype=torch.bfloat16)
    store.append(x)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        store.append(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        store.append(x)
    assert [event.name for event in profile.events()].count("encode") == 1
