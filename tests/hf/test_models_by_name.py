"""Models given by their name: directories, the hub, GGUF files, and how they are loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

import kvpolicy
from kvpolicy import ModelSource
from kvpolicy.errors import CompareError, MissingDependencyError
from kvpolicy.hf import source as sources
from kvpolicy.hf.models import BUNDLED, apply_template, load_model
from kvpolicy.hf.source import check_model, is_bundled
from tests.support.gguf_files import write_gguf

VOCABULARY = 2240
"""Entries of the bundled tokenizer."""


@pytest.fixture(scope="module")
def tiny() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    heads = {"num_key_value_heads": 1, "max_position_embeddings": 512, "tie_word_embeddings": False}
    return Qwen2ForCausalLM(Qwen2Config(vocab_size=VOCABULARY, **sizes, **heads)).eval()


@pytest.fixture(scope="module")
def directory(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny.save_pretrained(path)
    return path


def test_a_gguf_file_is_the_model_that_was_written(tiny: Any, tmp_path: Path) -> None:
    file = tmp_path / "tiny.gguf"
    write_gguf(file, tiny)
    assert check_model(file) is None
    model, tokenizer = load_model(ModelSource(file, device="cpu"))
    bundled = AutoTokenizer.from_pretrained(BUNDLED)
    ids = tokenizer("import os\nprint(os)", return_tensors="pt").input_ids
    assert bundled.decode(ids[0]) == "import os\nprint(os)"
    assert model.dtype == torch.float32
    assert model.config.max_position_embeddings == 512
    with torch.inference_mode():
        torch.testing.assert_close(model(ids).logits, tiny(ids).logits)
        assert kvpolicy.make_cache("logquant", model) is not None
    with pytest.raises(CompareError, match=r"give the file tiny\.gguf"):
        check_model(tmp_path)
    file.write_bytes(file.read_bytes()[:3000])
    with pytest.raises(CompareError, match="can't be loaded"):
        load_model(file)


def test_dtype_devices_and_tokenizer(directory: Path) -> None:
    with pytest.raises(CompareError, match=r"must have a tokenizer, found none.* \(--tokenizer"):
        load_model(directory)
    source = ModelSource(directory, dtype="bfloat16", device_map="cpu", tokenizer=BUNDLED)
    model, tokenizer = load_model(source)
    assert model.dtype == torch.bfloat16
    assert tokenizer.vocab_size == VOCABULARY
    assert check_model(source) == 512
    assert is_bundled(None)
    assert is_bundled(ModelSource(dtype="float32"))
    assert not is_bundled(source)
    assert not is_bundled(model)
    with pytest.raises(CompareError, match="name one"):
        load_model(source, device="cpu")
    with pytest.raises(CompareError, match=r"must have a chat template.*--tokenizer"):
        apply_template(tokenizer, [{"role": "user", "content": "x"}])
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    assert apply_template(tokenizer, [{"role": "user", "content": "x"}], tokenize=False) == "<user>x"


def test_a_model_spread_over_devices_runs_attached(tiny: Any, directory: Path, tmp_path: Path) -> None:
    mapped = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    rest = {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    model, _ = load_model(ModelSource(directory, device_map={**mapped, **rest}, tokenizer=BUNDLED))
    ids = torch.arange(60)[None] + 7
    with torch.inference_mode():
        options = {"max_new_tokens": 8, "do_sample": False}
        with kvpolicy.attach(model, "logquant:window=6"):
            found = model.generate(ids, **options)
        with kvpolicy.attach(tiny, "logquant:window=6"):
            assert found.tolist() == tiny.generate(ids, **options).tolist()


@pytest.mark.parametrize("offline", [True, False])
def test_a_model_of_the_hub_that_can_not_be_had(offline: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "ENDPOINT", "https://hub.invalid")
    monkeypatch.setattr(sources, "getproxies", dict)
    why = "not in the hub's cache here, and the hub can't be reached"
    with pytest.raises(CompareError, match=f"model 'org/name': .*{why}"):
        check_model("org/name")
    with pytest.raises(CompareError, match=f"model 'org/name': .*{why}"):
        kvpolicy.compare(["full"], model="org/name", progress=False)
    with pytest.raises(CompareError, match=f"tokenizer 'org/name': .*{why}"):
        load_model(ModelSource(tokenizer="org/name"))


def test_a_model_of_the_hub_is_loaded_from_its_cache(
    directory: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As the hub's client lays it out."""
    from huggingface_hub import constants

    snapshot = tmp_path / "models--org--name" / "snapshots" / "0123abcd"
    snapshot.parent.mkdir(parents=True)
    snapshot.symlink_to(directory)
    (tmp_path / "models--org--name" / "refs").mkdir()
    (tmp_path / "models--org--name" / "refs" / "v2").write_text("0123abcd")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    source = ModelSource("org/name", revision="v2", tokenizer=BUNDLED)
    assert check_model(source) == 512
    assert load_model(source)[0].config.hidden_size == 32
    with pytest.raises(CompareError, match="org/name"):
        check_model(ModelSource("org/name", revision="v3"))


def test_packages_that_a_model_needs_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(sources, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'kvpolicy\[gguf\]'"):
        check_model(tmp_path / "x.gguf")
    with pytest.raises(MissingDependencyError, match=r"pip install 'kvpolicy\[device-map\]'"):
        check_model(ModelSource(device_map="auto"))
    with pytest.raises(CompareError, match="such as"):
        check_model(ModelSource(device="cuda:x"))
