"""Tasks from files, on tiny files of the same form; and texts that nothing is generated from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from toys import chatty, plain, write

from kvpolicy.errors import KvpolicyError, TaskError
from kvpolicy.tasks.encoding import encode, length_of
from kvpolicy.tasks.files import JsonLines
from kvpolicy.tasks.load import check_task, load_task
from kvpolicy.tasks.longbench_metrics import DATASETS
from kvpolicy.tasks.sample import Sample
from kvpolicy.tasks.scorers import score

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2+2?"}]


def test_rows_keep_their_fields_and_name_their_scorer(tmp_path: Path) -> None:
    rows = [
        {"prompt": "Capital?", "answers": ["Paris", "Lutetia"], "document": 7, "depth": 0.5, "tags": ["a"]},
        {"prompt": "Sum?", "answer": 4, "answers": ["4", "four"]},
    ]
    path = write(tmp_path / "rows.jsonl", rows)
    first, second = load_task(f"{path}:scorer=f1,new_tokens=9,stop=##", 2, 0)
    assert (first.answer, first.references, first.document) == ("Paris", ("Paris", "Lutetia"), "7")
    assert first.facts == {"depth": 0.5, "tags": ["a"]}
    assert (first.scorer, first.new_tokens, first.stop) == ("f1", 9, ("##",))
    assert (second.answer, second.references, second.document) == ("4", ("4", "four"), None)
    assert score(first, "lutetia!## and more") == 1
    made = load_task(JsonLines(path=path, scorer=lambda text, sample: float("7" in text)), 2, 0)
    assert [score(sample, "7") for sample in made] == [1, 1]


def test_chats_of_rows_are_rendered_or_written_out(tmp_path: Path) -> None:
    turns = [*CHAT, {"role": "assistant", "content": "4"}, {"role": "user", "content": "And 3+3?"}]
    path = write(tmp_path / "rows.jsonl", [{"messages": CHAT, "answer": "4"}, {"messages": turns, "answer": 6}])
    one, two = load_task(path, 2, 0, tokenizer=chatty())
    assert one.rendered
    assert one.facts == {"template": True}
    head = "<|endoftext|><|system|>\nBe brief.<|endoftext|>\n<|user|>\n2+2?<|endoftext|>\n<|assistant|>\n"
    assert (one.prompt, one.answer) == (head, "4")
    assert two.turns == (head, "4<|endoftext|>\n<|user|>\nAnd 3+3?<|endoftext|>\n<|assistant|>\n")
    assert encode(one, chatty())[0][0][:2] == [
        chatty().eos_token_id,
        chatty()("<|", add_special_tokens=False)["input_ids"][0],
    ]
    for tokenizer, spec in ((plain(), path), (None, path), (chatty(), f"{path}:template=false")):
        one, two = load_task(spec, 2, 0, tokenizer=tokenizer)
        assert not one.rendered
        assert one.prompt + one.answer == "System: Be brief.\nUser: 2+2?\nAssistant: 4"
        assert two.turns[1] == " 4\nUser: And 3+3?\nAssistant:"


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        ({"prompt": "p"}, "", '"answer" must be a string, found none among prompt'),
        ({"prompt": "p", "answers": []}, "", '"answers" must be a list of strings, found none'),
        ({"prompt": "p", "answers": [None]}, "", '"answers" must be a string, found a NoneType'),
        ({"prompt": "p", "messages": CHAT, "answer": "a"}, "", '"prompt" or "messages", found both'),
        ({"messages": "hi", "answer": "a"}, "", '"messages" must be a list of objects'),
        ({"messages": [{"role": "user"}], "answer": "a"}, "", '"content" must be a string'),
        ({"messages": [{"role": "assistant", "content": "x"}], "answer": "a"}, "", "must be of the user"),
        ({"prompt": "p", "answer": "("}, ":scorer=regex", "must be regular expressions for this scorer"),
        ({"prompt": "p", "answer": "a"}, ":scorer=f2", r"scorer must be one of .*mean 'f1'"),
        ({"prompt": "p", "answer": "a"}, ":score=f1", r"no option 'score' \(did you mean 'scorer'\?\)"),
        ({"prompt": "p", "answer": "a"}, ":scorer", "options are written NAME:key=value"),
        ({"prompt": "p", "answer": "a"}, ":scorer=f1,scorer=f1", "may be given once, found 'scorer' twice"),
        ({"prompt": "p", "answer": "a"}, ":new_tokens=0", "new_tokens must be at least 1, found 0"),
    ],
    ids=str,
)
def test_faults_of_rows_and_options_are_named(tmp_path: Path, row: Any, options: str, message: str) -> None:
    path = write(tmp_path / "rows.jsonl", [row])
    with pytest.raises(TaskError, match=message):
        check_task(f"{path}{options}", 1)


GSM = [
    {"question": f"What is {i}+{i}?", "answer": f"It is <<{i}+{i}={2 * i}>>{2 * i}.\n#### {2 * i}"} for i in range(9)
]


def test_gsm8k_shows_solved_examples_and_scores_the_last_number(tmp_path: Path) -> None:
    write(tmp_path / "test.jsonl", GSM[:3])
    write(tmp_path / "train.jsonl", GSM[2:])
    for path in (tmp_path, tmp_path / "test.jsonl"):
        made = load_task(f"gsm8k:path={path},shots=6", 3, 1)
        assert made[2].prompt.endswith("Question: What is 2+2?\nAnswer:")
        for sample in made:
            assert sample.prompt.count("Question: ") == 7
            assert sample.prompt.split("Question: ")[7] not in "".join(sample.prompt.split("Question: ")[:7])
            assert score(sample, sample.answer) == 1
            assert score(sample, sample.answer.replace("####", "so") + "\n\nQuestion: what is 77?") == 1
            assert score(sample, "#### 5") == 0
            assert sample.new_tokens == 512
    (chat,) = load_task(f"gsm8k:path={tmp_path},shots=2", 1, 0, tokenizer=chatty())
    assert [message["role"] for message in chat.messages] == ["user", "assistant"] * 2 + ["user"]
    with pytest.raises(TaskError, match=r"must be 8 solved examples besides the question, found 7; .*shots="):
        load_task(f"gsm8k:path={tmp_path},shots=8", 1, 0)


def test_other_files_are_read_by_datasets(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    frame = datasets.Dataset.from_list(GSM)
    frame.to_parquet(tmp_path / "rows.parquet")
    expected = [sample.answer for sample in load_task(f"gsm8k:path={write(tmp_path / 'a.jsonl', GSM)},shots=0", 9, 0)]
    datasets.DatasetDict({"test": frame}).save_to_disk(tmp_path / "disk")
    for path in (tmp_path / "rows.parquet", tmp_path / "disk"):
        made = load_task(f"gsm8k:path={path},shots=0", 9, 0)
        assert [sample.answer for sample in made] == expected
    with pytest.raises(TaskError, match=r"split 'test', or a dataset .*found .*; give the path of a local copy"):
        load_task("gsm8k:path=nobody/nothing", 1, 0)


def longbench(home: Path, dataset: str, rows: list[dict[str, Any]]) -> str:
    write(home / "data" / f"{dataset}.jsonl", rows)
    (home / "config").mkdir(exist_ok=True)
    prompts = dict.fromkeys(DATASETS, "Read:\n{context}\nAsk: {input}\nAnswer:")
    (home / "config" / "dataset2prompt.json").write_text(json.dumps(prompts))
    (home / "config" / "dataset2maxlen.json").write_text(json.dumps(dict.fromkeys(DATASETS, 64)))
    return f"longbench:dataset={dataset},path={home}"


def row_of(context: str, answers: list[str], classes: Any = None) -> dict[str, Any]:
    return {"context": context, "input": "Who?", "answers": answers, "all_classes": classes, "length": 9, "_id": "x"}


def test_longbench_has_its_prompts_truncation_and_metrics(tmp_path: Path) -> None:
    text = " ".join(f"word{i}" for i in range(400))
    rows = [row_of(text, ["The cat", "cats"]), row_of(text, ["Dog"]), row_of("short", ["Dog"])]
    spec = longbench(tmp_path, "qasper", rows)
    one, two, three = load_task(spec, 3, 0)
    assert one.prompt == f"Read:\n{text}\nAsk: Who?\nAnswer:"
    assert (one.answer, one.references, one.new_tokens) == (" The cat", ("The cat", "cats"), 64)
    assert one.document == two.document != three.document
    assert score(one, "a CAT.") == 1
    for tokenizer in (plain(), chatty()):
        cut = load_task(f"{spec},max_length=100", 3, 0, tokenizer=tokenizer)
        ids = tokenizer(one.prompt)["input_ids"]
        kept = "".join(tokenizer.decode(part, skip_special_tokens=True) for part in (ids[:50], ids[-50:]))
        assert kept in cut[0].prompt
        assert cut[0].rendered == (tokenizer is chatty())
        assert [sample.facts["cut_tokens"] for sample in cut] == [len(ids) - 100] * 2 + [0]
    with pytest.raises(TaskError, match="max_length counts tokens, which takes a tokenizer"):
        load_task(f"{spec},max_length=100", 1, 0)
    classes = ["City", "Date"]
    spec = longbench(tmp_path, "trec", [row_of("c", ["City"], classes)])
    (sample,) = load_task(spec, 1, 0, tokenizer=chatty())
    assert not sample.rendered  # no chat is made of these
    assert score(sample, "\nCity\nDate") == 1
    assert score(sample, "City or Date") == 0.5
    (tmp_path / "config" / "dataset2maxlen.json").unlink()
    with pytest.raises(TaskError, match=r"dataset2prompt.json and dataset2maxlen.json must be in .*config=..."):
        check_task(spec, 1)
    with pytest.raises(TaskError, match=r"option 'dataset' must be 'narrativeqa'.*found 'trek'"):
        check_task("longbench:dataset=trek,path=x", 1)


def test_longbench_is_read_from_parquet_and_from_what_datasets_saved(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [{**row_of("text", ["Dog"], None), "dataset": "qasper"}, {**row_of("b", ["Cat", "cats"]), "dataset": "trec"}]
    expected = load_task(longbench(tmp_path, "qasper", rows[:1]), 1, 0)
    frame, config = datasets.Dataset.from_list(rows), tmp_path / "config"
    own = datasets.Dataset.from_list(rows[:1])
    frame.to_parquet(tmp_path / "all.parquet")
    frame.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"test": frame}).save_to_disk(tmp_path / "dict")
    for kind in ("file", "saved", "shards"):
        (tmp_path / kind).mkdir()
    own.to_parquet(tmp_path / "file" / "qasper.parquet")
    own.save_to_disk(tmp_path / "saved" / "data" / "qasper")
    own.to_parquet(tmp_path / "shards" / "qasper" / "test-00000-of-00001.parquet")
    for place in ("all.parquet", "one", "dict", "file", "saved", "shards"):
        found = load_task(f"longbench:dataset=qasper,path={tmp_path / place},config={config}", 1, 0)
        assert [(x.prompt, x.references, x.document) for x in found] == [
            (x.prompt, x.references, x.document) for x in expected
        ], place
    with pytest.raises(TaskError, match=r"must hold rows of lcc, found those of qasper, trec"):
        check_task(f"longbench:dataset=lcc,path={tmp_path / 'one'},config={config}", 1)


SQUAD = [
    {
        "context": f"Paragraph {i} tells of town {i} and its mayor, called Ann{i}.",
        "qas": [
            {
                "question": f"Who is mayor of {i}?",
                "answers": [{"text": f"Ann{i}"}, {"text": f"Ann{i}"}, {"text": "Ann"}],
            },
            {"question": "Why?", "answers": [], "is_impossible": True},
        ],
    }
    for i in range(60)
]
HOTPOT = [
    {
        "question": f"Q{i}?",
        "answer": f"A{i}",
        "context": [[f"{kind}{i}", [f"{kind}{i} is", " short."]] for kind in "abc"],
        "supporting_facts": [[f"a{i}", 0], [f"c{i}", 1]],
    }
    for i in range(40)
]


def test_questions_stand_among_documents_of_others(tmp_path: Path) -> None:
    (tmp_path / "squad.json").write_text(json.dumps({"data": [{"paragraphs": SQUAD}]}))
    samples = load_task(f"qa:path={tmp_path / 'squad.json'},tokens=600", 6, 0)
    for sample in samples:
        name = sample.references[0]
        assert sample.references == (name, "Ann")
        assert sample.prompt.count(f"called {name}.") == 1
        assert sample.prompt.count("Document 2:\n") == 1
        assert sample.document == f"Who is mayor of {name[3:]}?"
        assert sample.document in sample.prompt
        before = sample.prompt[: sample.prompt.index(f"called {name}.")]
        assert before.count("Document ") / sample.facts["documents"] == pytest.approx(sample.facts["depth"], abs=0.15)
        assert score(sample, f"It is {name.upper()}.") == 1
    assert len({round(sample.facts["depth"], 1) for sample in samples}) > 3
    assert load_task(f"qa:path={tmp_path / 'squad.json'},tokens=600", 2, 0) == samples[:2]
    (chat,) = load_task(f"qa:path={tmp_path / 'squad.json'},tokens=600", 1, 0, tokenizer=chatty())
    assert chat.rendered
    assert 500 < length_of(chat, chatty()) <= 600
    (last,) = load_task(f"qa:path={tmp_path / 'squad.json'},depth=1,tokens=600", 1, 0)
    assert last.facts["depth"] > 0.85
    assert load_task(f"qa:path={tmp_path / 'squad.json'},tokens=100000", 1, 0)[0].facts["documents"] == 60
    (tmp_path / "hotpot.json").write_text(json.dumps(HOTPOT))
    spread = [
        {
            **row,
            "context": {"title": [x[0] for x in row["context"]], "sentences": [x[1] for x in row["context"]]},
            "supporting_facts": {"title": [x[0] for x in row["supporting_facts"]], "sent_id": [0, 1]},
        }
        for row in HOTPOT
    ]
    made = load_task(f"qa:path={tmp_path / 'hotpot.json'},tokens=300", 4, 0)
    assert made == load_task(f"qa:path={write(tmp_path / 'hotpot.jsonl', spread)},tokens=300", 4, 0)
    for sample in made:
        assert all(f"\n{kind}{sample.answer.strip()[1:]}\n" in sample.prompt for kind in "abc")
        assert len(sample.facts["depths"]) == 2
    for rows, message in (
        ([{"question": "x", "context": 3}], "must be a text as in SQuAD"),
        ([{"paragraphs": [{}]}], r"an article must have paragraphs .* found none of 'qas'"),
        ([{"question": "x", "context": "y", "answers": []}], "must hold a question that has an answer"),
        ([3], "must be an object as in SQuAD or HotpotQA, found a int"),
    ):
        (tmp_path / "wrong.json").write_text(json.dumps(rows))
        with pytest.raises(TaskError, match=message):
            check_task(f"qa:path={tmp_path / 'wrong.json'}", 1)


def test_ruler_files_are_scored_by_parts_or_all(tmp_path: Path) -> None:
    row = {"index": 3, "input": "Find it.", "outputs": ["12", "34"], "answer_prefix": " They are", "length": 99}
    write(tmp_path / "niah" / "validation.jsonl", [row])
    write(tmp_path / "qa_1" / "validation.jsonl", [{**row, "outputs": ["12", "34"]}])
    (sample,) = load_task(f"ruler:path={tmp_path}/niah/validation.jsonl", 1, 0, tokenizer=chatty())
    assert (sample.prompt, sample.answer) == ("Find it. They are", " 12, 34")
    assert sample.facts == {"index": 3, "length": 99, "template": False}
    assert score(sample, " 34") == 0.5
    (sample,) = load_task(f"ruler:path={tmp_path}/qa_1/validation.jsonl", 1, 0)
    assert score(sample, " 34") == 1
    (sample,) = load_task(f"ruler:path={tmp_path}/niah/validation.jsonl,template=true", 1, 0, tokenizer=chatty())
    assert sample.prompt.endswith("Find it.<|endoftext|>\n<|assistant|>\nThey are")


def test_completions_are_run_only_where_that_is_asked_for(tmp_path: Path) -> None:
    row = {
        "task_id": "T/0",
        "prompt": "def double(x):\n",
        "canonical_solution": "    return 2 * x\n",
        "entry_point": "double",
        "test": f"def check(f):\n    open({str(tmp_path / 'ran')!r}, 'w')\n    assert f(4) == 8\n",
    }
    path = write(tmp_path / "rows.jsonl", [row])
    (sample,) = load_task(f"completion:path={path}", 1, 0)
    assert score(sample, "    return 2 * x\n\ndef other():\n    pass") == 1
    assert 0.5 < score(sample, "    return x + x") < 1
    assert not (tmp_path / "ran").exists()
    (sample,) = load_task(f"completion:path={path},execute=true", 1, 0)
    assert score(sample, "    return x + x\n\ndef other(:") == 1
    assert score(sample, "    return x") == 0
    assert (tmp_path / "ran").exists()
    assert sample.new_tokens == 512


def test_texts_are_cut_in_tokens_and_nothing_is_generated(tmp_path: Path) -> None:
    for name in ("a.txt", "b.md", "c.bin"):
        (tmp_path / name).write_text(" ".join(f"{name} word {i}" for i in range(2000)), encoding="utf-8")
    made = load_task(f"text:path={tmp_path},tokens=100,answer=20", 6, 0, tokenizer=chatty())
    assert {Path(str(sample.document)).name for sample in made} == {"a.txt", "b.md"}
    for sample in made:
        (prompt,), answer = encode(sample, chatty())
        assert (len(prompt), len(answer), prompt[0]) == (100, 20, chatty().eos_token_id)
        assert not sample.generate
        ids = chatty()(Path(sample.facts["file"]).read_text(), add_special_tokens=False)["input_ids"]
        piece = [*prompt[1:], *answer]
        assert any(ids[i : i + 119] == piece for i in range(0, len(ids), 119))
    (alone,) = load_task(f"text:path={tmp_path}/a.txt,tokens=100", 1, 0, tokenizer=plain())
    assert alone.document is None
    assert len(alone.answer_ids) == 64
    for spec, n, message in (
        (f"text:path={tmp_path}/a.txt", 900, r"must hold 900 different samples of 1024 \+ 64 tokens, found"),
        (f"text:path={tmp_path}/none", 1, "must be a readable file, found no such file"),
        (f"text:path={tmp_path}/c.bin", 1, "takes a tokenizer, found none"),
    ):
        with pytest.raises(TaskError, match=message):
            load_task(spec, n, 0, tokenizer=plain() if "c.bin" not in spec else None)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("needel", r"one of lines, .*found 'needel' \(did you mean 'needle'\?\)"),
        ("needle:dept=1", r"no option 'dept' \(did you mean 'depth'\?\); there are .*keys, "),
        ("needle:depth=2", "depth must be at most 1, found 2"),
        ("needle:depth=x", "option 'depth' must be a valid number.*found 'x'"),
        ("needle:depth=x,keys=0", "option 'depth'.*; keys must be at least 1|keys.*; option 'depth'"),
        ("needle:tokens=2000000", "tokens must be at most 1,048,576, found 2000000"),
        ("needle:haystack=pros", r"haystack must be prose or noise or the path of a text.*mean 'prose'"),
        ("gsm8k:path=/nowhere.jsonl", "must be a readable file of JSON Lines"),
        ("longbench", "option 'dataset' must be given; write longbench:dataset=..."),
        ("ruler:path=/nowhere.jsonl", "must be a readable file of JSON Lines"),
        ("text", "option 'path' must be given"),
    ],
)
def test_options_that_are_wrong_are_named_with_the_remedy(spec: str, message: str) -> None:
    with pytest.raises(KvpolicyError, match=message):
        load_task(spec, 1, 0)


def test_tokens_of_the_task_itself_come_first() -> None:
    (sample,) = load_task("needle:tokens=600", 1, 0, tokens=900)
    assert sample.facts["length"] == 600
    (sample,) = load_task("needle", 1, 0, tokens=900)
    assert sample.facts["length"] == 900
    with pytest.raises(TaskError, match="samples times tokens must be at most 134,217,728"):
        check_task("needle:tokens=1000000", 1000)


def test_a_task_of_an_entry_point_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib.metadata import EntryPoint

    from kvpolicy.tasks import load
    from kvpolicy.tasks.task import Task

    class Mine(Task):
        """One sample."""

        name = "mine"
        word: str = "x"

        def samples(self, n: int, seed: int, tokenizer: Any = None) -> list[Sample]:
            return [Sample("mine", "p", self.word)]

    points = {"mine": Mine, "other": Mine, "broken": None}

    def found(name: str) -> None:
        point = EntryPoint(name, "x:y", load.GROUP)
        monkeypatch.setattr(EntryPoint, "load", lambda self: points[self.name] or 1 / 0)
        monkeypatch.setattr(load, "entry_points", lambda group: [point])
        load.tasks.cache_clear()

    try:
        found("mine")
        assert load_task("mine:word=y", 1, 0) == [Sample("mine", "p", "y")]
        found("other")
        with pytest.raises(TaskError, match=r"task 'other' \(x:y\) must be a subclass of Task with name 'other'"):
            load_task("lines", 1, 0)
        found("broken")
        with pytest.raises(TaskError, match=r"task 'broken' .* must be loaded, found ZeroDivisionError"):
            load_task("lines", 1, 0)
    finally:
        monkeypatch.undo()
        load.tasks.cache_clear()
