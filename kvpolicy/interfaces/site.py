"""Where a store stands: what a transform, a quantizer or an extra may know of its place in the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from kvpolicy.errors import RecipeError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Rotary", "Site"]

Rotary = Callable[["Tensor"], "tuple[Tensor, Tensor]"]
"""Positions `[batch or 1, tokens]` to cos and sin, float32 `[batch or 1, tokens, rotated channels]`. The entry of a
channel is that by which it is rotated; the first channels of a head are."""


@dataclass(frozen=True)
class Site:
    """The layer and the side that a store belongs to. Not all is known everywhere: defaults say what is assumed."""

    layer: int = 0
    """Index of the layer in the model."""
    layers: int = 1
    """Layers of the model."""
    side: Literal["keys", "values"] = "keys"
    """What the store holds."""
    kv_heads: int = 1
    """Heads of keys and values."""
    head_dim: int = 64
    """Channels of a head, on this side."""
    rotary: Rotary | None = None
    """The model's own rotary embedding, positions to cos and sin. None where it is unknown: the cache was made from a
    config, the model has none that is a function of the position alone, or the model is gone."""
    interleaved: bool = False
    """Whether neighbouring channels are rotated together, rather than those of the two halves."""
    fitted: Mapping[str, Tensor] = field(default_factory=dict)
    """This layer's part of a calibration; empty where there is none."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Site:
        return self  # nothing of it changes, and copies of caches share what was calibrated

    def calibrated(self, name: str, shape: tuple[int, ...] | None = None, unrotated: bool = False) -> Tensor:
        """A tensor of the calibration that the recipe names, for this layer and side.

        Args:
            name: what the calibrator calls it, without `keys.` or `values.`.
            shape: what it must have; by default it isn't looked at.
            unrotated: of keys, that of keys before RoPE.

        Raises:
            RecipeError: there is none, or it has another shape.
        """
        whole = f"{'unrotated' if unrotated and self.side == 'keys' else self.side}.{name}"
        found = self.fitted.get(whole)
        if found is None:
            held = f"one that holds {', '.join(sorted(self.fitted))}" if self.fitted else "none"
            raise RecipeError(
                f"it takes a calibration that holds {whole}, found {held}; make one by kvpolicy calibrate METHOD "
                "--model DIR --text FILE --out CALIBRATION, and name it in the recipe, calibration: CALIBRATION"
            )
        if (shape is not None and tuple(found.shape) != shape) or not found.isfinite().all():
            raise RecipeError(
                f"{whole} of a calibration must be finite numbers {shape or ''}, found {tuple(found.shape)}; make one "
                "for this model by kvpolicy calibrate"
            )
        return found
