"""How many numbers share a scale, where a quantizer leaves that to the store."""

from __future__ import annotations

from kvpolicy.errors import RecipeError
from kvpolicy.interfaces.quantizer import AffineQuantizer, known_grouping


def group_size_of(quantizer: AffineQuantizer, head_dim: int) -> int:
    """The group size that a quantizer uses for `head_dim` channels; 0 means one group per arrival.

    Raises:
        RecipeError: the size does not fit.
    """
    size = quantizer.group_size
    if size == "head":
        return head_dim
    if size == "half":
        if head_dim % 2:
            raise RecipeError(f"group_size: half must go with an even head_dim, found {head_dim}; use auto or head")
        return head_dim // 2
    if (known := known_grouping(quantizer)) is not None:
        if known.per == "token" and head_dim % known.size:
            raise RecipeError(
                f"group_size must divide head_dim with per: token, found group_size {size} and head_dim {head_dim}; "
                f"use auto or one of {_divisors(head_dim)}"
            )
        return known.size
    if size == "arrival":
        raise RecipeError("group_size: arrival needs per: channel, found per: token; give a number or auto")
    return _best_size(quantizer.nbits, head_dim)


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _best_size(nbits: int, head_dim: int) -> int:
    """The largest divisor up to 64, or the next one if a scale and an offset of 32 bits would outweigh the codes."""
    sizes = _divisors(head_dim)
    largest = max(d for d in sizes if d <= 64)
    return next((d for d in sizes if d >= largest and d * nbits >= 64), head_dim)
