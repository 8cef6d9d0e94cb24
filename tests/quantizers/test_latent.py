"""Principal directions and codes of several widths, against float64 formulas."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from kvpolicy.errors import KvpolicyError, RecipeError
from kvpolicy.interfaces.component import Component
from kvpolicy.interfaces.quantizer import AffineQuantizer
from kvpolicy.interfaces.site import Site
from kvpolicy.interfaces.transform import Transform
from kvpolicy.plugins import registry
from kvpolicy.storage.make import make_store

WIDTHS = [7, 6, 5, 4, 3, 3, 2, 0]
HEADS, DIM = 2, 16


def known(room: str, kind: str, **options: object) -> Component:
    made: Component = getattr(registry(), room)[kind].cls.model_validate({"kind": kind, **options}, strict=True)
    return made


def quantizer(**options: object) -> AffineQuantizer:
    made = known("quantizers", "int", **{"nbits": WIDTHS, "per": "channel", "group_size": 32, **options})
    assert isinstance(made, AffineQuantizer)
    return made


def latent() -> Transform:
    made = known("transforms", "latent")
    assert isinstance(made, Transform)
    return made


def keys(tokens: int, seed: int = 0) -> Tensor:
    """Tokens of few directions, and a mean."""
    g = torch.Generator().manual_seed(seed)
    mixed = torch.randn(2, HEADS, tokens, DIM, generator=g) * torch.logspace(1, -2, DIM)
    return mixed @ torch.randn(2, HEADS, DIM, DIM, generator=g) + 3 * torch.randn(2, HEADS, 1, DIM, generator=g)


@pytest.mark.parametrize("prompt", [5, 100])
def test_directions_are_found_once_for_a_store_and_the_inverse_in_few_calls(
    prompt: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[int] = []
    real = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda x: found.append(at) or real(x))
    store = make_store(quantizer(transforms=(latent(),)), DIM)
    assert store is not None
    x = keys(300)
    for at in (prompt, *range(prompt + 1, 301)):
        store.append(x[:, :, 0 if at == prompt else at - 1 : at])
    assert found == [max(prompt, 32)]
    state = latent().fit(x, None, Site(side="values", kv_heads=HEADS, head_dim=DIM))
    products: list[int] = []
    baddbmm = torch.baddbmm
    monkeypatch.setattr(torch, "baddbmm", lambda *given, **more: products.append(1) or baddbmm(*given, **more))
    y = latent().forward(x.double(), state, None)
    assert len(products) == 5
    assert torch.allclose(latent().inverse(y, state, None), x.double(), rtol=1e-12, atol=1e-11)


def test_channels_are_the_principal_directions() -> None:
    x = keys(200)
    transform = latent()
    state = transform.fit(x, None, Site(side="values", kv_heads=HEADS, head_dim=DIM))
    y = transform.forward(x.double(), state, None)
    assert torch.allclose(transform.inverse(y, state, None), x.double(), rtol=1e-9, atol=1e-9)
    for row in range(2):
        for head in range(HEADS):
            own = x[row, head].double().numpy()
            power = (own**2).mean(0)
            weighted = (own - own.mean(0)) * np.sqrt(power / power.mean() + 1e-3)
            covariance = weighted.T @ weighted
            covariance += 0.25 * DIM * np.eye(DIM) * np.trace(covariance) / DIM / len(own)
            values = np.linalg.eigvalsh(covariance)[::-1]
            found = y[row, head].numpy()
            moments = found.T @ found + 0.25 * DIM * np.eye(DIM) * np.trace(weighted.T @ weighted) / DIM / len(own)
            # Rounded to 8 bits, directions are off by a hundredth.
            assert np.allclose(np.diag(moments)[:4], values[:4], rtol=0.02)
            assert np.all(np.abs(found.mean(0)) < 1e-5 * np.abs(own).max())


def test_codes_have_the_width_of_their_run() -> None:
    x = keys(64)
    store = make_store(quantizer(scale_dtype="float32"), DIM)
    assert store is not None
    store.append(x)
    # Of two channels a part of any bits takes a byte: parts 3, 2, 2, 1, neighbours of 3 bits two for four channels, 1.
    assert store.bytes()["codes"] == 2 * HEADS * 64 * (3 + 2 + 2 + 1 + 2 + 1)
    out = torch.empty_like(x)
    store.write(out, 0)
    groups = x.double().unflatten(2, (2, 32))
    low, high = groups.amin(3, keepdim=True), groups.amax(3, keepdim=True)
    levels = torch.tensor([2.0**w - 1 for w in WIDTHS], dtype=torch.float64).repeat_interleave(2)
    step = (high - low) / levels.clamp(min=1)
    expected = torch.where(levels > 0, ((groups - low) / step).round() * step + low, groups.mean(3, keepdim=True))
    assert torch.allclose(out.double(), expected.flatten(2, 3), rtol=1e-4, atol=1e-4)


def test_directions_in_order_err_less_at_the_same_bits() -> None:
    x = keys(256)
    errors = []
    for options in ({"nbits": [7, 6, 5, 4, 4, 3, 3, 0], "transforms": [latent()]}, {"nbits": 4}):
        store = make_store(quantizer(**options), DIM)
        assert store is not None
        store.append(x[:, :, :100])
        store.append(x[:, :, 100:])
        out = torch.empty_like(x)
        store.write(out, 0)
        errors.append(float((out - x).square().mean()))
    assert errors[0] < errors[1] / 4


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"per": "token"}, "per: channel"),
        ({"range": "rms"}, "range: rms"),
        ({"symmetric": True}, "symmetric: true"),
        ({"nbits": [0, 0]}, "above 0"),
        ({"nbits": [4]}, "nbits"),
        ({"nbits": [9, 1]}, "nbits"),
        ({"nbits": 5}, "nbits"),
    ],
    ids=str,
)
def test_lists_that_mean_nothing_are_refused(options: dict[str, object], words: str) -> None:
    with pytest.raises((ValueError, KvpolicyError), match=words):
        quantizer(**options)


def test_a_list_must_fit_the_channels() -> None:
    with pytest.raises(RecipeError, match="as many entries as divide head_dim"):
        make_store(quantizer(nbits=[4, 3, 2]), DIM)
