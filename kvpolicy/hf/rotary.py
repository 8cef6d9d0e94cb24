"""A model's own rotary embedding, as a function of positions."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor

from kvpolicy.errors import CacheError
from kvpolicy.hf.fingerprint import blocks_of
from kvpolicy.interfaces.rotation import pairs, rotate

__all__ = ["ModelRotary", "rotaries"]

MOVING = ("dynamic", "longrope")
"""Embeddings whose frequencies depend on how much text was seen."""
ONLY_WINDOWS = ("cohere2", "exaone4", "exaone_moe", "flint", "kolibri1")
"""How the names of models begin that rotate in their sliding-window layers only, if they have such."""
Layout: TypeAlias = tuple[Callable[[Tensor], Tensor], bool]
"""How the cos that a module gives are spread over channels, and whether neighbours are rotated together."""
LAYOUTS: tuple[Layout, ...] = (
    (lambda x: x, False),
    (lambda x: x, True),
    (lambda x: x[..., : x.shape[-1] // 2].repeat_interleave(2, dim=-1), True),
    (lambda x: torch.cat([x, x], dim=-1), False),
    (lambda x: x.repeat_interleave(2, dim=-1), True),
)
_layouts: WeakKeyDictionary[torch.nn.Module, dict[str | None, Layout | None]] = WeakKeyDictionary()


class ModelRotary:
    """Positions to cos and sin, by the module of a model. It doesn't keep the model alive, and is copied as it is."""

    def __init__(self, module: Any, layer_type: str | None, layout: Layout) -> None:
        self._module = ref(module)
        self._layer_type = layer_type
        self._spread, self.interleaved = layout

    def __call__(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin of positions `[batch or 1, tokens]`: float32 `[batch or 1, tokens, rotated channels]`.

        Raises:
            CacheError: the model is gone.
        """
        module = self._module()
        if module is None:
            raise CacheError("a transform must ask the model for its rotary embedding, and the model is gone; keep it")
        cos, sin = map(self._spread, _asked(module, self._layer_type, positions))
        return cos, sin

    def __deepcopy__(self, memo: dict[int, Any]) -> ModelRotary:
        return self

    def __reduce__(self) -> tuple[Any, tuple[()]]:
        return _gone, ()


def _gone() -> None:
    """What a rotary embedding is once it was pickled: unknown."""
    return


def _asked(module: Any, layer_type: str | None, positions: Tensor) -> tuple[Tensor, Tensor]:
    own = {} if layer_type is None else {"layer_type": layer_type}
    like = torch.empty(0, dtype=torch.float32, device=positions.device)
    with torch.no_grad():
        cos, sin = module(like, positions, **own)
    return cos.to(positions.device), sin.to(positions.device)


def rotaries(model: Any, layers: int) -> list[ModelRotary | None]:
    """The rotary embedding of each layer of a model; None where it is not a function of the position alone."""
    none: list[ModelRotary | None] = [None] * layers
    if not isinstance(model, torch.nn.Module):
        return none
    config: Any = model.config
    text = config.get_text_config(decoder=True)
    modules = (m for name, m in model.named_modules() if name.rpartition(".")[2] == "rotary_emb")
    module = next((m for m in modules if getattr(m, "config", None) in (text, config)), None)
    several = "mrope_section" in str(getattr(text, "rope_parameters", ""))  # positions of a token
    if module is None or several or getattr(text, "qk_nope_head_dim", None):  # or rotated channels that come last
        return none
    types = getattr(text, "layer_types", None) or none
    by_type = "layer_type" in inspect.signature(module.forward).parameters
    rotated = _rotated(model, text, layers)
    return [_of_layer(module, str(types[i]) if by_type else None) if rotated[i] else None for i in range(layers)]


def _rotated(model: Any, text: Any, layers: int) -> list[bool]:
    """Whether each layer that is no sliding-window layer rotates its keys at all."""
    listed = getattr(text, "no_rope_layers", None) or [True] * layers
    windows = getattr(text, "sliding_window", None) is not None
    if str(getattr(text, "model_type", "")).startswith(ONLY_WINDOWS) and windows:
        listed = [False] * layers
    blocks = blocks_of(model, layers) or ()
    told = [all(getattr(m, "use_rope", True) for m in block.modules()) for block in blocks] or [True] * layers
    return [bool(listed[i]) and told[i] for i in range(layers)]


def _of_layer(module: torch.nn.Module, layer_type: str | None) -> ModelRotary | None:
    kind = getattr(module, "rope_type", None)
    kind = kind.get(layer_type) if isinstance(kind, dict) else kind
    if kind is None or kind in MOVING:
        return None
    layouts = _layouts.setdefault(module, {})
    if layer_type not in layouts:
        layouts[layer_type] = _layout(module, layer_type)
    layout = layouts[layer_type]
    return None if layout is None else ModelRotary(module, layer_type, layout)


def _layout(module: torch.nn.Module, layer_type: str | None) -> Layout | None:
    """How the model rotates; None: in some other way.

    That is asked of the function by which the model's own code applies cos and sin.
    """
    apply = getattr(sys.modules.get(type(module).__module__), "apply_rotary_pos_emb", None)
    if apply is None:
        return None
    for layout in LAYOUTS:
        try:
            given = _asked(module, layer_type, torch.tensor([[1]]))
            cos, sin = map(layout[0], given)
            x = torch.eye(cos.shape[-1]).unsqueeze(1).unsqueeze(1)  # each channel alone
            _, found = apply(x, x, *given)
            partners, signs = pairs(cos.shape[-1], layout[1])
            angles = torch.atan2(sin, cos).view(1, 1, 1, -1) * signs
            factor = (cos.square() + sin.square()).sqrt()[..., :1].unsqueeze(0)
            own = {"frequencies": angles, "partners": partners, "factor": factor}
            if found.shape == x.shape and torch.allclose(rotate(x, own, torch.ones(1, 1, 1)), found, atol=1e-5):
                return layout
        except Exception:  # whatever the code of a model does with arguments that it doesn't expect
            continue
    return None
