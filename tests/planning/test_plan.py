"""Plans: what fits, what is read, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from models import COMMON, build, ids
from transformers import AutoConfig, AutoModelForCausalLM
from typer.testing import CliRunner
from words import CACHE

import kvpolicy
from kvpolicy.errors import CacheError, KvpolicyError, PlanError
from kvpolicy.hf import passes
from kvpolicy.hf.cache import make_cache
from kvpolicy.planning import sooner
from kvpolicy.planning.dry_run import DryRun
from kvpolicy.planning.plain import plain_shape
from kvpolicy.planning.read import read_shape
from kvpolicy.planning.transformers_shape import shape_from
from kvpolicy.recipe.load import load_recipe

LLAMA_8B: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "dtype": "bfloat16",
}


@pytest.mark.parametrize(
    ("recipe", "first", "later", "queries"),
    [
        ("full", False, False, False),
        ("logquant", False, True, False),
        ("h2o", True, True, False),
        ("snapkv", True, True, False),
        ("expected-attention", True, True, True),
    ],
)
def test_what_waits_until_several_layers_let_it_in_is_what_waits_in_a_cache(
    recipe: str, first: bool, later: bool, queries: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether layers keep keys and values of the first pass, and of later ones; and queries with them."""
    model = build("llama", torch.float32, num_hidden_layers=6)
    shape = read_shape(model, "float32")
    waiting = [DryRun(load_recipe(recipe), shape, 2, "cuda", True).waiting(150, first=x) for x in (True, False)]
    layer = shape.layers[0]
    each = 2 * layer.kv_heads + (layer.heads if queries else 0)
    assert waiting == [4 * 2 * 150 * each * layer.key_dim * 4 * x for x in (first, later)]
    kept: list[int] = []
    before = passes.hold_all

    def noted(layers: Any) -> None:
        kept.append(sum(x.numel() * x.element_size() for layer in layers for x in layer.staged.values()))
        before(layers)

    monkeypatch.setattr(passes, "LATE", ("cpu",))
    monkeypatch.setattr(passes, "hold_all", noted)
    cache = make_cache(recipe, model)
    found = []
    with torch.no_grad(), kvpolicy.attach(model):
        for _ in range(2):
            kept.clear()
            model(ids(150, 2), **{CACHE: cache})
            found.append(max(kept, default=0))
    assert found == waiting


def test_layers_that_let_a_prompt_in_together_are_counted() -> None:
    """On a GPU the keys and values of four layers wait, where the model is attached and the pass is a prompt's."""

    def peak(recipe: str, **more: Any) -> int:
        return kvpolicy.plan(recipe, LLAMA_8B, tokens=8192, **more)[recipe].prefill_peak

    waiting = 4 * 2 * 8 * 128 * 2
    assert peak("logquant") == peak("logquant", attach=False)
    assert peak("h2o", batch=3) - peak("h2o", batch=3, device="cpu") > 3 * 8192 * waiting // 2


def test_an_8b_model_at_131072_tokens() -> None:
    found = kvpolicy.plan(["logquant", "full"], LLAMA_8B, tokens=131072, batch=8)
    assert found.model.parameters == 8_030_261_248
    exact, small = found["full"], found["logquant"]
    assert exact.memory.exact_bytes == 2 * 2 * 8 * 8 * 128 * 32 * 131072 == 128 << 30
    # 42 to 83 recent and 42 log-spaced tokens exact; the others 2 bits, scale and offset of 16 bits for 64 numbers.
    coded = (small.memory.total("codes") * 4) // (2 * 8 * 8 * 128 * 32)
    assert 131072 - 83 - 42 <= coded <= 131072 - 42
    assert small.memory.total("scales") == small.memory.total("zeros") == small.memory.total("codes") // 8
    assert 20.0 < small.memory.bytes / 2**30 < 20.2
    weights = (8_030_261_248 - 128256 * 4096) * 2
    assert small.read == weights + small.memory.bytes
    assert small.speedup_ceiling == (weights + (128 << 30)) / small.read
    assert exact.speedup_ceiling == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize("heads", [(3, 64), (8, 128)], ids=str)
