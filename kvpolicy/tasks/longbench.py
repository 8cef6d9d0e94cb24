"""LongBench (Bai et al. 2024, arXiv:2308.14508) from the user's copy: its prompts, truncation and metrics."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, ClassVar, Final, Literal

from pydantic import Field

from kvpolicy.errors import TaskError
from kvpolicy.tasks.files import draw
from kvpolicy.tasks.longbench_metrics import DATASETS, check_dataset
from kvpolicy.tasks.rows import rows_of, text_field, text_list
from kvpolicy.tasks.sample import Sample
from kvpolicy.tasks.task import Chat
from kvpolicy.words import clip, in_line, in_words, listed

PLAIN: Final = ("trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p")
"""Tasks whose prompts are no chats."""
_FILES: Final = ("dataset2prompt.json", "dataset2maxlen.json")
_SAVED: Final = ("dataset_dict.json", "state.json")
"""What `datasets` marks a directory with that it saved."""


class LongBench(Chat):
    """One of LongBench's 21 tasks, or of LongBench-E's.

    Prompts and numbers of new tokens come from `dataset2prompt.json` and `dataset2maxlen.json`, rows from
    `DATASET.jsonl`, or from Parquet or what `datasets` saved. A prompt longer than `max_length` tokens loses its
    middle. Prompts are chats but for trec, triviaqa, samsum, lsht, lcc and repobench-p. The metrics are the official
    ones, the best over the answers. They differ in one thing: the official ROUGE is 0 wherever its library exceeds
    Python's recursion limit, which summaries of some hundred words do; here these are scored. Chinese tasks need
    jieba. Samples with the same context share a document.
    """

    name: ClassVar[str] = "longbench"
    dataset: Literal[tuple(DATASETS)] = Field(description="Which task.")  # type: ignore[valid-type]
    path: str = Field(description="Directory of the copy: rows in it or in `data/`; or one file of rows.")
    config: str | None = Field(
        None, description="Directory of the two config files; default: `config/` or `LongBench/config/` of the copy."
    )
    extended: bool = Field(False, description="Take LongBench-E's rows, `DATASET_e.jsonl`.")
    max_length: int | None = Field(
        None, ge=2, le=1 << 24, description="Most tokens of a prompt; default: nothing is cut away."
    )

    def check(self, n: int) -> None:
        """Read the files."""
        self._config()
        check_dataset(self.dataset)
        self._rows()

    def samples(self, n: int, seed: int, tokenizer: Any = None) -> list[Sample]:
        """`n` rows, drawn by the seed, in the order of the file."""
        prompt, most = self._config()
        check_dataset(self.dataset)
        if self.max_length is not None and tokenizer is None:
            raise TaskError(
                "longbench: max_length counts tokens, which takes a tokenizer, found none; give tokenizer=..."
            )
        rows = draw(self._rows(), n, seed, self.path)
        return [self._sample(place, row, prompt, most, tokenizer) for place, row in rows]

    def _rows(self) -> list[tuple[str, dict[str, Any]]]:
        """The rows of JSON Lines, of Parquet, or of what `datasets` saved; of several tasks in one place, its own."""
        name = f"{self.dataset}{'_e' if self.extended else ''}"
        home = Path(self.path).expanduser()
        if home.is_file() or any((home / mark).is_file() for mark in _SAVED):
            rows = rows_of(str(home), "test")
            named = [(place, row) for place, row in rows if row.get("dataset", name) in (name, self.dataset)]
            if not named:
                others = listed(list(dict.fromkeys(str(row.get("dataset")) for _, row in rows)))
                raise TaskError(
                    f"{in_line(home)}: must hold rows of {name}, found those of {others}; give the copy of {name}"
                )
            return named
        ends = (".jsonl", ".parquet", ".arrow", "")
        places = [folder / f"{name}{end}" for end in ends for folder in (home, home / "data")]
        place = next((place for place in places if place.exists()), home / "data" / f"{name}.jsonl")
        return rows_of(str(place), "test")

    def _config(self) -> tuple[str, int]:
        home = Path(self.path).expanduser()
        home = home.parent if home.is_file() else home
        places = (
            [Path(self.config).expanduser()] if self.config else [home / "config", home / "LongBench" / "config", home]
        )
        place = next((place for place in places if all((place / file).is_file() for file in _FILES)), None)
        if place is None:
            raise TaskError(
                f"longbench: {' and '.join(_FILES)} must be in {listed([clip(str(place), 200) for place in places])}, "
                "found none; take them from LongBench's repository, and name their directory (config=...)"
            )
        prompt, most = (self._entry(place / file) for file in _FILES)
        if not isinstance(prompt, str) or isinstance(most, bool) or not isinstance(most, int) or most < 1:
            raise TaskError(
                f"longbench: the config files must map {self.dataset} to a text and a number, found {in_words(prompt)} "
                f"and {in_words(most)}; take them from LongBench's repository"
            )
        return prompt, most

    def _entry(self, file: Path) -> Any:
        try:
            return dict(json.loads(file.read_text(encoding="utf-8"))).get(self.dataset)
        except (OSError, ValueError, TypeError) as error:
            raise TaskError(f"{clip(str(file), 300)}: must be a JSON object, found {clip(str(error), 120)}") from error

    def _sample(self, place: str, row: dict[str, Any], form: str, most: int, tokenizer: Any) -> Sample:
        context = text_field(place, row, "context", empty=True)
        answers = text_list(place, row, "answers")
        given = {**row, "context": context, "input": text_field(place, row, "input", empty=True)}
        try:
            prompt = form.format(**given)
        except (KeyError, IndexError, ValueError) as error:
            raise TaskError(f"{place}: the prompt of {self.dataset} needs other fields, found no {error}") from error
        prompt, cut = self._cut(prompt, tokenizer)
        classes = text_list(place, row, "all_classes") if row.get("all_classes") else ()
        facts = {"dataset": self.dataset, "id": row.get("_id"), "words": row.get("length"), "cut_tokens": cut}
        fields: dict[str, Any] = {
            "task": f"{self.name}:{self.dataset}",
            "answers": answers,
            "document": hashlib.sha256(context.encode()).hexdigest()[:16] if context else None,
            "facts": {**facts, "classes": list(classes)} if classes else facts,
            "scorer": "longbench",
        }
        new = self.new_tokens or most
        if self.dataset in PLAIN or not self.template:
            answer = answers[0] if prompt[-1:].isspace() else f" {answers[0]}"
            return Sample(prompt=prompt, answer=answer, new_tokens=new, **fields)
        return self.model_copy(update={"new_tokens": new}).chat(prompt, answers[0], tokenizer, **fields)

    def _cut(self, prompt: str, tokenizer: Any) -> tuple[str, int]:
        """The prompt without its middle where it is too long, and how many tokens that took away."""
        if self.max_length is None:
            return prompt, 0
        tokens = list(tokenizer(prompt, verbose=False)["input_ids"])
        if len(tokens) <= self.max_length:
            return prompt, 0
        half = self.max_length // 2
        parts = [tokenizer.decode(part, skip_special_tokens=True) for part in (tokens[:half], tokens[-half:])]
        return "".join(parts), len(tokens) - 2 * half
