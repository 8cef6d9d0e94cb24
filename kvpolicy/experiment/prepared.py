"""An experiment made ready to run: its samples in tokens, its model, and what is recorded of both."""

from __future__ import annotations

import hashlib
import json
import platform
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from kvpolicy.errors import CompareError
from kvpolicy.experiment.arms import Matching, Open
from kvpolicy.experiment.experiment import Experiment
from kvpolicy.experiment.matching import Counter, Lengths, bits_wanted, match
from kvpolicy.experiment.names import AGAIN, ATTENTION, EXACT
from kvpolicy.experiment.run import encode
from kvpolicy.experiment.store import Contents, Planned
from kvpolicy.experiment.work import Item
from kvpolicy.hf.fingerprint import fingerprint_of
from kvpolicy.hf.models import load_config, load_model
from kvpolicy.hf.source import source_of
from kvpolicy.planning.read import read_shape
from kvpolicy.recipe.load import Recipe, load_recipe
from kvpolicy.recipe.yaml import dump_yaml, read_text
from kvpolicy.tasks.load import load_task
from kvpolicy.tasks.sample import Sample

Drawn = list[tuple[Planned, Sample]]


@dataclass(frozen=True)
class Prepared:
    """Everything that a run needs."""

    experiment: Experiment
    recipes: dict[str, Recipe]
    """The arms as they were given."""
    model: Any
    """None where it is in workers."""
    tokenizer: Any
    items: list[Item]
    bundled: bool
    facts: dict[str, Any]
    """Model, versions, samples and command, as results name them."""
    identity: dict[str, Any]
    """What the numbers depend on, but for whether the model is attached."""

    def all_arms(self) -> dict[str, Recipe]:
        """The arms, the exact cache first, and the A/A arm last."""
        return all_arms(self.experiment, self.recipes)

    def contents(self, attached: bool) -> Contents:
        """What a store of it begins with."""
        e = self.experiment
        settings = {
            **self.facts,
            "attached": attached,
            "errors": bool(set(e.measures) & set(ATTENTION)),
            "metrics": list(e.measures),
            "margins": e.all_margins(),
            "batch": e.batch,
            "aa": AGAIN if e.aa else None,
            "engine": None if e.engine is None else e.engine.model_dump(exclude_none=True),
            "experiment": declared_again(e, self.recipes),
            **({} if e.matching is None else {"match": e.matching.plain()}),
        }
        arms = {name: recipe.to_yaml(resolved=True) for name, recipe in self.all_arms().items()}
        samples = [item.planned for item in self.items]
        return Contents({**self.identity, "attached": attached}, settings, arms, samples, e.baseline)


def match_arms(
    experiment: Experiment, opened: list[Open], beside: dict[str, Recipe], model: Any = None, tokenizer: Any = None
) -> Matching:
    """Choose the open parameters of arms by the bits that they come to on the experiment's samples. No weight is read.

    Raises:
        CompareError: an arm can't come near enough, or a sample does not fit the model.
    """
    config = getattr(model, "config", None)
    if model is None:
        config, own = load_config(experiment.source)
        tokenizer = own if tokenizer is None else tokenizer
    if config is None or tokenizer is None:
        load_given(model, tokenizer, None)  # says what is missing
    drawn = draw(experiment, tokenizer)
    encoded = encode([sample for _, sample in drawn], tokenizer, config)
    lengths = Lengths.of((planned.task, item) for (planned, _), item in zip(drawn, encoded, strict=True))
    dtype = None if model is None else str(model.dtype).removeprefix("torch.")
    counter = Counter(read_shape(config, dtype), lengths, experiment.attach)
    return match(opened, beside, counter, bits_wanted(experiment.match))


def all_arms(experiment: Experiment, recipes: Mapping[str, Recipe]) -> dict[str, Recipe]:
    """Recipes by arm, the exact cache first, and the A/A arm last."""
    full = load_recipe("full")
    return {EXACT: full, **recipes, **({AGAIN: full} if experiment.aa else {})}


def draw(experiment: Experiment, tokenizer: Any) -> Drawn:
    """The samples of all tasks. Of a file a row is used once, however many seeds draw it.

    Raises:
        TaskError: an option of a task does not fit, or its file can't be used.
    """
    drawn: Drawn = []
    for task in experiment.tasks:
        seeds, label = task.seeds or experiment.seeds, experiment.label(task)
        known: set[tuple[str, str]] = set()
        for seed in seeds:
            n, tokens = experiment.size(task)
            with warnings.catch_warnings():  # that a file has fewer rows was said when it was checked
                warnings.filterwarnings("ignore", message=".*fewer than the")
                samples = load_task(task.task, n, seed, tokens, tokenizer)
            for place, sample in enumerate(samples):
                if (sample.prompt, sample.answer) in known and len(seeds) > 1:
                    continue
                known.add((sample.prompt, sample.answer))
                name = f"{place}" if len(seeds) == 1 else f"{seed}.{place}"
                facts = json.loads(json.dumps(dict(sample.facts), default=str))
                drawn.append((Planned(label, name, sample.prompt, sample.answer, sample.document, facts), sample))
    return drawn


