"""An experiment that workers run. This process draws the samples and keeps the rows; it never loads the weights."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from kvpolicy.errors import CompareError
from kvpolicy.experiment.bench import Job, Terms
from kvpolicy.experiment.engines import Engine
from kvpolicy.experiment.experiment import Experiment
from kvpolicy.experiment.pool import Dispatcher, Pool
from kvpolicy.experiment.prepared import Prepared, Work, all_arms, put_together
from kvpolicy.experiment.work import Labour, units
from kvpolicy.hf.models import load_config
from kvpolicy.hf.source import ModelSource
from kvpolicy.recipe.load import Recipe


def check_workers(experiment: Experiment, model: Any, tokenizer: Any) -> None:
    """Refuse what workers can't be given.

    Raises:
        CompareError: the model or its tokenizer is an object.
        MissingDependencyError: the engine is not installed.
    """
    assert experiment.engine is not None
    given = model if model is not None else tokenizer
    if given is not None:
        raise CompareError(
            "the workers of an engine load the model and its tokenizer themselves, so both must be given by their "
            f"names, found a {type(given).__name__}; save it (save_pretrained) and name the directory, or leave the "
            "engine out"
        )
    if experiment.engine.name == "ray":
        from kvpolicy.arguments import check_ray

        check_ray()
    else:
        from kvpolicy.experiment.local import refuse_within_worker

        refuse_within_worker()


@contextmanager
def elsewhere(
    experiment: Experiment, recipes: dict[str, Recipe], command: str | None
) -> Iterator[tuple[Prepared, bool, Labour]]:
    """An experiment that is ready, whether its workers' models are attached, and what runs its units.

    Raises:
        CompareError: workers can't be started, the model can't be loaded there, or a sample does not fit it.
        RecipeError: a recipe does not fit the model, or its plugin is not installed where workers run.
    """
    engine = experiment.engine
    assert engine is not None
    source = _absolute(experiment.source)
    config, tokenizer = load_config(source)
    work = Work.of(experiment, tokenizer, config)
    arms = {name: _written(recipe) for name, recipe in all_arms(experiment, recipes).items()}
    with _open_pool(engine, Job(source, arms, Terms.of(experiment), engine.cpus)) as pool:
        dispatcher = Dispatcher(pool)
        seen = dispatcher.begin(len(units(work.items, experiment.batch)))
        ready = put_together(experiment, recipes, work, seen, command, model=None, bundled=source.bundled)
        yield ready, seen["attached"], dispatcher.labour


def _open_pool(engine: Engine, job: Job) -> AbstractContextManager[Pool]:
    if engine.name == "ray":
        from kvpolicy.experiment.cluster import open_cluster

        return open_cluster(engine, job)
    from kvpolicy.experiment.local import open_local

    return open_local(engine, job)


def _absolute(source: ModelSource) -> ModelSource:
    """The same for a process in another directory."""
    return replace(source, name=_path(source.name), tokenizer=_path(source.tokenizer))


def _path(name: str | os.PathLike[str] | None) -> str | None:
    if name is None:
        return None
    return os.path.abspath(name) if Path(name).exists() else os.fspath(name)


def _written(recipe: Recipe) -> str:
    if recipe.calibration:
        recipe = recipe.model_copy(update={"calibration": os.path.abspath(recipe.calibration)})
    return recipe.to_yaml(resolved=True)
