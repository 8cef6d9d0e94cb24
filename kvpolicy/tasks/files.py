"""Samples of a user's own: JSON Lines with prompts or chats, and answers."""

from __future__ import annotations

import random
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from pydantic import Field

from kvpolicy.errors import TaskError
from kvpolicy.tasks.rows import json_rows, text_field, text_list
from kvpolicy.tasks.sample import Message, Sample
from kvpolicy.tasks.scorers import check_scorer
from kvpolicy.tasks.task import Chat, Task
from kvpolicy.words import clip

T = TypeVar("T")
KNOWN = ("prompt", "messages", "answer", "answers", "document")


def draw(rows: list[T], n: int, seed: int, name: str) -> list[T]:
    """`n` of the rows, in their order; with a warning all of them where there are fewer."""
    if n > len(rows):
        warnings.warn(
            f"{clip(name, 300)} holds {len(rows)} row{'s' if len(rows) > 1 else ''}, "
            f"fewer than the {n} samples asked for (-n): each is used once",
            stacklevel=4,
        )
    if n >= len(rows):
        return rows
    chosen = random.Random(seed).sample(range(len(rows)), n)
    return [rows[index] for index in sorted(chosen)]


class FromFile(Task):
    """A task whose samples are rows of a file."""

    def check(self, n: int) -> None:
        """Read the file."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.samples(n, 0)


class JsonLines(FromFile, Chat):
    """A file of JSON Lines: `prompt` or `messages`, `answer` or `answers`, and `document`.

    Answers may be numbers. `answers` are alternatives, of which the best counts; the first is fed through the
    cache unless there is `answer` as well. Samples of one `document` are not independent. All other fields are kept as
    facts. Of `messages` each has `role` and `content`.
    """

    name: ClassVar[str] = "jsonl"
    path: str = Field(description="The file; on the shell it stands before the colon.")
    scorer: str | Callable[[str, Sample], float] = Field(
        "exact", description="How answers are scored; from Python also a function of the generated text and the sample."
    )
    stop: str | None = Field(None, min_length=1, description="Generated text is scored up to here.")

    def samples(self, n: int, seed: int, tokenizer: Any = None) -> list[Sample]:
        """`n` rows, drawn by the seed, in the order of the file."""
        check_scorer(self.scorer)
        found = [self._sample(place, row, tokenizer) for place, row in json_rows(Path(self.path))]
        return draw(found, n, seed, self.path)

    def _sample(self, place: str, row: dict[str, Any], tokenizer: Any) -> Sample:
        answers = text_list(place, row, "answers") if "answers" in row else ()
        answer = answers[0] if answers and "answer" not in row else text_field(place, row, "answer", numbers=True)
        if self.scorer == "regex":
            _check_patterns(place, answers or (answer,))
        fields: dict[str, Any] = {
            "task": self.name,
            "answers": answers,
            "document": None if row.get("document") is None else text_field(place, row, "document", numbers=True),
            "facts": {name: value for name, value in row.items() if name not in KNOWN},
            "scorer": self.scorer,
            "stop": () if self.stop is None else (self.stop,),
        }
        if "messages" in row:
            if "prompt" in row:
                raise TaskError(f'{place}: must have "prompt" or "messages", found both; leave one out')
            return self.chat(_messages(place, row["messages"]), answer, tokenizer, turns=True, **fields)
        prompt = text_field(place, row, "prompt")
        return Sample(prompt=prompt, answer=answer, new_tokens=self.new_tokens, **fields)


def _messages(place: str, given: Any) -> list[Message]:
    form = 'write {"messages": [{"role": "user", "content": "..."}]}'
    if not isinstance(given, list) or not given or not all(isinstance(message, dict) for message in given):
        raise TaskError(f'{place}: "messages" must be a list of objects, found {clip(repr(given), 80)}; {form}')
    found = [{name: text_field(place, message, name) for name in ("role", "content")} for message in given]
    if found[-1]["role"] == "assistant":
        raise TaskError(f'{place}: the last of "messages" must be of the user, found one of the assistant; {form}')
    return list(found)


def _check_patterns(place: str, patterns: tuple[str, ...]) -> None:
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise TaskError(
                f"{place}: answers must be regular expressions for this scorer, found {clip(pattern, 80)!r}: {error}; "
                "mend it, or choose another scorer"
            ) from error
