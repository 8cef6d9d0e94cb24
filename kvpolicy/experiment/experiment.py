"""An experiment as it is declared: a YAML file, a call, or a line of the shell."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    PrivateAttr,
    ValidationError,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from kvpolicy.errors import CompareError, KvpolicyError
from kvpolicy.experiment.arms import Arm, Declared, Matching, Open, recipes_of
from kvpolicy.experiment.arms import is_exact as is_exact
from kvpolicy.experiment.engines import Engine, Given
from kvpolicy.experiment.names import ATTENTION, EXACT, METRICS
from kvpolicy.hf.source import ModelSource
from kvpolicy.recipe.load import Recipe
from kvpolicy.recipe.source import refuse_misplaced
from kvpolicy.recipe.yaml import Document, parse_scalar, read_file, read_mapping
from kvpolicy.statistics.margins import TASKS
from kvpolicy.tasks.task import Task as TaskKind
from kvpolicy.words import in_words, listed, quoted, suggest

IS = "an experiment is a mapping with keys such as arms and tasks"
MOST_BITS = 64
"""Bits of a number that no cache exceeds."""
Metric = Literal[
    "score", "nll", "kl", "top1", "bits", "peak_bytes", "final_bytes", "exact_bytes", "prefill_seconds", "step_seconds",
    "l1", "l2", "exact_mass", "quantized_mass", "dropped_mass",
]  # fmt: skip


def _of_metrics(value: dict[str, float]) -> dict[str, float]:
    unknown = next((name for name in value if name not in METRICS), None)
    if unknown is not None:
        raise ValueError(f"margins must be of metrics, found {quoted(unknown)}{suggest(unknown, METRICS)}")
    return value


Margins = Annotated[dict[str, Annotated[float, Field(gt=0, strict=False)]], AfterValidator(_of_metrics)]


class Task(Declared):
    """Samples."""

    task: Any = Field(
        description="The name of a task, maybe with options, or a .jsonl file.", json_schema_extra={"type": "string"}
    )
    n: int | None = Field(default=None, ge=1, description="Samples of each seed; by default the experiment's n.")
    tokens: int | None = Field(default=None, description="Approximate length of a generated sample.")
    seeds: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] | None = Field(
        default=None, description="Seeds of its samples; by default the experiment's."
    )
    name: str | None = Field(
        default=None, min_length=1, description="What its results are called; by default the task."
    )
    margins: Margins = Field(
        default={}, description="By metric: its own differences that count as none, before the experiment's."
    )


def _matched(value: Any) -> Any:
    """What arms are matched by: `{"bits": None}` where no number is given."""
    found = value
    if isinstance(value, str):
        name, equals, number = value.partition("=")
        found = {name.strip(): parse_scalar(number) if equals else None}
    bits = found.get("bits", "") if isinstance(found, Mapping) and list(found) == ["bits"] else ""
    if value is None or bits is None:
        return found
    if isinstance(bits, bool) or not isinstance(bits, int | float) or not 0 < bits <= MOST_BITS:
        raise ValueError(
            f"match must be bits, or bits with a number up to {MOST_BITS} such as {{bits: 3.0}} (on the shell "
            f"bits=3.0), found {in_words(value if bits == '' else bits)}"
        )
    return {"bits": float(bits)}


_NUMBER = {"type": ["number", "null"], "exclusiveMinimum": 0, "maximum": MOST_BITS}
_MATCH = {
    "if": {"type": "string"},
    "then": {"pattern": "^bits(=.*)?$"},
    "else": {
        "type": ["object", "null"],
        "properties": {"bits": _NUMBER},
        "required": ["bits"],
        "additionalProperties": False,
    },
}


class Experiment(Declared):
    """Arms and tasks, and how they are run. Made by `load_experiment`."""

    model: str | None = Field(
        default=None,
        description="A directory, an id of the Hugging Face hub, or a GGUF file; by default the bundled one.",
    )
    revision: str | None = Field(default=None, description="A branch, tag or commit of a model of the hub.")
    tokenizer: str | None = Field(default=None, description="Where the tokenizer comes from; by default the model.")
    dtype: Literal["auto", "bfloat16", "float16", "float32", "float64"] | None = Field(
        default=None, description="Of the weights; by default their own."
    )
    device: str | None = Field(default=None, description="Such as cpu or cuda:1; by default CUDA where there is one.")
    device_map: str | dict[str, Any] | None = Field(
        default=None, description="In the place of a device: auto, or which module goes where."
    )
    trust_remote_code: bool = Field(
        default=False, description="Run code that comes with the model. Not in a file: given on the shell or in a call."
    )
    arms: list[Arm] = Field(min_length=1, description="Recipes. A word is a bundled name or a file, with parameters.")
    tasks: list[Task] = Field(default=[Task(task="lines")], min_length=1, description="What the arms run on.")
    n: int = Field(default=16, ge=1, description="Samples of each task and seed, the same for every arm.")
    tokens: int | None = Field(default=None, description="Approximate length of a generated sample.")
    seeds: list[Annotated[int, Field(ge=0)]] = Field(default=[0], min_length=1, description="Seeds of the samples.")
    metrics: list[Metric] | None = Field(
        default=None, min_length=1, description="What is measured; by default all. Without score nothing is generated."
    )
    margins: Margins = Field(default={}, description="By metric: a difference from the baseline that counts as none.")
    match: Annotated[Any, BeforeValidator(_matched), WithJsonSchema(_MATCH)] = Field(
        default=None,
        description="bits: choose parameters of arms so that their effective bits agree, or are those given.",
    )
    baseline: str = Field(default=EXACT, description="The arm that the others are compared with.")
    aa: bool = Field(default=False, description="Run the exact cache again in another batch: the noise floor.")
    batch: int = Field(default=1, ge=1, le=4096, description="Samples that run together.")
    attach: bool = Field(default=True, description="Let the model read the compressed stores directly.")
    engine: Given = None
    _matching: Matching | None = PrivateAttr(None)

    @property
    def matching(self) -> Matching | None:
        """How its arms were matched; None where they were not."""
        return self._matching

    @field_validator("arms", "tasks", mode="before")
    @classmethod
    def _words(cls, value: Any, info: ValidationInfo) -> Any:
        """A word stands for a mapping of one key; what is a recipe itself, too."""
        if not isinstance(value, list):
            return value
        if info.field_name == "tasks":
            return [{"task": x} if isinstance(x, str | TaskKind) else x for x in value]
        return [{"recipe": x} if isinstance(x, str) or (isinstance(x, dict) and "tiers" in x) else x for x in value]

    @field_validator("tasks")
    @classmethod
    def _known(cls, value: list[Task]) -> list[Task]:
        wrong = next((x.task for x in value if not isinstance(x.task, str | TaskKind) or not x.task), None)
        if wrong is not None:
            raise ValueError(f"a task must be a name or the path of a .jsonl file, found {in_words(wrong)}")
        return value

    @model_validator(mode="after")
    def _check(self) -> Experiment:
        if self.batch > 1 and set(self.metrics or ()) & set(ATTENTION):
            raise ValueError(f"metrics of attention ({', '.join(ATTENTION)}) need batch 1, found {self.batch}")
        return self

    def size(self, task: Task) -> tuple[int, int | None]:
        """Samples of each seed, and the length asked for."""
        return task.n or self.n, self.tokens if task.tokens is None else task.tokens

    def label(self, task: Task) -> str:
        """What the results of a task are called; tasks of one name are told apart by their lengths."""
        if task.name is not None:
            return task.name
        own = task.task if isinstance(task.task, str) else str(task.task.name)
        same = [other for other in self.tasks if other.task == task.task and other.name is None]
        tokens = self.size(task)[1]
        return own if len(same) == 1 or tokens is None else f"{own}:tokens={tokens}"

    def all_margins(self) -> dict[str, Any]:
        """Margins by metric, and by task where a task has its own, as verdicts take them."""
        own = {self.label(task): dict(task.margins) for task in self.tasks if task.margins}
        return {**self.margins, **({TASKS: own} if own else {})}

    @property
    def source(self) -> ModelSource:
        """The model, which is given by its name."""
        return ModelSource(
            self.model, self.dtype, self.device, self.device_map, self.trust_remote_code, self.revision, self.tokenizer
        )

    @property
    def measures(self) -> tuple[str, ...]:
        """The metrics, those left out that a batch can't tell."""
        if self.metrics is not None:
            return tuple(name for name in METRICS if name in self.metrics)
        return tuple(name for name in METRICS if self.batch == 1 or name not in ATTENTION)


