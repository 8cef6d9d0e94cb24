"""What every test needs: one thread, no network, and the modules in tests/support."""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
sys.path.insert(0, str(Path(__file__).parent / "support"))

gc.disable()  # imports leave no garbage

import torch

torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """What was imported and collected stays: the collector of garbage needn't look through it again and again."""
    gc.collect()
    gc.freeze()
    gc.enable()
