"""Pictures of quality against effective bits: of a comparison, one labelled point per arm, and of a search."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from kvpolicy.errors import CompareError
from kvpolicy.words import in_line

_BLUE, _ORANGE, _GREY = "#0b5394", "#c55a11", "0.45"
_TICKS = (0.25, 0.5, 1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32)
_LONGEST = 34
_NEAR = 12


class Point(NamedTuple):
    """An arm in a panel."""

    label: str
    bits: float
    """Effective bits per key or value."""
    mean: float
    low: float
    """Ends of the confidence interval."""
    high: float
    evicts: bool
    """Whether its recipe drops tokens."""


class Panels(NamedTuple):
    """What a picture shows: the task score on the left, divergence on the right."""

    score: Sequence[Point]
    divergence: Sequence[Point]
    exact: float | None
    """The score of the exact cache, unless it is one of the points."""


def plot_comparison(panels: Panels, title: str, path: Path) -> Path:
    """Draw the score, and the divergence from the exact cache, against effective bits per value.

    Args:
        panels: the points.
        title: of the picture; how bars are to be read is added.
        path: where the picture goes; its ending says the format.

    Raises:
        CompareError: there is no point, the ending is unknown, or the file can't be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    check_ending(path)
    if not panels.score:
        raise CompareError("a picture needs at least one row, found none; run an arm on a sample first")
    figure = Figure(figsize=(11.5, 5.4), layout="constrained", dpi=144)
    canvas = FigureCanvasAgg(figure)
    bars = "bars: 95% confidence intervals of the mean (on the right, their upper half where they reach 0)"
    figure.suptitle(f"{title}; {bars}", fontsize="medium")
    left, right = figure.subplots(1, 2)
    _draw_score(left, panels.score, panels.exact)
    _draw_divergence(right, panels.divergence)
    canvas.draw()
    # Placed after the layout is settled, since positions are found in pixels.
    figure.set_layout_engine("none")
    for axes, points in ((left, panels.score), (right, panels.divergence)):
        _label(axes, points, canvas.get_renderer())
    return write_picture(figure, path)


def plot_front(
    points: Sequence[Point], behind: Sequence[tuple[float, float]], budget: float | None, title: str, path: Path
) -> Path:
    """Draw divergence from the exact cache against effective bits: what a search found, and what it tried.

    Args:
        points: what was found, with confidence intervals.
        behind: bits and divergence of trials.
        budget: the most bits, if there is a bound.
        title: of the picture; how bars and dots are to be read is added.
        path: where the picture goes; its ending says the format.

    Raises:
        CompareError: the ending is unknown, or the file can't be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    check_ending(path)
    figure = Figure(figsize=(8.5, 5.6), layout="constrained", dpi=144)
    canvas = FigureCanvasAgg(figure)
    said = "named: held-out samples, bars are 95% confidence intervals; grey: trials, on the samples tuned on"
    figure.suptitle(f"{title}\n{said}", fontsize="medium", parse_math=False)
    axes = figure.add_subplot()
    _draw_divergence(axes, points)
    every = [*points, *(Point("", bits, kl, kl, kl, False) for bits, kl in behind)]
    _scale_divergence(axes, every)
    axes.plot([p.bits for p in every], [p.mean for p in every], ".", color="0.75", markersize=4, zorder=0)
    # Linear: what a search finds lies close together.
    low, high = min(p.bits for p in every), max(p.bits for p in every)
    room = max(high - low, 0.5) * 0.08
    axes.set_xscale("linear")
    axes.set_xlim(low - room, high + room)
    axes.xaxis.set_major_locator(MaxNLocator(10))
    axes.set_xlabel("effective bits per key or value")
    if budget is not None:
        axes.axvline(budget, color=_GREY, linewidth=1, linestyle="--", zorder=0)
    canvas.draw()
    figure.set_layout_engine("none")
    _label(axes, points, canvas.get_renderer())
    return write_picture(figure, path)


def check_ending(path: Path) -> None:
    """Refuse a path whose ending is no format of pictures."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    supported = sorted(FigureCanvasAgg.get_supported_filetypes())
    if path.suffix.lstrip(".").lower() not in supported:
        raise CompareError(
            f"{in_line(path)}: a picture must end in one of {', '.join(supported)}, found {path.suffix!r}"
        )


def write_picture(figure: Any, path: Path) -> Path:
    """Write a figure."""
    try:
        figure.savefig(path)
    except OSError as error:
        raise CompareError(f"{in_line(path)}: the picture can't be written: {error}") from error
    return path


def shortened(label: str) -> str:
    """A label that leaves room for others; its end tells arms of one recipe apart."""
    return label if len(label) <= _LONGEST else "…" + label[1 - _LONGEST :]


def _draw_score(axes: Any, points: Sequence[Point], exact: float | None) -> None:
    _draw(axes, points)
    if exact is not None:
        axes.axhline(exact, color=_GREY, linewidth=1, linestyle="--", zorder=0)
    axes.set_ylim(-0.06, 1.09)
    axes.set_ylabel("task score (dashed: exact cache)")


def _draw_divergence(axes: Any, points: Sequence[Point]) -> None:
    if not points:
        axes.text(0.5, 0.5, "no answer is longer than a token", ha="center", transform=axes.transAxes)
    _draw(axes, points, log=True)
    _scale_divergence(axes, points)
    axes.set_ylabel("KL divergence from the exact cache (nats per token)")


