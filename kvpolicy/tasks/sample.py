"""A sample: what a model reads, what it is expected to write, and how that is scored."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

Message: TypeAlias = Mapping[str, str]
"""A message of a chat: `role` and `content`."""


@dataclass(frozen=True)
class Sample:
    """One prompt and the answer expected of greedy decoding."""

    task: str
    """Name of the task that the sample belongs to."""
    prompt: str
    """Text the model reads; of a chat what its messages were rendered to."""
    answer: str
    """Text that should follow the prompt; it is fed through the cache for log-likelihoods."""
    answers: tuple[str, ...] = ()
    """References of the scorer where they are not the answer alone: alternatives of which the best counts, or for
    `contains_all` texts that are all wanted."""
    messages: tuple[Message, ...] = ()
    """The chat that the prompt was rendered from; empty where it is no chat."""
    rendered: bool = False
    """The prompt was rendered by the tokenizer's chat template and holds its special tokens: none are added."""
    turns: tuple[str, ...] = ()
    """The prompt in parts, in order, which are fed one after another to one cache; empty: all at once."""
    document: str | None = None
    """Samples that share a document are not independent; None: the sample stands for itself."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Plain values about the sample, for the facts of its row. Where what is asked for stands at places in the
    context: `depth`, the mean of its `depths`, from 0 (the beginning) to 1. Of generated samples `length`, the tokens
    asked for."""
    scorer: str | Callable[[str, Sample], float] = "exact"
    """Name of a scorer, or a function of the generated text and the sample; scores lie in [0, 1]."""
    stop: tuple[str, ...] = ()
    """Generated text is scored up to the first of these."""
    new_tokens: int | None = None
    """Most tokens of greedy decoding; None: as many as the answer has."""
    generate: bool = True
    """Whether the sample is decoded and scored; if not it is read for log-likelihood and divergence alone."""
    prompt_ids: tuple[int, ...] = ()
    """Tokens of the prompt where the sample was cut in tokens; the text stands for readers then."""
    answer_ids: tuple[int, ...] = ()
    """Tokens of the answer, likewise."""

    @property
    def references(self) -> tuple[str, ...]:
        """What a scorer compares with."""
        return self.answers or (self.answer,)
