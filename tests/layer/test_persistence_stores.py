"""What is saved of stores whose tensors only their quantizer understands."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from kvpolicy.interfaces.quantizer import TensorQuantizer
from kvpolicy.layer.saving.file import Damaged, Held
from kvpolicy.layer.saving.stores import fill_stores, save_stores
from kvpolicy.storage.make import make_store


class Book(TensorQuantizer):
    """A code book of two entries for each channel: what it keeps may be no index."""

    kind: Literal["book"] = "book"

    def encode(self, x: Tensor) -> dict[str, Tensor]:
        return {"index": (x > 0).long(), "scale": x.abs().mean(3, keepdim=True)}

    def decode(self, encoded: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
        signs = torch.tensor([-1.0, 1.0])
        return (signs[encoded["index"]] * encoded["scale"]).to(dtype)


def layer(tokens: int) -> Any:
    """A layer as far as its stores need one, which must hold so many tokens."""
    stores = {side: [make_store(Book(), 8)] for side in ("keys", "values")}
    like = {side: torch.zeros(2, 3, 0, 8) for side in stores}
    placement = SimpleNamespace(store_spec=lambda side, s: Book())
    planner = SimpleNamespace(length=lambda side, s: tokens)
    return SimpleNamespace(stores=stores, like=like, placement=placement, planner=planner)


def held() -> dict[str, Tensor]:
    tiers, tensors = layer(5), {}
    for stores in tiers.stores.values():
        stores[0].append(torch.randn(2, 3, 5, 8, generator=torch.Generator().manual_seed(0)))
    save_stores(tiers, 0, tensors)
    return {name: x for name, x in tensors.items() if not name.endswith("like")}


def test_they_come_back() -> None:
    tiers, tensors = layer(5), held()
    fill_stores(tiers, 0, Held(tensors), torch.device("cpu"))
    _, x = next(tiers.stores["keys"][0].decoded(9, torch.float32))
    index, scale = tensors["0.keys.0.index"], tensors["0.keys.0.scale"]
    assert torch.equal(x, torch.where(index > 0, scale, -scale))


CHANGES: dict[str, Any] = {
    "must be of the same tokens": lambda t: {k: x for k, x in t.items() if not k.endswith("scale")},
    "must hold 5 tokens, found 4": lambda t: {k: x[:, :, :4] for k, x in t.items()},
    "must hold 5 tokens, found 0": lambda t: {},
    r"same tokens, found .* of \[4, 5\]": lambda t: {k: x[:, :, :4] if "scale" in k else x for k, x in t.items()},
    "index must be .* in torch.int64, found .* in torch.int32": lambda t: {k: x.int() for k, x in t.items()},
    r"scale must be \(2, 3\) of tokens of \(1,\)": lambda t: {k: x.expand(2, 3, 5, 8) for k, x in t.items()},
    r"index must be \(2, 3\) of tokens": lambda t: {k: x[:1] for k, x in t.items()},
    "quantizer 'book' can't decode it: IndexError": lambda t: {k: x + 2 for k, x in t.items()},
    "its tensors must be .*, found more": lambda t: {**t, "0.keys.0.more": t["0.keys.0.index"]},
}


@pytest.mark.parametrize("told", CHANGES)
def test_what_the_quantizer_could_not_read_is_refused(told: str) -> None:
    changed = {name: x.contiguous() for name, x in CHANGES[told](held()).items()}
    with pytest.raises(Damaged, match=f"layer 0, keys, store 0: .*{told}"):
        fill_stores(layer(5), 0, Held(changed), torch.device("cpu"))
