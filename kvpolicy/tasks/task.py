"""What a task is: a frozen model whose fields are its options, and which makes samples."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Final

from pydantic import BaseModel, ConfigDict, Field

from kvpolicy.errors import TaskError
from kvpolicy.tasks.encoding import after, count, fit, render
from kvpolicy.tasks.sample import Message, Sample
from kvpolicy.words import in_words

MAX_TOKENS: Final = 1 << 20
"""Tokens of a generated sample."""
MAX_TOTAL: Final = 1 << 27
"""Tokens of all generated samples together."""
ROOM: Final = 32
"""Tokens that a model may write around an answer, unless a task says otherwise."""
GOLDEN: Final = (5**0.5 - 1) / 2


class Task(BaseModel, ABC):
    """A task. Its fields are its options, on the shell `NAME:key=value,key=value`; each has a description."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)

    name: ClassVar[str]
    """By which it is asked for."""

    @abstractmethod
    def samples(self, n: int, seed: int, tokenizer: Any = None) -> list[Sample]:
        """Samples, the same for the same arguments.

        Args:
            n: how many; a task of a file may have fewer.
            seed: of what is drawn.
            tokenizer: of the model, for lengths and chats; None estimates lengths and renders no chat.

        Raises:
            TaskError: an option does not fit, or a file can't be used.
        """

    def check(self, n: int) -> None:
        """Refuse what can't be right, before a model is loaded.

        Raises:
            TaskError: saying what.
        """


class Generated(Task):
    """A task whose samples are made on the spot."""

    tokens: int = Field(
        1024, ge=1, le=MAX_TOKENS, description="Tokens of prompt and answer together, of the model's tokenizer."
    )

    def check(self, n: int) -> None:
        """Refuse numbers of samples and tokens that would take hours.

        Raises:
            TaskError: both together are above 134,217,728.
        """
        if n * self.tokens > MAX_TOTAL:
            raise TaskError(
                f"{self.name}: samples times tokens must be at most {MAX_TOTAL:,}, found {in_words(n)} times "
                f"{self.tokens}; ask for fewer samples"
            )


class Fitted(Generated):
    """Samples that are filled until they have their length."""

    least: ClassVar[int] = 1
    """Units of filling in the shortest sample."""

    def samples(self, n: int, seed: int, tokenizer: Any = None) -> list[Sample]:
        """Each sample by itself: the first ones are the same for every `n`."""
        self.check(n)
        found, units, depths = [], self.least, self.depths(seed)
        for number in range(n):
            key, depth = f"{self.name}:{seed}:{number}", (depths + number * GOLDEN) % 1.0

            def build(units: int, key: str = key, depth: float = depth) -> Sample:
                return self.build(units, random.Random(key), depth, tokenizer)

            sample, units = fit(build, self.tokens, tokenizer, self.least, units, self.most)
            found.append(sample)
        return found

    def depths(self, seed: int) -> float:
        """Depth of the first sample; those that follow are spread evenly, however many there are."""
        return random.Random(f"{self.name}:{seed}").random()

    @property
    def most(self) -> int | None:
        """Units of filling in the longest sample."""
        return None

    @abstractmethod
    def build(self, units: int, rng: random.Random, depth: float, tokenizer: Any) -> Sample:
        """A sample with so many units of filling and what is asked for at a depth from 0 to 1."""


class Chat(Task):
    """A task whose samples may be chats."""

    template: bool = Field(True, description="Render by the tokenizer's chat template where it has one.")
    new_tokens: int | None = Field(
        None, ge=1, le=MAX_TOKENS, description="Most tokens of greedy decoding; default: the task's own."
    )

    def chat(
        self, messages: Sequence[Message] | str, answer: str, tokenizer: Any, prefix: str = "", **fields: Any
    ) -> Sample:
        """A sample of a chat; a text is one message of the user.

        Args:
            messages: those before the answer.
            answer: what the assistant should write after `prefix`.
            tokenizer: of the model, or None.
            prefix: how the assistant's turn begins.
            **fields: the other fields of the sample; its facts are completed by what was done with the template.
        """
        given = [{"role": "user", "content": messages}] if isinstance(messages, str) else list(messages)
        parts, rendered = render(given, prefix, tokenizer, self.template)
        prompt = "".join(parts)
        answer = after(prompt, answer, rendered, prefix)
        turns = fields.pop("turns", None)
        facts = {**fields.pop("facts", {}), "template": rendered}
        tokens = self.new_tokens or count(answer, tokenizer) + ROOM
        return Sample(
            prompt=prompt,
            answer=answer,
            messages=tuple(given),
            rendered=rendered,
            turns=parts if turns and len(parts) > 1 else (),
            new_tokens=tokens,
            facts=facts,
            **fields,
        )


def spread(depths: Sequence[float]) -> dict[str, Any]:
    """Facts about where in the context things stand."""
    exact = [round(depth, 4) for depth in depths]
    return {"depth": round(sum(depths) / len(depths), 4), "depths": exact}
