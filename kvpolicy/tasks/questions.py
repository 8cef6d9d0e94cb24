"""Questions over documents, in RULER's form (Hsieh et al. 2024, arXiv:2404.06654): invented ones, or those of SQuAD or
HotpotQA."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from kvpolicy.errors import TaskError
from kvpolicy.tasks.invented import Question, invented
from kvpolicy.tasks.rows import rows_of, text_field, text_list
from kvpolicy.tasks.sample import Sample
from kvpolicy.tasks.task import Chat, Fitted, spread
from kvpolicy.words import in_line

ASKED = "Answer the question based on the given documents. Only give me the answer and do not output any other words."


class Questions(Fitted, Chat):
    """A question whose documents stand among documents of other questions: RULER's qa_1 (SQuAD) and qa_2 (HotpotQA).

    Without a file they are short texts about people and towns that are invented; one question in four needs two of
    them. With `path` they come from the user's copy: the official JSON of SQuAD or HotpotQA, or rows with the same
    fields; questions without an answer are left out. HotpotQA's own distractors always stand in the context, and then
    as many documents of other questions as fit; where there are no more, the sample stays shorter. RULER shuffles
    all documents; here the first that is needed stands at the depth, for heat maps. The score is whether one of the
    answers is contained. Samples of the same question share a document.
    """

    name: ClassVar[str] = "qa"
    path: str | None = Field(
        None, description="A JSON file, JSON Lines, or what `datasets` reads; default: invented documents."
    )
    split: str = Field("validation", description="The split, where there are several.")
    depth: float | None = Field(
        None, ge=0, le=1, description="Where the first document needed stands; default: spread evenly over the samples."
    )

    def check(self, n: int) -> None:
        """Read the file, if there is one."""
        super().check(n)
        read_questions(self.path, self.split)

    @property
    def most(self) -> int:
        """All documents that there are."""
        return len(read_questions(self.path, self.split)[1])

    def build(self, units: int, rng: random.Random, depth: float, tokenizer: Any) -> Sample:
        """So many documents, or those of the question where they are more."""
        questions, documents = read_questions(self.path, self.split)
        asked = rng.choice(questions)
        own = {*asked.needed, *asked.beside}
        others = [text for text in rng.sample(documents, min(units, len(documents))) if text not in own]
        fill = [*asked.beside, *others[: max(units - len(own), 0)]]
        rng.shuffle(fill)
        places = [depth if self.depth is None else self.depth, *(rng.random() for _ in asked.needed[1:])]
        order = [((i + 0.5) / len(fill), text) for i, text in enumerate(fill)]
        order = sorted([*order, *zip(places, asked.needed, strict=True)], key=lambda at: at[0])
        parts = [f"Document {i}:\n{text}" for i, (_, text) in enumerate(order, 1)]
        context = "\n\n".join(parts)
        found = [context.index(f":\n{text}") / len(context) for text in asked.needed]
        return self.chat(
            f"{ASKED}\n\nThe following are given documents.\n\n{context}\n\n{ASKED}\n\nQuestion: {asked.text}",
            asked.answers[0],
            tokenizer,
            " Answer:",
            task=self.name,
            answers=asked.answers,
            document=asked.text,
            facts={**spread(found), "length": self.tokens, "documents": len(parts)},
            scorer="contains",
        )


def read_questions(path: str | None, split: str) -> tuple[list[Question], list[str]]:
    """Questions that have an answer, and all documents, each once; invented ones, if no file is given.

    Raises:
        TaskError: the file can't be read, or its rows are not of SQuAD's or HotpotQA's form.
    """
    if path is None:
        return invented()
    file = Path(path).expanduser()
    stamp = (file.stat().st_mtime_ns, file.stat().st_size) if file.is_file() else ()
    return _read(path, split, stamp)


@lru_cache(maxsize=4)
def _read(path: str, split: str, stamp: tuple[int, ...]) -> tuple[list[Question], list[str]]:
    """The same; read again once the file has changed."""
    found, documents = list[Question](), dict[str, None]()
    for place, row in _rows(path, split):
        question = _question(place, row)
        documents.update(dict.fromkeys((*question.needed, *question.beside)))
        if question.answers:
            found.append(question)
    if not found:
        raise TaskError(f"{in_line(path)}: must hold a question that has an answer, found none; give another file")
    return found, list(documents)


def _rows(path: str, split: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The rows, each with its place: those of the official files, too."""
    file = Path(path).expanduser()
    try:
        data = json.loads(file.read_text(encoding="utf-8")) if file.suffix == ".json" and file.is_file() else None
    except (OSError, ValueError, RecursionError):
        data = None  # JSON Lines, or what is wrong is said as they are read
    data = data.get("data") if isinstance(data, dict) and "data" in data else data
    if not isinstance(data, list):
        yield from rows_of(path, split)
        return
    for number, entry in enumerate(data, 1):
        place = f"{in_line(path)}, entry {number}"
        if not isinstance(entry, dict):
            raise TaskError(f"{place}: must be an object as in SQuAD or HotpotQA, found a {type(entry).__name__}")
        yield from _squad(place, entry) if "paragraphs" in entry else [(place, entry)]


def _squad(place: str, article: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The questions of an article, each as a row."""
    try:
        for paragraph in article["paragraphs"]:
            for asked in paragraph["qas"]:
                texts = [] if asked.get("is_impossible") else [answer["text"] for answer in asked["answers"]]
                row = {"question": asked["question"], "context": paragraph["context"], "answers": {"text": texts}}
                yield place, row
    except (KeyError, TypeError, AttributeError) as error:
        raise TaskError(
            f"{place}: an article must have paragraphs with context and qas as SQuAD's, found none of {error}; give "
            "the official file"
        ) from error


def _question(place: str, row: Mapping[str, Any]) -> Question:
    given, text = row.get("context"), text_field(place, dict(row), "question")
    if isinstance(given, str):
        answers = row.get("answers")
        texts = answers.get("text") if isinstance(answers, dict) else answers
        known = tuple(dict.fromkeys(text_list(place, {"answers": texts}, "answers"))) if texts else ()
        return Question(text, known, (text_field(place, dict(row), "context"),))
    facts = row.get("supporting_facts")
    try:
        pairs = zip(given["title"], given["sentences"], strict=True) if isinstance(given, dict) else given
        told = {str(title): f"{title}\n{''.join(sentences)}" for title, sentences in pairs or ()}
        named = facts["title"] if isinstance(facts, dict) else [str(title) for title, _ in facts or ()]
    except (KeyError, TypeError, ValueError) as error:
        raise TaskError(
            f'{place}: "context" must be a text as in SQuAD, or titles and sentences as in HotpotQA, found another '
            "form; give the official file"
        ) from error
    needed = [title for title in dict.fromkeys(named) if title in told] or list(told)
    if not needed:
        raise TaskError(f'{place}: "context" must hold a document at least, found none; remove the row')
    beside = tuple(text for title, text in told.items() if title not in needed)
    return Question(text, text_list(place, dict(row), "answer"), tuple(told[title] for title in needed), beside)
