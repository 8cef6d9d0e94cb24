"""An experiment made ready to run: its samples in tokens, its model, and what is recorded of both."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from kvpolicy.errors import CompareError
from kvpolicy.experiment.experiment import AGAIN, ATTENTION, EXACT, Experiment
from kvpolicy.experiment.run import encode
from kvpolicy.experiment.samples import Sample
from kvpolicy.experiment.store import Contents, Planned
from kvpolicy.experiment.tasks import load_task
from kvpolicy.experiment.work import Item
from kvpolicy.hf.fingerprint import fingerprint_of
from kvpolicy.hf.models import load_model
from kvpolicy.hf.source import source_of
from kvpolicy.recipe.load import Recipe, load_recipe
from kvpolicy.recipe.yaml import dump_yaml

Drawn = list[tuple[Planned, Sample]]


@dataclass(frozen=True)
class Prepared:
    """Everything that a run needs."""

    experiment: Experiment
    recipes: dict[str, Recipe]
    """The arms as they were given."""
    model: Any
    tokenizer: Any
    items: list[Item]
    bundled: bool
    facts: dict[str, Any]
    """Model, versions, samples and command, as results name them."""
    identity: dict[str, Any]
    """What the numbers depend on, but for whether the model is attached."""

    def all_arms(self) -> dict[str, Recipe]:
        """The arms, the exact cache first, and the A/A arm last."""
        full = load_recipe("full")
        return {EXACT: full, **self.recipes, **({AGAIN: full} if self.experiment.aa else {})}

    def contents(self, attached: bool) -> Contents:
        """What a store of it begins with."""
        e = self.experiment
        settings = {
            **self.facts,
            "attached": attached,
            "errors": bool(set(e.measures) & set(ATTENTION)),
            "metrics": list(e.measures),
            "margins": dict(e.margins),
            "batch": e.batch,
            "aa": AGAIN if e.aa else None,
            "experiment": declared_again(e, self.recipes),
        }
        arms = {name: recipe.to_yaml(resolved=True) for name, recipe in self.all_arms().items()}
        samples = [item.planned for item in self.items]
        return Contents({**self.identity, "attached": attached}, settings, arms, samples, e.baseline)


def draw(experiment: Experiment) -> Drawn:
    """The samples of all tasks. Of a file a row is used once, however many seeds draw it.

    Raises:
        TaskError: a task is unknown, or its file is not valid.
    """
    drawn: Drawn = []
    for task in experiment.tasks:
        seeds, label = task.seeds or experiment.seeds, experiment.label(task)
        tokens = task.tokens if task.tokens is not None else experiment.tokens
        known: set[tuple[str, str]] = set()
        for seed in seeds:
            for place, sample in enumerate(load_task(task.task, task.n or experiment.n, seed, tokens)):
                if (sample.prompt, sample.answer) in known and len(seeds) > 1:
                    continue
                known.add((sample.prompt, sample.answer))
                name = f"{place}" if len(seeds) == 1 else f"{seed}.{place}"
                drawn.append((Planned(label, name, sample.prompt, sample.answer), sample))
    return drawn


def early_identity(experiment: Experiment, recipes: dict[str, Recipe], drawn: Drawn) -> dict[str, Any]:
    """What numbers depend on as far as it is known without the model."""
    tasks = {}
    for task in experiment.tasks:
        label = experiment.label(task)
        texts = [(planned.prompt, planned.answer) for planned, _ in drawn if planned.task == label]
        seeds = ", ".join(map(str, task.seeds or experiment.seeds))
        tasks[label] = {"samples": len(texts), "seeds": seeds, "texts": _digest(repr(texts))}
    arms = {name: {"recipe": recipe.to_yaml(resolved=True), **_calibration(recipe)} for name, recipe in recipes.items()}
    order = ", ".join(arms)
    measured = ", ".join(experiment.measures)
    return {
        "arms": order,
        "tasks": ", ".join(tasks),
        "arm": arms,
        "task": tasks,
        "metrics": measured,
        "batch": experiment.batch,
        "A/A arm": experiment.aa,
    }


def prepare(
    experiment: Experiment,
    recipes: dict[str, Recipe],
    drawn: Drawn,
    model: Any = None,
    tokenizer: Any = None,
    command: str | None = None,
) -> Prepared:
    """Load the model, unless it is given, and put the samples into tokens.

    Raises:
        CompareError: the model can't be loaded, or a sample does not fit it.
    """
    bundled = model is None and experiment.model is None
    given, device = (experiment.source, None) if model is None else (model, experiment.device)
    loaded, tokenizer, shown = load_given(given, tokenizer, device)
    encoded = encode([sample for _, sample in drawn], tokenizer, loaded.config)
    items = [Item(planned, found) for (planned, _), found in zip(drawn, encoded, strict=True)]
    found = fingerprint_of(loaded)
    model_facts = {**about(loaded, shown), **_environment()}
    digests = {
        "config": _digest(repr(sorted(found.config.items()))),
        "weights": _digest(repr(sorted((found.weights or {}).items()))),
        "tokenizer": _tokenizer(tokenizer),
    }
    identity = early_identity(experiment, recipes, drawn)
    facts = {
        **model_facts,
        **_described(experiment, items),
        "digests": {**digests, "tasks": {task: said["texts"] for task, said in identity["task"].items()}},
        "template": None,
        "truncation": None,
        "command": command,
    }
    same = {"dtype": facts["dtype"], "device": loaded.device.type, "versions": facts["versions"]}
    return Prepared(
        experiment, recipes, loaded, tokenizer, items, bundled, facts, {**identity, **same, "model": digests}
    )


def _described(experiment: Experiment, items: Sequence[Item]) -> dict[str, Any]:
    """The tasks as results name them; where there is one, also by the words of `compare`."""
    tasks: list[dict[str, Any]] = []
    for task in experiment.tasks:
        label = experiment.label(task)
        tokens = task.tokens if task.tokens is not None else experiment.tokens
        n = sum(item.planned.task == label for item in items)
        seeds = list(task.seeds or experiment.seeds)
        tasks.append({"name": label, "task": task.task, "n": n, "tokens": tokens, "seeds": seeds})
    first = tasks[0]
    return {
        "task": ", ".join(str(task["name"]) for task in tasks),
        "n": len(items),
        "seed": first["seeds"][0] if len(first["seeds"]) == 1 else first["seeds"],
        "tokens": first["tokens"],
        "tasks": tasks,
    }


def declared_again(experiment: Experiment, recipes: dict[str, Recipe]) -> str:
    """The experiment as YAML that stands for itself: every recipe written out."""
    data = experiment.model_dump(mode="json", exclude={"arms"}, exclude_defaults=True)
    from kvpolicy.recipe.yaml import read_text

    arms = [{"name": name, "recipe": read_text(r.to_yaml(resolved=True), name).data} for name, r in recipes.items()]
    return dump_yaml({**data, "arms": arms})


def load_given(model: Any, tokenizer: Any, device: str | None) -> tuple[Any, Any, str]:
    """Model, tokenizer, and what the model is called."""
    if (source := source_of(model, device)) is not None:
        loaded, found = load_model(source)
        return loaded, tokenizer if tokenizer is not None else found, source.shown
    if device is not None:
        raise CompareError(f"device {device!r} is for a model given by its name; move a model of your own by model.to")
    if not hasattr(model, "config") or not callable(model):
        raise CompareError(
            f"model must be a causal language model of transformers or the name of one, found {type(model).__name__}"
        )
    if tokenizer is None:
        raise CompareError(
            "a model given as an object needs its tokenizer, found none; pass tokenizer=..., "
            "or the name of the model as model"
        )
    return model, tokenizer, str(getattr(model.config, "name_or_path", "") or type(model).__name__)


def about(model: Any, shown: str) -> dict[str, Any]:
    """A model and the versions of libraries, as results name them."""
    import torch
    import transformers

    return {
        "model": shown,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "versions": {
            "kvpolicy": version("kvpolicy"),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def _environment() -> dict[str, Any]:
    import torch

    cards = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"python": platform.python_version(), "system": platform.platform(), "gpus": cards}


def _digest(text: str | bytes) -> str:
    return hashlib.sha256(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _calibration(recipe: Recipe) -> dict[str, str]:
    """The digest of a calibration's file, if the recipe names one."""
    if not recipe.calibration:
        return {}
    try:
        return {"calibration": _digest(Path(recipe.calibration).read_bytes())}
    except OSError:  # said when its cache is made
        return {}


def _tokenizer(tokenizer: Any) -> str:
    """A digest of what a tokenizer does with a text: its words and its template."""
    words = sorted(tokenizer.get_vocab().items()) if hasattr(tokenizer, "get_vocab") else []
    return _digest(repr((words, getattr(tokenizer, "chat_template", None))))
