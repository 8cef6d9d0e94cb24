"""What the report of a bad recipe holds: every problem, parameters by name, no contents of files; and how soon."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpolicy.errors import RecipeError
from kvpolicy.interfaces.budget import find_overlaps
from kvpolicy.recipe.inherit import BUNDLED, MAX_CHAIN
from kvpolicy.recipe.load import load_recipe, load_yaml
from kvpolicy.recipe.yaml import MAX_PROBLEMS

EXAMPLES = int(os.environ.get("EXAMPLES", "200"))
FULL = "tiers: [{store: full}]\n"


def lines_of(source: object, **params: object) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load_recipe(source, **params)  # type: ignore[arg-type]
    return str(caught.value).splitlines()


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def test_every_problem_is_told_at_once_in_the_order_of_the_file(tmp_path: Path) -> None:
    path = write(
        tmp_path / "bad.yaml",
        """tiers:
  - {policy: {kind: recnt, x: 3}, store: full}
  - {policy: {kind: recent, windw: 3, flush: 0}, keys: ful, values: {kind: int, nbits: 7, group_size: -1, foo: !x 3}}
  - {policy: {kind: recent, window: $w, flush: 0}, store: !!binary aGk=, stor: 3}
  - 3
  - {policy: {kind: recent}, store: {kind: int, nbits: 2}}
