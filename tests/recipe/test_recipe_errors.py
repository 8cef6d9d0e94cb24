"""Bad recipes: one error that names file, line and path, what was found and what is allowed."""

from __future__ import annotations

import os
import re
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML
from written import policy, store, tiers

from kvpolicy.errors import RecipeError
from kvpolicy.recipe.inherit import BUNDLED
from kvpolicy.recipe.load import load_recipe, load_yaml

UPPER = "  - {policy: {kind: recent, window: 8}, store: full}\n"
LAST = "  - store: {kind: int, nbits: 2}\n"


# file -> what the message must say after "bad.yaml"
BAD = {
    "unknown key": ("tires: []\n", ":1: tires: unknown key 'tires' (did you mean 'tiers'?); allowed: version, name"),
    "unknown key, line": (f"name: x\n{store('full')}\nsumary: y\n", ":5: sumary: unknown key 'sumary' (did you mean"),
    "unknown tier key": (
        tiers("{stor: full}"),
        ":2: tiers[0].stor: unknown key 'stor' of a tier (did you mean 'store'",
    ),
    "unknown policy": (
        policy("{kind: recnt}"),
        ":2: tiers[0].policy.kind: no policy of kind 'recnt' (did you mean 'recent'?); installed: attention",
    ),
    "unknown quantizer": (
        store("{kind: itn}"),
        ":2: tiers[0].store.kind: no quantizer of kind 'itn' (did you mean 'int'",
    ),
    "unknown store": (store("ful"), ":2: tiers[0].store: a store must be full, evict or a mapping"),
    "kind as a word": (store("int"), "found 'int'; write {kind: int}"),
    "policy as a word": (
        policy("recent"),
        "a policy must be a mapping with kind and options, found 'recent'; write {kind",
    ),
    "no kind": (
        policy("{window: 3}"),
        ":2: tiers[0].policy: a policy must say its kind, found nothing; installed: attention",
    ),
    "kind is a number": (policy("{kind: 3}"), ":2: tiers[0].policy.kind: a policy must say its kind, found 3"),
    "unknown option": (
        policy("{kind: recent, windw: 3}"),
        ":2: tiers[0].policy.windw: unknown option 'windw' of recent (did you mean 'window'?); options of recent: ",
    ),
    "budget 0": (
        policy("{kind: log, budget: 0}"),
        ":2: tiers[0].policy.budget: a budget in tokens must be at least 1, found 0",
    ),
    "budget -1": (
        policy("{kind: log, budget: -1}"),
        "tiers[0].policy.budget: a budget in tokens must be at least 1, found -1",
    ),
    "budget nan": (policy("{kind: log, budget: .nan}"), "must lie in (0, 1), found nan"),
    "budget inf": (policy("{kind: log, budget: .inf}"), "must lie in (0, 1), found inf"),
    "budget 1.0": (policy("{kind: log, budget: 1.0}"), "must lie in (0, 1), found 1.0; write an integer"),
    "budget true": (policy("{kind: log, budget: true}"), "tiers[0].policy.budget: a budget is a number of tokens"),
    "budget list": (policy("{kind: log, budget: [1]}"), "tiers[0].policy.budget: a budget is a number of tokens"),
    "window word": (policy("{kind: recent, window: many}"), "tiers[0].policy.window: a budget is a number of tokens"),
    "flush 0": (policy("{kind: recent, flush: 0}"), "policy.flush: must be greater than or equal to 1, found 0"),
    "flush text": (policy("{kind: recent, flush: '3'}"), "policy.flush: must be a valid integer, found '3'"),
    "flush true": (policy("{kind: recent, flush: true}"), "policy.flush: must be a valid integer, found True"),
    "sink 0": (policy("{kind: sink, tokens: 0}"), "policy.tokens: must be greater than or equal to 1, found 0"),
    "nbits 5": (store("{kind: int, nbits: 5}"), ":2: tiers[0].store.nbits: must be 1, 2, 3, 4 or 8, found 5"),
    "group size": (
        store("{kind: int, group_size: -1}"),
        "store.group_size: must be greater than or equal to 1 or must be",
    ),
    "per": (store("{kind: int, per: head}"), "store.per: must be 'token' or 'channel', found 'head'"),
    "placement by update": (
        f"placement: update\n{store('full')}",
        ":1: placement: placement must be removed, a key of version 0.1: tokens are placed as if fed one by one. Where "
        "it was update, give the first tier policy: {kind: residual, length: 128}, as recipe hf-quantized does",
    ),
    "placement": (f"placement: token\n{store('full')}", ":1: placement: placement must be removed"),
    "name": (f"name: 3\n{store('full')}", ":1: name: name must be text, found 3"),
    "no tiers": ("name: x\n", ": a recipe must have tiers (or extends), found neither"),
    "empty tiers": ("tiers: []\n", ":1: tiers: tiers must be a list of at least one tier, found an empty list"),
    "tiers mapping": ("tiers: {a: 1}\n", ":1: tiers: tiers must be a list of at least one tier, found a mapping"),
    "tier is a word": (tiers("full"), ":2: tiers[0]: a tier must be a mapping with policy and store, found 'full'"),
    "no store": (
        tiers("{}"),
        ":2: tiers[0]: a tier must have either store, or keys and values, found none",
    ),
    "store and keys": (tiers("{store: full, keys: full}"), "either store, or keys and values, found store, keys"),
    "keys alone": (tiers("{keys: full}"), "either store, or keys and values, found keys"),
    "last policy": (
        "tiers:\n" + UPPER,
        ":2: tiers[0].policy: the last tier takes whatever reaches it and must have no policy",
    ),
    "no policy": (tiers("{store: full}", "{store: full}"), ":2: tiers[0]: every tier but the last must have a policy"),
    "rises": (
        tiers("{policy: {kind: recent}, store: {kind: int, nbits: 2}}", "{store: full}"),
        ":3: tiers[1].store: precision must never rise down the list, found full below int (2 bits)",
    ),
    "side rises": (
        tiers("{policy: {kind: recent}, keys: full, values: {kind: int, nbits: 2}}", "{store: {kind: int, nbits: 4}}"),
        ":3: tiers[1].store: precision must never rise",
    ),
    "evict above": (
        tiers("{policy: {kind: recent}, store: evict}", "{store: evict}"),
        ":2: tiers[0].store: evict must stand in the last tier",
    ),
    "evict one side": (
        tiers("{policy: {kind: recent}, store: full}", "{keys: full, values: evict}"),
        "tiers[1].values: evict must",
    ),
    "only evict": (store("evict"), ":2: tiers[0]: the only tier must not evict"),
    "undefined": (
        policy("{kind: recent, window: $w}"),
        ":2: tiers[0].policy.window: $w must be declared in params; declared: none",
    ),
    "undefined, near": (
        "params: {window: 3}\n" + policy("{kind: recent, window: $windw, flush: $window}"),
        ":3: tiers[0].policy.window: $windw must be declared in params (did you mean 'window'?); declared: window",
    ),
    "unused": (f"params:\n  a: 1\n{store('full')}", ":2: params.a: parameter 'a' must be used as $a somewhere"),
    "param list": (
        f"params: {{a: [1]}}\n{store('$a')}",
        ":1: params.a: parameter 'a': its default must be a number, a word",
    ),
    "param of param": (
        f"params: {{a: $b}}\n{store('$a')}",
        "its default must be a number, a word or true/false, found '$b'",
    ),
    "param name": (
        f"params: {{a-b: 1}}\n{store('full')}",
        ":1: params.a-b: a parameter's name has letters, digits and _",
    ),
    "params list": (
        f"params: [1]\n{store('full')}",
        ":1: params: params must be a mapping of names to values, found a list",
    ),
    "version 2": (
        f"version: 2\ntypes: x\n{store('full')}",
        ":1: version: this kvpolicy reads recipes of version 1, found version 2; upgrade kvpolicy",
    ),
    "version text": (f"version: one\n{store('full')}", ":1: version: version must be 1, found 'one'"),
    "extends nothing": (
        "extends: kiv\n",
        ":1: extends: extends must name a bundled recipe or a file relative to this one, found 'kiv' (did",
    ),
    "extends number": ("extends: 3\n", ":1: extends: extends must name a bundled recipe or a file, found 3"),
    "extends itself": (
        "extends: bad.yaml\n",
        ":1: extends: a recipe must not extend itself, found bad.yaml -> bad.yaml",
    ),
    "layers list": (f"layers: [full]\n{store('full')}", ":1: layers: layers must be a mapping such as"),
    "layer name": (
        f"layers:\n  first: full\n{store('full')}",
        ":2: layers.first: a layer selector is an index or a range",
    ),
    "layer range": (
        f"layers: {{5-2: full}}\n{store('full')}",
        ":1: layers.5-2: a range of layers must ascend, found '5-2'",
    ),
    "layer overlap": (
        f'layers:\n  "2-5": full\n  "4": full\n{store("full")}',
        ":3: layers.4: a layer may be named once, found '4' overlapping '2-5'",
    ),
    "layer word": (
        f"layers: {{0: ful}}\n{store('full')}",
        ":1: layers.0: a layer must have a list of tiers or full, found 'ful'",
    ),
    "layer tier": (f"layers:\n  0:\n    - {{stor: 1}}\n{store('full')}", ":3: layers.0[0].stor: unknown key"),
    "empty": ("", ": a recipe is a mapping with keys such as name and tiers, found an empty file"),
    "comment": ("# nothing\n", "found an empty file"),
    "list": ("- a\n", ":1: a recipe is a mapping with keys such as name and tiers, found a list"),
    "word": ("logquant\n", ":1: a recipe is a mapping with keys such as name and tiers, found 'logquant'"),
    "two documents": ("a: 1\n---\nb: 2\n", ":2: not valid YAML: expected a single document"),
    "syntax": ("tiers: [\nname: x\n", "not valid YAML"),
    "tab": ("tiers:\n\t- a\n", ":2: not valid YAML"),
    "control": ("name: \x01\n", ":1: not valid YAML: character 1 is not allowed"),
    "duplicate": (
        f"name: a\n{store('full')}\nname: b\n",
        ":5: name: a key may stand once, found 'name' also in line 1",
    ),
    "duplicate option": (
        policy("{kind: log, budget: 3, budget: 4}"),
        ":2: tiers[0].policy.budget: a key may stand once",
    ),
    "complex key": ("? [a]\n: b\n", ":1: a key must be a plain word"),
    "python tag": (
        "name: !!python/object/apply:os.system [echo]\n",
        ":1: name: tags are not allowed in a recipe, found !!python/",
    ),
    "own tag": ("name: !mine x\n", ":1: name: tags are not allowed in a recipe, found !mine"),
    "binary tag": ("name: !!binary aGk=\n", ":1: name: tags are not allowed in a recipe, found !!binary"),
    "set tag": ("name: !!set {a, b}\n", "tags are not allowed in a recipe, found !!set"),
    "recursive": ("name: &a [*a]\n", "nests at most 40 levels, found more (does an alias contain itself?)"),
    "merge list": ("<<: [1]\n", "<< takes a mapping or a list of mappings, found 1"),
    "unknown alias": ("name: *nothing\n", ":1: not valid YAML: found undefined alias"),
}


