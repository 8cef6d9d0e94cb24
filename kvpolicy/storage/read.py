"""What attention reads of stores where it lies."""

from __future__ import annotations

from typing import Any

from kvpolicy.storage.affine import AffineStore
from kvpolicy.storage.exact import ExactStore
from kvpolicy.storage.pages import Pages

__all__ = ["parts_read", "words_of"]


def parts_read(store: Any) -> tuple[Pages, ...] | None:
    """The parts of a store that kernels read, in the order in which pages are counted; None: they know none such."""
    if isinstance(store, AffineStore):
        parts, numbers = store.parts, store.groups.numbers
        if numbers is None:
            return parts["codes"], parts["params"], parts["exact"]
        return parts["codes"], parts["params"], numbers, parts["exact"]
    if isinstance(store, ExactStore):
        return (store.parts["exact"],)
    return None


def words_of(store: Any) -> Any:
    """What says, with the marks of `parts_read`, how kernels read a store as long as it lives; None: there is more.

    What its transforms keep is its own.
    """
    if isinstance(store, AffineStore) and store.beside is None and store.levels is None:
        return store.quantizer, store.head_dim, store.scales.origin
    return "exact" if isinstance(store, ExactStore) else None
