"""Calibrations of tiny models."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from kvpolicy import Recipe, load_recipe
from kvpolicy.experiment.calibration import Run
from kvpolicy.plugins import calibrator_of
from tests.support.models import ids

__all__ = ["calibrated", "calibration"]

_folder = TemporaryDirectory(prefix="kvpolicy-")


@lru_cache(maxsize=32)
def calibration(model: Any, method: str) -> Path:
    """The file that a calibrator makes for a model, of few random tokens."""
    path = Path(_folder.name) / f"{id(model)}-{method}.safetensors"
    samples = torch.cat([ids(96, seed=seed) for seed in range(2)])
    Run(calibrator_of(method), model, samples, path).go()
    return path


def calibrated(name: str, model: Any, **params: Any) -> Recipe:
    """A bundled recipe with a calibration of a model, if it takes one."""
    file = load_recipe(name).calibration
    return load_recipe(name, **params, **({"calibration": str(calibration(model, Path(file).stem))} if file else {}))
