"""Tasks made on the spot: what they ask for stands in the text, lengths are met, chats are rendered."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from toys import chatty, plain

from kvpolicy.errors import TaskError
from kvpolicy.tasks.encoding import encode, length_of
from kvpolicy.tasks.load import load_task, tasks
from kvpolicy.tasks.sample import Sample
from kvpolicy.tasks.scorers import SCORERS, score
from kvpolicy.tasks.task import Chat, Fitted, Generated

FITTED = [name for name, task in tasks().items() if issubclass(task, Fitted) and "path" not in task.model_fields]
SPECS = [
    *FITTED,
    "needle:keys=4,haystack=noise,depth=0.5",
    "needle:haystack=needles,key_kind=uuids,value_kind=uuids",
    "needle:values=4",
    "needle:queries=3,keys=5,value_kind=words",
    "variables:chains=3,hops=2,haystack=prose,example=false",
    "common_words:common=5,often=8,seldom=2,example=false",
    "frequent_words:alpha=3.5",
    "turns:turns=2",
    "tool_call:depth=0",
    "copying:depth=1,words=5",
    "passkey:digits=9",
    "qa",
]


def context_of(sample: Sample) -> str:
    return " ".join(message["content"] for message in sample.messages) or sample.prompt


@pytest.mark.parametrize("spec", SPECS)
def test_samples_hold_what_they_ask_for(spec: str) -> None:
    made = load_task(spec, 3, 5, 1500)
    assert made == load_task(spec, 3, 5, 1500)
    assert made[:2] == load_task(spec, 2, 5, 1500)
    assert made != load_task(spec, 3, 6, 1500)
    assert len({sample.prompt for sample in made}) == 3
    for sample in made:
        assert score(sample, sample.answer) == 1, sample.answer
        assert score(sample, "") == score(sample, "I do not know") == 0
        if sample.scorer in ("contains", "contains_all"):
            assert all(reference in context_of(sample) for reference in sample.references)
        assert json.loads(json.dumps(sample.facts)) == sample.facts
        assert sample.facts["length"] == 1500
        assert 0 <= sample.facts.get("depth", 0) <= 1


@pytest.mark.parametrize("spec", [*SPECS, "lines", "arithmetic"])
def test_lengths_are_met_in_the_tokens_of_the_model(spec: str) -> None:
    for tokens, tokenizer in ((1400, plain()), (3000, chatty())):
        for sample in load_task(spec, 2, 1, tokens, tokenizer):
            found = length_of(sample, tokenizer)
            # A piece of filling: RULER's five sentences, or a needle of two uuids.
            assert tokens - max(0.02 * tokens, 75) <= found <= tokens, spec


def test_lengths_of_any_tokenizer_are_met() -> None:
    def letters(text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) for letter in text]}

    for spec in ("needle", "variables", "lines", "tool_call", "copying", "qa"):
        (sample,) = load_task(spec, 1, 0, 20_000, letters)
        assert 19_600 <= len(sample.prompt) + len(sample.answer) <= 20_000


@pytest.mark.parametrize("name", sorted(set(FITTED) - {"common_words", "frequent_words", "turns", "variables"}))
def test_depth_is_where_the_text_has_it_and_spreads_over_the_samples(name: str) -> None:
    depths = []
    for sample in load_task(name, 8, 0, 4000):
        if name == "needle":
            text = sample.prompt.split("afterwards.\n")[1].split("\nWhat ")[0]
            place = text.index(f"is: {sample.references[0]}") - len("One of the special magic numbers for ab-cd ")
        elif name == "passkey":
            text = sample.prompt.split("there.\n")[1].split("\nWhat ")[0]
            place = text.index("The pass key is")
        elif name == "copying":
            text = sample.prompt.split("Text:\n")[1].split("\n\nThe same")[0].replace("\n", " ")
            place = text.index(sample.prompt.split("within:\n")[1] + sample.answer)
        else:
            text = sample.prompt.split("come in:\n")[1].split("\nShip ")[0]
            place = text.index(f"Order {json.loads(sample.references[0])['arguments']['order_id']}")
        assert place / len(text) == pytest.approx(sample.facts["depth"], abs=0.02)
        depths.append(sample.facts["depth"])
    assert sum(depth < 0.5 for depth in depths) in (3, 4, 5)
    assert max(depths) - min(depths) > 0.6
    if "depth" in tasks()[name].model_fields:
        (sample,) = load_task(f"{name}:depth=0.25", 1, 3, 4000)
        assert sample.facts["depth"] == pytest.approx(0.25, abs=0.03)


def test_invented_documents_answer_what_is_asked_of_them() -> None:
    kinds = {
        r"In which town was (.*) born\?": 1,
        r"In which year was (.*) born\?": 2,
        r"What was the trade of (.*)\?": 0,
        r"On which river lies the town where (.*) was born\?": 3,
    }
    asked = set()
    for sample in load_task("qa", 24, 0, 2000):
        context, _, question = sample.prompt.removesuffix(" Answer:").rpartition("Question: ")
        (kind,) = (kind for kind in kinds if re.fullmatch(kind, question))
        name = re.fullmatch(kind, question)[1]  # type: ignore[index]
        (told,) = re.findall(rf"{name}, a (\w+), was born in ([\w ]+) in (\d+)", context)
        rivers = re.findall(rf"{told[1]} is a town on the river (\w+)", context)
        assert sample.references == ((*told, *rivers)[kinds[kind]],)
        assert sample.facts["documents"] == context.count("Document ")
        asked.add(kind)
    assert asked == set(kinds)
    with pytest.raises(TaskError, match=r"nowhere.json"):
        load_task("qa:path=nowhere.json", 1, 0)


def test_needles_of_several_are_told_apart() -> None:
    (sample,) = load_task("needle:keys=6,queries=2,values=3", 1, 0, 2000)
    told = re.findall(r"magic numbers for (\S+) is: (\d{7})\.", sample.prompt)
    assert len(told) == 18
    assert len({value for _, value in told}) == 18
    assert len({key for key, _ in told}) == 6
    keys = re.search(r"numbers for (\S+), and (\S+) mentioned", sample.prompt).groups()  # type: ignore[union-attr]
    assert {value for key, value in told if key in keys} == set(sample.references)
    assert score(sample, sample.references[0]) == pytest.approx(1 / 6)


def test_variables_are_those_that_have_the_value() -> None:
    for sample in load_task("variables:chains=3,hops=3", 3, 0, 2000):
        text = sample.prompt.split("\n\nMemorize")[1]
        known: dict[str, str] = {}
        for name, value in re.findall(r"VAR ([A-Z]{5}) = (?:VAR )?([A-Z]{5}|\d{5})", text):
            known[name] = known.get(value, value)  # an assignment comes after the one it takes its value from
        wanted = re.search(r"assigned the value (\d{5}) in", text)[1]  # type: ignore[index]
        assert len(known) == 12
        assert {name for name, value in known.items() if value == wanted} == set(sample.references)


def test_common_and_frequent_words_are_the_most_frequent() -> None:
    for tokens, often, seldom in ((2000, 6, 1), (6000, 30, 3)):
        (sample,) = load_task("common_words", 1, 0, tokens)
        words = re.findall(r"\d+\. (\S+)", sample.prompt.split("most often.\n")[-1].split("\nQuestion")[0])
        assert sorted({words.count(word) for word in words}) == [seldom, often]
        assert {word for word in words if words.count(word) == often} == set(sample.references)
    (sample,) = load_task("frequent_words", 1, 0, 4000)
    coded = sample.prompt.split("coded words. ")[1].split("\nQuestion")[0].split()
    counts = sorted({word: coded.count(word) for word in coded}.items(), key=lambda item: -item[1])
    assert counts[0][0] == "..."
    assert [word for word, _ in counts[1:4]] == list(sample.references)
    # Of N words the k-th comes N / (zeta(2) k^2) times.
    assert counts[1][1] / counts[0][1] == pytest.approx(1 / 4, abs=0.05)


def test_turns_are_fed_one_after_another() -> None:
    for tokenizer in (plain(), chatty()):
        (sample,) = load_task("turns:turns=5", 1, 0, 900, tokenizer)
        assert "".join(sample.turns) == sample.prompt
        parts, answer = encode(sample, tokenizer)
        given = {} if tokenizer is plain() else {"add_special_tokens": False}
        whole = tokenizer(sample.prompt + sample.answer, **given)["input_ids"]
        assert [token for part in parts for token in part] + answer == whole
        assert len(parts) == 5
        assert sample.references[0] in tokenizer.decode(parts[0])
        assert not any(sample.references[0] in tokenizer.decode(part) for part in parts[1:])


def test_chats_are_rendered_by_the_template_where_there_is_one() -> None:
    for name in FITTED:
        (sample,) = load_task(name, 1, 0, 1500, chatty())
        chat = issubclass(tasks()[name], Chat)
        assert sample.rendered == chat == sample.prompt.startswith("<|endoftext|><|user|>\n")
        assert sample.facts.get("template", False) == chat
        ids = [token for part in encode(sample, chatty())[0] for token in part]
        # The first token, which the template or the tokenizer puts there, not both; and one after each message.
        assert ids.count(chatty().eos_token_id) == 1 + len(sample.messages)
        assert ids[:2].count(chatty().eos_token_id) == 1
        if chat:
            (off,) = load_task(f"{name}:template=false", 1, 0, 1500, chatty())
            assert not off.rendered
            assert not off.facts["template"]
            assert "<|user|>" not in off.prompt
    (sample,) = load_task("needle", 1, 0, 700, chatty())
    assert re.search(
        r"provided text\?<\|endoftext\|>\n<\|assistant\|>\nThe special magic number for \S+ .* is$", sample.prompt
    )
    assert sample.answer == f" {sample.references[0]}"


def test_a_template_that_refuses_is_reported() -> None:
    class Refusing:
        chat_template = "x"

        def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
            return {"input_ids": [0] * len(text)}

        def apply_chat_template(self, *_: Any, **__: Any) -> str:
            raise ValueError("roles must alternate")

    with pytest.raises(
        TaskError, match=r"must take the messages \(user\), found: roles must alternate; .*template=false"
    ):
        load_task("needle", 1, 0, 3000, Refusing())


def test_what_is_too_short_names_the_least_length() -> None:
    for name in sorted(set(FITTED) | {"lines", "arithmetic"}):
        with pytest.raises(TaskError, match="tokens must be at least") as error:
            load_task(name, 1, 0, 15, plain())
        least = int(re.search(r"at least (\d+)", str(error.value))[1])  # type: ignore[index]
        load_task(name, 1, 0, least + 60, plain())


def test_the_room_loads_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; from kvpolicy.tasks.load import load_task; load_task('needle', 1, 0, 400); "
        "assert not {'torch', 'transformers', 'datasets', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_task_and_scorer_is_documented() -> None:
    page = (Path(__file__).parents[2] / "docs" / "howto" / "tasks.md").read_text(encoding="utf-8")
    rows = " ".join(line.split("|")[1] for line in page.splitlines() if line.startswith("| "))
    assert {name for name in (*tasks(), *SCORERS) if f"`{name}`" not in rows} == set()
    for name, task in tasks().items():
        assert task.__doc__, name
        assert all(field.description for field in task.model_fields.values()), name
        assert issubclass(task, Generated) == ("tokens" in task.model_fields)