def test_our_own_recipes_keep_their_budgets_at_4096_tokens(heads: tuple[int, int]) -> None:
    kv_heads, head_dim = heads
    config = {**LLAMA_8B, "num_key_value_heads": kv_heads, "num_attention_heads": kv_heads, "head_dim": head_dim}
    budgets = {"best-2bit": 3.0, "best-3bit": 3.6, "best-4bit": 4.6}
    for generated in (1, 40, 96):
        found = kvpolicy.plan(list(budgets), config, tokens=4096, generated=generated)
        for name, most in budgets.items():
            assert found[name].memory.bits_per_value <= most, (name, generated)


@pytest.mark.parametrize(
    "options",
    [
        {"model_type": "llama", "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
        {"model_type": "llama", "num_key_value_heads": 4},
        {"model_type": "mistral", "sliding_window": None, "head_dim": 32},
        {"model_type": "qwen2", "tie_word_embeddings": True},
        {"model_type": "qwen3", "head_dim": 32, "attention_bias": True},
    ],
    ids=str,
)
def test_plain_models_are_read_as_transformers_builds_them(options: dict[str, Any]) -> None:
    given = {**COMMON, **options}
    plain = plain_shape("m", given)
    assert plain is not None
    built = AutoConfig.for_model(**given)
    asked = shape_from("m", built)
    for name in ("parameters", "read", "hidden", "widest", "vocab", "positions", "layers"):
        assert getattr(plain, name) == getattr(asked, name), name
    assert plain.parameters == sum(p.numel() for p in AutoModelForCausalLM.from_config(built).parameters())


def test_what_fits_is_the_most_that_fits() -> None:
    memory = 1 << 22
    given = {**COMMON, "model_type": "llama"}
    for recipe in ("logquant", "snapkv:capacity=64,window=8"):
        (found,) = kvpolicy.plan(recipe, given, tokens=512, memory=memory, dtype="float32").found
        rows, longest = found.largest_batch, found.longest_context
        assert rows
        assert longest
        for tokens, batch, fits in (
            (512, rows, True),
            (512, rows + 1, False),
            (longest, 1, True),
            (longest + 1, 1, False),
        ):
            (again,) = kvpolicy.plan(recipe, given, tokens=tokens, batch=batch, dtype="float32").found
            assert (again.total <= memory) == fits, (recipe, tokens, batch)


def test_layers_that_share_and_experts_are_told_apart() -> None:
    moe = AutoConfig.for_model(
        "qwen3_moe",
        **{**COMMON, "head_dim": 32, "num_experts": 4, "num_experts_per_tok": 1, "moe_intermediate_size": 16},
    )
    shape = read_shape(moe, "float32")
    assert shape.expert
    assert shape.active == 0.25
    assert shape.weights_read(1) < shape.weights_read(4) == shape.weights_read(8)


BAD: list[tuple[Any, dict[str, Any], str]] = [
    (LLAMA_8B, {"tokens": 0}, "tokens must be an integer from 1 to 4,194,304, found 0"),
    (LLAMA_8B, {"tokens": 10**12}, "tokens must be an integer"),
    (LLAMA_8B, {"batch": 10**9}, "batch must be an integer"),
    (LLAMA_8B, {"memory": "8GiB"}, "nothing fits beside them"),
    (LLAMA_8B, {"memory": "much"}, "memory must be a size such as 80GiB"),
    (LLAMA_8B, {"dtype": "int3"}, "dtype must be one of float32, float16, bfloat16"),
    ({**LLAMA_8B, "num_hidden_layers": 10**9}, {}, "num_hidden_layers of a config must be an integer from 1 to"),
    ({"model_type": "nonesuch"}, {}, "the config can't be used"),
    ({"hidden_size": 64, "architectures": ["X"]}, {}, "must name a model_type"),
    ({**COMMON, "model_type": "t5"}, {}, "decoder models"),
    (7, {}, "model must be a config.json"),
    ("/nowhere/at/all", {}, "found no directory or file"),
    ("nowhere.gguf", {}, "found no directory or file"),
    ("nobody/nothing", {}, "the hub can't be reached"),
]


@pytest.mark.parametrize(("model", "options", "words"), BAD, ids=lambda x: str(x)[:30])
def test_what_cannot_be_planned_is_said(model: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(PlanError) as caught:
        kvpolicy.plan("logquant", model, **options)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_recipe_for_other_models_is_refused() -> None:
    with pytest.raises(KvpolicyError, match="the model must have 28 layers"):
        kvpolicy.plan("kvtuner-qwen2.5-7b", LLAMA_8B)


def test_the_command(tmp_path: Path) -> None:
    from kvpolicy.cli.main import app

    config, picture = tmp_path / "config.json", tmp_path / "plan.svg"
    config.write_text(json.dumps({**COMMON, "model_type": "llama"}))
    words = ["plan", "logquant", "qaq", "--model", str(config), "--tokens", "600", "--memory", "1MiB"]
    shown = CliRunner().invoke(app, [*words, "--json", "--plot", str(picture)])
    told = json.loads(shown.stdout)
    assert [x["recipe"] for x in told["plans"]] == ["logquant", "qaq"]
    first, second = told["plans"]
    assert sum(first["cache"]["parts"].values()) == first["cache"]["bytes"]
    assert not first["cache"]["at_most"]
    assert "attention decide" in second["cache"]["at_most"][0]
    assert "memory" in picture.read_text()
    assert "exact" in picture.read_text()
    # The dtype is not named, and one row fits or not, which the status says.
    assert "names no dtype" in told["model"]["notes"][0]
    assert shown.exit_code == (2 if 0 in (first["largest_batch"], second["largest_batch"]) else 0)
    small = CliRunner().invoke(app, ["plan", "full", "--model", str(config), "--tokens", "4096", "--memory", "300KiB"])
    assert small.exit_code == 2
    assert "full: one row of 4,096 tokens does not fit into 300.0 KiB" in small.output


@pytest.mark.parametrize("recipe", ["h2o", "quest", "adakv", "qaq"])
def test_what_a_cache_refuses_of_a_model_not_attached_a_plan_refuses_too(recipe: str) -> None:
    model = build("llama", torch.float32, num_hidden_layers=3)
    with pytest.raises(CacheError) as refused, torch.inference_mode():
        model(ids(64), **{CACHE: make_cache(recipe, model)})
    with pytest.raises(CacheError) as found:
        kvpolicy.plan(recipe, model.config, tokens=64, attach=False, device="cpu")
    assert str(found.value) == str(refused.value)


def test_a_plan_begins_without_what_it_does_not_need() -> None:
    """In a new process: what torch's import leaves out, and that it is there once something asks for it."""
    code = f"""
import sys
from kvpolicy.planning.sooner import CUDA, META, import_torch
late = META, CUDA, "transformers", "scipy", "matplotlib"
import_torch()
from kvpolicy.planning.plan import plan
print(plan("logquant", {LLAMA_8B!r}, tokens=131072, batch=8)["logquant"].memory.bytes)
print([name for name in late if name in sys.modules])
from torch._meta_registrations import meta_mm
import torch
print(meta_mm is sys.modules[META].meta_mm, torch._meta_registrations.meta_mm is meta_mm)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.split("\n")[:3] == ["21577991072", "[]", "True True"], done.stdout + done.stderr


def test_a_module_that_is_held_back_is_there_once_it_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "held_back_for_once.py").write_text("found = 7\n")
    monkeypatch.syspath_prepend(tmp_path)
    with sooner._held_back("held_back_for_once", sooner._Later("held_back_for_once")):
        found = import_module("held_back_for_once")
        assert "found" not in vars(found)
        assert not hasattr(found, "__path__")
        with sooner._held_back("held_back_for_once", None):  # it is there already
            assert found.found == 7
        assert sys.modules["held_back_for_once"] is not found
    assert sys.modules.pop("held_back_for_once").found == 7
