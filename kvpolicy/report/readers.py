"""Rows from elsewhere: CSV files, and the samples that lm-evaluation-harness logs."""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kvpolicy.errors import CompareError
from kvpolicy.statistics.rows import Evidence, Row
from kvpolicy.words import in_line, in_words, listed, quoted

NEEDED = ("arm", "task", "sample")
TEXTS = ("document", "prompt", "answer", "output", "error")
BASELINES = ("exact", "full", "baseline")
"""Arms that are the baseline where nobody names one; else it is the first."""
_SAMPLES = re.compile(r"samples_(?P<task>.+)_(?P<date>\d{4}-\d\d-\d\dT\d\d-\d\d-\d\d(\.\d+)?)\.jsonl")
_LONGEST = 1 << 24
"""Characters of a field or a line."""


def is_lm_eval(path: Path) -> bool:
    """Whether a path is a file of `--log_samples`, or a directory that holds some."""
    if path.is_dir():
        return next(_sample_files(path), None) is not None
    return path.suffix == ".jsonl"


def read_csv(path: Path) -> Evidence:
    """Rows of a CSV file, or of a compressed one (.csv.gz).

    Its columns are `arm`, `task`, `sample`, and `score` or another metric.

    `document`, `prompt`, `answer`, `output` and `error` may stand beside them. Any other column is a metric if it
    holds numbers, else a fact. An empty cell is a missing value.

    Raises:
        CompareError: the file can't be read, or a line is not valid; the message names it.
    """
    rows: list[Row] = []
    seen: dict[tuple[str, str, str], int] = {}
    with _opened(path) as file:
        reader = csv.DictReader(file, strict=True)
        try:
            names = [name.strip() for name in reader.fieldnames or ()]
            _check_header(path, names)
            reader.fieldnames = names
            for cells in reader:
                row = _row_of(f"{in_line(path)}, line {reader.line_num}", cells)
                key = (row.arm, row.task, row.sample)
                if key in seen:
                    raise CompareError(
                        f"{in_line(path)}, line {reader.line_num}: an arm must have one row for each sample of a task, "
                        f"found arm {quoted(row.arm)}, task {quoted(row.task)}, sample {quoted(row.sample)} in line "
                        f"{seen[key]}, too; remove one"
                    )
                seen[key] = reader.line_num
                rows.append(row)
        except (csv.Error, UnicodeError, EOFError, OSError) as error:
            raise CompareError(
                f"{in_line(path)}, line {reader.line_num + 1}: the file must be CSV in UTF-8, found {error}; "
                "export it again"
            ) from None
    if not rows:
        raise CompareError(f"{in_line(path)}: the file must have a line for each arm and sample, found none")
    return Evidence(_metrics_alike(rows), _arms(rows), default_baseline(_arms(rows)), settings={"source": path.name})


def read_lm_eval(path: Path, arm: str, document: str | None = None) -> Evidence:
    """Rows of `samples_<task>_<date>.jsonl`, which `lm_eval --log_samples` writes; of a directory, all tasks in it.

    Metrics have the harness's names, and after a comma that of the filter, unless it is `none`: `acc`,
    `exact_match,strict-match`. Log-likelihoods of `perplexity` and `*_perplexity` become `nll`. Of several files of a
    task the newest is read, as the harness does.

    Args:
        path: a file or a directory.
        arm: the name of the arm that made them.
        document: the field of each `doc` that tells which document it is about; None: samples share none.

    Raises:
        CompareError: a file can't be read, or a line is not valid; the message names it.
    """
    files = dict(_newest(path)) if path.is_dir() else {_task_of(path): path}
    rows: list[Row] = []
    for task, file in files.items():
        merged: dict[str, Row] = {}
        for place, record in _records(file):
            row = _logged(place, record, arm, task, document)
            before = merged.get(row.sample)
            if before is not None and (clash := set(before.metrics) & set(row.metrics)):
                raise CompareError(
                    f"{place}: a sample must have one line for each filter, found {sorted(clash)[0]} of doc_id "
                    f"{row.sample} twice; the file was written twice, so run the task again"
                )
            metrics = {**(before.metrics if before else {}), **row.metrics}
            first = before or row
            merged[row.sample] = Row(
                arm, task, row.sample, metrics, row.document, first.facts, first.prompt, first.answer, first.output
            )
        rows += merged.values()
    settings = {"source": path.name, "files": [file.name for file in files.values()], **_configuration(files.values())}
    return Evidence(tuple(rows), {arm: None}, arm, settings=settings)


