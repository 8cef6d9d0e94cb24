"""Finds the task that a name or a path stands for, with options after a colon."""

from __future__ import annotations

import os
import re
from functools import lru_cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Final

from pydantic import ValidationError

from kvpolicy.errors import TaskError
from kvpolicy.tasks.benchmarks import Completion, Gsm8k, Ruler
from kvpolicy.tasks.files import JsonLines
from kvpolicy.tasks.lines import Arithmetic, Lines
from kvpolicy.tasks.longbench import LongBench
from kvpolicy.tasks.needles import Needle, Passkey
from kvpolicy.tasks.questions import Questions
from kvpolicy.tasks.recall import Copying, ToolCall, Turns
from kvpolicy.tasks.sample import Sample
from kvpolicy.tasks.source import Code
from kvpolicy.tasks.task import Generated, Task
from kvpolicy.tasks.texts import Text
from kvpolicy.tasks.tracking import CommonWords, FrequentWords, Variables
from kvpolicy.words import clip, listed, quoted, suggest

GROUP: Final = "kvpolicy.tasks"
"""Entry points that are tasks: subclasses of `Task`."""
BUILT_IN: Final[tuple[type[Task], ...]] = (
    Lines,
    Arithmetic,
    Code,
    Needle,
    Passkey,
    Variables,
    CommonWords,
    FrequentWords,
    Questions,
    Copying,
    Turns,
    ToolCall,
    Text,
    JsonLines,
    Gsm8k,
    LongBench,
    Ruler,
    Completion,
)
_OPTIONS = re.compile(r"(?s)(.+?):((?:[A-Za-z_]\w*\s*=.*)?)")


@lru_cache(maxsize=1)
def tasks() -> dict[str, type[Task]]:
    """All tasks by name: the built-in ones and those of entry points.

    Raises:
        TaskError: an entry point can't be loaded, is no task, or has the name of another.
    """
    found: dict[str, type[Task]] = {task.name: task for task in BUILT_IN}
    for point in entry_points(group=GROUP):
        home = f"{point.name!r} ({point.value})"
        try:
            task = point.load()
        except Exception as error:
            raise TaskError(
                f"task {home} must be loaded, found {type(error).__name__}: {error}; mend or uninstall its distribution"
            ) from error
        if not (isinstance(task, type) and issubclass(task, Task) and getattr(task, "name", None) == point.name):
            raise TaskError(f"task {home} must be a subclass of Task with name {point.name!r}, found {task!r:.80}")
        if point.name in found:
            raise TaskError(f"task {home} must have a name of its own, found another of that name; uninstall one")
        found[point.name] = task
    return found


def load_task(
    spec: str | os.PathLike[str] | Task, n: int, seed: int, tokens: int | None = None, tokenizer: Any = None
) -> list[Sample]:
    """Samples of a task, the same for the same arguments.

    Args:
        spec: a task; or in words `NAME:key=value,key=value`, or the path of a file of JSON Lines likewise.
        n: number of samples; of a file with fewer rows each is used once, with a warning.
        seed: of what is drawn.
        tokens: length of a generated sample where the task's own options don't give it; not used for files.
        tokenizer: of the model, in whose tokens lengths are counted and by whose template chats are rendered; None
            estimates lengths and renders no chat.

    Raises:
        TaskError: there is no such task, an option is not valid, or a file can't be used.
    """
    task = find_task(spec, tokens)
    _check_number(task, n)
    return task.samples(n, seed, tokenizer)


def check_task(spec: str | os.PathLike[str] | Task, n: int, tokens: int | None = None) -> Task:
    """The task that a spec stands for; what can't be right is refused before a model is loaded.

    Raises:
        TaskError: there is no such task, an option is not valid, its file can't be used, or samples would take hours.
    """
    task = find_task(spec, tokens)
    _check_number(task, n)
    task.check(n)
    return task


def _check_number(task: Task, n: int) -> None:
    if n < 0:
        raise TaskError(f"{task.name}: the number of samples must be at least 0, found {n}")


def find_task(spec: str | os.PathLike[str] | Task, tokens: int | None = None) -> Task:
    """The task that a spec stands for, its options checked; no sample is made.

    Raises:
        TaskError: there is no such task, or an option is not valid.
    """
    if isinstance(spec, Task):
        task = spec
    else:
        text = os.fspath(spec)
        name, given = _split(text)
        known = tasks()
        cls, options = known.get(name), _options(text, given)
        if cls is None:
            cls, options = JsonLines, {"path": _file(name), **options}
        task = _make(cls, text, options)
    if tokens is not None and isinstance(task, Generated) and "tokens" not in task.model_fields_set:
        return _make(type(task), task.name, {**task.model_dump(exclude_unset=True), "tokens": tokens})
    return task


def _make(cls: type[Task], spec: str, options: dict[str, Any]) -> Task:
    try:
        return cls.model_validate(options)
    except ValidationError as error:
        told = [_problem(cls, dict(problem)) for problem in error.errors(include_url=False)]
        raise TaskError(f"task {clip(spec, 300)}: {'; '.join(dict.fromkeys(told))}") from None


def _problem(cls: type[Task], problem: dict[str, Any]) -> str:
    name = str(problem["loc"][0]) if problem["loc"] else "its options"
    if problem["type"] == "extra_forbidden":
        known = list(cls.model_fields)
        return f"no option {quoted(name)}{suggest(name, known)}; there are {', '.join(known)}"
    if problem["type"] == "missing":
        return f"option {name!r} must be given; write {cls.name}:{name}=..."
    found = clip(str(problem["input"]), 80)
    bounds = {"less_than_equal": ("at most", "le"), "greater_than_equal": ("at least", "ge")}
    if problem["type"] in bounds:
        words, bound = bounds[problem["type"]]
        limit = problem["ctx"][bound]
        return f"{name} must be {words} {limit:{',' if isinstance(limit, int) else 'g'}}, found {found}"
    rule = str(problem["msg"]).replace("Input should be", "must be")
    return f"option {name!r} {rule[0].lower()}{rule[1:]}, found {found!r}"


def _split(spec: str) -> tuple[str, str]:
    """Name or path, and what follows the colon."""
    if spec in tasks() or _exists(spec):
        return spec, ""
    match = _OPTIONS.fullmatch(spec)
    if match:
        return match[1], match[2]
    for head, colon, tail in (spec.partition(":"), spec.rpartition(":")):
        if colon and (head in tasks() or _exists(head)):
            return head, tail
    return spec, ""


def _options(spec: str, text: str) -> dict[str, Any]:
    given: dict[str, Any] = {}
    for part in text.split(",") if text else ():
        name, equals, value = part.partition("=")
        name = name.strip()
        if not equals or not name or not value.strip():
            raise TaskError(
                f"task {clip(spec, 300)}: options are written NAME:key=value,key=value, found {quoted(part)}"
            )
        if name in given:
            raise TaskError(f"task {clip(spec, 300)}: an option may be given once, found {quoted(name)} twice")
        given[name] = value.strip()
    return given


def _file(name: str) -> str:
    if name.endswith((".jsonl", ".json", ".ndjson")) or _exists(name):
        return name
    known = tasks()
    raise TaskError(
        f"task must be one of {listed(list(known))} or the path of a JSON Lines file, found "
        f"{quoted(name)}{suggest(name, known)}"
    )


def _exists(name: str) -> bool:
    try:
        return Path(name).exists()
    except (OSError, ValueError):
        return False
