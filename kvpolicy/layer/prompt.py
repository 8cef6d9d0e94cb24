"""A prompt's tokens let into the tiers of several layers: those that stand alike plan as one, and code in one go."""

from __future__ import annotations

from collections.abc import Sequence

from kvpolicy.layer.commit import advance
from kvpolicy.layer.layer import MAX_PENDING, LayerCache

__all__ = ["AT_ONCE", "LATE", "hold_all"]

LATE: tuple[str, ...] = ("cuda",)
"""Devices that work while the host plans."""
AT_ONCE = 4
"""Layers that let a prompt's tokens in together there. Until then their keys and values are kept as they came."""


def hold_all(layers: Sequence[LayerCache]) -> None:
    """Let the tokens of `stage` in, of each layer; as `LayerCache.hold` one by one, in fewer calls of a device."""
    whole = [layer for layer in layers if _enters_whole(layer)]
    for layer in layers:
        if layer in whole:
            layer.decoded, layer.pending, layer.staged = {}, layer.staged, {}
        else:
            layer.hold()
    advance([[layer] for layer in whole])


def _enters_whole(layer: LayerCache) -> bool:
    """Whether all staged tokens go to the tiers as they are, and ask nothing of other layers."""
    placement = layer.placement
    return (
        bool(layer.staged)
        and layer.staged["keys"].shape[2] > MAX_PENDING
        and placement.ranks
        and not placement.shared
        and placement.merger is None
        and layer.told is None
        and all(layer.staged[side].dtype == like.dtype for side, like in layer.like.items())
    )