def early_identity(experiment: Experiment, recipes: dict[str, Recipe]) -> dict[str, Any]:
    """What numbers depend on as far as it is known without the model."""
    tasks = {}
    for task in experiment.tasks:
        n, tokens = experiment.size(task)
        seeds = ", ".join(map(str, task.seeds or experiment.seeds))
        tasks[experiment.label(task)] = {"of": shown_task(task.task), "n": n, "tokens": tokens, "seeds": seeds}
    arms = {name: {"recipe": recipe.to_yaml(resolved=True), **_calibration(recipe)} for name, recipe in recipes.items()}
    return {
        "arms": ", ".join(arms),
        "tasks": ", ".join(tasks),
        "arm": arms,
        "task": tasks,
        "metrics": ", ".join(experiment.measures),
        "batch": experiment.batch,
        "A/A arm": experiment.aa,
    }


def prepare(
    experiment: Experiment,
    recipes: dict[str, Recipe],
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
    work = Work.of(experiment, tokenizer, loaded.config)
    seen = seen_of(loaded, tokenizer, shown)
    return put_together(experiment, recipes, work, seen, command, model=loaded, bundled=bundled)


@dataclass(frozen=True)
class Work:
    """The samples of an experiment, and the tokenizer that put them into tokens."""

    drawn: Drawn
    items: list[Item]
    tokenizer: Any

    @classmethod
    def of(cls, experiment: Experiment, tokenizer: Any, config: Any) -> Work:
        """Draw the samples, and encode them for a model with this config."""
        drawn = draw(experiment, tokenizer)
        encoded = encode([sample for _, sample in drawn], tokenizer, config)
        return cls(drawn, [Item(p, found) for (p, _), found in zip(drawn, encoded, strict=True)], tokenizer)


def seen_of(model: Any, tokenizer: Any, shown: str) -> dict[str, Any]:
    """What a process that has the model says of it: `facts`, and `same`, on which numbers depend. Plain data."""
    found, facts = fingerprint_of(model), about(model, shown)
    digests = {
        "config": _digest(repr(sorted(found.config.items()))),
        "weights": _digest(repr(sorted((found.weights or {}).items()))),
        "tokenizer": _tokenizer(tokenizer),
    }
    same = {"dtype": facts["dtype"], "device": model.device.type, "versions": facts["versions"], "model": digests}
    return {"facts": {**facts, **_environment()}, "same": same}


def put_together(
    experiment: Experiment,
    recipes: dict[str, Recipe],
    work: Work,
    seen: Mapping[str, Any],
    command: str | None,
    *,
    model: Any,
    bundled: bool,
) -> Prepared:
    """An experiment that is ready. The model is None where workers have it, who said what they see of it."""
    texts, drawn = _texts(work.drawn), work.drawn
    facts = {
        **seen["facts"],
        **_described(experiment, work.items),
        "digests": {**seen["same"]["model"], "tasks": texts},
        "template": _template(work.tokenizer) if any(planned.facts.get("template") for planned, _ in drawn) else None,
        "truncation": _truncation(drawn),
        "command": command,
    }
    identity = {**early_identity(experiment, recipes), **seen["same"], "texts": texts}
    return Prepared(experiment, recipes, model, work.tokenizer, work.items, bundled, facts, identity)


def _described(experiment: Experiment, items: Sequence[Item]) -> dict[str, Any]:
    """The tasks as results name them; where there is one, also by the words of `compare`."""
    tasks: list[dict[str, Any]] = []
    for task in experiment.tasks:
        label = experiment.label(task)
        n, tokens = sum(item.planned.task == label for item in items), experiment.size(task)[1]
        seeds = list(task.seeds or experiment.seeds)
        tasks.append({"name": label, "task": shown_task(task.task), "n": n, "tokens": tokens, "seeds": seeds})
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
    hidden = {"arms", "tasks", "match", "trust_remote_code", "engine"}
    data = experiment.model_dump(mode="json", exclude=hidden, exclude_defaults=True)
    data["tasks"] = [
        {"task": shown_task(task.task), **task.model_dump(mode="json", exclude={"task"}, exclude_defaults=True)}
        for task in experiment.tasks
    ]
    arms = [{"name": name, "recipe": read_text(r.to_yaml(resolved=True), name).data} for name, r in recipes.items()]
    return dump_yaml({**data, "arms": arms})


def shown_task(task: Any) -> str:
    """A task in the words that stand for it; of an object from Python, its name and options."""
    if isinstance(task, str):
        return task
    given = ",".join(f"{key}={value}" for key, value in task.model_dump(exclude_unset=True).items())
    return f"{task.name}:{given}" if given else str(task.name)


def _texts(drawn: Drawn) -> dict[str, str]:
    """A digest of each task's samples."""
    found: dict[str, list[Any]] = {}
    for planned, sample in drawn:
        found.setdefault(planned.task, []).append((planned.prompt, planned.answer, sample.turns, sample.answers))
    return {task: _digest(repr(texts)) for task, texts in found.items()}


def _template(tokenizer: Any) -> str:
    return f"the tokenizer's, {_digest(str(getattr(tokenizer, 'chat_template', None)))}"


def _truncation(drawn: Drawn) -> str | None:
    """How many samples of each task were cut, where a task says so."""
    cut: dict[str, int] = {}
    for planned, _ in drawn:
        if planned.facts.get("truncated"):
            cut[planned.task] = cut.get(planned.task, 0) + 1
    return ", ".join(f"{task}: {n} samples cut" for task, n in cut.items()) or None


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
