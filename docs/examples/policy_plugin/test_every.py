"""Tests of the plugin: what it promises, and the contract that every policy must hold.

pip install . pytest
pytest
"""

import subprocess
import sys

import numpy as np

import kvpolicy
from kvpolicy.placement.simulate import simulate

RECIPE = {
    "name": "every-fourth",
    "tiers": [
        {"policy": {"kind": "recent", "window": 16}, "store": "full"},
        {"policy": {"kind": "every", "n": 4}, "store": "full"},
        {"store": {"kind": "int", "nbits": 2}},
    ],
}


def test_it_keeps_the_positions_divisible_by_n() -> None:
    policy = kvpolicy.load_recipe(RECIPE).tiers[1].policy
    assert policy.keep(np.arange(9), seen=9).tolist() == [True, False, False, False] * 2 + [True]


def test_a_recipe_holds_every_fourth_token_before_its_window() -> None:
    recent, fourth, others = simulate(kvpolicy.load_recipe(RECIPE).tiers, tokens=40)
    assert recent.tolist() == list(range(24, 40))
    assert fourth.tolist() == list(range(0, 24, 4))
    assert others.tolist() == [i for i in range(24) if i % 4]


def test_it_holds_the_contract() -> None:
    """kvpolicy's own suite, over this plugin: masks, purity, descent, any chunking the same placement."""
    suite = [sys.executable, "-m", "pytest", "--pyargs", "kvpolicy.contracts", "-q", "-k", "every"]
    done = subprocess.run(suite, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
