"""Every variant compiles on any machine, for any architecture, and keeps its numbers in registers."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
from variants import FEW, MANY

from kvpolicy.attention.cuda import compile as compiling
from kvpolicy.attention.cuda.compile import Build, Variant, compiled, missing, resources
from kvpolicy.attention.cuda.copy import Copy
from kvpolicy.attention.cuda.heads import Heads
from kvpolicy.attention.cuda.observe import Sums
from kvpolicy.attention.cuda.spaces import Join

absent = missing()
pytestmark = pytest.mark.skipif(absent is not None, reason=f"the kernels can't be compiled: {absent}")


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_120"])
@pytest.mark.parametrize("variant", FEW, ids=lambda v: "-".join(v.kinds)[:60])
def test_what_recipes_ask_for_compiles_without_spills(variant: Variant, arch: str) -> None:
    found = resources(compiled(variant, arch))
    assert found.stack == 0
    assert 32 < found.registers <= 255
    assert found.shared <= {"sm_80": 163, "sm_90": 227, "sm_120": 99}[arch] * 1024


@pytest.mark.parametrize("variant", MANY, ids=lambda v: f"{v.dims[0]}-{v.kinds[-1][:50]}")
def test_every_format_compiles_without_spills(variant: Variant) -> None:
    found = resources(compiled(variant, "sm_90"))
    assert found.stack == 0
    assert found.registers > 32


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_120"])
def test_sums_of_a_prompts_attention_compile_without_spills(arch: str) -> None:
    for dim, weighs, mask in product((64, 80, 96, 128, 256), (False, True), (False, True)):
        if arch == "sm_90" or dim == 128:
            found = resources(compiled(Sums(dim, dim != 80, weighs, mask, softcap=mask), arch))
            assert found.stack == 0
            assert found.shared <= 99 * 1024


@pytest.mark.parametrize("dim", [64, 80, 96, 128])
@pytest.mark.parametrize("bfloat", [False, True])
def test_sums_on_warpgroups_compile_without_spills(dim: int, bfloat: bool) -> None:
    found = resources(compiled(Sums(dim, bfloat, True, grouped=True), "sm_90"))
    assert found.stack == 0
    assert 32 < found.registers <= 65536 // Sums(dim, bfloat, True, grouped=True).build.threads
    assert found.shared <= 227 * 1024


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_120"])
@pytest.mark.parametrize("kernel", [Copy("copy"), Copy("shift"), Copy("shift", 4)], ids=str)
def test_copies_compile_without_spills(kernel: Copy, arch: str) -> None:
    found = resources(compiled(kernel, arch))
    assert found.stack == found.shared == 0


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_120"])
@pytest.mark.parametrize("bfloat", [0, 1])
def test_joins_of_spaces_compile_without_spills(bfloat: int, arch: str) -> None:
    for kernel in (Join(2, bfloat, bfloat), Join(2, bfloat, 2), Join(2, 2, bfloat), Join(bfloat, bfloat, 0, True)):
        found = resources(compiled(kernel, arch))
        assert found.stack == found.shared == 0
        assert found.registers <= 64


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_120"])
def test_weights_of_heads_compile_without_spills(arch: str) -> None:
    found = resources(compiled(Heads(), arch))
    assert found.stack == found.shared == 0
    assert found.registers <= 64


SMALL = Sums(64, True, weighs=False)
"""The kernel that takes the least time."""


def test_a_kernel_is_compiled_once_and_then_read_from_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVPOLICY_CACHE", str(tmp_path))
    compiled.cache_clear()
    first = compiled(SMALL, "sm_90")
    kept = list((tmp_path / "cuda").iterdir())
    assert [path.suffix for path in kept] == [".cubin"]
    assert kept[0].read_bytes() == first
    kept[0].write_bytes(b"from disk")
    compiled.cache_clear()
    assert compiled(SMALL, "sm_90") == b"from disk"
    compiled.cache_clear()


def test_another_source_is_another_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KVPOLICY_CACHE", str(tmp_path))
    compiled.cache_clear()
    compiled(SMALL, "sm_90")
    compiled.cache_clear()
    monkeypatch.setattr(Sums, "build", Build("observe", blocks=1))
    compiled(SMALL, "sm_90")
    compiled.cache_clear()
    assert len(list((tmp_path / "cuda").iterdir())) == 2


def test_a_register_too_few_is_seen() -> None:
    """The reader of cubins sees a spill where there is one."""
    from cuda.core import Program, ProgramOptions

    text = compiling.source(FEW[0], "sm_90").replace(
        "__launch_bounds__(WARPS * 32, BLOCKS)", "__launch_bounds__(WARPS * 32, 8)"
    )
    options = ProgramOptions(arch="sm_90", std="c++17", name="attend.cu")
    assert resources(bytes(Program(text, "c++", options).compile("cubin").code)).stack > 0
