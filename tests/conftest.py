"""What every test needs: one thread, no network, and the modules in tests/support."""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ["OMP_NUM_THREADS"] = "1"  # of processes that tests start, too; torch is imported later
sys.path.insert(0, str(Path(__file__).parent / "support"))

gc.disable()  # imports leave no garbage


def pytest_collection_finish() -> None:
    """What was imported and collected stays: the collector of garbage needn't look through it again and again."""
    gc.freeze()
    gc.enable()


def pytest_sessionfinish() -> None:
    """Nothing more need be freed, and pytest would search all of it five times."""
    gc.freeze()
