"""A model with large biases of keys is found out, and what is proposed rescues it."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from models import COMMON, build, bundled
from typer.testing import CliRunner

import kvpolicy
from kvpolicy.errors import PlanError


class Numbers:
    """A tokenizer: a token for each character."""

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [3 + ord(c) % 90 for c in text]}


def biased(size: float) -> Any:
    """A small Qwen2 whose keys have one channel far from zero in each head, as those of Qwen2.5 do."""
    model = build("qwen2", torch.float32, num_hidden_layers=3, head_dim=32, rope_theta=1e6)
    with torch.no_grad():
        for layer in model.model.layers[:2]:
            bias = layer.self_attn.k_proj.bias.view(COMMON["num_key_value_heads"], -1)
            bias[:, bias.shape[1] // 2 - 1] = size  # which turns most slowly
        for layer in model.model.layers:  # as sure of itself as a trained model
            for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                getattr(layer.self_attn, name).weight.mul_(6)
    return model


def test_a_model_with_large_biases_is_rescued() -> None:
    model = biased(300.0)
    found = kvpolicy.check(model, tokenizer=Numbers(), tokens=512)
    assert [layer.bias for layer in found.layers] == [300.0, 300.0, 0.0]
    assert any("k_proj has biases of up to 300 (layer 0" in warning for warning in found.warnings)
    assert any("4 bits per token collapse" in warning for warning in found.warnings)
    assert "Proposal: balanced" in found.notes()
    assert found.kl(4, "token") > 4 * found.kl(4, "channel")
    assert found.proposal == "balanced"
    assert found.proposal_kl < found.limit < found.kl(4, "token")
    assert not model.training
    # The same model without the biases has nothing to be warned of.
    plain = kvpolicy.check(biased(0.0), tokenizer=Numbers(), tokens=512)
    assert not [w for w in plain.warnings if "k_proj" in w or "collapse" in w]
    assert plain.kl(4, "token") < found.limit


def test_the_command(tmp_path: Any) -> None:
    from kvpolicy.cli.main import app

    text = tmp_path / "text.txt"
    text.write_text("import os\nimport sys\n" * 40)
    shown = CliRunner().invoke(app, ["check", "--text", str(text), "--tokens", "64", "--device", "cpu", "--json"])
    assert shown.exit_code == 0, shown.output
    told = json.loads(shown.stdout)
    assert told["tokens"] == 64
    assert not told["own_text"]
    assert len(told["layers"]) == bundled()[0].config.num_hidden_layers
    assert {(p["bits"], p["keys"]) for p in told["probes"]} == {(b, k) for b in (8, 4, 2) for k in ("token", "channel")}
    kvpolicy.load_recipe(told["proposal"])


def test_what_cannot_be_checked_is_said(tmp_path: Any) -> None:
    model = biased(0.0)
    (tmp_path / "short").write_text("x")
    bad: list[tuple[dict[str, Any], str]] = [
        ({"tokenizer": None}, "must come with its tokenizer"),
        ({"tokens": 3}, "tokens must be an integer from 32"),
        ({"limit": -1.0}, "must be a number above 0"),
        ({"text": tmp_path / "none"}, "must be a text file that can be read"),
        ({"text": tmp_path / "short"}, "at least 32 tokens, found 1"),
    ]
    for options, words in bad:
        with pytest.raises(PlanError, match=words):
            kvpolicy.check(model, **{"tokenizer": Numbers(), **options})
