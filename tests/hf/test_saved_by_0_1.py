"""A cache that version 0.1.0 saved is still read.

tests/golden/saved-by-0.1.0.safetensors was written with kvpolicy 0.1.0 and transformers 5.17.0: updates of 60, 1 and 7
tokens of `numbers` in a cache of CONFIG with the tiers recent (window 8, flush 8), log (budget 8), and keys in 4 bits
per channel in groups of 16, values in 2 bits per token.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import LlamaConfig, LlamaForCausalLM

import kvpolicy
from kvpolicy.placement.simulate import simulate
from tests.support.saved import rewritten

FILE = Path(__file__).parents[1] / "golden" / "saved-by-0.1.0.safetensors"
CONFIG = LlamaConfig(
    hidden_size=64,
    intermediate_size=64,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=32,
    vocab_size=128,
)
TOKENS = 68


def numbers(factor: int) -> torch.Tensor:
    """Of keys (7919) or values (6007): multiples of 1/128 in [-504/128, 504/128], exact in float32."""
    return ((torch.arange(2 * TOKENS * 32).view(2, 1, TOKENS, 32) * factor) % 1009 - 504) / 128


def test_the_file_is_of_the_first_version() -> None:
    with safe_open(FILE, "pt") as file:
        header = file.metadata()
    assert header["format_version"] == "1"
    assert json.loads(header["versions"])["kvpolicy"] == "0.1.0"


def test_it_is_read_with_a_warning_and_goes_on(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"kvpolicy 0\.1 wrote it"):
        cache = kvpolicy.CompressedCache.load(FILE, LlamaForCausalLM(CONFIG))
    assert cache.get_seq_length() == TOKENS
    held = cache.positions(0)
    places = dict(zip(held.positions.tolist(), held.tiers.tolist(), strict=True))
    tiers = simulate(cache.recipe.tiers, TOKENS)
    assert places == {int(p): tier for tier, positions in enumerate(tiers) for p in positions}
    exact = torch.tensor([places[position] < 2 for position in range(TOKENS)])
    assert 0 < exact.sum() < TOKENS / 2
    # Half a step of the codes: the widest range of a group is 1008 / 128.
    for found, given, levels in zip(cache.dense(0), (numbers(7919), numbers(6007)), (15, 3), strict=True):
        assert torch.equal(found[:, :, exact], given[:, :, exact])
        assert (found - given).abs().max() <= 1008 / 128 / levels / 2 + 1e-4
    new = torch.ones(2, 1, 40, 32)
    keys, _ = cache.update(new, new, 0)
    assert torch.equal(keys[:, :, TOKENS:], new)
    cache.save(tmp_path / "again.safetensors")
    with safe_open(tmp_path / "again.safetensors", "pt") as file:
        assert file.metadata()["format_version"] != "1"


def test_a_cache_of_a_recipe_that_is_gone_is_refused_by_name(tmp_path: Path) -> None:
    """0.1 had `placement: update`: such a cache has other tokens in its tiers than today's recipe of that name."""
    old = "placement: update\n"

    def header(texts: dict[str, str]) -> dict[str, str]:
        return {**texts, "recipe": texts["recipe"].replace("tiers:", f"{old}tiers:", 1)}

    copied = tmp_path / "copy.safetensors"
    copied.write_bytes(FILE.read_bytes())
    with pytest.raises(kvpolicy.errors.CacheError, match="can't be used here") as raised:
        kvpolicy.CompressedCache.load(rewritten(copied, header=header), LlamaForCausalLM(CONFIG))
    assert "placement must be removed" in str(raised.value)
    assert "kind: residual" in str(raised.value)