def is_experiment(source: Any) -> bool:
    """Whether this is the path of an experiment: a YAML file with the key `arms`, which no recipe has."""
    if not isinstance(source, str | os.PathLike) or not os.fspath(source).endswith((".yaml", ".yml")):
        return False
    try:
        return Path(source).is_file() and "arms" in read_file(Path(source)).data
    except (KvpolicyError, OSError, ValueError):
        return False


def load_experiment(
    source: Any, choose: Callable[[Experiment, list[Open], dict[str, Recipe]], Matching] | None = None, **given: Any
) -> tuple[Experiment, dict[str, Recipe]]:
    """An experiment and its arms by name.

    Args:
        source: the path of a YAML file, a mapping like it, an `Experiment`, or arms: recipes in a list, or by name in a
            mapping.
        choose: chooses the parameters of arms that are to be matched; where there are such arms, it must be given.
        **given: values for keys of the experiment, which count before its own.

    Raises:
        RecipeError: a line for each problem of the file or of its recipes, with the line where it stands.
        CompareError: the same of an experiment that is given from Python.
    """
    if isinstance(source, Experiment):
        experiment, document = source.model_copy(update=given), None
    elif is_experiment(source):
        document = read_file(Path(source), IS)
        if document.data.get("trust_remote_code"):
            document.fail(("trust_remote_code",), "must be given on the shell or in a call, found it in a file")
        experiment = _validated({**document.data, **given}, document, frozenset(given))
    elif isinstance(source, Mapping) and isinstance(source.get("arms"), list | tuple):
        document = read_mapping(source)
        experiment = _validated({**document.data, **given}, document, frozenset(given))
    else:
        document = None
        experiment = _validated({"arms": _arms(source), **given}, None)
    experiment = _for_all_tasks(experiment, given)
    labels = [experiment.label(task) for task in experiment.tasks]
    for label in labels:
        if labels.count(label) > 1:
            raise CompareError(f"tasks must have different names, found {quoted(label)} twice; give them names (name)")
    if document is not None and document.base is not None:
        experiment = _from_home(experiment, document.base, frozenset(given))
    experiment, recipes = _matched_recipes(experiment, document, choose)
    names = [EXACT, *recipes]
    if experiment.baseline not in names:
        hint = suggest(experiment.baseline, names)
        raise CompareError(f"baseline must be one of {listed(names)}, found {quoted(experiment.baseline)}{hint}")
    return experiment, recipes


