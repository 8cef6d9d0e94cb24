"""The study of a search in Optuna, in memory or in a directory from which the same search goes on."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from kvpolicy.errors import CompareError, MissingDependencyError
from kvpolicy.experiment.lock import locked
from kvpolicy.hf.fingerprint import Fingerprint, differences
from kvpolicy.recipe.yaml import path_text
from kvpolicy.words import clip, in_line, in_words

JOURNAL, ABOUT = "study.journal", "study.json"
"""Optuna's log of all trials, and what was searched."""
POPULATION = 20
"""Of NSGA-II."""
RECORD = "record"
"""The attribute of a trial that holds what kvpolicy knows of it."""
SEEDS = 1 << 32
"""numpy takes no greater ones."""
_SHOWN = 3
"""Differences of two spaces that an error names."""


@contextmanager
def open_study(directory: Path | None, about: dict[str, Any], bits: float | None, seed: int) -> Iterator[Any]:
    """A study of Optuna: new, or that of the same search in `directory`.

    Args:
        directory: where it is kept; None keeps it in memory.
        about: what is searched, as JSON; a study of something else is refused.
        bits: the budget, with which KL is minimised by TPE under a constraint; without it KL and bits by NSGA-II.
        seed: of the sampler; a study that goes on draws other numbers than it began with.

    Raises:
        CompareError: the directory holds another search, a damaged one, or one that is running, or can't be written.
        MissingDependencyError: Optuna can't be imported.
    """
    try:
        import optuna
    except ImportError as error:  # what it needs is missing
        raise MissingDependencyError(f"Optuna can't be imported: {error}; pip install 'kvpolicy[tune]'") from error

    shown = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with ExitStack() as stack, warnings.catch_warnings():
            # Constraints and journals are called experimental by some releases.
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            storage = None
            if directory is not None:
                stack.enter_context(locked(directory, "a search"))
                _check_same(directory, about)
                storage = _storage(directory)
            study = _study(storage, directory, bits)
            before = study.get_trials(deepcopy=False)
            for trial in before:
                if trial.state == optuna.trial.TrialState.RUNNING:  # was killed
                    study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
            study.sampler = _sampler(bits, (seed + len(before)) % SEEDS)
            yield study
    except OSError as error:
        raise CompareError(f"{in_line(directory)}: the study can't be read or written: {error}") from error
    finally:
        optuna.logging.set_verbosity(shown)


def set_constraint(trial: Any, excess: float) -> None:
    """Tell the sampler by how much a trial breaks the budget. Before Optuna 5 it reads the record."""
    if hasattr(trial, "set_constraint"):
        trial.set_constraint("bits", excess)


def _study(storage: Any, directory: Path | None, bits: float | None) -> Any:
    import optuna

    try:
        return optuna.create_study(
            storage=storage,
            study_name="tune",
            directions=["minimize"] if bits is not None else ["minimize", "minimize"],
            pruner=optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=1),
            load_if_exists=True,
        )
    except OSError:
        raise
    except Exception as error:  # whatever a damaged log leads to
        raise CompareError(
            f"{in_line(directory)}: {JOURNAL} can't be read: {type(error).__name__}: {clip(str(error), 200)}; "
            "choose another directory (--out), or remove this one"
        ) from error


def _sampler(bits: float | None, seed: int) -> Any:
    import optuna

    if bits is None:
        return optuna.samplers.NSGAIISampler(population_size=POPULATION, seed=seed)
    if hasattr(optuna.trial.Trial, "set_constraint"):
        return optuna.samplers.TPESampler(seed=seed)
    return optuna.samplers.TPESampler(seed=seed, constraints_func=lambda trial: [trial.user_attrs[RECORD]["excess"]])


def _storage(directory: Path) -> Any:
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    journal = directory / JOURNAL
    (directory / f"{JOURNAL}.lock").unlink(missing_ok=True)  # of a process that was killed: this one has the directory
    if journal.exists():
        raw = journal.read_bytes()
        whole = raw.rfind(b"\n") + 1
        if whole < len(raw):  # a line that was being written then
            os.truncate(journal, whole)
    try:
        return JournalStorage(JournalFileBackend(str(journal)))
    except OSError:
        raise
    except Exception as error:
        raise CompareError(
            f"{in_line(directory)}: {JOURNAL} can't be read: {type(error).__name__}: {clip(str(error), 200)}; "
            "choose another directory (--out), or remove this one"
        ) from error


def _check_same(directory: Path, about: dict[str, Any]) -> None:
    """Refuse the study of another search; of a new one write down what it is."""
    file, name = directory / ABOUT, clip(str(directory), 300)
    if file.exists():
        try:
            saved = json.loads(file.read_text(encoding="utf-8"))
            told = _differences(saved, about)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CompareError(
                f"{name}: {ABOUT} can't be read: {type(error).__name__}: {clip(str(error), 200)}; choose another "
                "directory (--out), or remove this one"
            ) from error
        if told:
            raise CompareError(
                f"{name}: the directory holds another search: {'; '.join(told)}; choose another directory (--out), or "
                "repeat what it was begun with"
            )
        return
    if (directory / JOURNAL).exists():
        raise CompareError(f"{name}: the directory holds {JOURNAL} without {ABOUT}; choose another directory (--out)")
    write_text(file, json.dumps(about, indent=1, allow_nan=False))


def write_text(file: Path, text: str) -> None:
    """Write a file whole or not at all."""
    part = file.with_name(f".{file.name}.part")
    try:
        part.write_text(text + "\n", encoding="utf-8")
        os.replace(part, file)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise CompareError(f"{file}: the file can't be written: {error}") from error


def _differences(saved: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """What tells two searches apart, in words."""
    told = []
    old, new = (dict(_leaves(x["space"])) for x in (saved, found))
    paths = [path for path in dict.fromkeys([*old, *new]) if old.get(path, _NONE) != new.get(path, _NONE)]
    if paths:
        shown = ", ".join(path_text(path) for path in paths[:_SHOWN])
        more = f" and {len(paths) - _SHOWN} more" if len(paths) > _SHOWN else ""
        told.append(f"the space differs at {shown}{more}")
    there, here = (Fingerprint(x["model"]["config"], x["model"]["weights"]) for x in (saved, found))
    others = differences(there, here, saved["model"]["transformers"] == found["model"]["transformers"])
    told += [f"another model: {text.replace('in the file', 'there')}" for text in others[:_SHOWN]]
    settings, ours = saved["settings"], found["settings"]
    changed = [key for key in ours if settings.get(key) != ours[key]]
    told += [f"{key} is {_word(settings.get(key))} there and {_word(ours[key])} here" for key in changed]
    if saved["texts"] != found["texts"] and not {"tokens", "samples", "held_out"} & set(changed):
        told.append("the texts are others")
    return told


_NONE = object()


def _word(value: Any) -> str:
    return "not given" if value is None else in_words(value)


def _leaves(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    """Every plain value below `value`, with its path."""
    if isinstance(value, Mapping | list) and value:
        for key, item in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from _leaves(item, (*path, key))
    else:
        yield path, value
