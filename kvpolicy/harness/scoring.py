"""Log-likelihoods through a compressed cache: a prompt is read at once, what follows token by token.

A prompt computes its own attention exactly, whatever the cache makes of it afterwards. So a prediction that is to come
from the compressed cache needs a later pass than the tokens that are compressed.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kvpolicy.hf.models import cache_word
from kvpolicy.hf.prepare import read_again


@dataclass
class Context:
    """Tokens that several continuations share, computed once."""

    tokens: tuple[int, ...]
    prefill: int
    """So many of them are read at once, at least 1; the rest token by token."""
    scored: int
    """Tokens from here on are predicted for the score, too."""
    tails: list[tuple[int, ...]] = field(default_factory=list)
    """What may follow."""

    @property
    def steps(self) -> int:
        """Tokens that are read one by one before the continuations begin."""
        return len(self.tokens) - self.prefill

    @property
    def longest(self) -> int:
        """Tokens with the longest continuation."""
        return len(self.tokens) + max(map(len, self.tails))


@dataclass
class Score:
    """What the predictions say of one continuation, with the scored tokens of its context."""

    log_likelihood: float
    greedy: bool
    """Whether each token was the most likely one."""
    tokens: int
    """How many were predicted."""
    through: int
    """How many of these predictions came from a pass that read the cache."""


def ordered(contexts: Sequence[Context]) -> list[int]:
    """The order in which contexts run: those with as many single steps together, the longest first."""
    return sorted(range(len(contexts)), key=lambda i: (contexts[i].steps, -contexts[i].longest))


def batches(contexts: Sequence[Context], size: Callable[[int], int], mixed: bool) -> Iterator[list[int]]:
    """Which contexts run together.

    Args:
        contexts: all there are.
        size: how many run together, beginning with one at a place in the order of `ordered`.
        mixed: whether prompts in a batch may differ in length, so that some are padded.
    """
    place, order = 0, ordered(contexts)
    while place < len(order):
        first = contexts[order[place]]
        batch = []
        for i in order[place : place + size(place)]:
            # Rows read single tokens together, so that none may be in its prompt still.
            if contexts[i].steps != first.steps or not (mixed or contexts[i].prefill == first.prefill):
                break
            batch.append(i)
        place += len(batch)
        yield batch


class Scorer:
    """Scores continuations of contexts with a model and fresh caches.

    Args:
        model: a causal language model of transformers.
        make: makes an empty cache.
        precision: in what the predictions become log-probabilities.
        around: a context manager for each forward pass.
    """

    def __init__(
        self,
        model: Any,
        make: Callable[[], Any],
        precision: torch.dtype,
        around: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        self.model, self.make, self.precision, self.around = model, make, precision, around
        self.word = cache_word(model)
        self.known = inspect.signature(model.forward).parameters
        self.device = torch.device(model.device)
        self.bits = 0.0
        """Effective bits per value of the last batch's cache, with its last continuations."""

    def score(self, batch: Sequence[Context]) -> list[list[Score]]:
        """The scores of a batch's continuations, by context."""
        with torch.inference_mode():
            return self._score(batch)

    def _score(self, batch: Sequence[Context]) -> list[list[Score]]:
        rows = _Rows(self, batch)
        contexts = rows.contexts()
        found: list[list[Score]] = [[] for _ in batch]
        for turn in range(max(len(context.tails) for context in batch)):
            asked = [i for i, context in enumerate(batch) if turn < len(context.tails)]
            last = all(len(batch[i].tails) == turn + 1 for i in asked)
            for i, tail in zip(asked, rows.tails(asked, turn, keep=not last), strict=True):
                found[i].append(_joined(contexts[i], tail))
        self.bits = rows.cache.memory().bits_per_value
        return found


@dataclass
class _Part:
    """Log-probabilities of tokens one after the other, and whether each was the most likely."""

    log_probs: Tensor
    greedy: Tensor
    through: int


def _joined(context: _Part, tail: _Part) -> Score:
    log_probs, greedy = torch.cat([context.log_probs, tail.log_probs]), torch.cat([context.greedy, tail.greedy])
    return Score(float(log_probs.double().sum()), bool(greedy.all()), len(log_probs), context.through + tail.through)


