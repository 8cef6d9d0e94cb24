"""Saved caches know their model, and are written whole or not at all."""

from __future__ import annotations

import copy
import gc
import json
import pickle
import resource
import signal
import stat
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from models import FAMILIES, build, ids, tiny
from safetensors import safe_open
from saved import rewritten
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from words import CACHE

from kvpolicy import CompressedCache, make_cache
from kvpolicy.errors import CacheError
from kvpolicy.hf.fingerprint import differences, fingerprint_of

OTHERS = "must be loaded for the model that made it, found another one"


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield


def filled(model: PreTrainedModel, given: Any = None) -> CompressedCache:
    cache = make_cache("logquant:window=10", model if given is None else given)
    model(ids(60), **{CACHE: cache})
    return cache


def like(model: PreTrainedModel, **changes: Any) -> PreTrainedModel:
    """A model of the same weights, its config changed."""
    config = copy.deepcopy(model.config)
    for name, value in changes.items():
        setattr(config, name, value)
    other = AutoModelForCausalLM.from_config(config).to(model.dtype).eval()
    other.load_state_dict(model.state_dict())
    return other


def saved(file: Path) -> dict[str, Any]:
    with safe_open(file, "pt") as opened:
        return json.loads(opened.metadata()["model"])


@pytest.fixture
def file(tmp_path: Path) -> Path:
    filled(tiny("llama")).save(tmp_path / "cache")
    return tmp_path / "cache"


def test_a_model_of_other_weights_is_refused_unless_told_otherwise(file: Path) -> None:
    other = copy.deepcopy(tiny("llama"))
    for weight in other.parameters():
        weight.mul_(1.25)
    with pytest.raises(CacheError, match=rf"{OTHERS}: its weights are others \([\w.]+ and \d+ more\)\. Use that model"):
        CompressedCache.load(file, other)
    loaded = CompressedCache.load(file, other, any_model=True)
    expected = CompressedCache.load(file, tiny("llama"))
    assert all(torch.equal(a, b) for a, b in zip(loaded.dense(1), expected.dense(1), strict=True))


@pytest.mark.parametrize("name", ["embed_tokens", "layers.0.self_attn.k_proj", "layers.1.mlp.down_proj", "norm"])
def test_one_changed_weight_is_noticed_and_named(name: str, file: Path) -> None:
    other = copy.deepcopy(tiny("llama"))
    other.model.get_submodule(name).weight.view(-1)[-1] += 1
    with pytest.raises(CacheError, match=rf"its weights are others \({name}\.weight\)"):
        CompressedCache.load(file, other)