def default_baseline(arms: Mapping[str, Any]) -> str:
    """`exact`, `full` or `baseline` if there is such an arm, else the first."""
    return next((arm for arm in BASELINES if arm in arms), next(iter(arms)))


def _opened(path: Path) -> Any:
    try:
        if path.suffix == ".gz":
            return gzip.open(path, "rt", encoding="utf-8-sig", newline="")
        return path.open(encoding="utf-8-sig", newline="")
    except OSError as error:
        raise CompareError(f"{in_line(path)}: the file can't be read: {error.strerror or error}") from None


def _check_header(path: Path, names: list[str]) -> None:
    missing = [name for name in NEEDED if name not in names]
    if missing or len(set(names)) < len(names) or not set(names) - {*NEEDED, *TEXTS}:
        found = listed([name or "(empty)" for name in names]) or "an empty file"
        raise CompareError(
            f"{in_line(path)}, line 1: the header must name arm, task, sample and score, each once, found {found}; add "
            "the columns, or name them so"
        )


def _row_of(place: str, cells: Mapping[Any, Any]) -> Row:
    if None in cells or None in cells.values():
        raise CompareError(
            f"{place}: a line must have as many cells as the header, found more or fewer; quote commas in texts"
        )
    found = {name: value.strip() if name not in TEXTS else value for name, value in cells.items()}
    for name in NEEDED:
        if not found[name]:
            raise CompareError(f"{place}: {name} must not be empty; fill it in, or remove the line")
    rest = {name: value for name, value in found.items() if name not in (*NEEDED, *TEXTS) and value}
    metrics = {name: number for name, value in rest.items() if (number := _number(value)) is not None}
    if "score" in rest and "score" not in metrics:
        raise CompareError(
            f"{place}: score must be a finite number, found {in_words(rest['score'])}; leave it empty if there is none"
        )
    texts = {name: found.get(name) or None for name in TEXTS}
    facts = {name: value for name, value in rest.items() if name not in metrics}
    if texts["error"]:
        metrics = {}
    return Row(found["arm"], found["task"], found["sample"], metrics, facts=facts, **texts)


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) and "_" not in text else None


def _metrics_alike(rows: list[Row]) -> tuple[Row, ...]:
    """A column that holds a word somewhere holds facts everywhere."""
    words = {name for row in rows for name in row.facts}
    return tuple(
        Row(
            row.arm,
            row.task,
            row.sample,
            {name: value for name, value in row.metrics.items() if name not in words},
            row.document,
            {**row.facts, **{name: value for name, value in row.metrics.items() if name in words}},
            row.prompt,
            row.answer,
            row.output,
            row.error,
        )
        for row in rows
    )


def _arms(rows: list[Row]) -> dict[str, None]:
    return dict.fromkeys(row.arm for row in rows)


def _sample_files(directory: Path) -> Iterator[Path]:
    return (file for file in sorted(directory.rglob("samples_*.jsonl")) if _SAMPLES.fullmatch(file.name))


def _newest(directory: Path) -> Iterator[tuple[str, Path]]:
    """Tasks and files; the newest of a task comes last. Those of two directories are of two runs."""
    parents: dict[str, Path] = {}
    for file in sorted(_sample_files(directory), key=lambda file: _SAMPLES.fullmatch(file.name)["date"]):  # type: ignore[index]
        task = _task_of(file)
        if parents.setdefault(task, file.parent) != file.parent:
            raise CompareError(
                f"{in_line(directory)}: a run must hold the samples of one model, found those of task {quoted(task)} "
                f"in {parents[task].name} and {file.parent.name}; give each of these directories as NAME=DIRECTORY"
            )
        yield task, file


def _task_of(file: Path) -> str:
    match = _SAMPLES.fullmatch(file.name)
    return match["task"] if match else file.stem.removeprefix("samples_")


