"""Keys or values as they came."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kvpolicy.storage.base import Ints, Store
from kvpolicy.storage.pages import Pages


class ExactStore(Store):
    """Keys or values as they came."""

    def __init__(self) -> None:
        self.parts = {"exact": Pages()}

    @property
    def format(self) -> str:
        return "exact" if self.front is None else "exact+flat"

    @property
    def length(self) -> int:
        return self.parts["exact"].length

    def append(
        self, x: Tensor, empty: Tensor | None = None, positions: Tensor | None = None, full: bool = False
    ) -> None:
        self.parts["exact"].append(x)

    def drop(self, index: Ints) -> None:
        self.parts["exact"].drop(index)

    def decoded(self, block: int, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
        return self.parts["exact"].blocks()

    def take(self, index: Ints, dtype: torch.dtype) -> Tensor:
        return self.parts["exact"].take(index)

    def gather(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        return self.parts["exact"].gather(index)

    def bytes(self) -> dict[str, int]:
        return {"exact": self.parts["exact"].used(), "indices": self.parts["exact"].bounds()}
