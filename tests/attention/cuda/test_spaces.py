"""What lies behind transforms that divide channels takes one launch, with PyTorch's results to the bit."""

from __future__ import annotations

from itertools import product
from typing import Any, Literal

import pytest
import torch
from kernels import DEVICES, Grids, grids_of, on_gpu
from kvpolicy_hadamard import Hadamard
from kvpolicy_scale import Scale
from torch import Tensor

from kvpolicy.attention.cuda import spaces as module
from kvpolicy.attention.cuda.spaces import joined, mapped
from kvpolicy.interfaces.site import Site
from kvpolicy.interfaces.transform import Transform
from kvpolicy.storage.chain import Chain
from kvpolicy.storage.fused import divisors_of

DTYPES = [torch.bfloat16, torch.float16]


class Named(Scale):
    """Changes nothing."""

    kind: Literal["named"] = "named"  # type: ignore[assignment]


class Twice(Scale):
    """Divides otherwise than `divides` says."""

    kind: Literal["twice"] = "twice"  # type: ignore[assignment]

    def inverse(self, y: Tensor, state: Any, positions: Any) -> Tensor:
        return super().inverse(y, state, positions) * 2


class Fitted(Scale):
    """May keep anything."""

    kind: Literal["fitted"] = "fitted"  # type: ignore[assignment]

    def fit(self, x: Tensor, queries: Any, site: Any) -> dict[str, Tensor]:
        return super().fit(x, queries, site)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Grids:
    """The grid of each launch; on a CPU the kernel's source is run."""
    found = grids_of(module, monkeypatch)
    module._ready.cache_clear()
    yield found
    module._ready.cache_clear()


def chain_of(lines: tuple[int, int], dim: int, dtype: torch.dtype, device: str) -> Chain:
    found = Chain((Scale(),), Site(side="values", head_dim=dim))
    found.restore({"transforms.0.divisors": (torch.rand(*lines, 1, dim, device=device) * 3 + 0.01).to(dtype)})
    return found


