"""Pictures as inline SVG: colours come from the page, so that they follow its light and dark scheme."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from markupsafe import Markup, escape

WIDTH, HEIGHT = 460, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 14, 12, 44
_LETTER = 7.0
"""Pixels of a letter, roughly: no font is loaded to measure it."""
COLOURS = 8
MINUS = "\u2212"


class Point(NamedTuple):
    """An arm in a scatter plot."""

    name: str
    x: float
    y: float
    low: float
    """Ends of the interval of y."""
    high: float
    style: int
    """The number of its colour."""
    front: bool
    """Whether no other point is better on both axes."""


class Line(NamedTuple):
    """A curve."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    classes: str
    """Of CSS, such as `s3`."""
    colour: str | None = None
    """Instead of that of its class."""


@dataclass(frozen=True)
class Scale:
    """Values along an axis; it spans the values that are drawn, and need not begin at 0."""

    low: float
    high: float
    log: bool = False

    @classmethod
    def over(cls, values: Iterable[float], log: bool = False) -> Scale:
        """With a margin around the values; values that are all the same have some room, too."""
        known = [v for v in values if math.isfinite(v) and (v > 0 or not log)]
        if not known:
            return cls(1.0, 10.0, True) if log else cls(0.0, 1.0)
        low, high = min(known), max(known)
        if log:
            room = (high / low) ** 0.06 if high > low * 1.2 else 1.3
            return cls(low / room, high * room, True)
        room = (high - low) * 0.07 or 0.05 * max(abs(high), 0.02)
        return cls(low - room, high + room)

    def __call__(self, value: float) -> float:
        """Where a value is, from 0 to 1; nothing is below the axis."""
        value = max(value, self.low)
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def ticks(self, most: int = 6) -> list[tuple[float, str]]:
        """Round values within the scale, and how they are written."""
        from matplotlib.ticker import LogLocator, MaxNLocator

        if self.log and self.high / self.low > 3:
            base = 10.0 if self.high / self.low > 100 else 2.0
            found = LogLocator(base=base, numticks=most + 2).tick_values(self.low, self.high)
        else:
            found = MaxNLocator(most - 1, steps=[1, 2, 2.5, 5, 10]).tick_values(self.low, self.high)
        inside = [float(v) for v in found if self.low <= v <= self.high]
        return [(v, _written(v)) for v in inside]


def _written(value: float) -> str:
    if abs(value) < 1e-12:
        return "0"
    if abs(value) < 1e-3:
        text = f"{value:.3g}" if "e" in f"{value:.3g}" else f"{value:.2e}".replace(".00", "")
        text = text.replace("e-0", "e-")
    else:
        text = f"{value:,.0f}" if abs(value) >= 1_000 else f"{value:.4g}"
    return text.replace("-", MINUS)


def scatter(points: Sequence[Point], x_name: str, y_name: str, rises: bool) -> Markup:
    """Points with intervals, the front as a line, and a number beside each point that its legend explains.

    Args:
        points: what is drawn.
        x_name: of the x axis, of which less is better.
        y_name: of the y axis.
        rises: whether more of y is better.
    """
    xs = [p.x for p in points]
    x = Scale.over(xs, log=max(xs) > 4 * min(xs) > 0)
    ys = [v for p in points for v in (p.low, p.y, p.high)]
    least, most = min([p.y for p in points if p.y > 0] or [1.0]), max(ys)
    # Divergences span decades; what is 0 stands on the axis.
    log = not rises and most > 50 * least and min(p.y for p in points) >= 0
    y = Scale.over([v for v in ys if v >= least / 3] if log else ys, log)
    parts = [_frame(x, y, x_name, y_name)]
    front = sorted((p for p in points if p.front), key=lambda p: (p.x, p.y))
    if len(front) > 1:
        steps = [f"M{_px(x, front[0].x)},{_py(y, front[0].y)}"]
        steps += [f"H{_px(x, p.x)}V{_py(y, p.y)}" for p in front[1:]]
        parts.append(f'<path class="front" d="{"".join(steps)}"/>')
    taken = [(_px(x, p.x), _py(y, p.y)) for p in points]
    for number, p in enumerate(points, 1):
        px, py = _px(x, p.x), _py(y, p.y)
        parts.append(
            f'<g class="s{p.style % COLOURS}"><title>{escape(p.name)}: {_written(p.x)}; {_written(p.y)} '
            f"[{_written(p.low)}, {_written(p.high)}]</title>"
            f'<path class="bar" d="M{px},{_py(y, p.low)}V{_py(y, p.high)}"/>'
            f'<circle cx="{px}" cy="{py}" r="5" class="{"dot" if p.front else "dot behind"}"/></g>'
        )
        parts.append(_number_beside(number, px, py, taken))
    best = "higher and further left is better" if rises else "lower and further left is better"
    return _svg(f"{y_name} against {x_name}: {best}", parts)