def _records(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    number = 0
    with _opened(path) as file:
        try:
            for number, line in enumerate(file, 1):
                place = f"{in_line(path)}, line {number}"
                if line.strip():
                    yield place, _record(place, line)
        except UnicodeError as error:
            raise CompareError(f"{in_line(path)}, line {number + 1}: the file must be UTF-8, found {error}") from None
    if not number:
        raise CompareError(
            f"{in_line(path)}: the file must have a line for each sample, found none; was the run cut short?"
        )


def _record(place: str, line: str) -> Mapping[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        raise CompareError(
            f"{place}: each line must be a JSON object, found {in_words(line.strip())}; a run that was cut short ends "
            "so: remove the line"
        ) from None
    if not isinstance(record, dict) or not isinstance(record.get("doc_id"), int | str):
        raise CompareError(
            f"{place}: each line must be an object with doc_id and metrics, as lm_eval --log_samples writes, found "
            f"{in_words(record)}; other tables are read as CSV"
        )
    return record


_KNOWN = {
    "doc_id", "doc", "target", "arguments", "resps", "filtered_resps", "filter", "metrics", "doc_hash", "prompt_hash",
    "target_hash",
}  # fmt: skip


def _logged(place: str, record: Mapping[str, Any], arm: str, task: str, document: str | None) -> Row:
    names = record.get("metrics")
    if not isinstance(names, list):  # of older releases of the harness
        names = [name for name in record if name not in _KNOWN]
    suffix = "" if record.get("filter", "none") == "none" else f",{record['filter']}"
    metrics = {}
    for name in names:
        found = _measured(str(name), record.get(name))
        if found is not None:
            metrics[found[0] + suffix] = found[1]
    if not metrics:
        said = listed(list(map(str, names))) or "none"
        raise CompareError(
            f"{place}: a sample must have a metric that is a finite number, found {said}; "
            "corpus-level metrics (BLEU, F1 over a split) can't be paired, so choose a task that scores samples"
        )
    arguments, prompt = record.get("arguments"), None
    if isinstance(arguments, dict) and arguments:
        first = next(iter(arguments.values()))
        prompt = first.get("arg_0") if isinstance(first, dict) else None
    facts = {name: record[name] for name in ("doc_hash", "prompt_hash") if record.get(name)}
    target = record.get("target")
    return Row(
        arm,
        task,
        str(record["doc_id"]),
        metrics,
        None if document is None else _document(place, record, document),
        facts,
        prompt if isinstance(prompt, str) else None,
        None if target is None else str(target),
        _output(record),
    )


def _document(place: str, record: Mapping[str, Any], field: str) -> str:
    doc = record.get("doc")
    if not isinstance(doc, dict) or doc.get(field) is None:
        known = listed(list(doc)) if isinstance(doc, dict) else "none"
        raise CompareError(f"{place}: --document must be a field of each doc, found {quoted(field)}; it has {known}")
    text = str(doc[field])
    return text if len(text) <= 64 else f"{text[:40]}... {hashlib.sha256(text.encode()).hexdigest()[:12]}"


def _measured(name: str, value: Any) -> tuple[str, float] | None:
    """A metric of a sample. The harness logs log-likelihoods, and their number of words or bytes, as perplexities."""
    if isinstance(value, list) and len(value) == 2 and all(isinstance(v, int | float) for v in value) and value[1]:
        found = -float(value[0]) / float(value[1])
        if name.endswith("_perplexity"):
            name = f"{name.removesuffix('_perplexity')}_nll"
        elif name == "bits_per_byte":
            found /= math.log(2)
        else:
            return None
        return (name, found) if math.isfinite(found) else None
    if not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return ("nll", -float(value)) if name == "perplexity" else (name, float(value))


def _output(record: Mapping[str, Any]) -> str | None:
    """What was generated; None where texts were rated."""
    arguments = record.get("arguments")
    first = next(iter(arguments.values()), None) if isinstance(arguments, dict) else None
    if not isinstance(first, dict) or not isinstance(first.get("arg_1"), dict):
        return None
    found = record.get("resps")
    while isinstance(found, list) and len(found) == 1:
        found = found[0]
    return found if isinstance(found, str) else None


def _configuration(files: Any) -> dict[str, Any]:
    """What the results beside the samples say of the run, if they are there."""
    kept: dict[str, Any] = {}
    for file in files:
        match = _SAMPLES.fullmatch(file.name)
        beside = file.with_name(f"results_{match['date']}.json") if match else file
        if match and beside.is_file():
            try:
                results = json.loads(beside.read_text(encoding="utf-8"))
            except (OSError, ValueError):
                continue
            if isinstance(results, dict):
                kept |= {name: results[name] for name in _RECORDED if results.get(name) is not None}
    return kept


_RECORDED = (
    "config", "model_name", "model_source", "git_hash", "date", "transformers_version", "lm_eval_version",
    "chat_template_sha", "system_instruction", "fewshot_as_multiturn", "n-shot", "versions",
)  # fmt: skip
