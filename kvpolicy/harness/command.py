"""lm-evaluation-harness's own command, with a recipe."""

from __future__ import annotations

import hashlib
import io
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

from kvpolicy.arguments import check_directory
from kvpolicy.errors import CompareError, KvpolicyError
from kvpolicy.harness import NAME, register
from kvpolicy.hf.source import BUNDLED, ModelSource
from kvpolicy.recipe.load import load_recipe
from kvpolicy.words import clip, in_line, quoted


def evaluate(recipe: str, source: ModelSource, arguments: Sequence[str]) -> None:
    """Run lm-evaluation-harness as its command would, with a model that reads a cache of a recipe.

    Args:
        recipe: what `load_recipe` takes.
        source: the model, unless the arguments name one.
        arguments: those of `lm_eval run`.

    Raises:
        MissingDependencyError: lm-evaluation-harness is not installed, or too old.
        CompareError: the arguments don't go together, or the harness fails.
    """
    register()
    load_recipe(recipe)  # what is wrong with it is said at once
    from lm_eval._cli import HarnessCLI
    from lm_eval.utils import setup_logging

    words = list(arguments[1:] if arguments and arguments[0] == "run" else arguments)
    with _shell(["lm_eval", "run", *words]):
        setup_logging()
        harness = HarnessCLI()
        asked = _parsed(harness)
        results = _complete(asked, recipe, source)
        before = _results_in(results)
        try:
            harness.execute(asked)
        except (KvpolicyError, OSError):
            raise
        except Exception as error:
            message = f"{type(error).__name__}: {clip(str(error).strip(), 600)}"
            raise CompareError(f"lm-evaluation-harness: {message}") from error
        first = os.environ.get("RANK", "0") == "0"  # of several processes one writes
        if results is not None and first and not _results_in(results) - before:
            raise CompareError(f"{in_line(results)}: the harness wrote no results there; its log above says why")


def _parsed(harness: Any) -> Any:
    """What its arguments say; of those it refuses its last line, without its usage."""
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            return harness.parse_args()
    except SystemExit as stop:
        last = said.getvalue().strip().rpartition("\n")[2]
        if not stop.code:
            raise
        raise CompareError(f"lm-evaluation-harness: {clip(last.partition('error: ')[2] or last, 600)}") from None


def _complete(asked: Any, recipe: str, source: ModelSource) -> Path | None:
    """Add the model class and its arguments to what was parsed; returns where results are to be written."""
    written = _written(asked.config) if asked.config else {}
    model = asked.model or written.get("model")
    if model not in (None, NAME):
        raise CompareError(f"kvpolicy lm-eval runs the model class {NAME!r}, found --model {model}; leave it out")
    given = {**_as_mapping(written.get("model_args")), **(asked.model_args or {})}
    if given.get("recipe", recipe) != recipe:
        raise CompareError(f"a recipe is given once, found --recipe {recipe} and recipe={given['recipe']}")
    ours = _model_args(source)
    if "pretrained" in given and len(ours) > (not source.bundled):
        name = next(iter(ours))
        raise CompareError(f"the model is given once, found pretrained={given['pretrained']} and {name}={ours[name]}")
    twice = sorted(given.keys() & ours.keys())
    if twice:
        raise CompareError(f"an argument is given once, found {twice[0]} in --model_args and before --")
    results, kept = (getattr(asked, name) or written.get(name) for name in ("output_path", "use_cache"))
    _check_outputs(results, kept)
    asked.model = NAME
    asked.model_args = {"pretrained": str(BUNDLED), **ours, **given, "recipe": recipe}
    if kept:
        # The harness knows an answer by its question alone, and would give that of another recipe.
        about = [load_recipe(recipe).to_yaml(), {name: str(value) for name, value in sorted(asked.model_args.items())}]
        asked.use_cache = f"{kept}-{hashlib.sha256(json.dumps(about).encode()).hexdigest()[:12]}"
    return Path(str(results)) if results else None


def _check_outputs(results: Any, answers: Any) -> None:
    """Refuse what can't be written: the harness would find it in the end, say so in its log alone, and lose all."""
    if results:
        path = Path(str(results))
        check_directory(path.parent if path.suffix == ".json" else path)
    if answers:
        check_directory(Path(str(answers)).parent)


def _results_in(path: Path | None) -> set[Path]:
    """Files of results, where the harness writes them."""
    if path is None:
        return set()
    return set(path.parent.glob("*.json") if path.suffix == ".json" else path.glob("*/results_*.json"))


def _model_args(source: ModelSource) -> dict[str, Any]:
    """A model and how it is loaded, as arguments of HFLM."""
    found = {
        "pretrained": None if source.name is None else str(source.name),
        "tokenizer": None if source.tokenizer is None else str(source.tokenizer),
        "revision": source.revision,
        "dtype": source.dtype,
        "device": source.device,
        "trust_remote_code": source.trust_remote_code or None,
        **({} if source.device_map is None else {"parallelize": True, "device_map": source.device_map}),
    }
    return {name: value for name, value in found.items() if value is not None}


def _written(path: str) -> dict[str, Any]:
    from lm_eval.config.evaluate_config import EvaluatorConfig

    try:
        found: dict[str, Any] = EvaluatorConfig.load_yaml_config(path)
    except (OSError, ValueError, TypeError) as error:
        raise CompareError(f"--config {quoted(path)}: {clip(' '.join(str(error).split()), 300)}") from error
    return found


def _as_mapping(given: Any) -> dict[str, Any]:
    from lm_eval.utils import simple_parse_args_string

    return dict(simple_parse_args_string(given) if isinstance(given, str) else given or {})


@contextmanager
def _shell(words: list[str]) -> Iterator[None]:
    """The harness reads its arguments from `sys.argv`."""
    before, sys.argv = sys.argv, words
    try:
        yield
    finally:
        sys.argv = before
