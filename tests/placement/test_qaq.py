"""QAQ: values in as many bits as attention asks for, against the paper's formulas in float64."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

import pytest
import torch
from kvpolicy_qaq import Qaq
from layers import HEAD_DIM, Layer, random_tokens
from models import ids, tiny
from torch import Tensor
from words import CACHE

from kvpolicy import Scorer, attach, load_recipe, make_cache
from kvpolicy.errors import PluginError
from kvpolicy.interfaces.scorer import Given
from kvpolicy.interfaces.scores import Scores
from kvpolicy.interfaces.site import Site


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield


def bits(values: Tensor, attention: Tensor, tokens: int, error: float) -> Tensor:
    """Before rounding up: sigma of a value, then the bits whose parts of the range are off by no more."""
    sigma = error / (math.sqrt(tokens) * attention.double())
    return torch.log2((values.amax(-1) - values.amin(-1)).double() / (2 * math.sqrt(3) * sigma))


def needed(values: Tensor, attention: Tensor, tokens: int, error: float) -> Tensor:
    """What the scorer says."""
    scorer = Qaq(error=error)
    noted = scorer.score(Given(values=values), Site())
    positions = torch.arange(tokens).expand(attention.shape)
    return scorer.again(noted, Given(attention=attention, positions=positions, ages=tokens - positions), Site())


def test_scores_are_the_bits_of_the_paper() -> None:
    values = torch.randn(2, 3, 40, 16, generator=torch.Generator().manual_seed(0))
    attention = torch.rand(2, 3, 40, generator=torch.Generator().manual_seed(1))
    found = needed(values, attention, 40, 0.3)
    torch.testing.assert_close(found.double(), bits(values, attention, 40, 0.3), rtol=0, atol=1e-5)
    torch.testing.assert_close(needed(values, attention / 2, 40, 0.3), found - 1)
    torch.testing.assert_close(needed(values, attention, 40, 0.6), found - 1)
    torch.testing.assert_close(needed(values * 2, attention, 40, 0.3), found + 1)


def test_the_error_of_outputs_is_what_was_asked_for() -> None:
    generator = torch.Generator().manual_seed(3)
    values = torch.rand(1, 1, 200, 512, generator=generator) * 4
    attention = torch.rand(1, 1, 200, generator=generator).pow(4)
    attention /= attention.sum()
    error = 0.01
    width = needed(values, attention, 200, error).ceil().clamp(min=1)[0, 0]
    assert 1 < float(width.max()) < 9
    low, parts = values.amin(3, keepdim=True), 2 ** width[:, None]
    step = (values.amax(3, keepdim=True) - low) / parts
    middles = ((values - low) / step).floor().clamp(max=parts - 1).add(0.5) * step + low
    off = (attention[..., None] * (middles - values)).sum(2).double()
    assert 0.2 * error < off.std() < error


TIERS = 5


def tier_of(layer: Layer, seen: int) -> Tensor:
    tiers = torch.full((seen,), -1)
    for tier, held in enumerate(layer.held()[0][0]):
        tiers[held] = tier
    return tiers


def test_tokens_descend_once_by_the_bits_that_they_need() -> None:
    error, window, prompt, steps = 0.05, 4, 120, 60
    query, keys, values = random_tokens(prompt + steps, 2, heads=2, kv_heads=1)
    values[:, :, ::7] *= 8
    layer = Layer("qaq", heads=2, kv_heads=1, error=error, period=1)
    before = torch.zeros(prompt, dtype=torch.int64)
    met, each = 0, torch.zeros(TIERS, dtype=torch.int64)
    for first, last in [(0, prompt), *((t, t + 1) for t in range(prompt, prompt + steps))]:
        held = layer.cache.dense(0)[0] if first else keys[:, :, :0]
        layer(*(x[:, :, first:last] for x in (query, keys, values)))
        tiers = tier_of(layer, last)
        shown = torch.cat([held, keys[:, :, first:last]], dim=2).double()
        scores = (query[:, :, last - 1 : last].double() @ shown.transpose(2, 3)) * HEAD_DIM**-0.5
        asked = bits(values[0, 0, :last], scores.softmax(-1)[0, :, 0].amax(0), last, error)
        by_bits = 1 + sum((asked < threshold).long() for threshold in (4, 2, 1))
        old = torch.arange(last) < last - window
        before = torch.cat([before, torch.zeros(last - len(before), dtype=torch.int64)])
        expected = torch.where(old, torch.where(before > 0, before, by_bits), 0)
        clear = torch.stack([(asked - threshold).abs() > 1e-3 for threshold in (4, 2, 1)]).all(0)
        assert torch.equal(tiers[clear], expected[clear])
        met += int(clear.sum())
        before, each = tiers, each + torch.bincount(tiers, minlength=TIERS)
    assert met > 0.98 * sum(range(prompt, prompt + steps + 1))
    assert (each > steps).all(), f"tiers must all be used, found {each.tolist()}"


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_of_a_padded_batch_are_placed_as_if_alone(side: str) -> None:
    prompt, pad, steps = 70, 23, 40
    query, keys, values = random_tokens(prompt + steps, 5, batch=2)
    real = torch.ones(2, prompt, dtype=torch.long)
    real[1, slice(0, pad) if side == "left" else slice(prompt - pad, prompt)] = 0
    batch, alone = (Layer("qaq", error=0.05, period=8) for _ in range(2))
    own = [*real[1].nonzero()[:, 0].tolist(), *range(prompt, prompt + steps)]
    outs = []
    for first, last in [(0, prompt), *((t, t + 1) for t in range(prompt, prompt + steps))]:
        mask = real if first == 0 else torch.ones(2, 1, dtype=torch.long)
        out = batch(*(x[:, :, first:last] for x in (query, keys, values)), mask)[1:]
        mine = [t for t in own if first <= t < last]
        expected = alone(*(x[1:, :, mine] for x in (query, keys, values)))
        outs.append((out[:, [t - first for t in mine]], expected))
    for found, expected in outs:
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    for found, expected in zip(batch.held()[1], alone.held()[0], strict=True):
        assert [[own.index(t) for t in tier] for tier in found] == expected


def test_stores_are_those_of_the_recipe() -> None:
    recipe = load_recipe("qaq")
    assert [getattr(tier.values, "nbits", 16) for tier in recipe.tiers] == [16, 8, 4, 2, 1]
    assert len({repr(tier.keys) for tier in recipe.tiers[1:]}) == 1
    with attach(tiny("llama")):
        cache = make_cache("qaq", tiny("llama"), error=0.02)
        tiny("llama")(ids(128), **{CACHE: cache})
        tiny("llama")(ids(1), **{CACHE: cache})
        stores = cache.layers[0].tiers.stores
        assert sum(store is not None for store in stores["keys"]) == 2


class Wrong(Scorer):
    """Gives one token too few the second time."""

    kind: Literal["wrong"] = "wrong"
    needs: ClassVar[frozenset[str]] = frozenset({"keys", "attention"})

    def scores(self) -> Scores:
        return Scores()

    def score(self, given: Given, site: Site) -> Tensor:
        return given.keys.float().norm(dim=-1)

    def again(self, noted: Tensor, given: Given, site: Site) -> Tensor:
        return noted[..., 1:]


def test_what_is_scored_again_is_checked() -> None:
    policy = load_recipe("qaq").tiers[1].policy.model_copy(update={"scorer": Wrong()})
    layer = Layer({"tiers": [{"policy": policy, "store": "full"}, {"store": {"kind": "int"}}]}, heads=2, kv_heads=1)
    with pytest.raises(PluginError, match="scorer 'wrong': again must return a float tensor"):
        layer(*random_tokens(64, 0, heads=2, kv_heads=1))
