"""What a search is refused for, before a model is loaded."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
from searched import SPACE, text

import kvpolicy
import kvpolicy.arguments as arguments
import kvpolicy.experiment.tune as tuning
from kvpolicy.cli.main import main
from kvpolicy.errors import CompareError, KvpolicyError, MissingDependencyError, TaskError
from kvpolicy.hf.models import load_model
from kvpolicy.tasks.texts import ANSWER, cut, text_files


@pytest.fixture(autouse=True)
def nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("loaded")

    monkeypatch.setattr(tuning, "load_given", never)
    monkeypatch.setattr(arguments, "version", lambda name: "5.0.0")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trials": 0}, "trials must be an integer of at least 1, found 0"),
        ({"trials": True}, "trials must be an integer of at least 1, found True"),
        ({"samples": 1}, "samples must be an integer of at least 2, found 1"),
        ({"tokens": 0}, "tokens must be an integer of at least 1, found 0"),
        ({"tokens": 1.5}, "tokens must be an integer"),
        ({"seed": -1}, "seed must be an integer of at least 0, found -1"),
        ({"samples": 10**6, "tokens": 10**6}, "samples times tokens must be at most 16,777,216"),
        ({"held_out": 0}, "held_out, .* must lie between 0 and 1, found 0"),
        ({"held_out": 1.0}, "held_out, .* found 1.0"),
        ({"bits": 0}, "bits, .* must be a number above 0, found 0"),
        ({"bits": float("nan")}, "bits, .* found nan"),
        ({"out": ""}, "out must be the path of a directory, found ''"),
        ({"out": "/dev/null/x"}, "/dev/null is a file"),
        ({"text": "nothing.txt"}, "nothing.txt: a text must be a readable file, found no such file"),
        ({"text": "/"}, "found a directory"),
        ({"text": []}, r"needs a text to cut samples from, found none; name a file \(on the shell --text FILE\)"),
        ({"text": 3}, "text must be the path of a file or a list of such, found 3"),
        ({"text": "a\0b"}, "must be a readable file"),
        ({"tokens": 100_000}, "must fit the model's max_position_embeddings, 2048, found 100000"),
        ({"model": "/nowhere"}, "found no directory or file '/nowhere'"),
        ({"space": {}}, "found no recipe"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_arguments_that_can_not_be_right_are_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(KvpolicyError, match=message):
        kvpolicy.tune(**{"space": SPACE, "text": text(tmp_path), "progress": False, **options})


def test_one_file_given_twice_is_refused(tmp_path: Path) -> None:
    file = text(tmp_path)
    link = tmp_path / "link.txt"
    link.symlink_to(file)
    with pytest.raises(TaskError, match=r"link.txt: a text may be given once, found it twice"):
        text_files([file, link])


@pytest.mark.parametrize("found", [None, "3.6.1", "unknown"])
def test_without_optuna_it_says_how_it_is_installed(found: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if found is None:
            raise PackageNotFoundError(name)
        return found

    monkeypatch.setattr(arguments, "version", version)
    state = "which is not installed" if found is None else f"found {found}"
    message = rf"kvpolicy tune needs Optuna 4 or newer, {state}; pip install 'kvpolicy\[tune\]'"
    with pytest.raises(MissingDependencyError, match=message):
        kvpolicy.tune(SPACE, text="nothing.txt")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--text", "no.txt"], "no.txt: a text must be a readable file"),
        ([], "missing option"),
        (["--text", "TEXT", "--bits", "-1"], "must be a number above 0, found -1.0"),
        (["--text", "TEXT", "--device", "gpu"], "device must be a name such as cpu"),
        (["--text", "TEXT", "--out", "TEXT"], "the results go into a directory, found a file"),
        (["--text", "TEXT"], "a recipe's keys stand below recipe"),
    ],
)
def test_errors_on_the_shell_are_lines_and_status_2(
    given: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = text(tmp_path)
    page = tmp_path / "space.yaml"
    page.write_text("recipe: kivi\nsearch: {nbits: [2, 4]}\ntiers: []\n", encoding="utf-8")
    words = [str(file) if word == "TEXT" else word for word in given]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["kvpolicy", "tune", str(page), *words])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source.txt", "space.yaml"]


def test_samples_don_t_overlap_and_are_split(tmp_path: Path) -> None:
    tokenizer = load_model(device="cpu")[1]
    file = text(tmp_path)
    split = cut([file], tokenizer, 100, 6, 0.34)
    assert (len(split.tuned), len(split.held_out)) == (4, 2)
    spans = [*split.tuned, *split.held_out]
    ids = tokenizer(file.read_text(), add_special_tokens=False)["input_ids"]
    places = set()
    for span in spans:
        assert (len(span.prompt), len(span.answer)) == (100, ANSWER)
        whole = [*span.prompt, *span.answer]
        places.add(next(i for i in range(len(ids)) if ids[i : i + len(whole)] == whole))
    assert len(places) == 6
    assert all(place % (100 + ANSWER) == 0 for place in places)


def test_a_first_token_of_the_tokenizer_stands_before_each_prompt(tmp_path: Path) -> None:
    tokenizer = load_model(device="cpu")[1]

    def with_first(text: str, add_special_tokens: bool = True, **options: Any) -> dict[str, list[int]]:
        ids = tokenizer(text, add_special_tokens=False, **options)["input_ids"]
        return {"input_ids": [7, *ids, 9] if add_special_tokens else ids}

    split = cut([text(tmp_path)], with_first, 100, 3, 0.5)
    for span in (*split.tuned, *split.held_out):
        assert span.prompt[0] == 7
        assert 7 not in span.prompt[1:]
        assert len(span.prompt) == 100


def test_texts_that_are_short_repeated_or_no_text(tmp_path: Path) -> None:
    tokenizer = load_model(device="cpu")[1]
    file = text(tmp_path)
    with pytest.raises(TaskError, match=r"must hold 500 different samples of 100 \+ 64 tokens, found \d+; give longer"):
        cut([file], tokenizer, 100, 500, 0.5)
    copied = tmp_path / "copy.txt"
    copied.write_text(file.read_text())
    alone = len(cut([file], tokenizer, 100, 2, 0.5).digest())
    assert alone == 64
    with pytest.raises(TaskError, match=r"found (\d+)") as both:
        cut([file, copied], tokenizer, 100, 500, 0.5)
    with pytest.raises(TaskError, match=r"found (\d+)") as one:
        cut([file], tokenizer, 100, 500, 0.5)
    assert str(both.value) == str(one.value)
    bad = tmp_path / "bad.txt"
    bad.write_bytes(b"one\ntwo \xff\n")
    with pytest.raises(TaskError, match=r"bad.txt, line 2: must be UTF-8 text, found the byte 0xff; save the file"):
        cut([bad], tokenizer, 100, 2, 0.5)
    bad.write_bytes(b"")
    with pytest.raises(TaskError, match="found 0"):
        cut([bad], tokenizer, 100, 2, 0.5)


def test_a_prompt_that_does_not_fit_the_model() -> None:
    tuning._check_length(1984, 2048)
    with pytest.raises(CompareError, match=r"max_position_embeddings, 2048, found 1985 \+ 64"):
        tuning._check_length(1985, 2048)
