"""Calibrating a model: what is seen of it, interruptions, files and what is wrong with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy

from kvpolicy import calibrate, load_recipe, make_cache
from kvpolicy.arguments import check_calibration
from kvpolicy.errors import CalibrationError, PluginError, RecipeError
from kvpolicy.experiment.calibration import PARTIAL, Run, _tokens
from kvpolicy.experiment.observation import Observed
from kvpolicy.hf.calibration import calibration_of, read_calibration
from kvpolicy.interfaces.rotation import find_rotation, rotate
from kvpolicy.plugins import calibrator_of
from kvpolicy.recipe.load import load_yaml
from tests.support.calibrations import calibrated, calibration
from tests.support.models import bundled, exact, ids, tiny
from tests.support.words import CACHE

METHODS = ("kvquant", "skvq", "wkvquant", "log")


def texts(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text(" ".join(f"word{i} and {i * 7}" for i in range(400)))
    return file


def test_a_layer_is_shown_what_it_brings_to_its_cache_and_the_derivatives() -> None:
    model, tokens = tiny("qwen3"), ids(40)[0]
    seen = Observed(model, 40)
    with seen.ready(frozenset({"gradients"})):
        found = dict(seen.watch(tokens, frozenset({"gradients"})))
    cache = exact(model)
    with torch.no_grad():
        logits = model(tokens[None], **{CACHE: cache}).logits

    def loss(out: torch.Tensor) -> float:
        return float(cross_entropy(out[0, :-1].double(), tokens[1:]))

    for layer in (0, 1):
        torch.testing.assert_close(found[layer].keys, cache.layers[layer].keys)
        torch.testing.assert_close(found[layer].values, cache.layers[layer].values)
    assert all(p.grad is None for p in model.parameters())
    # Along a direction, against the difference of losses; what is moved is moved where attention reads it.
    for side, name in (("keys", "key_states"), ("values", "value_states")):
        direction = torch.randn(found[1].keys.shape, generator=torch.Generator().manual_seed(3))
        moved = [loss(_logits(model, tokens, name, direction * step)) for step in (1e-3, -1e-3)]
        expected = (moved[0] - moved[1]) / 2e-3
        given = float((found[1].gradients[side] * direction).sum())
        assert abs(given - expected) < 0.02 * abs(expected) + 1e-4
    direction = torch.randn(found[1].keys.shape, generator=torch.Generator().manual_seed(4))
    turned = rotate(direction, find_rotation(found[1].site), torch.arange(40).view(1, 1, -1))
    one, other = ((found[1].gradients[n] * d).sum() for n, d in (("unrotated", direction), ("keys", turned)))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert torch.equal(model(tokens[None]).logits, logits)


def _logits(model: Any, tokens: torch.Tensor, name: str, added: torch.Tensor) -> torch.Tensor:
    cache = exact(model)
    update = cache.update

    def moved(key_states: Any, value_states: Any, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        if layer_idx == 1:
            key_states, value_states = (
                x + added if name == n else x for n, x in (("key_states", key_states), ("value_states", value_states))
            )
        return update(key_states, value_states, layer_idx, *args, **kwargs)

    cache.update = moved
    with torch.no_grad():
        logits: torch.Tensor = model(tokens[None], **{CACHE: cache}).logits
    return logits


def test_attention_is_that_of_the_newest_tokens() -> None:
    model, tokens = tiny("llama"), ids(300)[0]
    seen = Observed(model, 300)
    with seen.ready(frozenset({"attention"})):
        found = dict(seen.watch(tokens, frozenset({"attention"})))
    implementation = model.config._attn_implementation
    model.set_attn_implementation("eager")
    with torch.no_grad():
        weights = model(tokens[None], output_attentions=True).attentions
    model.set_attn_implementation(implementation)
    for layer in (0, 1):
        torch.testing.assert_close(found[layer].attention, weights[layer][0].mean(0)[-256:], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_an_interrupted_run_goes_on_and_finds_the_same(method: str, tmp_path: Path) -> None:
    model, samples = tiny("llama"), torch.stack([ids(64, seed=seed)[0] for seed in range(3)])
    whole, path = calibrator_of(method), tmp_path / "made"
    Run(whole, model, samples, tmp_path / "at-once").go()

    def stop(done: int, of: int, what: str) -> None:
        told.append((done, of))
        if len(told) == 3:
            raise KeyboardInterrupt

    told: list[tuple[int, int]] = []
    with pytest.raises(KeyboardInterrupt):
        Run(whole, model, samples, path, stop).go()
    assert not path.exists()
    assert [file.name for file in tmp_path.iterdir() if file.name.startswith(("made", "."))] == ["made" + PARTIAL]
    count = len(told)
    Run(whole, model, samples, path, lambda done, of, what: told.append((done, of))).go()
    assert told[count] == told[count - 1], "it must go on where it was interrupted"
    assert load_file(path).keys() == load_file(tmp_path / "at-once").keys()
    for name, t in load_file(path).items():
        assert torch.equal(t, load_file(tmp_path / "at-once")[name])
    assert not (tmp_path / ("made" + PARTIAL)).exists()
    # Another text, another model, or a damaged file: from the start.
    told.clear()
    with pytest.raises(KeyboardInterrupt):
        Run(whole, model, samples, tmp_path / "other", stop).go()
    for change in (samples.flip(0), None):
        told.clear()
        if change is None:
            (tmp_path / ("other" + PARTIAL)).write_bytes(b"nothing")
        Run(whole, model, samples if change is None else change, tmp_path / "other", stop_never(told)).go()
        assert told[0][0] == 0
        (tmp_path / ("other" + PARTIAL)).write_bytes(b"nothing")


def stop_never(told: list[tuple[int, int]]) -> Any:
    return lambda done, of, what: told.append((done, of))


def test_from_the_shell(tmp_path: Path) -> None:
    words = ["calibrate", "skvq", "--text", str(texts(tmp_path)), "--samples", "2", "--tokens", "64", "--device", "cpu"]
    result = forked.kvpolicy(*words, cwd=tmp_path)
    assert (result.returncode, result.stdout) == (0, ""), result.stderr
    assert "wrote skvq.safetensors" in result.stderr
    made, _ = read_calibration(tmp_path / "skvq.safetensors")
    assert made.method == "skvq"
    assert made.about["samples"] == 2
    model, _ = bundled()
    assert sorted(calibration_of(load_recipe("skvq", calibration=str(tmp_path / "skvq.safetensors")), model)) == list(
        range(model.config.num_hidden_layers)
    )
    again = forked.kvpolicy(*words, cwd=tmp_path)
    assert again.returncode == 2
    assert "there must be no such file yet, found one" in again.stderr


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"method": "kvquantt"}, r"no calibrator of kind 'kvquantt' \(did you mean 'kvquant'\?\).*installed: kvquant"),
        ({"method": "kvquant:share=2"}, r"calibrator 'kvquant' must have valid options.*share"),
        ({"method": "kvquant:share"}, r"written kvquant:key=value"),
        ({"samples": 0}, "samples must be an integer from 1"),
        ({"tokens": 1}, "tokens must be an integer from 2"),
        ({"tokens": 10**6}, "max_position_embeddings, .*, found 1000000; ask for fewer"),
        (
            {"samples": 50},
            r"text.txt: the text must have 50 samples of 128 tokens, 6400 in all, found \d+; give a longer",
        ),
        ({"text": "missing.txt"}, "missing.txt: must be a text file that can be read, found No such file"),
        ({"text": "bytes"}, "must be text in UTF-8"),
        ({"out": "."}, "the calibration goes into a file, found a directory"),
        ({"out": "nowhere/x"}, "no directory that it could be written to"),
        ({"model": object()}, "must come with its tokenizer"),
    ],
)
def test_what_is_wrong_is_told(options: dict[str, Any], told: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00\x81")
    model, tokenizer = bundled()
    given = {"method": "skvq", "text": texts(tmp_path), "samples": 2, "tokens": 128, "model": model, **options}
    given |= {"tokenizer": tokenizer if given["model"] is model else None}
    with pytest.raises(CalibrationError, match=told):
        calibrate(given.pop("method"), **given)
    assert not list(tmp_path.glob("*.safetensors*"))


def test_a_file_that_is_missing_damaged_or_of_another_is_told(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    model = tiny("llama")
    with pytest.raises(
        CalibrationError,
        match=r"recipe kvquant-post-rope: .*found none at 'kvquant.safetensors'; make it: kvpolicy calibrate kvquant "
        r"--model DIR --text FILE --out kvquant.safetensors, or name another: kvquant-post-rope:calibration=FILE",
    ):
        make_cache("kvquant-post-rope", model)
    content = calibration(model, "skvq").read_bytes()
    file = tmp_path / "skvq.safetensors"
    for damaged in (content[:-9], content[: len(content) // 2], b"", content[:-40] + bytes(40)):
        file.write_bytes(damaged)
        with pytest.raises(
            CalibrationError, match=r"found one that can't be read .* make it again by kvpolicy calibrate"
        ):
            make_cache("skvq", model)
    save_file({"x": torch.zeros(1)}, file)
    with pytest.raises(CalibrationError, match="found other safetensors"):
        make_cache("skvq", model)
    with pytest.raises(
        CalibrationError, match=r"must be a calibration of this model, found one of another: .*Make one"
    ):
        make_cache(calibrated("skvq", model), tiny("qwen3"))
    other = tiny("llama", torch.bfloat16)
    with torch.no_grad():
        other.model.layers[1].self_attn.k_proj.weight[0, 0] += 1
    with pytest.raises(CalibrationError, match="its weights are others"):
        make_cache(calibrated("skvq", model), other)
    with torch.no_grad():
        other.model.layers[1].self_attn.k_proj.weight[0, 0] -= 1
    wrong = load_recipe("kvquant", calibration=str(calibration(model, "skvq")))
    with pytest.raises(
        RecipeError, match=r"tiers\[1\]\.keys.*takes a calibration that holds unrotated\.levels3, found one"
    ):
        make_cache(wrong, model)
    bare = {"tiers": [{"keys": {"kind": "int", "transforms": ["range"]}, "values": "full"}]}
    with pytest.raises(
        RecipeError, match=r"transforms\[0\].*needs a calibration, and the recipe names none; make one by"
    ):
        make_cache(bare, model)


def test_the_path_is_relative_to_the_recipe_that_says_it(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("{extends: skvq, params: {calibration: own.safetensors}}")
    (tmp_path / "plain.yaml").write_text("{calibration: own.safetensors, tiers: [{store: full}]}")
    for name in ("mine.yaml", "plain.yaml"):
        recipe = load_recipe(tmp_path / name)
        assert recipe.calibration == str(tmp_path / "own.safetensors")
        assert load_yaml(recipe.to_yaml()) == recipe
    assert load_recipe(f"{tmp_path}/mine.yaml:calibration=here.safetensors").calibration == "here.safetensors"
    assert load_recipe("skvq").calibration == "skvq.safetensors"
    assert load_recipe({"calibration": "a", "tiers": [{"store": "full"}]}).calibration == "a"
    with pytest.raises(RecipeError, match="calibration must be text, found 3"):
        load_recipe({"calibration": 3, "tiers": [{"store": "full"}]})


def test_a_calibrator_that_misbehaves_is_named() -> None:
    Skvq = type(calibrator_of("skvq"))

    class Wrong(Skvq):  # type: ignore[misc, valid-type]
        def finish(self, state: Any, site: Any) -> Any:
            return {"low": torch.zeros(1)}

    class Nan(Skvq):  # type: ignore[misc, valid-type]
        def finish(self, state: Any, site: Any) -> Any:
            return {"keys.low": torch.full((1,), torch.nan)}

    class Writes(Skvq):  # type: ignore[misc, valid-type]
        def watch(self, given: Any, state: Any, turn: int) -> Any:
            given.keys.zero_()
            return super().watch(given, state, turn)

    for cls, told in ((Wrong, "named keys., values., unrotated."), (Nan, "finite"), (Writes, "must not change")):
        with pytest.raises(PluginError, match=told):
            Run(cls(), tiny("llama"), ids(20), Path("nowhere")).go()


def test_the_header_says_of_which_model_it_is() -> None:
    path = calibration(tiny("llama"), "log")
    with safe_open(path, framework="pt") as file:
        texts = file.metadata()
    assert texts["method"] == "log"
    assert json.loads(texts["model"])["config"]["model_type"] == "llama"
    assert json.loads(texts["about"])["tokens"] == 96


def test_of_a_long_text_as_much_is_read_from_everywhere() -> None:
    _, tokenizer = bundled()
    content = "".join(f"line {i}\n" for i in range(20_000))
    found = _tokens(content, tokenizer, 3, 16, None, "text")
    assert found.shape == (3, 16)
    assert [tokenizer.decode(row).count("line") > 1 for row in found] == [True] * 3
    assert "line 0\n" in tokenizer.decode(found[0])
    assert "19999" in tokenizer.decode(found[2])
    whole = torch.tensor(tokenizer(content[:2000], add_special_tokens=False)["input_ids"])
    few = _tokens(content[:2000], tokenizer, 3, 64, None, "text")
    assert torch.equal(few[0], whole[:64])
    assert torch.equal(few[2], whole[-64:])


def test_derivatives_in_half_precision_are_those_in_full() -> None:
    found = []
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        seen = Observed(tiny("llama", dtype), 40)
        with seen.ready(frozenset({"gradients"})):
            found.append(dict(seen.watch(ids(40)[0], frozenset({"gradients"})))[0].gradients["keys"])
    for half in found[1:]:
        assert torch.nn.functional.cosine_similarity(half.flatten(), found[0].flatten(), dim=0) > 0.95
        assert 0.9 < float(half.norm() / found[0].norm()) < 1.1


def test_the_text_is_never_replaced(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("import os\n" * 50)
    with pytest.raises(CalibrationError, match="must be another file than the text"):
        check_calibration(2, 64, text, text, True)
    assert text.read_text() == "import os\n" * 50


def test_only_a_calibration_is_replaced(tmp_path: Path) -> None:
    text, model = tmp_path / "text.txt", tmp_path / "model.safetensors"
    text.write_text("import os\n" * 50)
    save_file({"weight": torch.ones(2)}, model)
    for out in (model, tmp_path / "notes.txt"):
        out.touch()
        with pytest.raises(CalibrationError, match="only a calibration is replaced, found another file"):
            check_calibration(2, 64, text, out, True)
    assert load_file(model)["weight"].tolist() == [1.0, 1.0]
