"""Saved caches whose tokens differ by row or KV head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import ids, llama
from recipes import DISTINCT
from safetensors.torch import load_file
from saved import rewritten
from transformers import PreTrainedModel
from words import CACHE

from kvpolicy import CompressedCache, attach, make_cache
from kvpolicy.errors import CacheError

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield


def logits(model: PreTrainedModel, cache: CompressedCache, steps: int) -> torch.Tensor:
    return torch.stack([model(ids(1, batch=2, seed=50 + t), **{CACHE: cache}).logits for t in range(steps)])


@pytest.mark.parametrize("name", [name for name in DISTINCT if name != "full"])
def test_padded_batches_survive(name: str, tmp_path: Path) -> None:
    model = llama(64, 4, 2, torch.float32)
    mask = torch.ones(2, 150, dtype=torch.long)
    mask[1, :60] = 0
    with attach(model):
        cache = make_cache(name, model, **({"window": 20} if name in ("logquant", "balanced") else {}))
        model(ids(150, batch=2), **{CACHE: cache}, attention_mask=mask)
        model(ids(25, batch=2, seed=9), **{CACHE: cache})
        for t in range(15):
            model(ids(1, batch=2, seed=t), **{CACHE: cache})
        cache.save(tmp_path / "cache")
        loaded = CompressedCache.load(tmp_path / "cache", model)
        for a, b in zip(loaded.positions(1), cache.positions(1), strict=True):
            assert (a == b).all()
        a, b = loaded.memory(), cache.memory()
        assert (a.bytes, a.exact_bytes, a.values) == (b.bytes, b.exact_bytes, b.values)
        torch.testing.assert_close(logits(model, loaded, 40), logits(model, cache, 40), rtol=1e-3, atol=0.02)
        again = tmp_path / "again"
        loaded.save(again)
        assert CompressedCache.load(again, model).get_seq_length() == 230


@pytest.mark.parametrize(
    "entry", ["positions", "tiers", "scores", "state.rows.0.0", "state.padding", "groups", "params"]
)
def test_damaged_tables_are_found(entry: str, tmp_path: Path) -> None:
    model = llama(64, 4, 2, torch.float32)
    mask = torch.ones(2, 250, dtype=torch.long)
    mask[1, :60] = 0
    with attach(model):
        cache = make_cache("zipcache", model)
        model(ids(250, batch=2), **{CACHE: cache}, attention_mask=mask)
    file = tmp_path / "cache"
    cache.save(file)
    found = [name for name in load_file(file) if name.endswith(entry)]
    assert found

    def changed(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        x = tensors[found[0]]
        if entry == "state.rows.0.0":
            x[0] += 1
        elif entry in ("positions", "tiers", "groups"):
            x[x < 127] = 5000 if entry == "positions" else 100
        else:
            tensors[found[0]] = x[..., :-1, :].contiguous() if x.ndim == 4 else x[:, :-1].contiguous()
        return tensors

    with pytest.raises(CacheError, match="damaged"):
        CompressedCache.load(rewritten(file, changed), model)