class _Rows:
    """One batch: a cache with a row for each context, padded on the left."""

    def __init__(self, scorer: Scorer, batch: Sequence[Context]) -> None:
        self.scorer, self.batch = scorer, batch
        self.cache = scorer.make()
        widest = max(context.prefill for context in batch)
        padding = [widest - context.prefill for context in batch]
        self.mask = torch.tensor([[0] * n + [1] * (widest - n) for n in padding], device=scorer.device)
        self.logits = torch.empty(0)
        """The predictions after the contexts, `[rows, vocabulary]`."""

    def contexts(self) -> list[_Part]:
        """Read the contexts; of each the scored part."""
        parts: list[list[tuple[Tensor, Tensor]]] = [[] for _ in self.batch]
        widest = self.mask.shape[1]
        all_logits = any(context.scored < context.prefill for context in self.batch)
        ids = [(0,) * (widest - c.prefill) + c.tokens[: c.prefill] for c in self.batch]
        prompt = torch.tensor(ids, device=self.scorer.device)
        with read_again(self.scorer.model, self.cache, prompt, self.mask if self.padded else None):
            logits = self._pass(self.cache, self.mask, prompt, all_logits)
        for row, context in enumerate(self.batch):
            scored = context.tokens[context.scored : context.prefill]
            if scored:
                parts[row].append(self._rated(logits[row, -len(scored) - 1 : -1], scored))
        self.logits = logits[:, -1].clone()
        through = [0] * len(self.batch)
        for step in range(self.batch[0].steps):
            tokens = [context.tokens[context.prefill + step] for context in self.batch]
            for row, context in enumerate(self.batch):
                if context.prefill + step >= context.scored:
                    parts[row].append(self._rated(self.logits[row][None], tokens[row : row + 1]))
                    through[row] += step > 0
            self.logits = self._next(self.cache, tokens)
        empty = (torch.zeros(0, device=self.scorer.device), torch.zeros(0, dtype=torch.bool, device=self.scorer.device))
        return [
            _Part(torch.cat([x for x, _ in (empty, *part)]), torch.cat([x for _, x in (empty, *part)]), n)
            for part, n in zip(parts, through, strict=True)
        ]

    def tails(self, asked: list[int], turn: int, keep: bool) -> list[_Part]:
        """The continuations of some rows; afterwards the cache is what it was, if it is to be kept."""
        tails = [self.batch[i].tails[turn] for i in asked]
        logits, longest = [self.logits[asked]], max(map(len, tails))
        mask = self.mask
        if longest > 1:
            cache = copy.deepcopy(self.cache) if keep else self.cache
            if len(asked) < len(self.batch):
                chosen = torch.tensor(asked, device=self.scorer.device)
                cache.batch_select_indices(chosen)
                self.mask = mask[chosen]
            for step in range(longest - 1):
                # A row that is done gets its last token again, which nothing looks at.
                logits.append(self._next(cache, [tail[min(step, len(tail) - 1)] for tail in tails]))
        self.mask = mask
        stepped = self.batch[0].steps > 0
        found = []
        for row, tail in enumerate(tails):
            rated = self._rated(torch.stack([x[row] for x in logits[: len(tail)]]), tail)
            found.append(_Part(*rated, len(tail) - 1 + stepped))
        return found

    def _next(self, cache: Any, tokens: Sequence[int]) -> Tensor:
        """Logits `[rows, vocabulary]` after one more token of each row."""
        ids = torch.tensor(tokens, device=self.scorer.device)[:, None]
        self.mask = torch.cat([self.mask, torch.ones_like(self.mask[:, :1])], dim=1)
        return self._pass(cache, self.mask, ids, False)[:, -1]

    def _pass(self, cache: Any, mask: Tensor, ids: Tensor, all_logits: bool) -> Tensor:
        """Logits `[rows, tokens, vocabulary]` of a forward pass, or those of the last token alone."""
        given: dict[str, Any] = {self.scorer.word: cache, "use_cache": True}
        if self.padded:
            given["attention_mask"] = mask
            if "position_ids" in self.scorer.known:
                given["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        if not all_logits and "logits_to_keep" in self.scorer.known:
            given["logits_to_keep"] = 1
        with self.scorer.around():
            logits: Tensor = self.scorer.model(ids, **given).logits
        return logits

    @property
    def padded(self) -> bool:
        """Whether any row is padded."""
        return len({context.prefill for context in self.batch}) > 1

    def _rated(self, logits: Tensor, tokens: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The log-probability of each token by the logits `[tokens, vocabulary]`; whether none is likelier."""
        wanted = torch.tensor(tokens, device=logits.device)
        log_probs = logits.log_softmax(-1, dtype=self.scorer.precision).gather(1, wanted[:, None])[:, 0]
        return log_probs.to(self.scorer.device), (logits.argmax(-1) == wanted).to(self.scorer.device)
