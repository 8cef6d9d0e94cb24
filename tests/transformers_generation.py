"""Run transformers' own generation tests with caches of kvpolicy in the place of DynamicCache.

Its tests are not in its wheel, so this needs a checkout; one of the installed release fits best:

    git clone --depth 1 --branch v5.24.0 https://github.com/huggingface/transformers /tmp/transformers
    pip install parameterized
    python tests/transformers_generation.py /tmp/transformers
    python tests/transformers_generation.py /tmp/transformers --families llama --arms full balanced-attached

The tests are those of `GenerationTesterMixin` in the test file of each family, but for those that choose a static or a
quantized cache. They run once as they are, which is the
control, and once per arm: there each `generate` that makes a DynamicCache of its own gets a cache of the recipe
instead, and the model is attached meanwhile where the arm says so. What fails in an arm and passes in the control is
listed by name, with the error. Attached models refuse to give attention weights with a compressed cache, so that the
tests which ask for them are listed; with --no-weights no test asks, and the rest of what they test is seen. The caches
are exchanged in the processes of this script only. Ends with 1 if anything
is listed.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

FAMILIES = ["llama", "mistral", "qwen3", "gemma3", "gpt2", "phi3"]
ARMS = ["full", "full-attached", "balanced", "balanced-attached"]
CONTROL = "DynamicCache"
OTHERS = ("static_cache", "quant_cache", "compil")
"""In the names of tests that choose another cache themselves, so that there is none to exchange."""


class Plugin:
    """Inside pytest: takes the tests of the mixin, exchanges the caches, and notes what became of each test."""

    def __init__(self, arm: str, out: Path, weights: bool = True) -> None:
        self.weights, self.exchanged = weights, 0
        self.recipe, _, attached = arm.partition("-")
        self.attached, self.out = bool(attached), out
        self.found: dict[str, list[str]] = {}
        self.control = arm == CONTROL
        if not self.control:
            self._exchange()

    def _exchange(self) -> None:
        from transformers import DynamicCache, GenerationMixin

        import kvpolicy
        from kvpolicy.hf.attach import is_attached
        from kvpolicy.hf.models import cache_word

        prepare, generate = GenerationMixin._prepare_cache_for_generation, GenerationMixin.generate

        @functools.wraps(prepare)
        def prepare_ours(model: Any, config: Any, kwargs: dict[str, Any], *args: Any, **options: Any) -> None:
            word = cache_word(model)
            given = kwargs.get(word)
            prepare(model, config, kwargs, *args, **options)
            made = kwargs.get(word)
            if made is not given and type(made) is DynamicCache and config.cache_implementation in (None, "dynamic"):
                kwargs[word] = kvpolicy.make_cache(self.recipe, model)
                self.exchanged += 1
                if getattr(config, "is_assistant", False) and hasattr(made, "activate_past_recording"):
                    kwargs[word].activate_past_recording()

        @functools.wraps(generate)
        def generate_attached(model: Any, *args: Any, **kwargs: Any) -> Any:
            attach = self.attached and not is_attached(model)
            with kvpolicy.attach(model) if attach else nullcontext():
                return generate(model, *args, **kwargs)

        GenerationMixin._prepare_cache_for_generation = prepare_ours
        GenerationMixin.generate = generate_attached

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        from tests.generation.test_utils import GenerationTesterMixin

        names = set(dir(GenerationTesterMixin))
        if not self.weights:
            for cls in {item.cls for item in items if getattr(item, "cls", None)}:
                cls.has_attentions = False

        def taken(item: Any) -> bool:
            name = getattr(item, "originalname", None) or item.name
            mixin = issubclass(item.cls or object, GenerationTesterMixin) and name in names
            return mixin and not any(other in name for other in OTHERS)

        dropped = [item for item in items if not taken(item)]
        config.hook.pytest_deselected(items=dropped)
        items[:] = [item for item in items if taken(item)]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            crash = getattr(report.longrepr, "reprcrash", None)
            self.found[report.nodeid.removeprefix("tests/models/")] = [
                report.outcome,
                crash.message if crash else str(report.longrepr or ""),
            ]

    def pytest_sessionfinish(self) -> None:
        assert self.control or self.exchanged, "no cache was exchanged"
        self.out.write_text(json.dumps(self.found, indent=1), encoding="utf-8")


def inside(options: argparse.Namespace) -> int:
    """Run one arm in this process."""
    checkout = options.checkout
    sys.path.insert(0, str(checkout))
    tests = [str(checkout / "tests" / "models" / family / f"test_modeling_{family}.py") for family in options.families]
    # Its conftest belongs to its own release; nothing in these tests needs it.
    given = [
        *("--rootdir", str(checkout), "--config-file", os.devnull, "--noconftest"),
        *("-p", "no:cacheprovider", "-q", "-W", "ignore"),
    ]
    plugin = Plugin(options.inside, options.out, options.weights)
    return int(pytest.main([*given, *options.pytest, *tests], plugins=[plugin]))


def outside(options: argparse.Namespace, arm: str, directory: Path) -> dict[str, dict[str, list[str]]]:
    """Run one arm in a process of its own; what became of each test of each family."""
    out = directory / f"{arm}.json"
    out.unlink(missing_ok=True)
    command = [sys.executable, __file__, str(options.checkout), "--inside", arm, "--out", str(out)]
    command += [] if options.weights else ["--no-weights"]
    command += ["--families", *options.families, *(f"--pytest={given}" for given in options.pytest)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    found: dict[str, list[str]] = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}
    families = {f: {name: x for name, x in found.items() if name.startswith(f"{f}/")} for f in options.families}
    for family, tests in families.items():
        if not any(outcome == "passed" for outcome, _ in tests.values()):
            sys.exit(f"{family}, {arm}: no test passed\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    return families


def counts(found: dict[str, list[str]]) -> str:
    outcomes = [outcome for outcome, _ in found.values()]
    return ", ".join(f"{outcomes.count(kind)} {kind}" for kind in ("passed", "failed", "skipped"))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("checkout", type=Path, help="a checkout of transformers")
    parser.add_argument("--families", nargs="+", default=FAMILIES, help="folders below tests/models")
    parser.add_argument("--arms", nargs="+", default=ARMS, help="RECIPE or RECIPE-attached")
    parser.add_argument("--no-weights", dest="weights", action="store_false", help="no test asks for attention weights")
    parser.add_argument("--out", type=Path, help="keep what became of each test in this directory, as JSON")
    parser.add_argument("--pytest", action="append", default=[], help="an option of pytest, such as --pytest=-kbeam")
    parser.add_argument("--inside", metavar="ARM", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.checkout = options.checkout.resolve()
    if not (options.checkout / "tests" / "generation" / "test_utils.py").is_file():
        parser.error(f"{options.checkout} must be a checkout of transformers, found no tests/generation/test_utils.py")
    return options


def main() -> int:
    options = parse()
    if options.inside:
        return inside(options)
    directory = options.out or Path(tempfile.mkdtemp(prefix="transformers-generation-"))
    directory.mkdir(parents=True, exist_ok=True)
    print(f"transformers {importlib.metadata.version('transformers')}, tests of {options.checkout}", flush=True)
    control = outside(options, CONTROL, directory)
    for family, tests in control.items():
        print(f"{family}, {CONTROL}: {counts(tests)}", flush=True)
    beyond = 0
    for arm in options.arms:
        print(flush=True)
        for family, tests in outside(options, arm, directory).items():
            new = {
                name: message
                for name, (outcome, message) in tests.items()
                if outcome == "failed" and control[family].get(name, ["passed"])[0] != "failed"
            }
            beyond += len(new)
            print(f"{family}, {arm}: {counts(tests)}; {len(new)} failed beyond {CONTROL}", flush=True)
            for name, message in new.items():
                print(f"  {name.partition('::')[2]}\n    {' '.join(message.split())[:300]}", flush=True)
    print(f"\n{beyond} failures beyond those of {CONTROL}; details in {directory}")
    return int(beyond > 0)


if __name__ == "__main__":
    sys.exit(main())
