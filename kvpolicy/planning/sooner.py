"""torch without the parts of its import that no plan uses, which take a third of its time."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType
from typing import Any

__all__ = ["import_torch", "with_meta_kernels"]

META = "torch._meta_registrations"
"""Kernels in Python for tensors without memory; torch imports the module for what it registers."""
CUDA = "cuda.bindings"
"""torch tries to import it, and does without."""


def import_torch() -> None:
    """Import torch, if nothing has yet, for counting alone: `with_meta_kernels` adds what is left out.

    Nothing of torch is changed. What is left out is imported by whoever asks for it later.
    """
    if "torch" not in sys.modules:
        with _held_back(META, _Later(META)), _held_back(CUDA, None):
            import_module("torch")


def with_meta_kernels() -> None:
    """Add what models need that are built without memory."""
    import_module("torch")
    import_module(META)


class _Later(ModuleType):
    """Stands for a module until something of it is asked for."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        return getattr(import_module(self.__name__), name)


@contextmanager
def _held_back(name: str, instead: ModuleType | None) -> Iterator[None]:
    """While this lasts, an import of the module finds this instead; None: that there is none."""
    if name in sys.modules:
        yield
        return
    sys.modules[name] = instead  # type: ignore[assignment]
    try:
        yield
    finally:
        if sys.modules.get(name) is instead:
            del sys.modules[name]
