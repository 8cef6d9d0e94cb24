"""The command: what it prints, and that every error is one message with exit status 2."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import forked
import pytest

import kvpolicy
from kvpolicy.cli.main import main
from kvpolicy.recipe.load import bundled_names, load_recipe, load_yaml


def run(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return forked.kvpolicy(*arguments, cwd=cwd, env={"COLUMNS": "200"})


def test_help_is_quick_and_imports_nothing_heavy() -> None:
    code = (
        "import sys\nimport kvpolicy.cli.main\n"
        "heavy = {'torch', 'transformers', 'matplotlib', 'pydantic', 'numpy', 'ruamel'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    start = time.perf_counter()
    assert subprocess.run([sys.executable, "-m", "kvpolicy", "--help"], check=True, capture_output=True)
    assert time.perf_counter() - start < 2


LONG = "a" * 3000
CARELESS = [
    (("show", "logquant", "window=64"), "write logquant:window=64"),
    (("show", "logquant", "window=64", "--tokens", "9", "nbits=4"), "write logquant:window=64,nbits=4"),
    (("show", "logquant:window=64", "nbits=4"), "write logquant:window=64,nbits=4"),
    (("show", "logquant:", "window=64"), "write logquant:window=64"),
    (("show", "window=64", "logquant"), "write NAME:window=64"),
    (("show", "logquant", "kivi"), "one recipe is expected, found also 'kivi'"),
    (("show", "logquant:window:64"), "NAME:key=value,key=value, found 'window:64'"),
    (
        ("show", "--window", "64", "logquant"),
        "a recipe's parameters are written NAME:key=value; see kvpolicy show --help",
    ),
    (("show", "LogQuant"), "did you mean 'logquant'?"),
    (("show", "logquant:Window=3"), "did you mean 'window'?"),
    (("Show", "logquant"), "show"),
    (("show", "Logquant.yaml"), "no such file; the bundled recipe is 'logquant'"),
    (("show",), "RECIPE"),
    (("show", "empty.yaml"), "found an empty file"),
    (("show", "binary.yaml"), "found byte 0x89"),
    (("show", "directory"), "found a directory"),
    (("show", LONG), "no recipe 'aaa"),
    (("show", LONG + ".yaml"), "no such file"),
    (("show", "дом"), "no recipe 'дом'"),
    (("show", "full", "--tokens", "10000000"), "1048576"),
    (("show", "full", "--tokens", "many"), "--tokens"),
    (("show", "full", "--plot", "x.xyz"), "must end in one of"),
    (("show", "full", "--plot", "missing/x.png"), "there is no directory missing"),
    (("show", "full", "--plot", "directory"), "found a directory"),
    (("show", "full", "--plot", LONG + ".png"), "can't be written"),
    (("validate", "logquant", "window=64"), "write logquant:window=64"),
    (("validate", "kiwi"), "did you mean 'kivi'?"),
    (("generate", "--recipe", "logquant", "window=64", "--prompt", "x"), "write logquant:window=64"),
    (("generate", "--recipe", "kiwi", "--prompt", "x"), "did you mean 'kivi'?"),
    (("generate", "--recipe", "full", "--prompt", ""), "must not be empty"),
    (("generate", "--recipe", "full", "--prompt", "x" * 99, "--max-new-tokens", "99999"), "2048, found 99999"),
    (("generate", "--recipe", "full", "--prompt", "x", "--device", "cudda"), "did you mean 'cuda'?"),
    (("generate", "--recipe", "full", "--prompt", "x", "--device", "cuda:x"), "found 'cuda:x'"),
    (("generate", "--recipe", "full", "--prompt", "x", "--model", "binary"), "config.json must be JSON"),
    (("generate", "--recipe", "full", "--prompt", "x", "--model", "empty"), "config.json must be JSON"),
    (("generate", "--recipe", "full", "--prompt", "x", "--model", "directory"), "must hold config.json"),
    (("generate", "--recipe", "full", "--prompt", "x", "--model", "empty.yaml"), "must be a GGUF file"),
    (("generate", "--recipe", "full", "--prompt", "x", "--model", LONG), "model must be"),
    (("generate", "--recipe", "full", "--prompt", "x", "--model", "./missing"), "found no directory or file"),
    (("generate", "--recipe", "full", "--prompt", "x", "--model", "nobody/nothing"), "the Hugging Face hub doesn't"),
    (("generate", "--recipe", "full", "--prompt", "x", "--model", "files"), "give the file model.gguf"),
    (("generate", "--recipe", "full", "--prompt", "x", "--dtype", "bf16"), "did you mean 'bfloat16'?"),
    (("compare", "full", "--device", "cpu", "--device-map", "auto"), "give one of them"),
    (("compare", "full", "--device-map", "Auto"), "did you mean 'auto'?"),
    (("compare", "full", "--revision", "main"), "is for a model of the hub"),
    (("compare", "full", "--model", "files/model.gguf", "--revision", "main"), "is for a model of the hub"),
    (("compare", "full", "--model", "files/model.gguf", "--trust-remote-code"), "for models with code"),
    (("compare", "full", "--tokenizer", ""), "must be a directory or an id"),
    (("tune", "space.yaml", "--text", "empty.yaml", "--trust-remote-code"), "for models with code"),
    (("calibrate", "kvquant", "--text", "empty.yaml", "--dtype", "int8"), "must be one of auto"),
    (("generate", "full", "--prompt", "x"), "--recipe"),
    (("compare", "logquant", "window=64"), "write logquant:window=64"),
    (("compare", "full", "logquant", "window=64", "kivi", "nbits=4"), "write logquant:window=64 kivi:nbits=4"),
    (("compare", "kiwi", "Full"), "did you mean 'full'?"),
    (("compare", "full", "--task", "Lines"), "did you mean 'lines'?"),
    (("compare", "full", "--task", "missing.jsonl"), "No such file"),
    (("compare", "full", "--task", "empty.yaml"), "at least one row"),
    (("compare", "full", "--task", "binary.yaml"), "UTF-8"),
    (("compare", "full", "--task", "directory"), "a directory"),
    (("compare", "full", "--task", LONG), "task must be one of"),
    (("compare", "full", "--tokens", "10000000"), "at most 1,048,576, found 10000000"),
    (("compare", "full", "--tokens", "9000"), "max_position_embeddings, 2048, found 9000"),
    (("compare", "full", "-n", "1000000000"), "at most 134,217,728"),
    (("compare", "full", "-n", "0"), "at least 1, found 0"),
    (("compare", "full", "--out", "empty.yaml"), "found a file"),
    (("compare", "full", "--out", "empty.yaml/x"), "empty.yaml is a file"),
    (("compare", "full", "--out", LONG), "can't be written"),
    (("compare", "full", "--out", "/proc/kvpolicy"), "can't be written there"),
    (("plan", "full", "--model", "binary", "--plot", "/proc/kvpolicy.png"), "can't be written"),
    (("show", "full", "--plot", "/proc/kvpolicy.png"), "can't be written"),
    (("report", "empty.yaml", "--out", "/proc/kvpolicy"), "can't be written"),
    (("report", "empty.yaml", "--out", "empty.yaml/x"), "can't be written"),
    (("report", "empty.yaml", "--out", LONG), "can't be written"),
    (("report", "a\nb.csv"), r"a\nb.csv: there is no such run"),
    (("report", "empty.yaml", "--out", "empty.yaml", "--format", "a\nb"), "--format must be of"),
    (("report", "a\nb=c\nd.csv"), r"c\nd.csv: there is no such run"),
    (("calibrate", "kvquant", "--text", "empty.yaml", "--out", "/proc/x.safetensors"), "no directory that it could"),
    (("recipes", "x"), "unexpected extra argument"),
    (("nonsense",), "nonsense"),
]


def test_what_a_careless_user_types_is_answered_before_torch_is_loaded(tmp_path: Path) -> None:
    """All of them in one process, which ends with neither torch nor transformers."""
    (tmp_path / "empty.yaml").touch()
    (tmp_path / "binary.yaml").write_bytes(b"\x89PNG\xff\x00")
    for name in ("directory", "binary", "empty", "files"):
        (tmp_path / name).mkdir()
    (tmp_path / "files" / "model.gguf").write_bytes(b"GGUF")
    (tmp_path / "binary" / "config.json").write_bytes(b"\x89PNG\xff\x00")
    (tmp_path / "empty" / "config.json").touch()
    code = (
        "import contextlib, io, json, sys\nfrom kvpolicy.cli.main import main\nfound = []\n"
        "for arguments in json.loads(sys.stdin.read()):\n"
        "    out, err = io.StringIO(), io.StringIO()\n    sys.argv = ['kvpolicy', *arguments]\n"
        "    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):\n"
        "        try:\n            main()\n            status = None\n"
        "        except SystemExit as stop:\n            status = stop.code\n"
        "    heavy = sorted({'torch', 'transformers', 'matplotlib'} & set(sys.modules))\n"
        "    found.append((status, out.getvalue(), err.getvalue(), heavy))\n"
        "print(json.dumps(found))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps([arguments for arguments, _ in CARELESS]),
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "COLUMNS": "200"},
    )
    assert done.returncode == 0, done.stderr
    for (arguments, expected), (status, out, err, heavy) in zip(CARELESS, json.loads(done.stdout), strict=True):
        shown = " ".join(arguments)[:80]
        assert (status, out, heavy) == (2, "", []), (shown, status, out, err, heavy)
        assert expected in err, (shown, err)
        assert all(line.startswith("error: ") and len(line) < 1_000 for line in err.splitlines()), (shown, err)
        assert err.count("\n") == (2 if arguments[:2] == ("compare", "kiwi") else 1), (shown, err)


def test_an_error_of_a_name_takes_no_time() -> None:
    best = 9.0
    for _ in range(3):
        before = os.times()
        done = subprocess.run(
            [sys.executable, "-m", "kvpolicy", "compare", "logqant"], capture_output=True, check=False
        )
        assert done.returncode == 2
        after = os.times()
        best = min(best, after.children_user - before.children_user + after.children_system - before.children_system)
    assert best < 0.5


def test_a_disk_that_is_full_is_one_message() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "kvpolicy", "recipes"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    assert "No space left" in done.stderr
    assert "Traceback" not in done.stderr


def test_recipes_lists_every_bundled_recipe() -> None:
    result = run("recipes")
    assert result.returncode == 0, result.stderr
    for name in bundled_names():
        assert any(line.startswith(f"{name} ") for line in result.stdout.splitlines())


def test_show_prints_yaml_that_loads_and_a_table() -> None:
    result = run("show", "logquant:window=64,nbits=4", "--tokens", "1000")
    assert result.returncode == 0, result.stderr
    assert load_yaml(result.stdout).tiers == load_recipe("logquant", window=64, nbits=4).tiers
    assert "Tiers after 1000 tokens" in result.stderr
    assert "recent(window=64, flush=64)" in result.stderr
    assert "takes the rest" in result.stderr


def test_show_says_how_tokens_came_and_what_other_layers_have(tmp_path: Path) -> None:
    assert "Tiers after a prompt of 300 tokens" in run("show", "hf-quantized", "--tokens", "300").stderr
    file = tmp_path / "layers.yaml"
    file.write_text('extends: logquant\nlayers: {"0": full, "1-2": [{store: {kind: int, nbits: 8}}]}\n')
    shown = run("show", str(file)).stderr
    assert "Layers 0: full" in shown
    assert "Tiers of layers 1-2" in shown
    assert "int(nbits=8" in shown


@pytest.mark.parametrize(
    "arguments", [("compare", "full", "-n", "1"), ("generate", "--recipe", "full", "--prompt", "ß")]
)
def test_a_terminal_that_knows_ascii_alone_is_served(arguments: tuple[str, ...]) -> None:
    done = forked.kvpolicy(*arguments, env={"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr


def test_prompts_that_are_no_text_and_tasks_that_are_no_files() -> None:
    generate = [sys.executable, "-m", "kvpolicy", "generate", "--recipe", "full", "--prompt"]
    bad = subprocess.run([*generate, b"\xff\xfe"], capture_output=True, text=True, check=False)
    assert (bad.returncode, "no UTF-8" in bad.stderr) == (2, True), bad.stderr
    shell = f"{sys.executable} -m kvpolicy generate --recipe full --prompt - <&-"
    closed = subprocess.run(["sh", "-c", shell], capture_output=True, text=True, check=False)
    assert (closed.returncode, "stdin, which is closed" in closed.stderr) == (2, True), closed.stderr
    device = run("compare", "full", "--task", "/dev/zero.jsonl" if not Path("/dev/zero").exists() else "/dev/zero")
    assert device.returncode == 2
    assert "Traceback" not in device.stderr


def test_show_draws_a_picture(tmp_path: Path) -> None:
    result = run("show", "partial-logquant", "--tokens", "300", "--plot", str(tmp_path / "out.png"))
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    assert "wrote" in result.stderr


@pytest.mark.parametrize("name", ["out.xyz", "missing/out.png"])
def test_a_picture_that_can_not_be_written_is_an_error(tmp_path: Path, name: str) -> None:
    result = run("show", "full", "--tokens", "10", "--plot", str(tmp_path / name))
    assert result.returncode == 2
    assert name in result.stderr
    assert "Traceback" not in result.stderr


def test_validate_reports_each_file_and_fails_if_one_is_bad(tmp_path: Path) -> None:
    (tmp_path / "good.yaml").write_text("tiers: [{store: full}]\n")
    (tmp_path / "bad.yaml").write_text("tiers:\n  - {stor: full}\n")
    result = run("validate", "good.yaml", "bad.yaml", "kivi", cwd=tmp_path)
    assert result.returncode == 2
    assert result.stdout.splitlines() == ["good.yaml: valid (good, tiers: 1)", "kivi: valid (kivi, tiers: 3)"]
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: bad.yaml:2: tiers[0].stor: unknown key 'stor' of a tier (did you mean 'store'?)")
    assert run("validate", "good.yaml", cwd=tmp_path).returncode == 0


def test_schema_is_json() -> None:
    result = run("schema")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["title"] == "kvpolicy recipe"


def test_plugins_lists_kind_distribution_version_file_and_options() -> None:
    result = run("plugins")
    assert result.returncode == 0, result.stderr
    (line,) = (line for line in result.stdout.splitlines() if line.startswith("policy") and " log " in line)
    for part in ("policy", "kvpolicy", kvpolicy.__version__, "kvpolicy_log.py", "budget=42"):
        assert part in line


BAD = [
    ("show", "logqant"),
    ("show", "logquant:window=0"),
    ("show", "logquant:windw=3"),
    ("show", "logquant:window"),
    ("show", "logquant:window=[1"),
    ("show", "logquant:window=!!python/name:os.system"),
    ("show", "missing.yaml"),
    ("show", "."),
    ("show", "a" * 5000),
    ("show", ""),
    ("validate", "logquant:nbits=7"),
    ("show", "full", "--tokens", "9999", "--plot", "x.png"),
    ("show", "full", "--tokens", "-1"),
    ("nonsense",),
    ("compare", "h2o", "--unattached"),
    ("generate", "--recipe", "zipcache", "--prompt", "import os", "--unattached"),
]


@pytest.mark.parametrize("arguments", BAD, ids=[" ".join(a)[:40] for a in BAD])
def test_bad_input_is_exit_status_2_and_one_message(
    arguments: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["kvpolicy", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.strip()


def test_an_error_has_no_traceback(tmp_path: Path) -> None:
    result = run("show", "logqant", cwd=tmp_path)
    assert result.returncode == 2
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: no recipe 'logqant' (did you mean 'logquant'?)")


def test_what_attention_chooses_is_not_shown_as_known(tmp_path: Path) -> None:
    result = run("show", "h2o", "--tokens", "300", "--plot", str(tmp_path / "h2o.png"), cwd=tmp_path)
    assert result.returncode == 0
    rows = [line for line in result.stderr.splitlines() if line.startswith(("0 ", "1 "))]
    assert rows[0].rstrip().endswith("270 to 299")
    assert rows[1].rstrip().endswith("by attention")
    assert (tmp_path / "h2o.png").stat().st_size > 1000
