"""The picture of attention by distance: layers, their mean, and the power law fitted to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from kvpolicy.errors import CompareError
from kvpolicy.experiment.attention_distance import NEAREST, SINKS, Distances
from kvpolicy.experiment.plot import check_ending, write_picture

_BLUE, _ORANGE, _LAYER = "#0b5394", "#c55a11", "#9dbfe0"


def plot_attention(distances: Distances, title: str, path: Path) -> Path:
    """Draw mean attention per token against distance from the query.

    Args:
        distances: the attention.
        title: of the picture.
        path: where the picture goes; its ending says the format.

    Raises:
        CompareError: attention was not watched, the ending is unknown, or the file can't be written.
    """
    from matplotlib.figure import Figure

    check_ending(path)
    if not distances.layers or not len(distances.distances):
        raise CompareError(
            "a picture of attention needs answers whose attention was watched, found none; compare with an attached "
            "model, errors=True, and answers of more than a token"
        )
    figure = Figure(figsize=(8.5, 5.6), layout="constrained", dpi=144)
    axes = figure.add_subplot()
    axes.set_title(title, fontsize="medium", parse_math=False)
    _curves(axes, distances)
    _fit(axes, distances)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    # A layer that hardly looks at most distances would squeeze all else.
    positive = distances.mean()[distances.mean() > 0]
    axes.set_ylim(bottom=positive.min() / 100 if len(positive) else None)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
    axes.set_xlabel(f"distance from the query, tokens (without the first {SINKS} tokens of the text)")
    axes.set_ylabel("mean attention per token")
    axes.grid(color="0.92")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize="small", loc="lower left", edgecolor="none", framealpha=0.85)
    return write_picture(figure, path)


def _curves(axes: Any, distances: Distances) -> None:
    x = distances.distances
    curves = distances.curves()
    for number, curve in enumerate(curves.values()):
        label = f"one of {len(curves)} layers" if number == 0 else None
        axes.plot(x, curve, color=_LAYER, linewidth=1, label=label)
    axes.plot(x, distances.mean(), "o-", color=_BLUE, linewidth=1.8, markersize=3.5, label="mean of the layers")


def _fit(axes: Any, distances: Distances) -> None:
    fit = distances.fit()
    if fit is not None:
        x = distances.distances
        x = x[x >= NEAREST]
        label = (
            rf"power law from distance {fit.first:.0f} to {fit.last:.0f}: "
            rf"$\alpha$ = {fit.exponent:.2f}, R² = {fit.r2:.2f}"
        )
        axes.plot(x, fit(x), "--", color=_ORANGE, linewidth=2, label=label)
        level = fit.factor * np.exp((1 - fit.exponent) * np.log(x).mean())
        axes.plot(
            x, level / x, ":", color="0.35", linewidth=1.4, label=r"$\alpha$ = 1, the density of log-spaced tokens"
        )
    shares = distances.shares()
    left_out = (
        f"not drawn: first {SINKS} tokens, {100 * shares['first_tokens']:.0f}% of attention; "
        f"own token, {100 * shares['own_token']:.0f}%"
    )
    axes.plot([], [], " ", label=left_out)
