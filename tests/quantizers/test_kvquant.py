"""KVQuant's parts against the formulas of its paper, written out in float64."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from kvpolicy_kvquant import Kvquant, Nuq, NuqStatic, _means

from kvpolicy.interfaces.calibrator import Watched
from kvpolicy.interfaces.site import Site
from kvpolicy.storage.make import make_store

HEADS, DIM, TOKENS = 2, 8, 41


def _cost(x: Any, w: Any, levels: Any) -> float:
    return float((w * (x[:, None] - np.asarray(levels, dtype=np.float64)).__pow__(2).min(1)).sum())


def test_levels_are_the_best_k_means() -> None:
    generator = np.random.default_rng(1)
    x, w = np.sort(generator.normal(size=11).clip(-2, 2) / 2), generator.random(11)
    levels = _means(w, w * x)[2]
    best = min(
        _cost(x, w, [np.average(x[a:b], weights=w[a:b]) for a, b in itertools.pairwise([0, *cuts, 11])])
        for cuts in itertools.combinations(range(1, 11), 3)
    )
    assert abs(_cost(x, w, levels) - best) < 1e-9 + 1e-5 * best
    x, w = generator.normal(size=900).clip(-3, 3) / 3, generator.random(900)
    for nbits, found in _means(w, w * x).items():
        levels = found.astype(np.float64)
        cell = np.abs(x[:, None] - levels).argmin(1)  # Lloyd's conditions: each level is the mean of its cell
        means = [np.average(x[cell == i], weights=w[cell == i]) for i in range(2**nbits)]
        np.testing.assert_allclose(levels, means, atol=1e-6)
        even = np.linspace(x.min(), x.max(), 2**nbits)
        assert _cost(x, w, levels) < _cost(x, w, even)
    few = _means(np.array([0.0, 1.0, 0.0, 2.0]), np.array([0.0, 0.5, 0.0, -1.0]))
    assert (few[4][1:] > few[4][:-1]).all()
    assert {-0.5, 0.5} <= set(few[2].tolist())
    assert len(_means(np.zeros(4), np.zeros(4))[4]) == 16


def _samples() -> list[Watched]:
    found = []
    for seed in range(3):
        keys, values, bare, g, h, i = torch.randn(
            6, 1, HEADS, TOKENS, DIM, generator=torch.Generator().manual_seed(seed)
        )
        gradients = {"keys": g, "values": h, "unrotated": i}
        site = Site(0, 1, "keys", HEADS, DIM)
        # Channels of other widths, and of other shapes, so that it matters how much each of them counts.
        keys = torch.where(torch.arange(DIM) % 2 == 0, keys, keys**3) * torch.linspace(0.5, 4, DIM) + 1
        found.append(Watched(site, 3 * TOKENS, keys, values, bare, gradients, None))
    return found


def test_ranges_are_percentiles_and_weights_those_of_the_appendix() -> None:
    calibrator, samples = Kvquant(share=0.1), _samples()
    state: dict[str, torch.Tensor] = {}
    for turn in range(2):
        for given in samples:
            state = calibrator.watch(given, state, turn)
    keys = torch.cat([given.keys[0, :, 1:] for given in samples], dim=1).double()
    found = calibrator.finish(state, samples[0].site)
    low, high = (keys.quantile(q, dim=1) for q in (0.05, 0.95))
    torch.testing.assert_close(found["keys.low"].double(), low, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found["keys.high"].double(), high, rtol=1e-5, atol=1e-5)
    # Equation 7: squared derivatives, times the square of the scale of the channel.
    half, middle = ((x.unsqueeze(1)) for x in ((high - low) / 2, (high + low) / 2))
    fisher = torch.cat([given.gradients["keys"][0, :, 1:] for given in samples], dim=1).double().square()
    y, w = (keys - middle) / half, fisher * half.square()
    within = y.abs() <= 1
    for nbits in (2, 3, 4):
        levels = found[f"keys.levels{nbits}"].numpy()
        binned = _cost(y[within].numpy(), w[within].numpy(), levels)
        cells = [y[within].numpy(), w[within].numpy()]
        start = np.quantile(cells[0], (np.arange(2**nbits) + 0.5) / 2**nbits)
        for _ in range(30):  # Lloyd's own algorithm ends in a place that is no better, but for the width of bins
            cell = np.abs(cells[0][:, None] - start).argmin(1)
            start = np.array([np.average(cells[0][cell == i], weights=cells[1][cell == i]) for i in range(len(start))])
        assert binned < _cost(*cells, start) * 1.001
        # Q-Norm: without weights, numbers decoded have the mean and the standard deviation of those coded.
        offset, scale = found[f"keys.norm{nbits}"].double().numpy()
        decoded = levels[np.abs(cells[0][:, None] - levels).argmin(1)] * scale + offset
        assert abs(decoded.mean() - cells[0].mean()) < 1e-3
        assert abs(decoded.std() / cells[0].std() - 1) < 1e-3
        assert nbits != 2 or abs(scale - 1) > 0.01
    assert torch.equal(found["values.levels3"], found["values.levels3"].sort().values)


@pytest.mark.parametrize(("nbits", "norm", "normed"), [(2, "auto", True), (2, False, False), (3, "auto", False)])
def test_numbers_are_coded_by_the_nearest_level_and_decoded_by_q_norm(nbits: int, norm: Any, normed: bool) -> None:
    levels = torch.tensor([-0.9, -0.5, -0.2, 0.0, 0.1, 0.3, 0.5, 0.7])[:: 8 >> nbits]
    fitted = {f"values.levels{nbits}": levels, f"values.norm{nbits}": torch.tensor([0.05, 1.25])}
    site = Site(0, 1, "values", HEADS, DIM, fitted=fitted)
    x = torch.randn(1, HEADS, 20, DIM, generator=torch.Generator().manual_seed(5))
    low, high = x.double().amin(3, keepdim=True), x.double().amax(3, keepdim=True)
    half, middle = (high - low) / 2, (high + low) / 2
    y = (x.double() - middle) / half
    chosen = levels.double()[(y.unsqueeze(-1) - levels.double()).abs().argmin(-1)]
    truth = chosen * 1.25 + 0.05 if normed else chosen
    coded = ((Nuq(nbits=nbits, norm=norm, group_size="head"), x, truth * half + middle),)
    for quantizer, given, expected in (*coded, (NuqStatic(nbits=nbits, norm=norm), y.float(), truth)):
        store = make_store(quantizer, DIM, site)
        assert store is not None
        store.append(given)
        (_, found), *_ = store.decoded(100, torch.float32)
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
