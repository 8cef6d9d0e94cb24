"""A picture of a plan: memory against the context."""

from __future__ import annotations

from pathlib import Path

from kvpolicy.errors import PlanError
from kvpolicy.planning.result import Plan
from kvpolicy.words import in_line

__all__ = ["lengths_to", "plot_plan"]

POINTS = 10
"""Lengths of a curve."""
LEAST = 64
"""The shortest of them, where there are longer ones."""
GIB = 1 << 30


def lengths_to(tokens: int) -> list[int]:
    """Lengths from a tenth of some tokens up to all of them."""
    return sorted({max(tokens * i // POINTS, min(LEAST, tokens)) for i in range(1, POINTS + 1)})


def plot_plan(plan: Plan, path: str | Path, limit: int | None = None) -> Path:
    """Draw weights and cache of each recipe, and of the exact cache, against the context.

    Args:
        plan: with several lengths.
        path: where the picture goes; its ending says the format.
        limit: bytes of memory, drawn as a line.

    Raises:
        PlanError: the picture can't be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    weights = plan.model.weights
    names = list(dict.fromkeys(x.recipe for x in plan.found))
    exact = {x.tokens: weights + x.memory.exact_bytes for x in plan.found}
    axes.plot([*exact], [n / GIB for n in exact.values()], color="0.3", linestyle="--", label="exact cache")
    for name in names:
        own = [x for x in plan.found if x.recipe == name]
        label = f"{name} (at most)" if own[0].at_most else name
        axes.plot([x.tokens for x in own], [(weights + x.memory.reserved) / GIB for x in own], marker=".", label=label)
    axes.axhline(weights / GIB, color="0.7", linewidth=0.8, label="weights")
    if limit is not None:
        axes.axhline(limit / GIB, color="#b2182b", linewidth=1.2, label="memory")
    axes.set_xlabel("tokens in the context")
    axes.set_ylabel("GiB of weights and cache")
    axes.set_xlim(0, max(exact))
    axes.set_ylim(0)
    axes.set_title(f"{plan.model.name[:60]}, {plan.model.dtype}, batch {plan.batch}", parse_math=False)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
    axes.legend(frameon=False, fontsize="small")
    target = Path(path)
    try:
        figure.savefig(target, dpi=144)
    except (OSError, ValueError) as error:
        raise PlanError(f"{in_line(target)}: the picture can't be written: {error}") from error
    return target
