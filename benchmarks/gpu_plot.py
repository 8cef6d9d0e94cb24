"""Draws what `gpu_model.py --pictures` measured: a step's time against context, and throughput against rows.

python benchmarks/gpu_plot.py out/gpu.json docs/images/gpu.png
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt


def main(source: str, target: str) -> None:
    found = json.loads(Path(source).read_text(encoding="utf-8"))
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), constrained_layout=True)
    for name, points in found["steps"].items():
        context = sorted((tokens, seconds * 1e3) for batch, tokens, seconds in points if batch == 8)
        rows = sorted((batch, batch / seconds) for batch, tokens, seconds in points if tokens == 8192)
        left.plot(*zip(*context, strict=True), marker="o", label=name)
        right.plot(*zip(*rows, strict=True), marker="o", label=name)
    left.set(xscale="log", xlabel="tokens of a row", ylabel="ms per step", title="8 rows", ylim=(0, None))
    right.set(
        xscale="log", yscale="log", xlabel="rows of 8,192 tokens", ylabel="tokens per second", title="8,192 tokens"
    )
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    figure.suptitle(found["card"].split(";")[0] + "; Llama of 8 billion parameters, bfloat16", fontsize=9)
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=130)


if __name__ == "__main__":
    main(*sys.argv[1:])