def error_of(path: Path, **params: Any) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, **params)
    return str(caught.value)


@pytest.mark.parametrize("case", BAD)
def test_one_error_with_file_line_path_and_remedy(case: str, tmp_path: Path) -> None:
    text, expected = BAD[case]
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    message = error_of(path)
    assert message.startswith(f"{path}:"), message
    assert "\n" not in message
    if expected.startswith(":"):
        assert message.removeprefix(str(path)).startswith(expected), message
    else:
        assert expected in message, message


def test_alias_bombs_are_counted_not_expanded(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    path = tmp_path / "bomb.yaml"
    path.write_text("\n".join(lines))
    start = time.perf_counter()
    assert "at most 20000 values, aliases expanded, found more" in error_of(path)
    assert time.perf_counter() - start < 5


def test_deep_nesting_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "deep.yaml"
    path.write_text("a: " + "[" * 20_000)
    assert "nests at most 40 levels" in error_of(path)


@pytest.mark.parametrize("text", ["[" * 5_000, "a: [" + "x," * 60_000 + "]", "- x\n" * 30_000, "k: {a: 1}\n" * 12_000])
def test_what_is_too_much_is_refused_before_anything_is_built(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def compose(*_: Any) -> None:
        raise AssertionError("built")

    monkeypatch.setattr(YAML, "compose", compose)
    with pytest.raises(RecipeError, match=r"nests at most 40 levels|at most 20000 values, found more"):
        load_yaml(text)


def test_binary_huge_missing_directory_and_special_files(tmp_path: Path) -> None:
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"name: x\n\xff\xfe\x00")
    assert error_of(binary) == f"{binary}:2: a recipe is a text file in UTF-8, found byte 0xff"
    zeros = tmp_path / "zeros.yaml"
    zeros.write_bytes(b"\0" * 100)
    assert "not valid YAML" in error_of(zeros)
    huge = tmp_path / "huge.yaml"
    huge.write_bytes(b"#" * (1 << 17) + b"#")
    assert error_of(huge) == f"{huge}: a recipe has at most 131072 bytes, found more"
    missing = tmp_path / "missing.yaml"
    assert error_of(missing) == f"{missing}: no such file"
    assert "found a directory" in error_of(tmp_path)
    pipe = tmp_path / "pipe.yaml"
    os.mkfifo(pipe)
    assert "a recipe is a regular file" in error_of(pipe)


def test_an_error_in_an_inherited_part_names_the_file_that_has_it(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("params: {w: 0}\n" + policy("{kind: log, budget: $w}"))
    child = tmp_path / "child.yaml"
    child.write_text("extends: base.yaml\n")
    expected = (
        f"{tmp_path}/base.yaml:3: tiers[0].policy.budget: a budget in tokens must be at least 1, found 0 (from par"
    )
    assert error_of(child).startswith(expected)


def test_cyclic_inheritance_names_the_cycle(tmp_path: Path) -> None:
    for name, parent in (("a", "b"), ("b", "c"), ("c", "a")):
        (tmp_path / f"{name}.yaml").write_text(f"extends: {parent}.yaml\n")
    assert "found a.yaml -> b.yaml -> c.yaml -> a.yaml" in error_of(tmp_path / "a.yaml")


def test_parameters_that_are_unknown_or_do_not_fit() -> None:
    kivi = re.escape(str(BUNDLED / "kivi.yaml"))
    with pytest.raises(
        RecipeError, match=f"^{kivi}: unknown parameter 'nbit' .did you mean 'nbits'.*: residual, nbits,"
    ):
        load_recipe("kivi", nbit=2)
    with pytest.raises(
        RecipeError, match=rf"^{kivi}:\d+: parameter 'nbits': must be 1, 2, .* found 7 \(at tiers\[1\].keys.nbits\)$"
    ):
        load_recipe("kivi", nbits=7)
    with pytest.raises(RecipeError, match="must be a number, a word or true/false, found a list"):
        load_recipe("kivi", nbits=[2])
    with pytest.raises(RecipeError, match="must be a number, a word or true/false, found <object"):
        load_recipe("kivi", nbits=object())


SHELL = {
    "kivi:nbits": "parameters are written NAME:key=value,key=value, found 'nbits'",
    "kivi:nbits=": "parameters are written NAME:key=value",
    "kivi:nbits=2,": "found ''",
    "kivi:nbits=2,nbits=4": "'nbits' twice",
    "kivi:nbits=[2]": "must be a number, a word or true/false, found a list",
    "kivi:nbits={": "not valid YAML",
    "kiwi": "no recipe 'kiwi' (did you mean 'kivi'?); give a path to a YAML file, or a bundled recipe, which kvpolicy "
    "recipes lists: adakv,",
    "kiwi:nbits=2": "no recipe 'kiwi' (did you mean 'kivi'?)",
    "nowhere/mine.yaml:nbits=2": "nowhere/mine.yaml: no such file",
    "": "no recipe ''",
    "bad\0name": "no recipe",
}


@pytest.mark.parametrize("source", SHELL)
def test_bad_shell_sources(source: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(source)
    assert SHELL[source] in str(caught.value)


def test_bad_python_sources() -> None:
    for source in (3, None, b"kivi", ["kivi"]):
        with pytest.raises(RecipeError, match="a recipe must be a name, a path, a mapping or a Recipe, found"):
            load_recipe(source)
    with pytest.raises(RecipeError, match=r"^<mapping>: tiers\[0\].store: a store must be full, evict or a mapping"):
        load_recipe({"tiers": [{"store": object()}]})
    with pytest.raises(RecipeError, match="<mapping>: a key must be a word, found nothing"):
        load_recipe({None: 1})
    cyclic: dict[str, Any] = {}
    cyclic["tiers"] = cyclic
    with pytest.raises(RecipeError, match="does it contain itself"):
        load_recipe(cyclic)
    with pytest.raises(RecipeError, match="nbits also as an argument"):
        load_recipe("kivi:nbits=2", nbits=2)


# Whatever stands in a file, the answer is a recipe or a RecipeError.
plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from(["full", "evict", "$w", "recent", "int", "x"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["kind", "policy", "store", "keys", "values", "window", "nbits", "tiers", "layers", "params", "0", "w"]
            ),
            inner,
        )
    ),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(
    st.dictionaries(st.sampled_from(["version", "name", "extends", "placement", "params", "tiers", "layers"]), plain)
)
def test_any_mapping_is_a_recipe_or_an_error(data: dict[str, Any]) -> None:
    with suppress(RecipeError):
        load_recipe(data)


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=200) | st.lists(st.sampled_from(list("{}[]:,-?&*!|>'\"% \nab<1$")), max_size=40).map("".join))
def test_any_text_is_a_recipe_or_an_error(text: str) -> None:
    with suppress(RecipeError):
        load_yaml(text)
