"""Kernels in tests: on a card where there is one, and on a CPU, where their source is run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_on_cpu import COMPILER, kernel_of, launch

from kvpolicy.attention.cuda.compile import missing

Grids = list[tuple[int, int, int]]
absent = "no CUDA device" if not torch.cuda.is_available() else missing()
on_gpu = pytest.mark.skipif(absent is not None, reason=f"the kernels can't run: {absent}")
DEVICES = [
    pytest.param("cpu", marks=pytest.mark.skipif(COMPILER is None, reason="no g++")),
    pytest.param("cuda", marks=on_gpu),
]


def grids_of(module: Any, monkeypatch: pytest.MonkeyPatch) -> Grids:
    """The grid of each launch that a module makes from now on; on a CPU the kernel's source is run."""
    found: Grids = []
    load, run = module.kernel_of, module.launch

    def noted(kernel: Any, arguments: Any, grid: tuple[int, int, int], device: int) -> None:
        found.append(grid)
        (launch if device < 0 else run)(kernel, arguments, grid, device)

    monkeypatch.setattr(module, "kernel_of", lambda source, at: (kernel_of if at < 0 else load)(source, at))
    monkeypatch.setattr(module, "launch", noted)
    monkeypatch.setattr(module, "_on_card", lambda x: True)
    return found
