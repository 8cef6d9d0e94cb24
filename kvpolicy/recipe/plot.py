"""A picture of one recipe: which tier holds each position as decoding goes on."""

from __future__ import annotations

from pathlib import Path
from textwrap import fill
from typing import Any

from kvpolicy.errors import RecipeError
from kvpolicy.interfaces.component import in_brief
from kvpolicy.interfaces.policy import RankPolicy
from kvpolicy.recipe.spec import Recipe, Tier
from kvpolicy.words import in_line

MAX_TOKENS = 4096
_EXACT = ["#08306b", "#2979b9", "#6baed6", "#9ecae1", "#c6dbef", "#deebf7"]
"""From the newest tier down."""
_QUANTIZED = ["#fdae6b", "#e6701a", "#a63603", "#6b2203"]
"""From the lowest tier up."""
_DROPPED, _UNSEEN = "#e4e4e4", "#ffffff"


def describe_store(store: Any) -> str:
    """`full`, `evict`, or kind and options that differ from their defaults."""
    if isinstance(store, str):
        return store
    default = {name: field.default for name, field in type(store).model_fields.items()}
    shown = [f"{n}={in_brief(value)}" for n, value in store if n in ("nbits", "per") or value != default[n]]
    return f"{store.kind}({', '.join(item for item in shown if not item.startswith('kind='))})"


def describe_tier(tier: Tier) -> str:
    """A tier on one line."""
    policy = "" if tier.policy is None else f"{describe_policy(tier.policy)}: "
    if tier.keys == tier.values:
        return policy + describe_store(tier.keys)
    return f"{policy}keys {describe_store(tier.keys)}, values {describe_store(tier.values)}"


def describe_policy(policy: Any) -> str:
    """Kind and options; where there are many of these the budget and those that differ from their defaults."""
    default = {name: field.default for name, field in type(policy).model_fields.items() if name != "kind"}
    shown = [(n, v) for n, v in policy if n in default and (len(default) <= 4 or n == "budget" or v != default[n])]
    return f"{policy.kind}({', '.join(f'{name}={value}' for name, value in shown)})"


def _colours(tiers: tuple[Tier, ...]) -> list[str]:
    """Exact tiers blue, dark to light; those of which keys or values are quantized orange; dropped tokens grey."""
    exact = [i for i, tier in enumerate(tiers) if tier.keys == tier.values == "full"]
    quantized = [i for i, tier in enumerate(tiers) if i not in exact and tier.keys != "evict"][::-1]
    colours = [_DROPPED] * len(tiers)
    for members, palette in ((exact, _EXACT), (quantized, _QUANTIZED)):
        for rank, i in enumerate(members):
            colours[i] = palette[min(rank, len(palette) - 1)]
    return colours


def asks_for_prompt(recipe: Recipe) -> bool:
    """Whether it matters to a policy where the prompt ends."""
    return any(tier.policy is not None and tier.policy._prompted for tier in recipe.tiers)


def _title(recipe: Recipe, prompt: int) -> str:
    fed = f"\n(the first {prompt} tokens are the prompt)" if asks_for_prompt(recipe) else ""
    if any(isinstance(tier.policy, RankPolicy) for tier in recipe.tiers):
        fed = "\n(the newest tokens stand in for those chosen by attention)"
    return fill(f"{recipe.name[:160]}: the tier that holds each position", 60) + fed


def _label(number: int, tier: Tier) -> str:
    return fill(f"{number}  {describe_tier(tier)}", 92, subsequent_indent="    ")


def plot_placement(recipe: Recipe, tokens: int, path: str | Path) -> Path:
    """Draw which tier holds each position while `tokens` tokens come one by one.

    Where it matters to a policy, the first quarter of them is the prompt.

    Args:
        recipe: the recipe; layers with tiers of their own are not drawn.
        tokens: how many.
        path: where the picture goes; its ending says the format.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    from kvpolicy.placement.simulate import history

    if not 1 <= tokens <= MAX_TOKENS:
        raise RecipeError(f"tokens must lie between 1 and {MAX_TOKENS} for a picture, found {tokens}")
    target = Path(path)
    supported = sorted(FigureCanvasAgg.get_supported_filetypes())
    if target.suffix.lstrip(".").lower() not in supported:
        raise RecipeError(
            f"{in_line(target)}: a picture must end in one of {', '.join(supported)}, found {target.suffix!r}"
        )
    prompt = max(1, tokens // 4)
    picture = history(recipe.tiers, tokens, prompt)
    colours = _colours(recipe.tiers)
    title, labels = _title(recipe, prompt), [_label(i, tier) for i, tier in enumerate(recipe.tiers)]
    lines = title.count("\n") + sum(label.count("\n") + 1 for label in labels)
    figure = Figure(figsize=(7.5, 5.6 + 0.17 * max(0, lines - 3)), layout="constrained")
    axes = figure.add_subplot()
    cmap = ListedColormap([_UNSEEN, *colours])
    axes.imshow(
        picture + 1,
        cmap=cmap,
        vmin=0,
        vmax=len(colours),
        interpolation="nearest",
        aspect="auto",
        extent=(-0.5, tokens - 0.5, tokens + 0.5, 0.5),
    )
    axes.set_xlabel("position in the context")
    axes.set_ylabel("tokens seen")
    axes.set_title(title, parse_math=False)
    handles = [
        Patch(facecolor=colour, edgecolor="0.4", linewidth=0.5, label=label)
        for colour, label in zip(colours, labels, strict=True)
    ]
    figure.legend(handles=handles, loc="outside lower left", frameon=False, fontsize="small")
    try:
        figure.savefig(target, dpi=144)
    except OSError as error:
        raise RecipeError(f"{in_line(target)}: the picture can't be written: {error}") from error
    return target
