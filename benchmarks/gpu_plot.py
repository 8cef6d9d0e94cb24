"""Draws what `gpu.py --out` wrote: a step's time against context, and tokens per second against rows in equal memory.

python benchmarks/gpu_plot.py out/gpu.json docs/assets/gpu.png
python benchmarks/gpu_plot.py out/context.json out/rows.json docs/assets/gpu.png
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator
from on_gpu.report import named
from on_gpu.rows import EXACT, Row, read

STYLES = {
    EXACT: ("#444444", "o", "-", 0),
    "quanto, 2 bits": ("#c8722a", "s", "-", 4),
    "quanto, 4 bits": ("#c8722a", "s", "--", -4),
    "logquant": ("#1f6fb4", "o", "-", 6),
    "logquant, 4 bits": ("#1f6fb4", "o", "--", -12),
    "kivi": ("#2f9e78", "^", "-", -3),
}
"""Color, marker, line, and how much higher than its point the number of rows stands."""
LABELS = {"logquant": "kvpolicy logquant, 2 bits", "kivi": "kvpolicy kivi, 2 bits"}


def drawn(
    axes: Any,
    rows: Sequence[Row],
    x: Callable[[Row], float],
    y: Callable[[Row], float],
    ticks: Sequence[int],
    last: bool,
) -> None:
    for arm, (color, marker, line, up) in STYLES.items():
        points = sorted((x(row), y(row)) for row in rows if row.arm == arm and row.shown and row.seconds)
        if points:
            label = LABELS.get(arm) or (named(Row("", arm, 0, 0)) if arm != EXACT else f"{EXACT}, 16 bits")
            axes.plot(*zip(*points, strict=True), color=color, marker=marker, linestyle=line, markersize=4, label=label)
            if last:  # as many rows as there is room for
                axes.annotate(
                    f"{points[-1][0]:,}", points[-1], (5, up), textcoords="offset points", va="center", fontsize=8
                )
    axes.set(xscale="log", yscale="log")
    axes.set_xticks(ticks)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3)


def main(sources: list[str], target: str) -> None:
    runs = [read(Path(source)) for source in sources]
    figure, both = plt.subplots(1, 2, figsize=(10, 4.4), constrained_layout=True)
    for axes, section in zip(both, ("context", "rows"), strict=True):
        card, rows = next(
            (about.split(",")[0], own) for about, all in runs if (own := [r for r in all if r.section == section])
        )
        if section == "context":
            lengths = sorted({row.tokens for row in rows})
            drawn(axes, rows, lambda row: row.tokens, lambda row: row.seconds * 1e3, lengths, False)
            axes.set(xlabel="tokens of a row", ylabel="milliseconds per step", title=f"{rows[0].batch} rows ({card})")
        else:
            drawn(axes, rows, lambda row: row.batch, lambda row: row.batch / row.seconds, (1, 4, 16, 64, 256), True)
            axes.margins(x=0.09)
            room = f"{rows[0].more['of GB']:.0f} GB for keys and values ({card})"
            axes.set(xlabel=f"rows of {rows[0].tokens:,} tokens", ylabel="tokens per second", title=room)
        axes.title.set_fontsize(10)
    shown = {}
    for axes in both:
        lines, labels = axes.get_legend_handles_labels()
        shown |= dict(zip(labels, lines, strict=True))
    figure.legend(shown.values(), shown, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=130)


if __name__ == "__main__":
    main(sys.argv[1:-1], sys.argv[-1])
