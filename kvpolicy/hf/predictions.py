"""How far predictions through one cache are from those through another."""

from __future__ import annotations

import torch
from torch import Tensor


def divergence(exact: Tensor, other: Tensor) -> list[float]:
    """KL(exact || other) in nats, of each step: log-probabilities `[..., vocabulary]`."""
    terms = torch.where(exact > -torch.inf, exact.exp() * (exact - other), 0.0)
    found: list[float] = terms.sum(-1).clamp(min=0).tolist()
    return found