def _matched_recipes(
    experiment: Experiment, document: Document | None, choose: Any
) -> tuple[Experiment, dict[str, Recipe]]:
    """The recipes, with the values that are chosen for open parameters; the baseline may be such an arm."""
    found: list[Matching] = []

    def values(waiting: list[Open], beside: dict[str, Recipe]) -> list[Any]:
        if not waiting:
            raise CompareError(
                "match needs an arm that leaves a parameter open, found none; write one as NAME:parameter=? (in a "
                "file, match: parameter)"
            )
        found.append(choose(experiment, waiting, beside))
        return [arm.value for arm in found[0].arms]

    wanted = experiment.match is not None and choose is not None
    recipes = recipes_of(experiment.arms, document, values if wanted else None)
    if found:
        names = {arm.label: arm.arm for arm in found[0].arms}
        experiment = experiment.model_copy(update={"baseline": names.get(experiment.baseline, experiment.baseline)})
        experiment._matching = found[0]
    return experiment, recipes


def _for_all_tasks(experiment: Experiment, given: Mapping[str, Any]) -> Experiment:
    """What is given beside a file counts before what its tasks say."""
    unsaid: dict[str, Any] = {"n": None, "tokens": None, "seeds": None, "margins": {}}
    own = {key: value for key, value in unsaid.items() if key in given and "tasks" not in given}
    return experiment.model_copy(update={"tasks": [task.model_copy(update=own) for task in experiment.tasks]})


