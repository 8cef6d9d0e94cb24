"""The order of channels: what groups cost with it, and that attention may fold it into the query."""

from __future__ import annotations

import itertools

import torch
from kvpolicy_int import Int
from kvpolicy_reorder import Reorder

from kvpolicy.attention.products import add_values, key_scores
from kvpolicy.interfaces.site import Site
from kvpolicy.storage.make import make_store

TOKENS, DIM, GROUP = 50, 16, 4


def _numbers(shift: float) -> torch.Tensor:
    """Channels of several widths, and of several middles, in no order."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, 3, TOKENS, DIM, generator=generator)
    width = 4.0 ** (torch.arange(DIM) % 4)
    middle = shift * (torch.arange(DIM) % 4)
    return x * width + middle if not shift else x + middle


def _cost(x: torch.Tensor) -> float:
    """The sum over groups of their squared ranges, which the error of rounding goes with."""
    low, high = x.double().amin(2), x.double().amax(2)
    groups = (y.unflatten(-1, (-1, GROUP)) for y in (low, high))
    low, high = next(groups).amin(-1), next(groups).amax(-1)
    return float((high - low).square().sum())


def test_channels_that_are_alike_become_neighbours() -> None:
    for shift in (0.0, 30.0):
        x = _numbers(shift)
        state = Reorder().fit(x, None, Site())
        y = Reorder().forward(x, state, None)
        assert sorted(state["order"][1, 2].tolist()) == list(range(DIM))
        assert torch.equal(y, x.gather(3, state["order"].long().unsqueeze(2).expand(x.shape)))
        kinds = (state["order"].long() % 4).unflatten(2, (-1, GROUP))
        assert (kinds == kinds[..., :1]).all(), "each group must hold the four channels of a kind"
        best = min(_cost(x[..., list(p)]) for p in itertools.islice(itertools.permutations(range(DIM)), 0, 40000, 199))
        assert _cost(y) < best < _cost(x) * 1.01


def test_with_the_order_known_codes_and_products_are_those_of_plain_groups() -> None:
    x = _numbers(0.0)
    store, plain = (make_store(Int(nbits=2, group_size=GROUP, transforms=t), DIM) for t in ((Reorder(),), ()))
    assert store is not None
    assert plain is not None
    order = Reorder().fit(x, None, Site())["order"].long().unsqueeze(2)
    store.append(x)
    plain.append(x.gather(3, order.expand(x.shape)))
    assert torch.equal(store.parts["codes"].slice(0, TOKENS), plain.parts["codes"].slice(0, TOKENS))
    low, high = (
        f(x.double().gather(3, order.expand(x.shape)).unflatten(3, (-1, GROUP)), -1) for f in (torch.amin, torch.amax)
    )
    step = ((high - low) / 3).unsqueeze(-1)
    groups = x.double().gather(3, order.expand(x.shape)).unflatten(3, (-1, GROUP))
    truth = (((groups - low.unsqueeze(-1)) / step).round() * step + low.unsqueeze(-1)).flatten(3)
    truth = torch.empty_like(truth).scatter_(3, order.expand(x.shape), truth)
    q, p = torch.randn(2, 3, 5, DIM), torch.rand(2, 3, 5, TOKENS)
    scores, out = torch.zeros(2, 3, 5, TOKENS), torch.zeros(2, 3, 5, DIM)
    key_scores(store, q, scores, 0)
    add_values(store, p, out, 0)
    exact = q.double() @ truth.transpose(2, 3)
    torch.testing.assert_close(scores.double(), exact, rtol=1e-4, atol=1e-5 * float(exact.abs().max()))
    exact = p.double() @ truth
    torch.testing.assert_close(out.double(), exact, rtol=1e-4, atol=1e-5 * float(exact.abs().max()))
