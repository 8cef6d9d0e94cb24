"""What every calibrator must hold."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvpolicy.contracts.samples import calibrators, name_of, tensor
from kvpolicy.interfaces.calibrator import Calibrator, Watched
from kvpolicy.interfaces.checks import finished, watched
from kvpolicy.interfaces.site import Site

CALIBRATORS = calibrators()
EVERY = pytest.mark.parametrize("calibrator", CALIBRATORS, ids=[name_of(calibrator) for calibrator in CALIBRATORS])
HEADS, TOKENS, DIM, SAMPLES = 2, 64, 16, 3


def _given(seed: int, needs: frozenset[str], unrotated: bool = True, constant: bool = False) -> Watched:
    shape = (1, HEADS, TOKENS, DIM)
    keys, values, bare = (tensor(shape, torch.float32, 10 * seed + i) * (not constant) for i in range(3))
    sides = {"keys": keys, "values": values, **({"unrotated": bare} if unrotated else {})}
    gradients = {n: tensor(shape, torch.float32, seed + 100) * 1e-3 for n in sides} if "gradients" in needs else {}
    attention = torch.rand(8, TOKENS).tril(TOKENS - 8) if "attention" in needs else None
    if attention is not None:
        attention = attention / attention.sum(1, keepdim=True)
    site = Site(1, 2, "keys", HEADS, DIM)
    return Watched(site, SAMPLES * TOKENS, keys, values, bare if unrotated else None, gradients, attention)


def _run(calibrator: Calibrator, **options: bool) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    torch.manual_seed(0)
    for turn, needs in enumerate(type(calibrator).turns):
        for sample in range(SAMPLES):
            given = _given(sample, needs, **options)
            # As a file gives it back, after an interruption.
            state = watched(calibrator, given, {name: t.clone() for name, t in state.items()}, turn)
    return finished(calibrator, state, Site(1, 2, "keys", HEADS, DIM))


@EVERY
def test_what_it_finds_is_named_finite_and_the_same_each_time(calibrator: Calibrator) -> None:
    found = _run(calibrator)
    assert found, "finish must give something"
    again = _run(calibrator)
    assert found.keys() == again.keys()
    assert all(torch.equal(t, again[name]) for name, t in found.items()), "the same samples must give the same"
    if "sentence" in type(calibrator).__dict__:
        assert calibrator.sentence({1: found}), "sentence must say something"


@EVERY
def test_layers_without_rope_and_equal_numbers_are_no_error(calibrator: Calibrator) -> None:
    found = _run(calibrator, unrotated=False)
    assert not any(name.startswith("unrotated.") for name in found), "what was not shown can't be found"
    _run(calibrator, constant=True)
