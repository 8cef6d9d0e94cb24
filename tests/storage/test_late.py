"""Rows of a padded batch that bring no token at first."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kvpolicy_hadamard import Hadamard
from kvpolicy_int import Int
from kvpolicy_lloyd_max import SplitLloydMax
from kvpolicy_scale import Scale
from kvpolicy_sketch import Sketch
from kvpolicy_unit import Unit
from layers import HEAD_DIM, random_tokens

from kvpolicy.storage.make import make_store


@pytest.mark.parametrize(
    "quantizer",
    [
        SplitLloydMax(seed=3),
        SplitLloydMax(nbits=1, wide_bits=4, transforms=(Hadamard(seed=1),), extras=(Sketch(),)),
        Int(nbits=4, group_size=8, transforms=(Scale(), Unit())),
    ],
    ids=["split", "behind", "transforms"],
)
def test_a_row_whose_tokens_come_late_is_coded_as_if_alone(quantizer: Any) -> None:
    """Of a padded batch, in which places without a token are zeros."""
    x = random_tokens(60, 4)[1].repeat(3, 1, 1, 1) * torch.arange(1, 4).view(3, 1, 1, 1)
    x[..., 3] *= 9 - torch.arange(3).view(3, 1, 1) * 4
    starts, whole = (0, 13, 41), x.clone()
    for row, start in enumerate(starts):
        x[row, :, :start] = 0
    store: Any = make_store(quantizer, HEAD_DIM)
    store.differ_by_head((3, 1))
    for part in x.tensor_split([10, 20, 50], dim=2):
        store.append(part)
    found = store.gather(torch.arange(60).expand(3, 1, -1), torch.float32)
    for row, start in enumerate(starts):
        alone: Any = make_store(quantizer, HEAD_DIM)
        cuts = [n - start for n in (10, 20, 50) if n > start]
        for part in whole[row : row + 1, :, start:].tensor_split(cuts, dim=2):
            alone.append(part)
        expected = torch.cat([part for _, part in alone.decoded(64, torch.float32)], 2)
        assert torch.equal(found[row, :, start:], expected[0])
