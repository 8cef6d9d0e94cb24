"""The same on a GPU, where there is one: caches, attached models, padded batches, policies by attention."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from layers import Layer, random_tokens
from models import ids, llama, tiny
from recipes import BY_POSITION, DISTINCT
from words import CACHE

from kvpolicy import CompressedCache, attach, load_recipe, make_cache

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore"),
]
DEVICE = "cuda"


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield


MOST_BITS = {"turboquant-2.5": 2}
"""By recipe, where it is not 8."""


def options(name: str) -> dict[str, Any]:
    return {"kivi": {"group_size": 16}, "kivi-sink": {"group_size": 16}, "adakv": {"capacity": 60}}.get(name, {})


@pytest.mark.parametrize("padded", [False, True], ids=["even", "padded"])
@pytest.mark.parametrize("name", [*(name for name in DISTINCT if name != "full"), "adakv", "best-3bit"])
def test_a_layer_attends_and_holds_what_it_does_on_a_cpu(name: str, padded: bool) -> None:
    query, keys, values = random_tokens(330, 3, batch=2)
    real = torch.ones(2, 330, dtype=torch.bool)
    real[1, :77] = not padded
    # In 8 bits, since rounding may put a code on the other side of a boundary.
    given = {k: MOST_BITS.get(name, 8) for k in ("nbits", "high", "low") if k in load_recipe(name).params}
    here, there = (Layer(name, **options(name), **given) for _ in range(2))
    for first, last in [(0, 150), (150, 250), *((i, i + 1) for i in range(250, 330))]:
        now = slice(first, last)
        parts = [x[:, :, now] for x in (query, keys, values)]
        expected = here(*parts, real[:, now] if padded else None)
        found = there(*(x.to(DEVICE) for x in parts), real[:, now] if padded else None)
        torch.testing.assert_close(found.cpu(), expected, rtol=2e-2, atol=2e-2)
    assert there.held() == here.held()
    a, b = there.cache.memory(), here.cache.memory()
    assert a.values == b.values
    # A GPU is not asked at each step which arrivals have lost all their tokens: gear keeps their bases a while longer.
    assert a.bytes == b.bytes or (name.startswith("gear") and b.bytes < a.bytes < 1.05 * b.bytes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", BY_POSITION)
def test_attached_and_unattached_agree(name: str, dtype: torch.dtype) -> None:
    model = copy.deepcopy(tiny("llama", dtype)).to(DEVICE)
    tokens = ids(200, batch=2).to(DEVICE)
    logits = []
    for attached in (False, True):
        cache = make_cache(name, model, **options(name))
        handle = attach(model) if attached else None
        steps = [(0, 150), *((i, i + 1) for i in range(150, 200))]
        found = [model(tokens[:, a:b], **{CACHE: cache}).logits[:, -1] for a, b in steps]
        logits.append(torch.stack(found).float())
        if handle is not None:
            handle.detach()
    limit = 1e-4 if dtype == torch.float32 else 32 * torch.finfo(dtype).eps
    assert (logits[0] - logits[1]).abs().max() <= limit * logits[0].abs().max()
    model.to("cpu")


@pytest.mark.parametrize("name", ["logquant", "h2o", "zipcache", "streaming-llm"])
def test_padded_generation_saving_and_beams(name: str, tmp_path: Path) -> None:
    model = copy.deepcopy(tiny("llama")).to(DEVICE)
    tokens, mask = ids(150, batch=2).to(DEVICE), torch.ones(2, 150, dtype=torch.long, device=DEVICE)
    mask[1, :60] = 0
    with attach(model):
        cache = make_cache(name, model)
        found = model.generate(tokens, attention_mask=mask, **{CACHE: cache}, max_new_tokens=40, do_sample=False)
        cache.save(tmp_path / "cache")
        loaded = CompressedCache.load(tmp_path / "cache", model)
        step = found[:, -1:]
        a, b = (model(step, **{CACHE: c}).logits for c in (loaded, cache))
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
        beams = make_cache(name, model)
        model.generate(tokens, attention_mask=mask, **{CACHE: beams}, max_new_tokens=20, num_beams=3)
    model.to("cpu")


@pytest.mark.parametrize("padded", [False, True], ids=["even", "padded"])
@pytest.mark.parametrize("name", DISTINCT)
def test_a_decode_step_waits_for_nothing(name: str, padded: bool) -> None:
    model = copy.deepcopy(tiny("llama", torch.bfloat16)).to(DEVICE)
    mask = torch.ones(2, 200, dtype=torch.long, device=DEVICE)
    mask[1, :60] = not padded
    tokens = ids(300, batch=2).to(DEVICE)
    with attach(model):
        cache = make_cache(name, model, **options(name))
        model(tokens[:, :200], attention_mask=mask, **{CACHE: cache})
        for t in range(200, 210):
            model(tokens[:, t : t + 1], **{CACHE: cache})
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for t in range(210, 300):
                model(tokens[:, t : t + 1], **{CACHE: cache})
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert cache.get_seq_length() == 300


@pytest.mark.parametrize("name", ["h2o", "snapkv", "zipcache"])
def test_sums_of_flash_attention_are_those_of_the_kernel(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt's output is the same to the bit whoever sums up its attention."""
    from kvpolicy.hf import flash
    from kvpolicy.placement.attention_scores import Observer

    torch.backends.cuda.enable_cudnn_sdp(False)
    model, prompt = copy.deepcopy(llama(64, 4, 2, torch.bfloat16)).to(DEVICE), ids(400, batch=2).to(DEVICE)
    told: list[torch.Tensor] = []
    taken: list[bool] = []
    logits = []
    asked, add = flash._is_flash, Observer.add_sums
    monkeypatch.setattr(Observer, "add_sums", lambda self, k, *x: (told.append(x[0].clone()), add(self, k, *x))[1])
    for known in (True, False):
        monkeypatch.setattr(
            flash, "_is_flash", lambda *x, known=known: taken.append(asked(*x)) or (known and taken[-1])
        )
        with attach(model):
            logits.append(model(prompt, **{CACHE: make_cache(name, model)}).logits)
    assert all(taken)
    assert torch.equal(*logits)
    assert told
    for x, y in zip(told[: len(told) // 2], told[len(told) // 2 :], strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["h2o", "snapkv"])
def test_heads_that_flash_attention_would_fill_up(name: str) -> None:
    torch.backends.cuda.enable_cudnn_sdp(False)
    model = copy.deepcopy(llama(100, 4, 2, torch.bfloat16)).to(DEVICE)
    with attach(model):
        assert model(ids(200).to(DEVICE), **{CACHE: make_cache(name, model)}).logits.isfinite().all()