def _arms(arms: Any) -> list[dict[str, Any]]:
    if isinstance(arms, str | os.PathLike | Recipe):
        arms = [arms]
    if not isinstance(arms, Iterable):
        raise CompareError(f"arms must be recipes in a list, or by name in a mapping, found {in_words(arms)}")
    named = list(arms.items()) if isinstance(arms, Mapping) else [(None, arm) for arm in arms]
    if not named:
        raise CompareError("a comparison needs at least one arm, found none; give a recipe such as 'logquant'")
    refuse_misplaced(source for label, source in named if label is None and isinstance(source, str))
    # Within a list the mapping of an arm would be taken for one of a recipe.
    return [{"recipe": source, "name": None if label is None else str(label)} for label, source in named]


def _validated(data: dict[str, Any], document: Document | None, given: frozenset[str] = frozenset()) -> Experiment:
    try:
        return Experiment.model_validate(data)
    except ValidationError as error:
        told = [(tuple(x["loc"]), _problem(x)) for x in error.errors(include_url=False)]
    for path, message in told:
        if document is None or (path and path[0] in given):
            where = ".".join(map(str, path))
            raise CompareError(f"{where}{': ' if where else ''}{message}")
        document.note(path, message)
    assert document is not None
    document.check()
    raise AssertionError("a problem was noted")


def _problem(problem: Any) -> str:
    """What pydantic found, in the words of recipes' errors."""
    kind, context, found = problem["type"], problem.get("ctx", {}), in_words(problem.get("input"))
    key = str(problem["loc"][-1]) if problem["loc"] else ""
    if kind == "extra_forbidden":
        homes = {"arms": Arm, "tasks": Task, "engine": Engine} if len(problem["loc"]) > 1 else {}
        home: Any = homes.get(str(problem["loc"][0]), Experiment)
        return f"unknown key {quoted(key)}{suggest(key, home.model_fields)}; allowed: {', '.join(home.model_fields)}"
    if kind == "missing":
        return f"must be given, found no {key}"
    if "error" in context:
        return str(context["error"])
    if kind == "too_short":
        return f"must have at least {context['min_length']}, found {found}"
    message = problem["msg"].removeprefix("Input should be ").removeprefix("Input should ")
    if kind == "literal_error":
        allowed = str(context["expected"]).replace("'", "").replace(" or ", ", ").split(", ")
        return f"must be one of {listed(allowed)}, found {found}{suggest(str(problem.get('input')), allowed)}"
    return f"must be {message[0].lower()}{message[1:]}, found {found}"


def _from_home(experiment: Experiment, home: Path, given: frozenset[str]) -> Experiment:
    """Paths of a file are relative to it: those of task files and of the model."""
    tasks = [
        task.model_copy(update={"task": str(home / task.task), "name": experiment.label(task)})
        if _is_file(task.task) and "tasks" not in given
        else task
        for task in experiment.tasks
    ]
    model = experiment.model
    if model is not None and "model" not in given and (home / model).is_dir():
        model = str(home / model)
    return experiment.model_copy(update={"tasks": tasks, "model": model})


def _is_file(task: Any) -> bool:
    name = task.partition(":")[0] if isinstance(task, str) else ""
    return name.endswith((".jsonl", ".json", ".ndjson")) and not Path(name).is_absolute()
