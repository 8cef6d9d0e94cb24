"""What is written beside the rows once a run is finished, and made from them alone: report and pictures."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvpolicy.arguments import RESULTS
from kvpolicy.experiment.store import read

if TYPE_CHECKING:
    from kvpolicy.experiment.result import Comparison


def write_results(result: Comparison, directory: Path) -> None:
    """Write report and pictures. What can't be written is a warning: the rows and the table are safe."""
    from kvpolicy.report import write as report

    parts: dict[str, Callable[[], Any]] = {"the report": lambda: report.write(read(directory), directory)}
    if any(row["score"] is not None for row in result.rows):
        parts["comparison.png"] = lambda: result.plot(directory / "comparison.png")
    if result.distances.layers:
        parts["attention.png"] = lambda: result.plot_attention(directory / "attention.png")
    for name, write in parts.items():
        try:
            write()
        except Exception as error:
            warnings.warn(f"{name} can't be written: {error}; the rows are in {directory / RESULTS[0]}", stacklevel=4)
