"""Files of calibrations: safetensors with a header that says of which model and method they are."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kvpolicy.arguments import CALIBRATION
from kvpolicy.errors import CalibrationError
from kvpolicy.hf.fingerprint import Fingerprint, differences, fingerprint_of
from kvpolicy.layer.saving.file import checksum, replace_file
from kvpolicy.plugins import registry
from kvpolicy.words import clip, quoted

__all__ = ["Calibration", "by_layer", "calibration_of", "flat", "read_calibration", "write_calibration"]

FORMAT, FORMAT_VERSION = CALIBRATION, "1"
READABLE = (torch.float32, torch.int16, torch.int32, torch.int64)


@dataclass(frozen=True)
class Calibration:
    """What a file holds, of a finished calibration or of one that goes on."""

    method: str
    """Kind of the calibrator."""
    model: Fingerprint
    layers: dict[int, dict[str, Tensor]]
    """Named tensors of each layer."""
    about: dict[str, Any] = field(default_factory=dict)
    """How it was made: samples, tokens, options, and so on."""


def flat(layers: Mapping[int, Mapping[str, Tensor]], prefix: str = "") -> dict[str, Tensor]:
    """Named tensors of layers as a file holds them: `3.keys.low`."""
    return {f"{prefix}{layer}.{name}": t for layer, tensors in layers.items() for name, t in tensors.items()}


def by_layer(tensors: Mapping[str, Tensor]) -> dict[int, dict[str, Tensor]]:
    """The inverse of `flat`.

    Raises:
        ValueError: a name that does not begin with a layer.
    """
    layers: dict[int, dict[str, Tensor]] = {}
    for whole, t in tensors.items():
        layer, _, name = whole.partition(".")
        if not (layer.isascii() and layer.isdecimal() and len(layer) < 6 and name):
            raise ValueError(f"a name of a tensor must begin with a layer, found {whole[:80]}")
        layers.setdefault(int(layer), {})[name] = t
    return layers


def write_calibration(path: Path, made: Calibration, kind: str = FORMAT) -> None:
    """Write a file, under another name that is changed in the end.

    Raises:
        CalibrationError: it can't be written.
    """
    texts = {
        "format": kind,
        "format_version": FORMAT_VERSION,
        "method": made.method,
        "model": json.dumps({"config": made.model.config, "weights": made.model.weights}),
        "versions": json.dumps({"kvpolicy": version("kvpolicy"), "transformers": transformers.__version__}),
        "about": json.dumps(made.about),
    }
    try:
        replace_file(path, texts, flat(made.layers))
    except (OSError, ValueError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise CalibrationError(f"the calibration can't be written to {clip(str(path), 300)}: {clip(reason)}") from None


def read_calibration(path: Path, kind: str = FORMAT) -> tuple[Calibration, str]:
    """What a file holds, and the release of transformers that it was made with.

    Raises:
        CalibrationError: there is none, or it is damaged or something else.
    """
    shown, again = clip(str(path), 300), "make it again by kvpolicy calibrate"
    try:
        with safe_open(path, framework="pt") as file:
            texts = file.metadata() or {}
            if texts.get("format") != kind:
                raise CalibrationError(
                    f"{shown}: a calibration must be a file that kvpolicy calibrate wrote, found other safetensors; "
                    "name the right file"
                )
            if texts.get("format_version") != FORMAT_VERSION:
                raise CalibrationError(
                    f"{shown}: this kvpolicy reads calibrations of version {FORMAT_VERSION}, found "
                    f"{texts.get('format_version', 'none')!r:.40}; {again}"
                )
            # Copies: what safetensors gives is a view of the file, which may change or vanish.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        if texts.get("checksum") != checksum(texts, tensors):
            raise ValueError("its contents don't match its checksum")
        model = json.loads(texts["model"])
        made = Calibration(texts["method"], Fingerprint(**model), by_layer(tensors), json.loads(texts["about"]))
        return made, str(json.loads(texts["versions"])["transformers"])
    except CalibrationError:
        raise
    except (SafetensorError, OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        raise CalibrationError(
            f"{shown}: a calibration must be a file that kvpolicy calibrate wrote, found one that can't be read "
            f"({clip(reason)}); {again}"
        ) from None


def calibration_of(recipe: Any, model_or_config: Any) -> dict[int, dict[str, Tensor]]:
    """The tensors of each layer of the calibration that a recipe names; none if it names none.

    Raises:
        CalibrationError: the file is missing or damaged, or of another model.
    """
    if not recipe.calibration:
        return {}
    path, start = Path(recipe.calibration), f"recipe {clip(recipe.name)}: "
    try:
        there = path.is_file()
    except (OSError, ValueError):
        there = False
    if not there:
        found = "something else" if os.path.exists(path) else "none"
        raise CalibrationError(
            f"{start}calibration must be a file that kvpolicy calibrate wrote for this model, found {found} at "
            f"{quoted(str(path))}; make it: kvpolicy calibrate {_method(recipe.name, path.stem)} --model DIR --text "
            f"FILE --out {quoted(str(path))[1:-1]}, or name another: {clip(recipe.name)}:calibration=FILE"
        )
    try:
        made, release = read_calibration(path)
    except CalibrationError as error:
        raise CalibrationError(f"{start}{error}") from None
    told = differences(made.model, fingerprint_of(model_or_config), release == transformers.__version__)
    if told:
        more = f"; and {len(told) - 3} more" if len(told) > 3 else ""
        raise CalibrationError(
            f"{start}{clip(str(path), 300)} must be a calibration of this model, found one of another: "
            f"{'; '.join(told[:3])}{more}. Make one for this model: kvpolicy calibrate {made.method} --model DIR "
            "--text FILE --out ANOTHER"
        )
    return made.layers


def _method(*names: str) -> str:
    """The calibrator that a recipe or a file is probably named after."""
    known = sorted(registry().calibrators, key=len, reverse=True)
    return next((kind for name in names for kind in known if name.startswith(kind)), "METHOD")