def numbers(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Tensor:
    """Of many sizes, some of them no numbers."""
    x = torch.randn(shape, device=device) * torch.exp(3 * torch.randn(shape, device=device))
    x.view(-1)[:4] = torch.tensor([torch.inf, torch.nan, -0.0, 1e-42])
    return x.to(dtype)


def same(found: Tensor, expected: Tensor) -> None:
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
def test_spaces_are_joined_as_pytorch_does(dim: int, dtype: torch.dtype, device: str, launched: Grids) -> None:
    for which, (batch, kv_heads, queries), result in product(
        ([0, 1], [1], [0, 1, 1], [1, 1, 1], [0, 1, 1, 1]),
        ((1, 1, 1), (1, 8, 1), (3, 2, 1), (2, 4, 5)),
        (dtype, torch.float32),
    ):
        heads = kv_heads * 3
        shape = (batch, queries, heads, dim)
        x = numbers((len(which), *shape) if len(which) > 1 else shape, torch.float32, device)
        lines = [(batch, kv_heads), (1, kv_heads), (batch, 1), (1, 1)]
        chains = [chain_of(lines[i], dim, dtype, device) if there else None for i, there in enumerate(which)]
        launched.clear()
        found = joined(x, chains, kv_heads, result)
        assert launched == [(-(-batch * queries * heads * dim // 512), 1, 1)]
        same(found, module._by_pytorch(x, chains, kv_heads).to(result))
        room = torch.empty_like(found)
        assert joined(x, chains, kv_heads, result, room) is room
        same(room, found)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kept", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_divisors_of_any_type(kept: torch.dtype, device: str, launched: Grids) -> None:
    x = numbers((2, 2, 1, 4, 64), torch.float32, device)
    chains = [None, chain_of((2, 2), 64, kept, device)]
    same(joined(x, chains, 2, torch.bfloat16), module._by_pytorch(x, chains, 2).bfloat16())
    assert len(launched) == 1


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [64, 96, 128, 256])
def test_queries_are_mapped_as_pytorch_does(dim: int, dtype: torch.dtype, device: str, launched: Grids) -> None:
    for batch, kv_heads, queries in ((1, 1, 1), (1, 8, 1), (3, 2, 4)):
        for lines in ((batch, kv_heads), (1, kv_heads), (1, 1)):
            chain = chain_of(lines, dim, dtype, device)
            query = numbers((batch, queries, kv_heads * 3, dim), dtype, device).transpose(1, 2)
            launched.clear()
            found = mapped(chain, query, kv_heads)
            assert len(launched) == 1
            assert found.is_contiguous()
            rows = query.float().unflatten(1, (kv_heads, -1)).flatten(2, 3)
            same(found, chain.adjoint(rows).to(torch.float16).view(query.shape))
            room = torch.empty_like(found)
            assert mapped(chain, query, kv_heads, room) is room
            same(room, found)


@on_gpu
def test_a_graph_reads_what_its_twins_took_last() -> None:
    one, other = (chain_of((2, 4), 128, torch.bfloat16, "cuda") for _ in range(2))
    x, query = numbers((2, 2, 1, 8, 128), torch.float32, "cuda"), numbers((2, 8, 1, 128), torch.bfloat16, "cuda")
    twin, stream = one.twin(), torch.cuda.Stream()

    def both(chain: Chain) -> tuple[Tensor, Tensor]:
        return joined(x, [None, chain], 4, torch.bfloat16), mapped(chain, query, 4)

    right = [both(one), both(other)]
    assert not torch.equal(*(found.nan_to_num() for _, found in right))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        found = both(twin)
    for taken, expected in ((other, right[1]), (one, right[0]), (other, right[1])):
        assert twin.take(taken)
        graph.replay()
        for own, right_one in zip(found, expected, strict=True):
            same(own, right_one)


@pytest.mark.parametrize(
    ("transforms", "served"),
    [
        ((Scale(),), True),
        ((Named(),), True),
        ((Twice(),), False),
        ((Fitted(),), False),
        ((Hadamard(),), False),
        ((Scale(), Scale()), False),
        ((Hadamard(), Scale()), False),
    ],
    ids=str,
)
def test_transforms_that_do_more_than_divide_are_left_to_pytorch(
    transforms: tuple[Transform, ...], served: bool, launched: Grids, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "kernel_of", lambda source, device: None)
    monkeypatch.setattr(module, "launch", lambda kernel, arguments, grid, device: launched.append(grid))
    chain = Chain(transforms, Site(side="values", kv_heads=2))
    assert divisors_of(chain) is None
    chain.forward(torch.randn(1, 2, 5, 64, dtype=torch.bfloat16), None)
    assert (divisors_of(chain) is not None) == served
    x = torch.randn(2, 1, 1, 4, 64)
    found = joined(x, [None, chain], 2, torch.bfloat16)
    assert len(launched) == served
    if not served:
        same(found, module._by_pytorch(x, [None, chain], 2).bfloat16())


def test_of_several_spaces_all_must_divide(launched: Grids) -> None:
    chains = [Chain((transform,), Site(side="values", kv_heads=2)) for transform in (Scale(), Hadamard())]
    for chain in chains:
        chain.forward(torch.randn(1, 2, 5, 64, dtype=torch.bfloat16), None)
    x = torch.randn(3, 1, 1, 4, 64)
    same(joined(x, [None, *chains], 2, torch.bfloat16), module._by_pytorch(x, [None, *chains], 2).bfloat16())
    assert not launched


@pytest.mark.parametrize(
    "kept",
    [
        (torch.rand(1, 1, 1, 1), torch.rand(1, 2, 1, 64)),
        (torch.rand(1, 2, 1, 64), torch.rand(1, 2, 1, 64, dtype=torch.float64)),
        (torch.rand(1, 2, 1, 64), torch.rand(1, 2, 1, 64).bfloat16()),
    ],
    ids=["one for all channels", "float64", "types that differ"],
)
def test_divisors_of_another_kind_are_left_to_pytorch(kept: tuple[Tensor, ...], launched: Grids) -> None:
    chains = [Chain((Scale(),), Site(side="values", kv_heads=2)) for _ in kept]
    for chain, divisors in zip(chains, kept, strict=True):
        chain.restore({"transforms.0.divisors": divisors})
    x = torch.randn(2, 1, 1, 4, 64)
    same(joined(x, chains, 2, torch.bfloat16), module._by_pytorch(x, chains, 2).bfloat16())
    assert not launched
