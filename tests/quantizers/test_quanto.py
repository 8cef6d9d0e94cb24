"""Quantizer `quanto` against the library called directly."""

from __future__ import annotations

import builtins
from typing import Any

import optimum.quanto as quanto
import pytest
import torch
from compiler import need_compiler
from kvpolicy_quanto import Quanto
from pydantic import ValidationError
from torch import Tensor

from kvpolicy.errors import MissingDependencyError

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def states(dtype: torch.dtype) -> Tensor:
    return torch.randn(2, 3, 128, 64, generator=torch.Generator().manual_seed(0)).to(dtype)


def library(x: Tensor, nbits: int, axis: int, group_size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes, scale and shift as the library's QuantizedCache layer obtains them, and what it decodes."""
    need_compiler()
    qtype = {2: quanto.qint2, 4: quanto.qint4}[nbits]
    scale, shift = quanto.MaxOptimizer()(x, qtype, axis, group_size)
    tensor = quanto.quantize_weight(x, qtype, axis, scale, shift, group_size)
    return tensor._data.unpack(), scale, shift, tensor.dequantize()


@pytest.mark.parametrize("group_size", [32, 64])
@pytest.mark.parametrize("nbits", [2, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_per_token_equals_axis_0(dtype: torch.dtype, nbits: Any, group_size: int) -> None:
    x = states(dtype)
    codes, scale, shift, decoded = library(x, nbits, 0, group_size)
    mine = Quanto(nbits=nbits).calibrate(x.reshape(-1, group_size))
    assert torch.equal(mine.codes, codes)
    assert torch.equal(mine.scale, scale.float())
    assert torch.equal(mine.offset, -shift.float())
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 0.04, torch.float16: 0.005}[dtype]
    assert torch.allclose((mine.scale * mine.codes + mine.offset).view(x.shape), decoded.float(), atol=tolerance)


@pytest.mark.parametrize("group_size", [32, 128])
@pytest.mark.parametrize("nbits", [2, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_per_channel_equals_axis_1(dtype: torch.dtype, nbits: Any, group_size: int) -> None:
    x = states(dtype)
    codes, scale, shift, _ = library(x, nbits, -1, group_size)
    # The library's columns run over channels first and the groups of tokens second.
    groups = x.reshape(-1, group_size, x.shape[-1]).permute(2, 0, 1).reshape(-1, group_size)
    mine = Quanto(nbits=nbits, per="channel").calibrate(groups)
    assert torch.equal(mine.codes, codes.T)
    assert torch.equal(mine.scale, scale.float().T)
    assert torch.equal(mine.offset, -shift.float().T)


@pytest.mark.parametrize("dtype", DTYPES)
def test_types_and_shapes(dtype: torch.dtype) -> None:
    affine = Quanto(nbits=2).calibrate(states(dtype).reshape(-1, 64))
    assert [t.dtype for t in affine] == [torch.uint8, torch.float32, torch.float32]
    assert [tuple(t.shape) for t in affine] == [(768, 64), (768, 1), (768, 1)]


def test_a_single_group_is_one_group() -> None:
    affine = Quanto(nbits=2).calibrate(torch.tensor([[0.0, 1.0, 2.0, 3.0]]))
    assert affine.codes.tolist() == [[0, 1, 2, 3]]
    assert affine.scale.tolist() == [[1.0]]


@pytest.mark.parametrize("value", [0.0, -2.5, 1000.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_numbers_are_exact(dtype: torch.dtype, value: float) -> None:
    groups = states(dtype).reshape(-1, 64)[:9].clone()
    groups[3] = value
    affine = Quanto(nbits=4).calibrate(groups)
    assert (affine.scale * affine.codes + affine.offset)[3].tolist() == [value] * 64
    assert (affine.codes[3] == 0).all()


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_inf_and_nan_spoil_their_group_only(bad: float) -> None:
    groups = states(torch.float32).reshape(-1, 64)[:9].clone()
    clean = Quanto(nbits=2).calibrate(groups)
    groups[3, 5] = bad
    affine = Quanto(nbits=2).calibrate(groups)
    others = torch.arange(9) != 3
    for mine, reference in zip(affine, clean, strict=True):
        assert torch.equal(mine[others], reference[others])
    assert not (affine.scale * affine.codes + affine.offset)[3].isfinite().any()
    assert int(affine.codes.max()) < 4


def test_other_widths_are_refused() -> None:
    with pytest.raises(ValidationError, match="nbits"):
        Quanto.model_validate({"nbits": 3})


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("optimum"):
            raise ModuleNotFoundError("No module named 'optimum'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingDependencyError, match=r"pip install optimum-quanto$"):
        Quanto(nbits=2).check(64)