ROPE: list[dict[str, Any]] = [
    {"rope_type": "default", "rope_theta": 500000.0},
    {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
]


@pytest.mark.parametrize("rope", ROPE, ids=lambda r: r["rope_type"])
def test_a_model_of_other_rope_is_refused(rope: dict[str, Any], file: Path) -> None:
    other = like(tiny("llama"), rope_parameters=rope)
    for given in (other, other.config):
        with pytest.raises(CacheError, match=rf"{OTHERS}: .*rope_parameters\.\w+ is .* in the file and .* in this mod"):
            CompressedCache.load(file, given)
    assert CompressedCache.load(file, other, any_model=True).get_seq_length() == 60


def test_what_decides_nothing_of_keys_and_values_is_not_compared(file: Path) -> None:
    changes = {"use_cache": False, "attention_dropout": 0.5, "eos_token_id": 7, "max_position_embeddings": 8192}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert CompressedCache.load(file, like(tiny("llama"), **changes)).get_seq_length() == 60
        assert CompressedCache.load(file, tiny("llama").model).get_seq_length() == 60


def test_of_a_config_the_weights_can_not_be_compared(file: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert CompressedCache.load(file, tiny("llama").config).get_seq_length() == 60
    with pytest.raises(CacheError, match=rf"{OTHERS}: rms_norm_eps is 1e-06 in the file and 0.1 in this model"):
        CompressedCache.load(file, like(tiny("llama"), rms_norm_eps=0.1).config)


def test_another_type_that_holds_the_same_numbers_is_the_same_model(tmp_path: Path) -> None:
    half = build("llama", torch.bfloat16, **FAMILIES["llama"])
    single = copy.deepcopy(half).float()
    assert not differences(fingerprint_of(half), fingerprint_of(single), True)
    filled(single).save(tmp_path / "cache")
    with pytest.raises(CacheError, match=r"computes in torch.bfloat16; use model.to\(torch.float32\)"):
        CompressedCache.load(tmp_path / "cache", half)
    assert CompressedCache.load(tmp_path / "cache", half.to(torch.float32)).get_seq_length() == 60
    rounded = copy.deepcopy(tiny("llama")).to(torch.bfloat16).float()
    with pytest.raises(CacheError, match="its weights are others"):
        CompressedCache.load(tmp_path / "cache", rounded)


def test_a_cache_made_from_a_config_says_that_its_weights_are_unknown(tmp_path: Path) -> None:
    model = tiny("llama")
    filled(model, model.config).save(tmp_path / "cache")
    assert saved(tmp_path / "cache")["weights"] is None
    with pytest.warns(UserWarning, match="says nothing of the model's weights.*made from a config"):
        CompressedCache.load(tmp_path / "cache", model)
    with pytest.raises(CacheError, match="rope_theta"):
        CompressedCache.load(tmp_path / "cache", like(model, rope_parameters=ROPE[0]))


def test_a_file_of_the_first_version_is_read_with_a_warning(file: Path) -> None:
    def older(header: dict[str, str]) -> dict[str, str]:
        return {k: v for k, v in {**header, "format_version": "1"}.items() if k != "model"}

    rewritten(file, header=older)
    with pytest.warns(UserWarning, match=r"kvpolicy 0\.1 wrote it"):
        loaded = CompressedCache.load(file, tiny("llama"))
    loaded.save(file)
    assert saved(file)["weights"] is None
    with pytest.raises(CacheError, match="must say which model made it"):
        CompressedCache.load(
            rewritten(file, header=lambda h: {k: v for k, v in h.items() if k != "model"}), tiny("llama")
        )


def test_a_loaded_cache_stays_that_of_its_model_until_it_is_reset(file: Path) -> None:
    other = like(tiny("llama"), rope_parameters=ROPE[0])
    cache = CompressedCache.load(file, other, any_model=True)
    cache.save(file)
    assert CompressedCache.load(file, tiny("llama")).get_seq_length() == 60
    with pytest.raises(CacheError, match=OTHERS):
        CompressedCache.load(file, other)
    cache.reset()
    other(ids(20), **{CACHE: cache})
    cache.save(file)
    assert CompressedCache.load(file, other).get_seq_length() == 20


def test_another_release_of_transformers_may_say_more(file: Path) -> None:
    def changed(header: dict[str, str]) -> dict[str, str]:
        model, versions = json.loads(header["model"]), json.loads(header["versions"])
        model["config"]["of_old"] = 1
        model["weights"]["renamed.weight"] = model["weights"].pop("norm.weight")
        versions["transformers"] = release
        return {**header, "model": json.dumps(model), "versions": json.dumps(versions)}

    content, release = file.read_bytes(), "5.17.1"
    assert CompressedCache.load(rewritten(file, header=changed), tiny("llama")).get_seq_length() == 60
    file.write_bytes(content)
    release = transformers.__version__
    with pytest.raises(CacheError, match=r"of_old is 1 in the file and not set in this model; its weights are others"):
        CompressedCache.load(rewritten(file, header=changed), tiny("llama"))


def test_the_model_is_not_kept_alive_and_caches_can_be_copied(tmp_path: Path) -> None:
    model = copy.deepcopy(tiny("llama"))
    cache = filled(model)
    copied, unpickled = copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))
    copied.save(tmp_path / "cache")
    assert saved(tmp_path / "cache")["weights"]
    unpickled.save(tmp_path / "cache")
    assert saved(tmp_path / "cache")["weights"] is None
    del model
    gc.collect()
    cache.save(tmp_path / "cache")
    assert saved(tmp_path / "cache")["weights"] is None
    assert saved(tmp_path / "cache")["config"]["hidden_size"] == 64


def test_weights_are_found_where_they_are_offloaded_to() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = copy.deepcopy(tiny("llama"))
    before = fingerprint_of(model)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert next(model.model.layers[0].parameters()).device.type == "meta"
    assert fingerprint_of(model) == before
    assert before.weights
    assert None not in before.weights.values()


