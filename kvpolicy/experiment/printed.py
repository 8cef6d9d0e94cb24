"""Results as text: their tables, then what is to be said of them."""

from __future__ import annotations

import io
from abc import ABC, abstractmethod
from typing import Any

from rich.console import Console
from rich.text import Text


class Printed(ABC):
    """A result that is shown as tables and notes."""

    @abstractmethod
    def tables(self) -> list[Any]:
        """What is shown."""

    @abstractmethod
    def notes(self) -> str:
        """What stands below the tables."""

    @property
    def width(self) -> int:
        """Columns that the tables need."""
        console = Console(width=4096)
        return max(120, *(console.measure(table).maximum for table in self.tables()))

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=self.width, color_system=None)
        for table in self.tables():
            console.print(table)
        console.print(Text(self.notes()), width=120)
        file = console.file
        assert isinstance(file, io.StringIO)
        return file.getvalue().rstrip()
