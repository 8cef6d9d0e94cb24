"""lm-evaluation-harness through compressed caches: equal to its own class with `full`, and different without."""

from __future__ import annotations

import json
import math
import re
import sys
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval import tasks
from lm_eval.api.instance import Instance
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import kvpolicy
from kvpolicy import arguments, harness
from kvpolicy.cli.main import main
from kvpolicy.errors import CompareError, MissingDependencyError, RecipeError
from kvpolicy.harness import model as models
from kvpolicy.harness.model import CompressedLM
from kvpolicy.hf.models import BUNDLED
from kvpolicy.hf.passes import is_attached
from tests.support.words import CACHE

TEXT = (BUNDLED.parent / "words.py").read_text()[200:]
CHOICES = [" return None", "\n\n    def __init__", " return"]
CONTEXTS = [TEXT[:200], TEXT[300:400], TEXT[:50] + " "]
LIKELY = [(context, choice) for context in CONTEXTS for choice in CHOICES] + [("", "import os"), ("i", "mport os, sys")]
ROLLING = [TEXT[:230], TEXT[500:560], "x"]
UNTIL = {"until": ["\n\n", " return"], "max_gen_toks": 8, "do_sample": False}
LENGTH = 64
TINY = "streaming-llm:window=4,sink=1"


@pytest.fixture(scope="module")
def loaded() -> Any:
    torch.manual_seed(1)
    sizes = {"hidden_size": 48, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=3072, num_key_value_heads=1, initializer_range=0.3, eos_token_id=0, **sizes)
    return LlamaForCausalLM(config).eval(), AutoTokenizer.from_pretrained(BUNDLED)


