"""A launch that is used again gets the addresses of each layer, and outputs of the stream that it runs on."""

from __future__ import annotations

import struct
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kvpolicy.attention.cuda import again as module
from kvpolicy.attention.cuda.again import Again
from kvpolicy.attention.cuda.plan import POINTERS


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The addresses of each launch."""
    found: list[tuple[int, ...]] = []

    def prepared(kernel: Any, arguments: Any, *about: Any) -> Any:
        return lambda: found.append(struct.unpack(f"<{len(arguments.buffer) // 8}Q", arguments.buffer.raw))

    monkeypatch.setattr(module, "prepared", prepared)
    return found


def test_addresses_are_those_of_a_layer_and_outputs_those_of_a_stream(
    launched: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    streams = iter([1, 1, 1, 2])
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: next(streams), raising=False)
    plan: Any = SimpleNamespace(
        kernel=None, parts=1, lines=2, turns=1, partial=0, numbers=b"", layout=b"", out=(1, 1, 4, 8),
        dtype=torch.float32, maps=(), spaces=(-1,), addresses=struct.Struct(f"<{POINTERS + 4}Q"),
    )  # fmt: skip
    run = Again(plan, torch.zeros(1, 4, 1, 8), [], 0)
    outs = []
    for layer in range(3):
        query, keys, values = torch.zeros(1, 4, 1, 8), torch.zeros(1, 2, 1, 8), torch.zeros(1, 2, 1, 8)
        out = run(query, (keys, values), [100 + layer, 200 + layer], {"keys": [], "values": []}, None, None)
        assert out is not None
        given = launched[-1]
        assert given[0] == query.data_ptr()
        assert out.data_ptr() in given
        assert given[POINTERS:] == (100 + layer, 200 + layer, keys.data_ptr(), values.data_ptr())
        outs.append(out)
    memory = [out.untyped_storage().data_ptr() for out in outs]
    assert memory[0] == memory[1] != memory[2]
