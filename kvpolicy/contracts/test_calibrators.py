"""What every calibrator must hold."""

from __future__ import annotations

import pytest
import torch

from kvpolicy.contracts.samples import calibrators, name_of, run_calibrator
from kvpolicy.interfaces.calibrator import Calibrator
from kvpolicy.interfaces.site import Site

CALIBRATORS = calibrators()
EVERY = pytest.mark.parametrize("calibrator", CALIBRATORS, ids=[name_of(calibrator) for calibrator in CALIBRATORS])
SITE = Site(1, 2, "keys", 2, 16)


@EVERY
def test_what_it_finds_is_named_finite_and_the_same_each_time(calibrator: Calibrator) -> None:
    found = run_calibrator(calibrator, SITE)
    assert found, "finish must give something"
    again = run_calibrator(calibrator, SITE)
    assert found.keys() == again.keys()
    assert all(torch.equal(t, again[name]) for name, t in found.items()), "the same samples must give the same"
    if "sentence" in type(calibrator).__dict__:
        assert calibrator.sentence({1: found}), "sentence must say something"


@EVERY
def test_layers_without_rope_and_equal_numbers_are_no_error(calibrator: Calibrator) -> None:
    found = run_calibrator(calibrator, SITE, unrotated=False)
    assert not any(name.startswith("unrotated.") for name in found), "what was not shown can't be found"
    run_calibrator(calibrator, SITE, constant=True)
