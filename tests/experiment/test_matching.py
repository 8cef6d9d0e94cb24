"""Parameters that are chosen so that effective bits match: what is chosen, planned and measured."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from kvpolicy import compare, load_recipe
from kvpolicy.errors import KvpolicyError, RecipeError
from kvpolicy.experiment.arms import Open, Tuned
from kvpolicy.experiment.comparison import declare
from kvpolicy.experiment.experiment import load_experiment
from kvpolicy.experiment.matching import Lengths, Search
from kvpolicy.experiment.schema import experiment_schema
from kvpolicy.experiment.store import read
from kvpolicy.recipe.yaml import read_file, read_text

PAGE = """\
arms:
  - full
  - {recipe: logquant, match: window}
  - {recipe: kivi, params: {nbits: 4, group_size: 16}, match: {residual: {from: 24, to: 56, step: 8}}, name: blocks}
  - {recipe: h2o, match: {heavy: [0.2, 0.31]}}
tasks: [{task: arithmetic, tokens: 128}, {task: arithmetic, tokens: 160}]
n: 1
match: {bits: 11.1}
baseline: blocks
metrics: [nll, bits]
"""


def test_bits_agree_as_planned_and_measured(
    loaded: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvpolicy.experiment.comparison.write_results", lambda *_: None)
    page = tmp_path / "e.yaml"
    page.write_text(PAGE)
    jsonschema.Draft202012Validator(experiment_schema()).validate(read_file(page).data)
    given: dict[str, Any] = {"model": loaded[0], "tokenizer": loaded[1], "progress": False, "out": tmp_path / "run"}
    result = compare(page, **given)
    exact, first, blocks, last = result.arms
    assert (exact, blocks) == ("full", "blocks")
    assert first.startswith("logquant:window=")
    assert last.startswith("h2o:heavy=")
    window = int(first.partition("=")[2])
    assert result.arms[first].tiers == load_recipe("logquant", window=window).tiers
    measured = {}
    for arm in (first, blocks, last):
        means = [result.of_task(task).mean(arm, "bits") for task in result.tasks]
        measured[arm] = sum(x.mean for x in means if x is not None) / 2
    planned = {arm: x["planned_bits"] for arm, x in result.settings["match"]["arms"].items()}
    assert measured == pytest.approx(planned, rel=1e-9)
    assert max(measured.values()) <= 1.02 * min(measured.values())
    assert f"matched: {first}: {planned[first]:.3f} bits planned, {measured[first]:.3f} measured" in result.notes()
    # Verdicts stand first, also where the run is partial.
    verdict = result.verdicts(metric="bits").of("exact", result.tasks[0])
    assert verdict.baseline == pytest.approx(result.of_task(result.tasks[0]).mean(blocks, "bits").mean)  # type: ignore[union-attr]
    lines = str(result).splitlines()
    assert lines[0].startswith("verdicts: nll against blocks")
    assert sum(line.startswith(first) and "undecided" in line for line in lines) == 3  # two tasks and their mean
    partial = replace(result, evidence=replace(result.evidence, rows=result.evidence.rows[:-1]))
    assert str(partial).startswith("verdicts (of a partial run): nll against blocks")
    assert "no sample has both arms" in str(partial)
    # The run that goes on, and what was recorded, are the resolved one.
    assert result.evidence.baseline == "blocks"
    again, recipes = load_experiment(read_text(result.settings["experiment"], "again").data)
    assert again.match is None
    assert {name: recipe.tiers for name, recipe in recipes.items()} == {
        name: recipe.tiers for name, recipe in result.arms.items()
    }
    rows = read(tmp_path / "run").rows
    monkeypatch.setattr("kvpolicy.experiment.work.Worker.run", None)  # nothing is left to run
    assert compare(page, **given).evidence.rows == rows


class Counted:
    """In the place of a counter: bits as a function of the value."""

    def __init__(self, bits: Callable[[int], float | None]) -> None:
        self.function, self.calls = bits, 0
        self.lengths = Lengths({"t": [((900,), 3)]})

    def bits(self, value: Any) -> float:
        self.calls += 1
        found = self.function(value)
        if found is None:
            raise RecipeError("no recipe")
        return found


def test_what_is_chosen_is_near_wherever_bits_go() -> None:
    """Curves that rise, fall, saw and have holes; the truth is a scan of all values."""
    rng = random.Random(0)
    found = 0
    for case in range(60):
        rate, saw, holes, falls = rng.uniform(0.002, 0.05), rng.randrange(1, 40), rng.randrange(1, 4), case % 3 == 0

        def bits(value: int, rate: float = rate, saw: int = saw, holes: int = holes, falls: bool = falls) -> Any:
            if value % holes or value == 0:
                return None
            level = 2 + rate * value + 0.01 * (value % saw)
            return 40 / level if falls else min(level, 16.0)

        arm = Open("arm:x=?", Tuned("x"), lambda value: value, 64)
        counter = Counted(bits)
        every = {value: b for value in range(904) if (b := bits(value)) is not None}
        target = rng.uniform(2.2, 15)
        search = Search(arm, counter)  # type: ignore[arg-type]
        place, near = search.near(target)
        assert every[place] == near
        best = min(abs(b / target - 1) for b in every.values())
        if best > 0.02:
            assert abs(near / target - 1) == pytest.approx(best), case
        else:
            found += 1
            assert abs(near / target - 1) <= 0.02, case
        assert counter.calls < 400
    assert found > 30


KIVI = "kivi:residual=16,group_size=16"


@pytest.mark.parametrize(
    ("arms", "match", "told"),
    [
        (["logquant:nbits=1..2"], "bits=3", "(nbits=1) at its nearest"),
        (
            [KIVI, "logquant:window=30..32"],
            None,
            "leaves window to be matched, and nothing",
        ),
        ([KIVI, "logquant:window=30..32"], "bits", "the bits of 'kivi:residual=16"),
        (
            [KIVI, "logquant:window=?"],
            "bits=5",
            "arm 'kivi:residual=16,group_size=16': eff",
        ),
        (["kivi"], "bits", "match needs an arm that leaves a parameter open"),
        (["logquant:quantizer=?"], "bits", "quantizer is no number by default, found 'int'"),
        (["logquant:windw=?"], "bits", "did you mean 'window'?"),
        (["logquant:window=8..4"], "bits", "found '8..4'"),
        (["logquant:window=?,nbits=?"], "bits", "one parameter of an arm is matched"),
        (["logquant:window=?"], "bytes", "match must be bits, or bits with a number"),
        (["logquant:window=?"], "bits=x", "found 'x'"),
        (["logquant:window=?"], {"bits": 0}, "found 0"),
    ],
)
def test_what_cannot_be_matched_is_said(arms: Any, match: Any, told: str, loaded: tuple[Any, Any]) -> None:
    given = {"model": loaded[0], "tokenizer": loaded[1], "n": 1, "tokens": 128, "match": match}
    with pytest.raises(KvpolicyError) as caught:
        declare(arms, **given)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_errors_of_a_page_say_the_line(tmp_path: Path) -> None:
    for text, told in (
        ("arms:\n- {recipe: logquant, match: windw}\nmatch: bits", "b.yaml:2: arms[0]: unknown parameter 'windw'"),
        ("arms:\n- {recipe: logquant, match: {window: {form: 3}}}", "b.yaml:2: arms[0].match: match must name"),
        ("arms: [full]\nmatch: {bit: 3}", "b.yaml:2: match: match must be bits"),
    ):
        (tmp_path / "b.yaml").write_text(text)
        with pytest.raises(KvpolicyError) as caught:
            load_experiment(tmp_path / "b.yaml", lambda *_: None)  # type: ignore[arg-type, return-value]
        assert told in str(caught.value), str(caught.value)
