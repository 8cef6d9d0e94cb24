"""Indices that layers share while they move together."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kvpolicy.layer.commit import commit_all
from kvpolicy.layer.held import Reading
from kvpolicy.layer.layer import LayerCache
from kvpolicy.placement.planner import Placement
from kvpolicy.placement.step import Step
from kvpolicy.recipe.load import load_recipe
from kvpolicy.storage import gather
from kvpolicy.storage.gather import on_device, sharing_indices

META, CPU = torch.device("meta"), torch.device("cpu")


def index(*numbers: int) -> np.ndarray:
    return np.array(numbers, dtype=np.int64)


def test_an_index_comes_to_a_device_once_while_layers_move() -> None:
    with sharing_indices():
        first = on_device(index(1, 2), META)
        assert on_device(index(1, 2), META) is first
        assert on_device(index(1, 3), META) is not first
        with sharing_indices():
            assert on_device(index(1, 2), META) is not first
        assert on_device(index(1, 2), META) is first
    assert on_device(index(1, 2), META) is not on_device(index(1, 2), META)


def test_on_a_cpu_an_index_is_the_array_itself() -> None:
    numbers = index(4, 5)
    with sharing_indices():
        assert on_device(numbers, CPU).data_ptr() == numbers.ctypes.data


def test_a_flush_of_many_layers_brings_as_many_indices_to_a_device_as_one_of_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[set[bytes]] = []

    def noted(numbers: np.ndarray, device: torch.device) -> torch.Tensor:
        shared = gather._shared.get()
        assert shared is not None, "an index is asked for while no layers move together"
        asked[-1].add(numbers.tobytes())
        return torch.from_numpy(numbers)

    for module in ("kvpolicy.storage.pages", "kvpolicy.storage.base", "kvpolicy.layer.mover"):
        monkeypatch.setattr(f"{module}.on_device", noted)
    counts = []
    for many in (1, 3):
        first = Step.first(Placement(load_recipe("logquant", window=12).tiers))
        reading = Reading(attached=True, lasting=True)
        layers = [LayerCache(first, None, reading) for _ in range(many)]
        asked.append(set())
        for n in [40, *[1] * 60]:
            for layer in layers:
                layer.stage(torch.randn(1, 2, n, 32), torch.randn(1, 2, n, 32))
                layer.hold()
            commit_all([[layer] for layer in layers], 1)
        counts.append(len(asked[-1]))
    assert asked[0] == asked[1]
    assert counts[0] > 0