def test_few_blocks_of_many_are_looked_at_and_views_are_read_as_they_are() -> None:
    model = build("llama", torch.float32, **{**FAMILIES["llama"], "num_hidden_layers": 30})
    weights = fingerprint_of(model).weights or {}
    looked = sorted({int(name.split(".")[1]) for name in weights if name.startswith("layers.")})
    assert looked == [0, 4, 8, 12, 17, 21, 25, 29]
    changed = model.model.layers[29].self_attn.v_proj
    changed.weight = nn.Parameter(changed.weight.t().contiguous().t())
    assert fingerprint_of(model).weights == weights
    model.model.layers[3].to("meta")
    assert fingerprint_of(model).weights == weights
    model.model.layers[4].to("meta")
    unknown = fingerprint_of(model)
    assert [name for name, value in (unknown.weights or {}).items() if value is None]
    assert not differences(fingerprint_of(model), unknown, True)


def test_layers_of_unequal_length_are_not_saved(tmp_path: Path) -> None:
    cache = filled(tiny("llama"))
    cache.layers[1].crop(-1)
    with pytest.raises(CacheError, match=r"must hold the same tokens.*\[60, 59\]"):
        cache.save(tmp_path / "cache")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [OSError("No space left on device"), KeyboardInterrupt(), MemoryError()], ids=repr)
@pytest.mark.parametrize("old", [True, False])
@pytest.mark.parametrize("at", ["save_file", "fsync", "replace"])
def test_an_interrupted_save_leaves_the_old_file_or_none(
    at: str, old: bool, error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, cache = tmp_path / "cache", filled(tiny("llama"))
    if old:
        file.write_bytes(b"old")

    def fails(first: Any, second: Any = None, **more: Any) -> None:
        if at == "save_file":
            Path(second).write_bytes(b"half a fi")
        raise error

    monkeypatch.setattr("safetensors.torch.save_file" if at == "save_file" else f"os.{at}", fails)
    with pytest.raises(CacheError if isinstance(error, OSError) else type(error)):
        cache.save(file)
    assert [p.name for p in tmp_path.iterdir()] == (["cache"] if old else [])
    assert not old or file.read_bytes() == b"old"


def test_a_full_disk(tmp_path: Path) -> None:
    file, cache = tmp_path / "cache", filled(tiny("llama"))
    cache.save(file)
    before, limits = file.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
        with pytest.raises(CacheError, match="could not be written to"):
            cache.save(file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]


def test_a_link_stays_a_link_and_modes_stay(tmp_path: Path) -> None:
    cache, link, file = filled(tiny("llama")), tmp_path / "link", tmp_path / "file"
    link.symlink_to(file)
    cache.save(link)
    file.chmod(0o640)
    cache.save(str(link))
    assert link.is_symlink()
    assert stat.S_IMODE(file.stat().st_mode) == 0o640
    assert CompressedCache.load(str(link), tiny("llama")).get_seq_length() == 60


@pytest.mark.parametrize("path", [None, 3, b"cache", "", "a\0b", "x" * 300, "/", "/dev/null", "none/cache"])
def test_paths_that_are_none(path: Any) -> None:
    with pytest.raises(CacheError):
        filled(tiny("llama")).save(path)
    with pytest.raises(CacheError):
        CompressedCache.load(path, tiny("llama"))


class _Payload:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(3)}, tmp_path / "torch")
    (tmp_path / "pickle").write_bytes(pickle.dumps(_Payload(tmp_path / "done")))
    for name in ("torch", "pickle"):
        with pytest.raises(CacheError, match=r"must be a cache written by CompressedCache\.save"):
            CompressedCache.load(tmp_path / name, tiny("llama"))
    assert not (tmp_path / "done").exists()


class _Adapted(nn.Module):
    """A layer with adapters, as PEFT keeps them."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = layer
        self.lora_A = nn.ModuleDict({name: nn.Linear(64, 4) for name in ("one", "two")})
        self.active_adapters, self.disable_adapters = ["one"], False


def test_of_adapters_those_count_that_compute() -> None:
    model, seen = copy.deepcopy(tiny("llama")), []
    model.peft_config = {"one": None, "two": None}
    attention = model.model.layers[0].self_attn
    attention.q_proj = adapted = _Adapted(attention.q_proj)
    for active, disabled in ((["one"], False), (["two"], False), (["one"], True)):
        adapted.active_adapters, adapted.disable_adapters = active, disabled
        seen.append(fingerprint_of(model))
    assert all(differences(seen[0], other, True) for other in seen[1:])
    assert not differences(seen[2], fingerprint_of(tiny("llama")), True)
    adapted.active_adapters, adapted.disable_adapters = ["one"], False
    adapted.lora_A["two"].weight += 1
    assert fingerprint_of(model) == seen[0]
