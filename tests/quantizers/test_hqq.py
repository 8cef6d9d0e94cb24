"""Quantizer `hqq` against the library called directly."""

from __future__ import annotations

import builtins
from typing import Any

import hqq.core.quantize as library
import pytest
import torch
from kvpolicy_hqq import Hqq
from torch import Tensor

from kvpolicy.errors import MissingDependencyError

BITS = [1, 2, 3, 4, 8]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def states(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def quantize(x: Tensor, nbits: int, axis: int, group_size: int, optimize: bool) -> tuple[Tensor, Tensor, Tensor]:
    codes, meta = library.Quantizer.quantize(
        x, nbits=nbits, axis=axis, group_size=group_size, optimize=optimize, bitpack=False, device="cpu"
    )
    return codes, meta["scale"], meta["zero"]


@pytest.mark.parametrize("optimize", [False, True])
@pytest.mark.parametrize("nbits", BITS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_per_token_equals_axis_1(dtype: torch.dtype, nbits: Any, optimize: bool) -> None:
    x = states(2, 3, 40, 64, dtype=dtype)
    codes, scale, zero = quantize(x, nbits, 1, 32, optimize)
    mine = Hqq(nbits=nbits, optimize=optimize).calibrate(x.reshape(-1, 32))
    assert torch.equal(mine.codes, codes.to(torch.uint8))
    assert torch.equal(mine.scale, scale)
    assert torch.equal(mine.offset, -zero * scale)


@pytest.mark.parametrize("optimize", [False, True])
@pytest.mark.parametrize("nbits", BITS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_per_channel_equals_axis_0(dtype: torch.dtype, nbits: Any, optimize: bool) -> None:
    x = states(1, 1, 128, 64, dtype=dtype)
    codes, scale, zero = quantize(x, nbits, 0, 32, optimize)
    # The library's rows are 32 runs of tokens, one after the other; a column takes a token of each run.
    mine = Hqq(nbits=nbits, optimize=optimize, per="channel").calibrate(x.reshape(32, -1).T.contiguous())
    assert torch.equal(mine.scale, scale.T)
    if optimize:  # a mean along another axis is summed in another order
        assert torch.allclose(mine.offset, (-zero * scale).T, atol=1e-5)
        assert (mine.codes == codes.T).float().mean() > 0.999
    else:
        assert torch.equal(mine.offset, (-zero * scale).T)
        assert torch.equal(mine.codes, codes.T.to(torch.uint8))


@pytest.mark.parametrize("nbits", BITS)
def test_decodes_like_the_library(nbits: Any) -> None:
    x = states(50, 64, dtype=torch.float32)
    codes, scale, zero = quantize(x, nbits, 1, 64, True)
    mine = Hqq(nbits=nbits).calibrate(x)
    assert [t.dtype for t in mine] == [torch.uint8, torch.float32, torch.float32]
    assert [tuple(t.shape) for t in mine] == [(50, 64), (50, 1), (50, 1)]
    assert torch.allclose(mine.scale * mine.codes + mine.offset, (codes - zero) * scale, atol=1e-5)


@pytest.mark.parametrize("optimize", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_numbers_are_kept(dtype: torch.dtype, optimize: bool) -> None:
    groups = states(9, 64, dtype=dtype)
    groups[3] = 2.5
    affine = Hqq(nbits=2, optimize=optimize).calibrate(groups)
    assert torch.allclose((affine.scale * affine.codes + affine.offset)[3], torch.tensor(2.5), rtol=1e-6)


@pytest.mark.parametrize("optimize", [False, True])
@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_inf_and_nan_spoil_their_group_only(bad: float, optimize: bool) -> None:
    quantizer = Hqq(nbits=2, optimize=optimize)
    groups = states(9, 64, dtype=torch.float32)
    others = torch.arange(9) != 3
    clean = quantizer.calibrate(groups[others])
    groups[3, 5] = bad
    affine = quantizer.calibrate(groups)
    for mine, reference in zip(affine, clean, strict=True):
        assert torch.equal(mine[others], reference)
    assert (affine.scale * affine.codes + affine.offset)[3].isnan().all()


def test_results_can_be_written_to() -> None:
    """The library's optimiser runs in inference mode, whose tensors refuse that later on."""
    for tensor in Hqq(nbits=2).calibrate(states(4, 64, dtype=torch.float32)):
        assert not tensor.is_inference()


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("hqq"):
            raise ModuleNotFoundError("No module named 'hqq'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingDependencyError, match=r"pip install hqq$"):
        Hqq(nbits=2).check(64)
