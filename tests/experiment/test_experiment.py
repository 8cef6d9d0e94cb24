"""Experiments in YAML: what they declare, the lines of their errors, and runs of them that go on."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from typer.testing import CliRunner

from kvpolicy import compare, load_recipe
from kvpolicy.cli.main import app
from kvpolicy.errors import CompareError, KvpolicyError
from kvpolicy.experiment.experiment import is_experiment, load_experiment
from kvpolicy.experiment.names import AGAIN, ATTENTION, METRICS
from kvpolicy.experiment.run import Runner
from kvpolicy.experiment.schema import experiment_schema
from kvpolicy.experiment.store import read
from kvpolicy.recipe.yaml import read_file

PAGE = """\
arms:
  - full
  - recipe: logquant
    params: {window: [8, 16], nbits: 4}
  - recipes/mine.yaml:keep=16
  - name: inline
    recipe:
      tiers:
        - {policy: {kind: recent, window: 8}, store: full}
        - {store: evict}
tasks:
  - {task: lines, tokens: 96}
  - {task: lines, tokens: 128, n: 1, margins: {score: 0.05}}
  - {task: own.jsonl, name: mine}
n: 2
seeds: [0, 1]
margins: {score: 0.01}
metrics: [nll, kl, bits]
"""
SHORT = """\
arms: [full, {recipe: logquant, params: {window: [8, 16]}}]
tasks: [{task: lines, tokens: 64}, {task: own.jsonl, name: mine}]
n: 1
seeds: [0, 1]
metrics: [nll, kl, bits]
"""
MINE = "name: mine\nparams: {keep: 8}\ntiers: [{policy: {kind: recent, window: $keep}, store: full}, {store: evict}]\n"


@pytest.fixture
def page(tmp_path: Path) -> Path:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "mine.yaml").write_text(MINE)
    rows = [f'{{"prompt": "<k{i}> <v1>\\n? <k{i}>\\n", "answer": "<k{i}> <v1>"}}' for i in range(1)]
    (tmp_path / "own.jsonl").write_text("\n".join(rows))
    (tmp_path / "experiment.yaml").write_text(PAGE)
    return tmp_path / "experiment.yaml"


def test_a_page_declares_arms_and_tasks_and_its_schema_knows_it(page: Path) -> None:
    experiment, recipes = load_experiment(page)
    assert list(recipes) == [
        "full", "logquant:window=8,nbits=4", "logquant:window=16,nbits=4", "recipes/mine.yaml:keep=16", "inline",
    ]  # fmt: skip
    assert recipes["logquant:window=16,nbits=4"].tiers == load_recipe("logquant:window=16,nbits=4").tiers
    assert recipes["recipes/mine.yaml:keep=16"].tiers[0].policy.window == 16
    assert [experiment.label(task) for task in experiment.tasks] == ["lines:tokens=96", "lines:tokens=128", "mine"]
    assert experiment.measures == ("nll", "kl", "bits")
    assert experiment.all_margins() == {"score": 0.01, "tasks": {"lines:tokens=128": {"score": 0.05}}}
    schema = experiment_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.Draft202012Validator(schema).validate(read_file(page).data)
    known = jsonschema.Draft202012Validator(schema)
    for wrong in ({"arms": [{"recipe": "kivi", "parms": {}}]}, {"arms": ["kivi"], "n": 0}, {"arms": [{"tiers": [3]}]}):
        assert not known.is_valid(wrong)
    changed, _ = load_experiment(page, n=5, seeds=[3])
    assert [(task.n or changed.n, task.seeds or changed.seeds) for task in changed.tasks] == [(5, [3])] * 3
    assert load_experiment(page, margins={"nll": 0.1})[0].all_margins() == {"nll": 0.1}


def test_the_experiment_of_a_call_is_that_of_the_page(page: Path) -> None:
    arms = {"full": "full", "w8": "logquant:window=8"}
    called, _ = load_experiment(arms, n=4, seeds=[1], tasks=["lines", {"task": "arithmetic", "n": 2}])
    page.write_text(
        "arms: [{name: full, recipe: full}, {name: w8, recipe: 'logquant:window=8'}]\n"
        "tasks: [lines, {task: arithmetic, n: 2}]\nn: 4\nseeds: [1]\n"
    )
    assert load_experiment(page)[0] == called
    assert is_experiment(page)
    assert not is_experiment(page.parent / "recipes" / "mine.yaml")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("arms: [logqant]", "b.yaml:1: arms[0]: no recipe 'logqant' (did you mean 'logquant'?)"),
        (
            "arms:\n  - {recipe: kivi, parms: {}}",
            "b.yaml:2: arms[0].parms: unknown key 'parms' (did you mean 'params'?)",
        ),
        ("arms: [full]\nn: 0", "b.yaml:2: n: must be greater than or equal to 1, found 0"),
        ("arms: [full]\nmetrics: [nll,\n scor]", "b.yaml:3: metrics[1]: must be one of"),
        ("arms:\n- full\n- recipe:\n    tiers:\n    - store: fulll", "b.yaml:5: tiers[0].store"),
        ("arms: [{recipe: kivi, params: {residuall: [1, 2]}}]", "did you mean 'residual'?"),
        ("arms: [{recipe: kivi, params: {residual: {a: 1}}}]", "the value of a parameter must be a word, a number"),
        ("arms: [full]\nmargins: {scoore: 1}", "margins must be of metrics, found 'scoore' (did you mean 'score'?)"),
        (
            "arms: [full]\ntasks:\n- task: lines\n  margins: {scoore: 1}",
            "b.yaml:4: tasks[0].margins: margins must",
        ),
        ("arms: [full]\nbaseline: ful", "baseline must be one of exact, full, found 'ful' (did you mean 'full'?)"),
        ("arms: []", "b.yaml:1: arms: must have at least 1, found an empty list"),
        ("arms: [full, full]", "arms must have different names, found 'full' twice"),
        ("arms: [{name: exact again, recipe: kivi}]", "must not be named 'exact again'"),
        ("arms: [full]\ntasks: [lines, lines]", "tasks must have different names, found 'lines' twice"),
        ("arms: [full]\nbatch: 2\nmetrics: [l1]", "metrics of attention (l1, l2"),
        ("arms: [full]\nmodel: {}\n", "b.yaml:2: model: must be"),
        ("arms: [full]\ndtype: bfloat\n", "b.yaml:2: dtype: must be one of auto, bfloat16, float16, float32, float64"),
        ("arms: [full]\ntrust_remote_code: true", "b.yaml:2: trust_remote_code: must be given on the shell"),
    ],
)
def test_errors_say_the_line(text: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "b.yaml").write_text(text)
    with pytest.raises(KvpolicyError) as caught:
        load_experiment(tmp_path / "b.yaml")
    assert told in str(caught.value)


def test_a_run_that_is_interrupted_goes_on_and_ends_as_if_it_had_not_been(
    page: Path, loaded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = loaded
    given: dict[str, Any] = {"model": model, "tokenizer": tokenizer, "progress": False}
    page.write_text(SHORT)
    monkeypatch.setattr("kvpolicy.experiment.comparison.write_results", lambda *_: None)
    whole = compare(page, out=page.parent / "whole", **given)
    run, runs, stop = Runner.run, Counter[tuple[str, str]](), [5]

    def counted(self: Any, cache: Any, item: Any) -> Any:
        if sum(runs.values()) == stop[0]:
            raise KeyboardInterrupt
        found = run(self, cache, item)
        runs[(cache.recipe.to_yaml(resolved=True), item.sample.prompt)] += 1
        return found

    monkeypatch.setattr(Runner, "run", counted)
    for at in (2, 4):
        stop[0] = at
        with pytest.raises(KeyboardInterrupt) as caught:
            compare(page, out=page.parent / "out", **given)
        partial = caught.value.partial  # type: ignore[attr-defined]
        assert "partial: the run did not end" in str(partial)
        assert partial.evidence.rows == read(page.parent / "out").rows
        assert 0 < len(partial.evidence.rows) < len(whole.evidence.rows)
    stop[0] = -1
    ended = compare(page, out=page.parent / "out", **given)
    assert ended.complete
    assert [timeless(row) for row in ended.evidence.rows] == [timeless(row) for row in whole.evidence.rows]
    exact = load_recipe("full").to_yaml(resolved=True)
    assert {count for (recipe, _), count in runs.items() if recipe != exact} == {1}
    done = sum(runs.values())
    compare(page, out=page.parent / "out", **given)
    assert sum(runs.values()) == done
    assert {row["sample"] for row in whole.of_task("lines").rows} == {"0.0", "1.0"}
    assert whole.evidence.planned == {"lines": 2, "mine": 1}  # both seeds draw the one row of the file
    assert all(
        row.output is None and "score" not in row.metrics and "l1" not in row.metrics for row in whole.evidence.rows
    )
    with pytest.raises(CompareError, match="means are those of one task"):
        whole.mean("full", "kl")
    assert whole.of_task("mine").mean("logquant:window=16", "kl") is not None
    again, recipes = load_experiment(read_text(whole.settings["experiment"]))
    assert (again.n, again.seeds, list(recipes)) == (1, [0, 1], list(whole.arms))


def read_text(text: str) -> Any:
    from kvpolicy.recipe.yaml import read_text as read_yaml

    return read_yaml(text, "experiment").data


def timeless(row: Any) -> Any:
    metrics = {name: value for name, value in row.metrics.items() if not name.endswith("seconds")}
    return row.arm, row.task, row.sample, metrics, row.facts, row.output, row.error


def test_the_exact_cache_again_shows_the_noise_and_batches_run_together(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    given: dict[str, Any] = {"model": model, "tokenizer": tokenizer, "progress": False, "n": 2, "tokens": 96}
    found = compare(["logquant:window=8"], aa=True, batch=2, **given)
    assert list(found.arms) == ["logquant:window=8", AGAIN]
    assert found.settings["aa"] == AGAIN
    noise, loss = found.mean(AGAIN, "kl"), found.mean("logquant:window=8", "kl")
    assert noise is not None
    assert loss is not None
    assert noise.mean < 1e-6 < loss.mean
    with pytest.raises(CompareError, match="batch must be 1 where the model is not attached, found 2"):
        compare(["full"], batch=2, attach=False, **given)
    assert not set(found.settings["metrics"]) & set(ATTENTION)
    assert set(found.settings["metrics"]) | set(ATTENTION) == set(METRICS)


def test_pictures_that_fail_leave_the_table(
    loaded: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise OSError("no fonts")

    monkeypatch.setattr("kvpolicy.experiment.plot.plot_comparison", fail)
    monkeypatch.setattr("kvpolicy.report.write.write", fail)
    model, tokenizer = loaded
    with (
        pytest.warns(UserWarning, match=r"comparison\.png can't be written: no fonts"),
        pytest.warns(UserWarning, match=r"the report can't be written: no fonts"),
    ):
        found = compare(["full"], model=model, tokenizer=tokenizer, n=1, tokens=96, out=tmp_path, progress=False)
    assert "lines: quality" in str(found)
    assert (tmp_path / "attention.png").exists()


def test_a_dry_run_says_what_would_run(page: Path) -> None:
    done = CliRunner().invoke(app, ["compare", str(page), "--dry-run"])
    assert done.exit_code == 0, done.output
    assert "rows: " in done.stdout
    assert "time: about " in done.stdout
    assert not (page.parent / "out").exists()
    alone = CliRunner().invoke(app, ["compare", str(page), "full"])
    assert isinstance(alone.exception, CompareError)
    assert "an experiment is given alone" in str(alone.exception)
