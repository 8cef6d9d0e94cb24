"""Pictures are drawn where a test is about one; garbage is not searched for among what was there before."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from kvpolicy.hf.models import load_model


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    """The bundled model, and its tokenizer."""
    return load_model(device="cpu")


def _touch(_: Figure, path: Path) -> None:
    path.touch()


@pytest.fixture(autouse=True, scope="module")
def _kept() -> None:
    """Experiments collect garbage, and so does statsmodels, which takes long where torch is loaded."""
    gc.freeze()


@pytest.fixture(autouse=True)
def _undrawn(request: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fixtures of modules, which come first, do draw."""
    if request.node.get_closest_marker("draws") is None:
        monkeypatch.setattr(FigureCanvasAgg, "draw", lambda _: None)
        monkeypatch.setattr(Figure, "savefig", _touch)
