"""Benchmarks of files that others have made: GSM8K, RULER's JSON lines, and completions like HumanEval's."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, ClassVar, Final, Literal

from pydantic import Field

from kvpolicy.errors import TaskError
from kvpolicy.tasks.encoding import after
from kvpolicy.tasks.execution import Program
from kvpolicy.tasks.files import FromFile, draw
from kvpolicy.tasks.rows import rows_of, text_field, text_list
from kvpolicy.tasks.sample import Sample
from kvpolicy.tasks.task import Chat

_SPLIT: Final = "The split that samples are drawn from."


class Gsm8k(FromFile, Chat):
    """GSM8K: grade-school mathematics with the steps written out (Cobbe et al. 2021, arXiv:2110.14168).

    Rows with `question` and `answer`, whose last line is `#### 42`. The prompt is `Question: ... Answer:` after solved
    examples, as in lm-evaluation-harness; with a chat template examples are turns. The output is scored up to the next
    `Question:`: 1 if the number after the first `####`, or else the last number, equals the answer's. The answer that
    is fed through the cache is the solution written out.
    """

    name: ClassVar[str] = "gsm8k"
    path: str = Field(
        "openai/gsm8k",
        description="A file of JSON Lines, a directory with `test.jsonl` and `train.jsonl`, or an id of the hub.",
    )
    split: str = Field("test", description=_SPLIT)
    shots: int = Field(5, ge=0, le=100, description="Solved examples before the question.")
    examples: str | None = Field(
        None, description="File that examples are drawn from; default: the split `train` of the same place."
    )
    new_tokens: int | None = Field(512, ge=1, le=1 << 20, description="Most tokens of greedy decoding.")

    def samples(self, n: int, seed: int, tokenizer: Any = None) -> list[Sample]:
        """Each sample has examples of its own, drawn by the seed; never the question itself."""
        rows = rows_of(self.path, self.split, "main")
        solved = self._solved() if self.shots else []
        asked = [self._pair(place, row) for place, row in rows]
        found = []
        for number, (question, answer) in enumerate(draw(asked, n, seed, self.path)):
            others = [pair for pair in solved if pair[0] != question]
            if len(others) < self.shots:
                raise TaskError(
                    f"gsm8k: there must be {self.shots} solved examples besides the question, found {len(others)}; ask "
                    "for fewer (shots=...)"
                )
            shown = random.Random(f"gsm8k:{seed}:{number}").sample(others, self.shots)
            found.append(self._sample(shown, question, answer, tokenizer))
        return found

    def _solved(self) -> list[tuple[str, str]]:
        place = self.examples or self.path
        if self.examples is None and Path(self.path).expanduser().is_file():
            beside = Path(self.path).expanduser().parent / "train.jsonl"
            if not beside.is_file():
                raise TaskError(
                    f"gsm8k: solved examples must come from somewhere, found no train.jsonl beside {self.path}; name a "
                    "file (examples=...), or take none (shots=0)"
                )
            place = str(beside)
        return [self._pair(where, row) for where, row in rows_of(place, "train", "main")]

    def _pair(self, place: str, row: dict[str, Any]) -> tuple[str, str]:
        return text_field(place, row, "question"), text_field(place, row, "answer", numbers=True)

    def _sample(self, shown: list[tuple[str, str]], question: str, answer: str, tokenizer: Any) -> Sample:
        turns = [("user", f"Question: {question}\nAnswer:")]
        for asked, told in reversed(shown):
            turns = [("user", f"Question: {asked}\nAnswer:"), ("assistant", told), *turns]
        fields: dict[str, Any] = {"task": self.name, "scorer": "numeric", "stop": ("Question:",)}
        messages = [{"role": role, "content": text} for role, text in turns]
        chat = self.chat(messages, answer, tokenizer, **fields, facts={"shots": self.shots})
        if chat.rendered:
            return chat
        prompt = "".join(f"Question: {asked}\nAnswer: {told}\n\n" for asked, told in shown)
        prompt += f"Question: {question}\nAnswer:"
        answer = after(prompt, answer, False)
        return Sample(prompt=prompt, answer=answer, new_tokens=self.new_tokens, facts=chat.facts, **fields)


class Ruler(FromFile, Chat):
    """JSON lines that RULER's own scripts have written (Hsieh et al. 2024, arXiv:2404.06654).

    Rows with `input`, `outputs`, and in newer versions `answer_prefix`, by which the answer begins. The score is the
    share of the outputs that are contained, or for `qa` whether one is. RULER writes the model's template into `input`
    itself, so none is applied unless asked for.
    """

    name: ClassVar[str] = "ruler"
    path: str = Field(description="The file, such as `niah_single_1/validation.jsonl`.")
    metric: Literal["all", "part"] | None = Field(
        None, description="Whether all outputs are wanted or one; default: one if file or directory begin with `qa`."
    )
    template: bool = Field(False, description="Render `input` by the tokenizer's chat template where it has one.")

    def samples(self, n: int, seed: int, tokenizer: Any = None) -> list[Sample]:
        """`n` rows, drawn by the seed, in the order of the file."""
        file = Path(self.path)
        part = self.metric == "part" or (
            self.metric is None and (file.name[:2] == "qa" or file.parent.name[:2] == "qa")
        )
        found = []
        for place, row in draw(rows_of(self.path, "validation"), n, seed, self.path):
            outputs = text_list(place, row, "outputs")
            prefix = text_field(place, row, "answer_prefix", empty=True) if "answer_prefix" in row else ""
            known = ("input", "outputs", "answer_prefix")
            found.append(
                self.chat(
                    text_field(place, row, "input"),
                    outputs[0] if part else ", ".join(outputs),
                    tokenizer,
                    prefix,
                    task=self.name,
                    answers=outputs,
                    facts={name: value for name, value in row.items() if name not in known},
                    scorer="contains" if part else "contains_all",
                )
            )
        return found


class Completion(FromFile):
    """Completion of functions from their heads, in the form of HumanEval (Chen et al. 2021, arXiv:2107.03374).

    Rows with `prompt`, `canonical_solution`, `test` and `entry_point`. Without `execute` no output of a model is run:
    it is compared with the solution. With it each output is run with the row's tests in a process of its own, with
    limits on time, memory and files; that is no sandbox.
    """

    name: ClassVar[str] = "completion"
    path: str = Field("openai/openai_humaneval", description="A file of JSON Lines, a directory, or an id of the hub.")
    split: str = Field("test", description=_SPLIT)
    scorer: Literal["edit", "exact"] = Field("edit", description="How output is compared where it is not run.")
    execute: bool = Field(False, description="Run what the model writes with the row's tests: 1 if they pass.")
    seconds: float = Field(10.0, gt=0, le=600, description="Time limit of a run.")
    new_tokens: int | None = Field(
        None, ge=1, le=1 << 20, description="Most tokens of greedy decoding; default: 512 where output is run."
    )

    def samples(self, n: int, seed: int, tokenizer: Any = None) -> list[Sample]:
        """`n` rows, drawn by the seed, in the order of the file."""
        found = []
        for place, row in draw(rows_of(self.path, self.split), n, seed, self.path):
            prompt = text_field(place, row, "prompt")
            program = None
            if self.execute:
                program = Program(
                    text_field(place, row, "test"), text_field(place, row, "entry_point"), seconds=self.seconds
                )
            facts = {"id": row.get("task_id", place)}
            found.append(
                Sample(
                    self.name,
                    prompt,
                    text_field(place, row, "canonical_solution").rstrip(),
                    facts=facts,
                    scorer=program or self.scorer,
                    stop=("\nclass", "\ndef", "\n#", "\nif", "\nprint"),
                    new_tokens=self.new_tokens or (512 if self.execute else None),
                )
            )
        return found