def _number_beside(number: int, px: float, py: float, taken: list[tuple[float, float]]) -> str:
    """At the place around the point that is furthest from all others."""
    width = _LETTER * len(str(number))
    places = [(px + dx, py + dy) for dx, dy in ((12, -8), (-12, -8), (12, 10), (-12, 10), (16, 1), (-16, 1))]
    inside = [p for p in places if _LEFT + width < p[0] < WIDTH - _RIGHT - width] or places
    place = max(inside, key=lambda p: min([math.dist(p, other) for other in taken if other != (px, py)] or [0.0]))
    taken.append(place)
    return f'<text class="mark" x="{place[0]:.1f}" y="{place[1] + 4:.1f}" text-anchor="middle">{number}</text>'


def curves(
    lines: Sequence[Line], x_name: str, y_name: str, *, log_x: bool = False, log_y: bool = False, step: bool = False
) -> Markup:
    """Curves over a common axis; their legend stands outside the picture."""
    x = Scale.over((v for line in lines for v in line.x), log_x)
    y = Scale.over((v for line in lines for v in line.y), log_y)
    parts = [_frame(x, y, x_name, y_name)]
    for line in lines:
        places = [
            (_px(x, a), _py(y, b))
            for a, b in zip(line.x, line.y, strict=True)
            if math.isfinite(a) and math.isfinite(b) and (a > 0 or not log_x) and (b > 0 or not log_y)
        ]
        if not places:
            continue
        to = "".join(f"H{px}V{py}" if step else f"L{px},{py}" for px, py in places[1:])
        colour = f' style="stroke:{line.colour}"' if line.colour else ""
        parts.append(
            f'<path class="line {line.classes}" data-name="{escape(line.name)}"{colour} '
            f'd="M{places[0][0]},{places[0][1]}{to}"><title>{escape(line.name)}</title></path>'
        )
    return _svg(f"{y_name} against {x_name}", parts)


def interval(low: float | None, middle: float, high: float | None, scale: Scale, margin: float | None) -> Markup:
    """A difference and its interval beside 0 and the margin, for a line of a table."""
    width, height = 140, 18

    def at(value: float) -> str:
        return f"{min(max(scale(value), 0.0), 1.0) * (width - 8) + 4:.1f}"

    parts = []
    if margin is not None:
        left, right = float(at(-margin)), float(at(margin))
        parts.append(f'<rect class="margin" x="{left}" y="0" width="{max(right - left, 0.5):.1f}" height="{height}"/>')
    parts.append(f'<path class="zero" d="M{at(0.0)},0V{height}"/>')
    if low is not None and high is not None:
        parts.append(f'<path class="bar" d="M{at(low)},9H{at(high)}"/>')
    parts.append(f'<circle class="dot" cx="{at(middle)}" cy="9" r="3.5"/>')
    return Markup(
        f'<svg class="interval" viewBox="0 0 {width} {height}" width="{width}" height="{height}" aria-hidden="true">'
        f"{''.join(parts)}</svg>"
    )


def stacked(parts: Sequence[tuple[str, float]], most: float) -> Markup:
    """A bar of parts, as long as its sum is of `most`."""
    x, found = 0.0, []
    for number, (name, value) in enumerate(parts):
        width = 400 * value / most if most else 0.0
        found.append(
            f'<rect class="p{number % COLOURS}" x="{x:.2f}" y="0" width="{width:.2f}" height="14">'
            f"<title>{escape(name)}: {_written(value)}</title></rect>"
        )
        x += width
    return Markup(
        f'<svg class="stack" viewBox="0 0 400 14" preserveAspectRatio="none" aria-hidden="true">{"".join(found)}</svg>'
    )


def _px(scale: Scale, value: float) -> float:
    return round(_LEFT + scale(value) * (WIDTH - _LEFT - _RIGHT), 1)


def _py(scale: Scale, value: float) -> float:
    return round(HEIGHT - _BOTTOM - scale(value) * (HEIGHT - _TOP - _BOTTOM), 1)


def _frame(x: Scale, y: Scale, x_name: str, y_name: str) -> str:
    """Axes, their ticks and names."""
    bottom, right = HEIGHT - _BOTTOM, WIDTH - _RIGHT
    parts = [f'<path class="axis" d="M{_LEFT},{_TOP}V{bottom}H{right}"/>']
    last = -math.inf
    for value, text in x.ticks():
        px, half = _px(x, value), _LETTER * len(text) / 2
        if px - half > last + 6:
            last = px + half
            parts.append(f'<path class="grid" d="M{px},{_TOP}V{bottom}"/>')
            parts.append(f'<text x="{min(px, WIDTH - half)}" y="{bottom + 16}" text-anchor="middle">{text}</text>')
    for value, text in y.ticks():
        py = _py(y, value)
        parts.append(f'<path class="grid" d="M{_LEFT},{py}H{right}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{py + 4}" text-anchor="end">{text}</text>')
    middle = (_TOP + bottom) / 2
    parts.append(
        f'<text class="name" x="{(_LEFT + right) / 2}" y="{HEIGHT - 8}" text-anchor="middle">{escape(x_name)}</text>'
    )
    parts.append(
        f'<text class="name" x="12" y="{middle}" text-anchor="middle" transform="rotate(-90 12 {middle})">'
        f"{escape(y_name)}</text>"
    )
    return "".join(parts)


def _svg(title: str, parts: Sequence[str]) -> Markup:
    return Markup(
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img"><title>{escape(title)}</title>'
        f"{''.join(parts)}</svg>"
    )
