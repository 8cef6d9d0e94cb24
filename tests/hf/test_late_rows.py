"""A padded row that has no token in a store yet, as its cache is saved or rows are chosen, is fitted once some come."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import ids, tiny
from torch import Tensor
from words import CACHE

import kvpolicy

STORES: dict[str, Any] = {
    "transforms": {"kind": "int", "nbits": 2, "group_size": 16, "transforms": [{"kind": "scale"}]},
    "tensors": {"kind": "split_lloyd_max", "nbits": 2, "wide_bits": 3},
}


def last_logits(store: Any, how: str, path: Path) -> Tensor:
    """What the late row gives after 60 steps, its cache once saved, or kept alone."""
    model = tiny("llama")
    tiers = [{"policy": {"kind": "recent", "window": 24}, "store": "full"}, {"store": store}]
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[1, :30] = 0

    def step(tokens: Tensor) -> Tensor:
        places = (mask.cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        logits: Tensor = model(tokens, attention_mask=mask, position_ids=places, **{CACHE: cache}).logits
        return logits

    with torch.no_grad(), kvpolicy.attach(model):
        cache = kvpolicy.make_cache({"tiers": tiers}, model)
        step(ids(40, 2))
        cache.commit()
        if how == "saved":
            cache.save(path)
            cache = kvpolicy.CompressedCache.load(path, model)
        if how == "alone":
            cache.batch_select_indices(torch.tensor([1]))
            mask = mask[1:]
        for seed in range(60):
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            found = step(ids(1, 2, seed=seed)[-len(mask) :])
    return found[-1, -1]


@pytest.mark.parametrize("how", ["saved", "alone"])
@pytest.mark.parametrize("name", STORES)
def test_a_late_row_is_fitted_to_its_own_first_tokens(name: str, how: str, tmp_path: Path) -> None:
    expected = last_logits(STORES[name], "as it was", tmp_path / "cache")
    found = last_logits(STORES[name], how, tmp_path / "cache")
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