@pytest.fixture(scope="module")
def directory(loaded: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    for part in loaded:
        part.save_pretrained(path)
    return path


def made(kind: Any, loaded: Any, **options: Any) -> Any:
    model, tokenizer = loaded
    return kind(model, tokenizer=tokenizer, max_length=LENGTH, **options)


def asked(kind: str, given: list[Any]) -> list[Instance]:
    return [Instance(kind, {}, args, i) for i, args in enumerate(given)]


def likelihoods(lm: Any) -> list[tuple[float, bool]]:
    return lm.loglikelihood(asked("loglikelihood", LIKELY), disable_tqdm=True)


def answers(lm: Any) -> tuple[Any, ...]:
    rolling = lm.loglikelihood_rolling(asked("loglikelihood_rolling", [(text,) for text in ROLLING]), disable_tqdm=True)
    written = lm.generate_until(asked("generate_until", [(c, UNTIL) for c in CONTEXTS]), disable_tqdm=True)
    return likelihoods(lm), rolling, written


def check_equal(found: Any, expected: Any) -> None:
    assert [greedy for _, greedy in found[0]] == [greedy for _, greedy in expected[0]]
    assert [score for score, _ in found[0]] == pytest.approx([score for score, _ in expected[0]], abs=1e-3)
    assert found[1] == pytest.approx(expected[1], abs=2e-3)
    assert found[2] == expected[2]


def test_full_equals_the_class_of_the_harness(loaded: Any) -> None:
    expected = answers(made(HFLM, loaded, batch_size=4))
    assert any(expected[2])
    for options in ({"batch_size": 1}, {"batch_size": 4}, {"batch_size": 3, "held_back": 0, "prefill": 5}):
        lm = made(CompressedLM, loaded, recipe="full", **options)
        check_equal(answers(lm), expected)
        assert not is_attached(loaded[0])
    tried = made(CompressedLM, loaded, recipe="full", batch_size="auto:2", max_batch_size=2)
    check_equal((likelihoods(tried), *expected[1:]), expected)


def plain(loaded: Any, recipe: str, tokens: list[int], prefill: int) -> torch.Tensor:
    """Log-probabilities of all tokens but the first: a prompt, then one token at a time, with a cache of its own."""
    model = loaded[0]
    with torch.inference_mode(), kvpolicy.attach(model):
        cache = kvpolicy.make_cache(recipe, model)
        logits = [model(torch.tensor([tokens[:prefill]]), **{CACHE: cache}).logits[0]]
        logits += [model(torch.tensor([[token]]), **{CACHE: cache}).logits[0] for token in tokens[prefill:-1]]
    return torch.cat(logits)[: len(tokens) - 1].log_softmax(-1).gather(1, torch.tensor(tokens)[1:, None])[:, 0]


@pytest.mark.parametrize(
    "recipe",
    [
        TINY,
        "logquant:window=6,nbits=2",
        "kivi:residual=8,group_size=8",
        "h2o:window=0.2,heavy=0.2",
        "snapkv:capacity=12,window=4",
    ],
)
def test_scores_are_those_of_reading_the_cache_token_by_token(recipe: str, loaded: Any) -> None:
    """Choices share a context and rows a batch, and none of them notices."""
    lm = made(CompressedLM, loaded, recipe=recipe, batch_size=4)
    scores = [score for score, _ in likelihoods(lm)]
    for (context, choice), score in zip(LIKELY, scores, strict=True):
        if context:
            head, tail = lm._encode_pair(context, choice)
            tokens = (head + tail)[-LENGTH - 1 :]
            split = len(tokens) - len(tail)
            own = plain(loaded, recipe, tokens, max(split - 1, 1))
            assert math.isclose(float(own[-len(tail) :].sum()), score, abs_tol=2e-3), (context, choice)
    text = ROLLING[1]
    window = [lm.prefix_token_id, *lm.tok_encode(text)]
    (found,) = lm.loglikelihood_rolling(asked("loglikelihood_rolling", [(text,)]), disable_tqdm=True)
    assert found == pytest.approx(float(plain(loaded, recipe, window, len(window) // 2).sum()), abs=2e-3)


def test_a_recipe_that_destroys_changes_every_score(loaded: Any) -> None:
    """Of a choice of one token, too, which a prompt alone would predict exactly."""
    exact, tiny = made(CompressedLM, loaded, recipe="full"), made(CompressedLM, loaded, recipe=TINY)
    for (context, _), (one, _), (other, _) in zip(LIKELY, likelihoods(exact), likelihoods(tiny), strict=True):
        assert abs(one - other) > 1e-2 or len(context) < 40, context
    read = tiny.get_model_info()["kvpolicy"]
    assert read["predictions"] - read["from_cache"] == 2  # of two contexts of one token
    assert read["bits_per_value"] < exact.get_model_info()["kvpolicy"]["bits_per_value"]
    prompt = made(CompressedLM, loaded, recipe=TINY, held_back=0)
    one_token = asked("loglikelihood", [(CONTEXTS[0], " return")])
    assert prompt.loglikelihood(one_token)[0][0] == pytest.approx(exact.loglikelihood(one_token)[0][0], abs=1e-3)


def test_a_recipe_that_has_the_prompt_read_again_is_told(loaded: Any) -> None:
    found = []
    for recipe in ("full", "kvzip:threshold=0.0", "kvzip:threshold=0.9,sinks=1"):
        lm = made(CompressedLM, loaded, recipe=recipe, batch_size=3)
        scores = [score for score, _ in lm.loglikelihood(asked("loglikelihood", LIKELY[:6]), disable_tqdm=True)]
        written = lm.generate_until(asked("generate_until", [(c, UNTIL) for c in CONTEXTS[:2]]), disable_tqdm=True)
        found.append((scores, written))
    full, all_kept, few = found
    assert all_kept[0] == pytest.approx(full[0], abs=1e-3)
    assert all_kept[1] == full[1]
    assert max(abs(a - b) for a, b in zip(few[0], full[0], strict=True)) > 1e-2


def test_the_choices_of_a_context_share_its_prompt(loaded: Any) -> None:
    read: list[int] = []
    hook = loaded[0].register_forward_pre_hook(
        lambda module, args, kwargs: read.append(args[0].numel()), with_kwargs=True
    )
    try:
        lm = made(CompressedLM, loaded, recipe=TINY)
        lm.loglikelihood(asked("loglikelihood", [(CONTEXTS[1], choice) for choice in CHOICES]), disable_tqdm=True)
    finally:
        hook.remove()
    context, tails = lm.tok_encode(CONTEXTS[1]), [lm.tok_encode(choice) for choice in CHOICES]
    assert sum(read) == len(context) + sum(len(tail) - 1 for tail in tails)


@pytest.fixture
def quick_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness reads thousands of its own tasks to find one, and asks pip and the machine about themselves."""
    monkeypatch.setattr("torch.utils.collect_env.get_pretty_env_info", str)
    monkeypatch.setattr(tasks, "TaskManager", partial(tasks.TaskManager, include_defaults=False))


def task(folder: Path) -> Path:
    rows = [{"text": TEXT[i * 90 : i * 90 + 90], "choices": CHOICES[:3], "label": i % 3} for i in range(4)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "task.yaml").write_text(
        f"task: local\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder / 'rows.jsonl'}}}}}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{text}}'\ndoc_to_target: label\n"
        "doc_to_choice: choices\nmetric_list: [{metric: acc}]\n"
    )
    return folder / "task.yaml"


def test_the_command_writes_what_the_harness_writes(
    directory: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    quick_tasks: None,
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    out, file = tmp_path / "out", str(task(tmp_path))
    common = ["--tasks", file, "--log_samples", "--output_path", str(out), "--batch_size", "2", "--device", "cpu"]
    common += ["--use_cache", str(tmp_path / "answers")]
    words = ["lm-eval", "--recipe", TINY, "--model", str(directory), "--dtype", "float32", "--", *common]
    monkeypatch.setattr(sys, "argv", ["kvpolicy", *words])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 0, capsys.readouterr().err
    (kept,) = tmp_path.glob("answers*")
    assert re.fullmatch(r"answers-[0-9a-f]{12}_rank0\.db", kept.name)  # no other recipe's
    (results,) = out.rglob("results_*.json")
    config = json.loads(results.read_text())["config"]
    assert config["model_args"]["recipe"] == TINY
    assert "streaming-llm" in config["kvpolicy"]["recipe"]
    assert config["kvpolicy"]["from_cache"] == config["kvpolicy"]["predictions"] > 0
    (samples,) = out.rglob("samples_*.jsonl")
    rows = [json.loads(line) for line in samples.read_text().splitlines()]
    found = simple_evaluate(
        model="kvpolicy",
        model_args={"pretrained": str(directory), "recipe": "full", "device": "cpu"},
        tasks=[file],
        bootstrap_iters=0,
        task_manager=tasks.TaskManager(),
    )
    exact = found["samples"]["local"]
    assert len(rows) == len(exact) == 4
    assert all(float(a["resps"][0][0][0]) != float(b["resps"][0][0][0]) for a, b in zip(rows, exact, strict=True))


ERRORS = [
    (["--recipe", "kiwi", "--", "--tasks", "x"], "did you mean 'kivi'"),
    (["--recipe", "kivi:sinks=1", "--", "--tasks", "x"], "unknown parameter 'sinks'"),
    (["--recipe", "kivi", "--model", "./nowhere", "--", "--tasks", "x"], "found no directory or file"),
    (["--recipe", "kivi", "--", "--model", "hf", "--tasks", "x"], "found --model hf; leave it out"),
    (["--recipe", "kivi", "--", "--tasks", "x", "--model_args", "recipe=full"], "a recipe is given once"),
    (["--recipe", "kivi", "--model", "x/y", "--", "--tasks", "x", "--model_args", "pretrained=z"], "given once"),
    (["--recipe", "kivi", "--dtype", "float32", "--", "--tasks", "x", "--model_args", "pretrained=z"], "given once"),
    (["--recipe", "kivi", "--dtype", "float32", "--", "--tasks", "x", "--model_args", "dtype=auto"], "given once"),
    (["--recipe", "kivi", "--", "--tasks", "no_such_task"], "Tasks not found: no_such_task"),
    (["--recipe", "kivi", "--", "--config", "missing.yaml"], "missing.yaml"),
    (["--recipe", "kivi", "--", "--nonsense", "3"], "harness: unrecognized arguments: --nonsense 3"),
    (
        ["--recipe", "kivi", "--", "--tasks", "x", "--output_path", __file__],
        "results go into a directory, found a file",
    ),
    (["--recipe", "kivi", "--", "--tasks", "x", "--output_path", f"{__file__}/a/b.json"], "test_lm_eval.py is a file"),
    (["--recipe", "kivi", "--", "--tasks", "x", "--output_path", "/proc/no/out"], "can't be written there: /proc"),
    (["--recipe", "kivi", "--", "--tasks", "x", "--use_cache", "/proc/no/answers"], "can't be written there: /proc"),
]


def test_what_can_not_be_run_is_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], quick_tasks: None
) -> None:
    for words, message in ERRORS:
        monkeypatch.setattr(sys, "argv", ["kvpolicy", "lm-eval", *words])
        with pytest.raises(SystemExit) as stop:
            main()
        said = capsys.readouterr().err
        assert (stop.value.code, message in said, "Traceback" in said) == (2, True, False), (words, said)
        assert "usage:" not in said


def test_errors(loaded: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for options, kind, message in (
        ({}, CompareError, "needs a recipe"),
        ({"recipe": "kiwi"}, RecipeError, "did you mean 'kivi'"),
        ({"recipe": "kivi", "held_back": -1}, CompareError, "held_back must be an integer of at least 0"),
        ({"recipe": "kivi", "prefill": 0}, CompareError, "prefill must be an integer of at least 1"),
    ):
        with pytest.raises(kind, match=message):
            made(CompressedLM, loaded, **options)
    with pytest.raises(CompareError, match="found no directory or file"):
        CompressedLM(str(tmp_path / "none"), recipe="kivi")
    lm = made(CompressedLM, loaded, recipe="full")
    with pytest.raises(CompareError, match="must fit the model's max_length, 64"):
        lm.loglikelihood(asked("loglikelihood", [("x", TEXT[:600])]), disable_tqdm=True)
    with pytest.raises(CompareError, match="must have a chat template"):
        lm.apply_chat_template([{"role": "user", "content": "x"}])
    monkeypatch.setattr(arguments, "OLDEST_LM_EVAL", (9, 0, 0))
    with pytest.raises(MissingDependencyError, match=r"9\.0\.0 or newer, found .*pip install 'kvpolicy\[lm-eval\]'"):
        harness.register()


def test_a_model_that_can_not_be_attached_runs_row_by_row(loaded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = likelihoods(made(CompressedLM, loaded, recipe=TINY))

    @contextmanager
    def unattached(model: Any, wanted: bool) -> Any:
        yield False

    monkeypatch.setattr(models, "attached", unattached)
    with pytest.raises(CompareError, match="batch_size must be 1, found 2"):
        made(CompressedLM, loaded, recipe=TINY, batch_size=2)
    found = likelihoods(made(CompressedLM, loaded, recipe=TINY))
    assert [score for score, _ in found] == pytest.approx([score for score, _ in expected], abs=1e-3)
