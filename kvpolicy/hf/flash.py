"""A prompt's own attention, with the sums that PyTorch's flash attention has computed anyway."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from kvpolicy.hf.modes import wants_gradients

OTHERWISE = ("dropout", "position_bias", "softcap", "s_aux")
"""Options with which attention is not plain causal attention, unless they are None or zero."""


def own_attention(
    original: Callable[..., Any],
    module: nn.Module,
    query: Tensor,
    new: tuple[Tensor, Tensor],
    mask: Tensor | None,
    args: tuple[Any, ...],
    options: dict[str, Any],
    summed: bool,
) -> tuple[Tensor, Tensor | None]:
    """What a model's own attention function gives for a prompt and, if `summed`, its sums where they cost nothing.

    Args:
        original: the attention function of the model.
        module: the attention module.
        query: `[batch, heads, queries, head_dim]`.
        new: keys and values, `[batch, kv_heads, tokens, head_dim]`.
        mask: the mask.
        args: what the model gives besides by place.
        options: what it gives by name.
        summed: whether sums are asked for.

    Returns:
        The output `[batch, queries, heads, head_dim]`; and the logarithm of the sum of the exponentials of each query,
        `[batch, heads, queries]` in float32, where PyTorch takes flash attention, which computes them, else None.
    """
    if summed and mask is None and not args and _is_flash(original, module, query, new, options):
        scale = options.get("scaling")
        found = torch.ops.aten._scaled_dot_product_flash_attention(query, *new, 0.0, True, scale=scale)
        if found[1].shape == query.shape[:3]:
            return found[0].transpose(1, 2).contiguous(), found[1]
    return original(module, query, *new, mask, *args, **options)[0], None


def _is_flash(
    original: Callable[..., Any], module: nn.Module, query: Tensor, new: tuple[Tensor, Tensor], options: dict[str, Any]
) -> bool:
    """Whether transformers asks PyTorch for causal attention and no more, and PyTorch takes flash attention for it."""
    causal, tokens = options.get("is_causal"), query.shape[2]
    if (
        original is not sdpa_attention_forward
        or not query.is_cuda
        or not (getattr(module, "is_causal", True) if causal is None else causal)
        or not 1 < tokens == new[0].shape[2]
        or query.shape[3] % 8  # PyTorch would fill channels up
        or any(isinstance(x, Tensor) or x for x in map(options.get, OTHERWISE))
        or torch.is_autocast_enabled(query.device.type)
        or wants_gradients(query, *new)
    ):
        return False
    grouped = query.shape[1] != new[0].shape[1]
    scale = options.get("scaling")
    choice = torch._fused_sdp_choice(query, *new, None, 0.0, True, scale=scale, enable_gqa=grouped)
    return bool(choice == SDPBackend.FLASH_ATTENTION.value)
