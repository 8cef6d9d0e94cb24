"""Saved caches that are changed on purpose."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file

from kvpolicy.layer.saving.file import checksum

__all__ = ["rewritten"]


def rewritten(file: Path, tensors: Any = lambda t: t, header: Any = lambda h: h) -> Path:
    """A file that is changed on purpose, its checksum included."""
    with safe_open(file, "pt") as opened:
        metadata = header(dict(opened.metadata()))
    held = tensors({name: tensor.clone() for name, tensor in load_file(file).items()})
    save_file(held, file, metadata={**metadata, "checksum": checksum(metadata, held)})
    return file