layers: {"0-3": full, "2": ful, "x": full, "1": [{store: evict}]}
params: {v: 3, a: [1]}
nme: 3
placement: later
""",
    )
    expected = [
        ":2: tiers[0].policy.kind: no policy of kind 'recnt'",
        ":3: tiers[1].values.foo: tags are not allowed",
        ":3: tiers[1].policy.windw: unknown option",
        ":3: tiers[1].policy.flush: must be greater",
        ":3: tiers[1].keys: a store must be full",
        ":3: tiers[1].values.nbits: must be 1, 2, 3, 4 or 8, found 7",
        ":3: tiers[1].values.group_size: must be",
        ":4: tiers[2].store: tags are not allowed",
        ":4: tiers[2].policy.window: $w must be declared",
        ":4: tiers[2].stor: unknown key",
        ":4: tiers[2].policy.flush: must be greater",
        ":5: tiers[3]: a tier must be a mapping",
        ":6: tiers[4].policy: the last tier takes",
        ":7: layers.2: a layer may be named once",
        ":7: layers.2: a layer must have a list",
        ":7: layers.x: a layer selector",
        ":7: layers.1: a layer may be named once",
        ":7: layers.1[0]: the only tier must not evict",
        ":8: params.a: parameter 'a': its default",
        ":8: params.v: parameter 'v' must be used",
        ":8: params.a: parameter 'a' must be used",
        ":9: nme: unknown key 'nme' (did you mean 'name'?)",
        ":10: placement: placement must be removed",
    ]
    found = [line.removeprefix(str(path)) for line in lines_of(path)]
    for wanted in expected:
        assert sum(line.startswith(wanted) for line in found) == 1, (wanted, found)
    assert len(found) == len(expected)
    numbers = [int(line.split(":")[1]) for line in found]
    assert numbers == sorted(numbers)


def test_one_mistake_is_one_line() -> None:
    for text in (
        "tiers: [{stor: full}]",
        "tires: [{store: full}]",
        "tiers: [{policy: {kind: recnt}, store: full}, {store: evict}]",
        "params: {a: [1]}\ntiers: [{store: $a}]",
        "tiers: [{policy: {kind: recent, window: $w}, store: full}, {store: evict}]",
        "tiers: [{policy: {kind: recent}, store: {kind: nothing}}, {store: full}]",
        "tiers: [{store: {kind: int, nbits: 12_x!}}]",
        "tiers: [{policy: {kind: recent, window: {a: !t 3}}, store: full}, {store: evict}]",
        "name: !t x\n" + FULL,
        "version: 2\ntires: 3\n",
    ):
        with pytest.raises(RecipeError) as caught:
            load_yaml(text)
        assert "\n" not in str(caught.value), str(caught.value)


def test_child_and_parent_are_checked_together_each_by_its_own_name(tmp_path: Path) -> None:
    base = write(tmp_path / "base.yaml", "sumary: x\ntiers: [{store: {kind: int, nbits: 7}}]\n")
    child = write(tmp_path / "child.yaml", "extends: base.yaml\nlayers: {x: full}\nplacemnt: token\n")
    found = lines_of(child)
    assert [line.split(":")[0] for line in found] == [str(child)] * 2 + [str(base)] * 2
    assert "layers.x" in found[0]
    assert "placemnt" in found[1]
    assert "sumary" in found[2]
    assert "nbits" in found[3]


def test_a_value_that_was_given_is_named_by_its_parameter_and_told_once() -> None:
    found = lines_of("logquant:window=0")
    assert len(found) == 2
    assert all(": parameter 'window': " in line and ", found 0 (at tiers[" in line for line in found)
    (line,) = lines_of("kivi:nbits=7")
    assert "parameter 'nbits': must be 1, 2, 3, 4 or 8, found 7 (at tiers[1].keys.nbits)" in line
    both = lines_of("logquant:window=0,nbits=7")
    assert sum("parameter 'nbits'" in line for line in both) == 1
    assert sum("parameter 'window'" in line for line in both) == 2
    assert lines_of(load_recipe("logquant"), window=0)[0].startswith("recipe logquant: parameter 'window': ")
    assert "unknown parameter 'Window' (did you mean 'window'?)" in lines_of("logquant:Window=3")[0]
    text = "params: {b: 2}\ntiers: [{policy: {kind: recent}, store: {kind: int, nbits: $b}}, {store: full}]"
    with pytest.raises(RecipeError, match=r"must be greater|precision must never rise"):
        load_yaml(text)


def test_at_most_a_hundred_problems_are_told() -> None:
    start = time.process_time()
    with pytest.raises(RecipeError) as caught:
        load_yaml("".join(f"key{i}: 1\n" for i in range(1_500)))
    assert len(str(caught.value).splitlines()) == MAX_PROBLEMS + 1
    assert time.process_time() - start < 2


EXTENDS = {
    "absolute": "/etc/passwd",
    "above": "../outside.yaml",
    "above by a detour": "sub/../../outside.yaml",
    "a link": "link.yaml",
    "through a linked folder": "linked/outside.yaml",
}


@pytest.mark.parametrize("case", EXTENDS)
def test_extends_does_not_leave_the_folder_of_the_recipe(case: str, tmp_path: Path) -> None:
    write(tmp_path / "outside.yaml", "secret: word\n")
    home = tmp_path / "home"
    child = write(home / "child.yaml", f"extends: {EXTENDS[case]}\n")
    (home / "sub").mkdir()
    (home / "link.yaml").symlink_to(tmp_path / "outside.yaml")
    (home / "linked").symlink_to(tmp_path)
    (line,) = lines_of(child)
    assert line.startswith(f"{child}:1: extends: extends must name a bundled recipe or a file in the folder")
    assert ("is an absolute path" if case == "absolute" else "leads out of it") in line
    assert "secret" not in line
    assert "root" not in line.removeprefix(str(child))


def test_extends_takes_no_absolute_path_even_into_the_folder(tmp_path: Path) -> None:
    base = write(tmp_path / "base.yaml", FULL)
    (line,) = lines_of(write(tmp_path / "child.yaml", f"extends: {base}\n"))
    assert line.endswith(", which is an absolute path")


def test_extends_goes_down_and_back_up_within_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "shared" / "base.yaml", "extends: ../deep.yaml\nname: base\n")
    write(tmp_path / "deep.yaml", "extends: logquant\nsummary: Deep.\n")
    child = write(tmp_path / "child.yaml", "extends: shared/base.yaml\n")
    (tmp_path / "alias.yaml").symlink_to(child)
    for path in (child, tmp_path / "alias.yaml"):
        assert load_recipe(path).tiers == load_recipe("logquant").tiers
    assert "leads out of it" in lines_of(tmp_path / "shared" / "base.yaml")[0]
    monkeypatch.chdir(tmp_path / "shared")
    assert "leads out of it" in lines_of({"extends": "../child.yaml"})[0]
    monkeypatch.chdir(tmp_path)
    assert load_recipe({"extends": "child.yaml"}).summary == "Deep."


@pytest.mark.parametrize(
    "name", ["a" * 255, "a" * 300, "a" * 5_000, "a/" * 3_000 + "b", "a\\0b", "\\uD83D\\uDE00" * 90]
)
def test_extends_of_a_name_that_no_file_can_have(name: str, tmp_path: Path) -> None:
    child = write(tmp_path / "child.yaml", f'extends: "{name}"\n')
    (line,) = lines_of(child)
    assert ":1: extends: extends must name a bundled recipe or a file relative to this one, found " in line or (
        "not valid YAML" in line
    )
    assert len(line) < 1_000


def test_extends_with_parameters_says_where_they_go() -> None:
    assert "found 'logquant:nbits=4'; parameters stand in params" in lines_of({"extends": "logquant:nbits=4"})[0]


def test_a_long_chain_is_refused_at_once(tmp_path: Path) -> None:
    for i in range(900):
        write(tmp_path / f"{i}.yaml", f"extends: {i + 1}.yaml\n")
    write(tmp_path / "900.yaml", FULL)
    start = time.perf_counter()
    (line,) = lines_of(tmp_path / "0.yaml")
    assert time.perf_counter() - start < 1
    assert f"at most {MAX_CHAIN} recipes may extend one another, found more" in line
    assert load_recipe(tmp_path / f"{900 - MAX_CHAIN + 1}.yaml").tiers == load_recipe("full").tiers


def test_a_thousand_selectors_are_checked_in_order() -> None:
    selectors = [f"{3 * i}-{3 * i + 1}" for i in range(5_000)]
    start = time.perf_counter()
    assert find_overlaps(selectors) == {}
    assert list(find_overlaps([*selectors, "7", "8", "-5--1", "-3", "5-14999"])) == ["7", "-3", "5-14999"]
    text = FULL + "layers:\n" + "".join(f'  "{i}": full\n' for i in range(1_000))
    recipe = load_yaml(text)
    assert len({recipe.tiers_of(i, 1_000) for i in range(1_000)}) == 1
    assert time.perf_counter() - start < 4


@given(st.lists(st.tuples(st.integers(-12, 12), st.integers(0, 5)), max_size=8))
def test_overlaps_are_those_of_sets(drawn: list[tuple[int, int]]) -> None:
    pairs = [(first, first + more) for first, more in drawn if (first < 0) == (first + more < 0)]
    keys = {f"{first}-{last}": set(range(first, last + 1)) for first, last in pairs}
    taken: set[int] = set()
    wrong = []
    for key, members in keys.items():
        if members & taken:
            wrong.append(key)
        else:
            taken |= members
    assert list(find_overlaps(keys)) == wrong


@pytest.mark.parametrize(
    "text",
    [
        "a: &a {b: 1}\nc:\n" + "  - {<<: *a}\n" * 2_000,
        "a: &a {b: 1}\nc: {<<: [" + "*a, " * 4_000 + "]}\n",
        "params: {" + ", ".join(f"p{i}: 1" for i in range(2_000)) + "}\n" + FULL,
        "tiers:\n" + "  - {store: $x}\n" * 1_000,
        "tiers: [{store: {kind: int, " + ", ".join(f"o{i}: 1" for i in range(2_000)) + "}}]",
    ],
    ids=["merges", "merged at once", "parameters", "undeclared", "options"],
)
def test_much_of_one_thing_is_answered_soon(text: str) -> None:
    start = time.perf_counter()
    with pytest.raises(RecipeError) as caught:
        load_yaml(text)
    assert time.perf_counter() - start < 4
    assert max(map(len, str(caught.value).splitlines())) < 3_000


def test_contents_and_long_names_are_not_repeated(tmp_path: Path) -> None:
    secret = "root:x:0:0:" + "secret" * 200
    long = "n" * 3_000
    texts = [
        secret,
        f"name: !{long} x",
        f"{long}: 1",
        f"tiers: [{{{long}: full}}]",
        f"tiers: [{{store: {long}}}]",
        f"tiers: [{{store: {{kind: {long}}}}}]",
        f"tiers: [{{store: {{kind: int, {long}: 3}}}}]",
        f"tiers: [{{store: {{kind: int, nbits: {long}}}}}]",
        f"tiers: [{{store: ${long}}}]",
        f"params: {{{long}: 3}}\n" + FULL,
        f"layers: {{{long}: full}}\n" + FULL,
        f"a: *{long}",
        f"placement: {long}\n" + FULL,
        f"extends: {long}\n",
    ]
    for i, text in enumerate(texts):
        for line in lines_of(write(tmp_path / f"{i}.yaml", text)):
            assert len(line.removeprefix(str(tmp_path))) < 600, line
            assert "secret" not in line
    for source in (
        long,
        f"{long}.yaml",
        f"{long}:a=1",
        f"logquant:{long}=1",
        f"logquant:window={long}",
        "logquant:" + long,
    ):
        assert all(len(line) < 700 for line in lines_of(source))


TEXTS = [path.read_text(encoding="utf-8") for path in sorted(BUNDLED.glob("*.yaml"))]
PIECES = [
    "full", "evict", "{", "}", "[", "]", "- ", "\n", "  ", ": ", "$", "$window", "&a ", "*a", "<<: *a", "!!set ",
    ".nan", ".inf", "-1", "0", "1e400", "9" * 40, "true", "null", "extends: kivi\n", "extends: ../x\n",
    "version: 2\n", "\t", "\x00", "\ufeff", "\ud800", "'", '"', "|", "?", "tiers:\n", "store", "nbits: 3",
    "share: layer", 'layers: {"0-3": full, "2": full}\n',
]  # fmt: skip
places = st.integers(0, 800)
edits = st.one_of(
    st.tuples(st.just("cut"), places, st.integers(1, 25)),
    st.tuples(st.just("again"), places, st.integers(1, 60)),
    st.tuples(st.just("put"), places, st.sampled_from(PIECES) | st.text(max_size=3)),
)


def edited(text: str, changes: list[tuple[str, int, int | str]]) -> str:
    for what, at, how in changes:
        place = at % (len(text) + 1)
        if isinstance(how, str):
            text = text[:place] + how + text[place:]
        else:
            piece = text[place : place + how]
            text = text[:place] + (piece * 2 if what == "again" else "") + text[place + len(piece) :]
    return text


@settings(max_examples=EXAMPLES, deadline=None)
@given(st.sampled_from(TEXTS), st.lists(edits, min_size=1, max_size=6))
def test_a_bundled_recipe_changed_at_random_is_a_recipe_or_an_error(
    text: str, changes: list[tuple[str, int, int | str]]
) -> None:
    load_recipe("full")  # the plugins are loaded once, which takes seconds
    changed = edited(text, changes)
    start = time.process_time()
    try:
        recipe = load_yaml(changed)
    except RecipeError as error:
        told = str(error).splitlines()
    else:
        told = ["a recipe"]
    assert time.process_time() - start < 2
    assert told
    assert all(line and len(line) < 1_000 for line in told)
    if told == ["a recipe"]:
        assert load_yaml(recipe.to_yaml()) == recipe


@settings(max_examples=EXAMPLES, deadline=None)
@given(
    st.lists(
        st.sampled_from(["word", " ", "  ", "\n", "\ufeff", "\t", "\x85", "\u2028", "é", ": ", "# ", "'", '"', "-"])
    )
)
def test_any_text_survives_yaml(pieces: list[str]) -> None:
    summary = "".join(pieces * 3)
    recipe = load_recipe({"summary": summary, "tiers": [{"store": "full"}]})
    assert load_yaml(recipe.to_yaml()).summary == recipe.summary
