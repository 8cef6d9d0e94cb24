"""What is written beside the rows once a run is finished, and made from them alone: report and pictures."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvpolicy.arguments import RESULTS

if TYPE_CHECKING:
    from kvpolicy.experiment.result import Comparison


def write_results(result: Comparison, directory: Path) -> None:
    """Write the pictures of a comparison. What can't be written is a warning: the rows and the table are safe."""
    parts: dict[str, Callable[[], Any]] = {}
    if any(row["score"] is not None for row in result.rows):
        parts["comparison.png"] = lambda: result.plot(directory / "comparison.png")
    if result.distances.layers:
        parts["attention.png"] = lambda: result.plot_attention(directory / "attention.png")
    for name, write in parts.items():
        try:
            write()
        except Exception as error:
            warnings.warn(f"{name} can't be written: {error}; the rows are in {directory / RESULTS[0]}", stacklevel=4)
