"""`kvpolicy generate`: text on stdout, the memory of the cache on stderr."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from typer.testing import CliRunner
from words import CACHE

from kvpolicy import make_cache
from kvpolicy.cli.main import app, main
from kvpolicy.hf.models import load_model
from kvpolicy.tasks.load import load_task


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    return load_model(device="cpu")


def run(*arguments: str, stdin: bytes | None = None) -> Any:
    return CliRunner().invoke(app, ["generate", *arguments], input=stdin)


def test_text_goes_to_stdout_and_memory_to_stderr(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    sample = load_task("lines", 1, 0, 128)[0]
    new = len(tokenizer(sample.answer).input_ids)
    done = run("--recipe", "kivi", "--prompt", sample.prompt, "--max-new-tokens", str(new))
    assert done.exit_code == 0, done.output
    assert done.stdout == sample.answer + "\n"
    cache = make_cache("kivi", model)
    with torch.inference_mode():
        model.generate(**tokenizer(sample.prompt, return_tensors="pt"), **{CACHE: cache}, max_new_tokens=new)
    assert f"{cache.memory().bytes:,} bytes" in done.stderr
    length = len(tokenizer(sample.prompt).input_ids)
    assert f"kivi: prompt of {length} tokens, {new} new" in done.stderr


def test_the_prompt_may_come_from_stdin_and_text_keeps_its_white_space(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    prompt = "import os\n\n\nclass Näme:\n    def __init__(self, a):\n"
    done = run("--recipe", "full", "--prompt", "-", "--max-new-tokens", "12", stdin=prompt.encode())
    assert done.exit_code == 0, done.output
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    with torch.inference_mode():
        output = model.generate(ids, max_new_tokens=12, do_sample=False)
    expected = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
    assert done.stdout == (expected if expected.endswith("\n") else expected + "\n")
    assert expected.startswith(" ")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--recipe", "full", "--prompt", ""], "must not be empty"),
        (["--recipe", "nothing", "--prompt", "a"], "no recipe 'nothing'"),
        (["--recipe", "full", "--prompt", "a", "--max-new-tokens", "0"], "at least 1, found 0"),
        (["--recipe", "full", "--prompt", "a", "--max-new-tokens", "2048"], "2048, found 1 + 2048"),
        (["--recipe", "full", "--prompt", "a", "--model", "/nowhere"], "found no directory or file '/nowhere'"),
    ],
)
def test_errors_are_one_line_and_status_2(
    arguments: list[str], text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["kvpolicy", "generate", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    found = capsys.readouterr()
    assert found.out == ""
    assert found.err.startswith("error: ")
    assert text in found.err
    assert found.err.count("\n") == 1


def test_a_model_that_fails_is_one_line(
    loaded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("out of memory\nby far")

    monkeypatch.setattr(type(loaded[0]), "generate", fail)
    monkeypatch.setattr("sys.argv", ["kvpolicy", "generate", "--recipe", "full", "--prompt", "a"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "error: the model can't be run: OutOfMemoryError: out of memory\\nby far\n"


def test_a_prompt_that_is_not_text_is_refused() -> None:
    done = run("--recipe", "full", "--prompt", "-", stdin=b"\xff\xfe")
    assert "must be UTF-8 text" in str(done.exception)


@pytest.mark.parametrize(("flags", "expected"), [([], True), (["--unattached"], False)], ids=["attached", "unattached"])
def test_the_model_is_attached_unless_told_otherwise(
    flags: list[str], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import LlamaForCausalLM

    from kvpolicy.hf.attach import is_attached

    generate, seen = LlamaForCausalLM.generate, []

    def spy(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(is_attached(self))
        return generate(self, *args, **kwargs)

    monkeypatch.setattr(LlamaForCausalLM, "generate", spy)
    done = run("--recipe", "logquant:window=8", "--prompt", "import os\n" * 20, "--max-new-tokens", "4", *flags)
    assert done.exit_code == 0, done.output
    assert seen == [expected]


def test_a_model_that_can_not_be_attached_generates_unattached(monkeypatch: pytest.MonkeyPatch) -> None:
    import kvpolicy.hf.attach

    monkeypatch.setattr(kvpolicy.hf.attach, "SERVED", ())
    done = run("--recipe", "logquant:window=8", "--prompt", "import os\n" * 20, "--max-new-tokens", "4")
    assert done.exit_code == 0, done.output
    assert done.stderr.startswith("warning: the model runs unattached: attach serves the attention implementations")
    assert "logquant: prompt of" in done.stderr