def _draw(axes: Any, points: Sequence[Point], log: bool = False) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    for p in points:
        colour = _ORANGE if p.evicts else _BLUE
        # Down to 0 a bar would cross every decade of a logarithmic axis.
        bars = [[p.mean - p.low if p.low or not log else 0.0], [p.high - p.mean]]
        axes.errorbar(p.bits, p.mean, bars, fmt="o", markersize=6, capsize=3, linewidth=1, color=colour)
    for colour, label in ((_BLUE, "keeps every token"), (_ORANGE, "drops tokens")):
        if any(p.evicts == (colour == _ORANGE) for p in points):
            axes.plot([], [], "o", color=colour, label=label)
    axes.set_xscale("log")
    if points:
        low, high = min(p.bits for p in points), max(p.bits for p in points)
        axes.set_xlim(low / 1.45, high * 1.45)
        axes.legend(frameon=False, fontsize="small", loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
    axes.xaxis.set_major_locator(FixedLocator(_TICKS))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.set_xlabel("effective bits per key or value (log scale)")
    axes.grid(color="0.92")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _scale_divergence(axes: Any, points: Sequence[Point]) -> None:
    """Logarithmic, with room for arms at 0."""
    positive = [p.mean for p in points if p.mean > 0]
    if not positive:
        axes.set_ylim(-0.05, 1)
        return
    least = 10.0 ** math.floor(math.log10(min(positive)))
    top = max(p.high for p in points)
    axes.set_yscale("symlog", linthresh=least, linscale=0.5)
    decades = range(round(math.log10(least)), math.ceil(math.log10(top)) + 1)
    step = max(1, math.ceil(len(decades) / 9))
    axes.set_yticks([0, *(10.0**i for i in decades[::step])], minor=False)
    axes.set_yticks([], minor=True)
    axes.set_ylim(-least / 4, max(top * 2.5, least * 10))


def _label(axes: Any, points: Sequence[Point], renderer: Any) -> None:
    """Put each label at the nearest place where it covers no point, bar or other label."""
    from matplotlib.transforms import Bbox

    pixel = renderer.points_to_pixels(1.0)
    dots, taken = [], []
    for p in points:
        (x, y), (_, low), (_, high) = (axes.transData.transform((p.bits, v)) for v in (p.mean, p.low, p.high))
        dots += [Bbox.from_extents(x - 5 * pixel, y - 5 * pixel, x + 5 * pixel, y + 5 * pixel)]
        taken += [Bbox.from_extents(x - 2 * pixel, low, x + 2 * pixel, high)]
    frame = axes.get_window_extent(renderer)
    labels: list[Any] = []
    for p in sorted(points, key=lambda p: (-p.mean, p.bits)):
        best: tuple[float, Any, Any, list[Any]] | None = None
        for place in _offsets():
            text = _annotate(axes, p, *place)
            box = _extent(text, renderer, 1.5 * pixel)
            line = _line(axes.transData.transform((p.bits, p.mean)), place[0] * pixel, place[1] * pixel, pixel)
            hidden = sum(_overlap(box, other) for other in taken + dots + labels)
            hidden += 4 * (box.width * box.height - _overlap(box, frame))
            hidden += sum(_overlap(part, other) for part in line for other in dots + labels)
            if best is None or hidden < best[0]:
                if best is not None:
                    best[1].remove()
                best = hidden, text, box, line
            else:
                text.remove()
            if best[0] < 1:
                break
        assert best is not None
        labels.append(best[2])
        taken += best[3]


def _line(start: Any, dx: float, dy: float, pixel: float) -> list[Any]:
    """Boxes along the line from a point to its label; none for a label beside its point."""
    from matplotlib.transforms import Bbox

    length = math.hypot(dx, dy)
    if length <= _NEAR * pixel:
        return []
    steps = [i * pixel * 3 / length for i in range(3, int(length / (3 * pixel)))]
    ends = [(start[0] + t * dx, start[1] + t * dy) for t in steps]
    return [Bbox.from_extents(x - 1.5 * pixel, y - 1.5 * pixel, x + 1.5 * pixel, y + 1.5 * pixel) for x, y in ends]


def _extent(text: Any, renderer: Any, padding: float) -> Any:
    """The box of an annotation's text, without its line."""
    from matplotlib.text import Text

    text.update_positions(renderer)
    return Text.get_window_extent(text, renderer).padded(padding)


def _offsets() -> Iterator[tuple[float, float, str, str]]:
    """Places around a point, near ones first, in typographic points."""
    for radius in (8, 14, 20, 28, 36, 46, 58, 72, 88, 106, 126, 150, 180, 215):
        for degrees in (0, 180, 45, -45, 135, -135, 90, -90, 22, -22, 158, -158, 67, -67, 113, -113):
            dx, dy = radius * math.cos(math.radians(degrees)), radius * math.sin(math.radians(degrees))
            ha = "center" if abs(dx) < 0.3 * radius else "left" if dx > 0 else "right"
            va = "center" if abs(dy) < 0.3 * radius else "bottom" if dy > 0 else "top"
            yield dx, dy, ha, va


def _annotate(axes: Any, p: Point, dx: float, dy: float, ha: str, va: str) -> Any:
    far = math.hypot(dx, dy) > _NEAR
    return axes.annotate(
        p.label.replace("$", r"\$"),
        (p.bits, p.mean),
        (dx, dy),
        textcoords="offset points",
        ha=ha,
        va=va,
        fontsize=8.5,
        color="0.15",
        annotation_clip=False,
        bbox={"boxstyle": "square,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.8},
        arrowprops={"arrowstyle": "-", "color": "0.6", "linewidth": 0.7, "shrinkA": 0, "shrinkB": 4} if far else None,
    )


def _overlap(one: Any, other: Any) -> float:
    """Area that two boxes share, in square pixels."""
    width = min(one.x1, other.x1) - max(one.x0, other.x0)
    height = min(one.y1, other.y1) - max(one.y0, other.y0)
    return float(width * height) if width > 0 and height > 0 else 0.0
