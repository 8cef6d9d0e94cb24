"""The bundled model: what ships, and that it retrieves, computes and models code offline."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import kvpolicy
from kvpolicy.tasks.lines import KEYS, VALUES
from kvpolicy.tasks.load import load_task
from kvpolicy.tasks.sample import Sample
from kvpolicy.tasks.scorers import score

DIRECTORY = Path(kvpolicy.__file__).parent / "model"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(DIRECTORY, local_files_only=True)


@pytest.fixture(scope="module")
def model() -> Iterator[Any]:
    loaded = AutoModelForCausalLM.from_pretrained(DIRECTORY, local_files_only=True)
    with torch.inference_mode():
        yield loaded.eval()


def scores(model: Any, tokenizer: Any, samples: list[Sample]) -> list[float]:
    """Scores of greedy decoding with the exact cache."""
    result = []
    for sample in samples:
        ids = tokenizer(sample.prompt, return_tensors="pt").input_ids
        new = len(tokenizer(sample.answer).input_ids)
        output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False)
        text = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
        result.append(score(sample, text))
    return result


def test_weights_are_small_safetensors_of_a_grouped_query_llama() -> None:
    names = {file.name for file in DIRECTORY.iterdir()}
    assert names == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert (DIRECTORY / "model.safetensors").stat().st_size <= 16 * 2**20
    config = json.loads((DIRECTORY / "config.json").read_text(encoding="utf-8"))
    assert config["model_type"] == "llama"
    assert config["head_dim"] == 64
    assert config["num_key_value_heads"] < config["num_attention_heads"]
    assert config["max_position_embeddings"] >= 2048
    weights = load_file(DIRECTORY / "model.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())


def test_model_loads_as_float32(model: Any) -> None:
    assert model.dtype == torch.float32
    assert sum(tensor.numel() for tensor in model.parameters()) < 6_000_000


@pytest.mark.parametrize("task", ["lines", "arithmetic", "code"])
def test_prompt_and_answer_are_tokenized_as_their_concatenation(tokenizer: Any, task: str) -> None:
    for sample in load_task(task, 3, seed=0, tokens=512):
        text = sample.prompt + sample.answer
        ids = tokenizer(text).input_ids
        assert ids == tokenizer(sample.prompt).input_ids + tokenizer(sample.answer).input_ids
        assert tokenizer.decode(ids) == text


def test_keys_and_values_are_single_tokens(tokenizer: Any) -> None:
    texts = [f"<k{key}>" for key in (0, KEYS - 1)]
    texts += [f" <v{value}>" for value in (0, VALUES - 1)]
    assert all(len(tokenizer(text).input_ids) == 1 for text in texts)
    for length in (256, 1024, 2000):
        (sample,) = load_task("lines", 1, 0, length)
        assert abs(len(tokenizer(sample.prompt + sample.answer).input_ids) - length) <= 8


def test_at_least_95_percent_of_the_lines_are_retrieved_at_1024_tokens(model: Any, tokenizer: Any) -> None:
    found = scores(model, tokenizer, load_task("lines", 15, 1000, 1024))
    assert sum(found) / len(found) >= 0.95


def test_lines_are_retrieved_near_the_longest_context(model: Any, tokenizer: Any) -> None:
    found = scores(model, tokenizer, load_task("lines", 4, 1000, 2000))
    assert sum(found) / len(found) >= 0.85


def test_chained_arithmetic_is_answered(model: Any, tokenizer: Any) -> None:
    found = scores(model, tokenizer, load_task("arithmetic", 6, 1000, 512))
    assert sum(found) / len(found) >= 0.9


def test_perplexity_of_held_out_code_is_that_of_a_small_language_model(model: Any, tokenizer: Any) -> None:
    total, count = 0.0, 0
    for sample in load_task("code", 12, 1000, 1024):
        ids = tokenizer(sample.prompt + sample.answer, return_tensors="pt").input_ids[:, :2048]
        total += float(model(ids, labels=ids).loss) * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    assert 3 < math.exp(total / count) < 15
