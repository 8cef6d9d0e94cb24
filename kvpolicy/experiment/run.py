"""One arm on one sample: prefill, teacher-forced steps through the cache, greedy decoding, and what they cost."""

from __future__ import annotations

import copy
import inspect
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kvpolicy.arguments import check_prompt
from kvpolicy.errors import CompareError
from kvpolicy.experiment.attention_error import AttentionErrors, Watcher
from kvpolicy.experiment.experiment import is_exact
from kvpolicy.experiment.prefill import Prompt, can_share
from kvpolicy.experiment.store import Planned
from kvpolicy.hf.models import cache_word
from kvpolicy.hf.passes import is_attached
from kvpolicy.hf.predictions import divergence
from kvpolicy.hf.prepare import asking, end_prompt, read_again
from kvpolicy.layer.report import PARTS, Memory
from kvpolicy.statistics.rows import Row
from kvpolicy.tasks.encoding import encode as tokens_of
from kvpolicy.tasks.sample import Sample
from kvpolicy.tasks.scorers import score
from kvpolicy.words import quoted

if TYPE_CHECKING:
    from kvpolicy.hf.cache import CompressedCache

UNLIKELY = 8.0
"""Nats: a token of an answer that the exact cache itself finds less likely than e^-8 was hardly meant."""


@dataclass(frozen=True)
class Encoded:
    """A sample in the tokens of a model."""

    sample: Sample
    prompt: list[int]
    answer: list[int]
    turns: tuple[int, ...] = ()
    """Lengths of the parts of the prompt that are read one after another; empty: all at once."""

    @property
    def parts(self) -> list[list[int]]:
        """The prompt as it is read."""
        ends = [sum(self.turns[: i + 1]) for i in range(len(self.turns))] or [len(self.prompt)]
        return [self.prompt[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)]

    @property
    def most(self) -> int:
        """Tokens of greedy decoding."""
        return self.sample.new_tokens or len(self.answer)


@dataclass(frozen=True)
class Run:
    """What a cache did on one sample. Step 0 comes from the prefill, which reads no stored token."""

    log_probs: Tensor
    """Log-probabilities `[answer tokens, vocabulary]` of the teacher-forced steps."""
    generated: list[int] | None
    """Tokens of greedy decoding; None where nothing was generated, and so there is no text and no score."""
    text: str | None
    score: float | None
    peak_bytes: int
    final_bytes: int
    exact_bytes: int
    bits: float
    prefill_seconds: float
    decode_seconds: float
    shared: bool = False
    """Whether the prompt was computed in the run of another cache."""
    attention: AttentionErrors | None = None
    """Of the teacher-forced steps; None where it was not watched."""
    memory: Mapping[str, int] = field(default_factory=dict)
    """The final bytes by part."""


def encode(samples: Sequence[Sample], tokenizer: Any, config: Any) -> list[Encoded]:
    """The samples in tokens.

    Raises:
        CompareError: a sample is empty, or longer than the model's positions.
    """
    text = config.get_text_config(decoder=True)
    limit = getattr(text, "max_position_embeddings", None)
    limit = limit if isinstance(limit, int) and limit > 0 else None
    found = []
    for number, sample in enumerate(samples):
        check_prompt(f"sample {number}: prompt and answer", sample.prompt + sample.answer, limit)
        parts, answer = tokens_of(sample, tokenizer)
        prompt = [token for part in parts for token in part]
        if not prompt or not answer:
            what = "answer" if prompt else "prompt"
            raise CompareError(f"sample {number}: prompt and answer must hold a token each, found none in the {what}")
        length = len(prompt) + max(len(answer), sample.new_tokens or 0)
        if limit is not None and length > limit:
            raise CompareError(
                f"sample {number}: prompt and answer must fit the model's max_position_embeddings, {limit}, "
                f"found {len(prompt)} + {len(answer)} tokens; ask for shorter samples (--tokens) or another task"
            )
        found.append(Encoded(sample, prompt, answer, tuple(map(len, parts)) if len(parts) > 1 else ()))
    return found


class Runner:
    """Runs samples through a model with the caches that it is given.

    Args:
        model: a causal language model of transformers.
        tokenizer: its tokenizer.
        errors: whether the attention of teacher-forced steps is compared with exact attention; the model must be
            attached.
        generate: whether there is greedy decoding.
        share: whether a sample's prompt is computed by the model once, with the first cache that runs it, if that is
            exact. Caches for which this can change their rows compute it themselves.
    """

    def __init__(
        self, model: Any, tokenizer: Any, errors: bool = False, generate: bool = True, share: bool = True
    ) -> None:
        self.model, self.tokenizer, self.errors = model, tokenizer, errors
        self.generate, self.share = generate, share
        self.prompt: tuple[Any, Prompt] | None = None
        """What was computed last to be shared, and for what."""
        self.device = torch.device(model.device)
        self.ends, self.word = _ends(model, tokenizer), cache_word(model)
        last_only = "logits_to_keep" in inspect.signature(model.forward).parameters
        self.options = {"logits_to_keep": 1} if last_only else {}

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Evaluation mode and no gradients; afterwards every module trains or not as before."""
        training = [module for module in self.model.modules() if module.training]
        self.model.eval()
        try:
            with torch.inference_mode():
                yield
        finally:
            for module in training:
                module.training = True

    def warm_up(self, cache: CompressedCache) -> None:
        """A few tokens, so that the first times measured are like the others."""
        for tokens in ([0] * 8, [0]):
            self._step(tokens, cache)

    def run(self, cache: CompressedCache, item: Encoded) -> Run:
        """Prefill once; then the answer token by token, and greedy decoding where it leaves the answer."""
        watcher = Watcher(cache) if self.errors else None
        logits, prefill, shared = self._prefill(cache, item, watcher)
        peak = cache.memory().bytes
        generates = self.generate and item.sample.generate
        rows, times, fresh = [logits], [], copy.deepcopy(cache) if generates else None
        for token in item.answer[:-1]:
            logits, seconds = self._step([token], cache, watcher, measure=True)
            rows.append(logits)
            times.append(seconds)
            peak = max(peak, cache.memory().bytes)
        memory = cache.memory()
        log_probs = log_probs_of(rows)
        generated = text = None
        if fresh is not None:
            generated = self._greedy(log_probs.argmax(-1).tolist(), item, fresh)
            text = self.decode(item.prompt, generated)
        return Run(
            log_probs,
            generated,
            text,
            None if text is None else score(item.sample, text),
            peak,
            memory.bytes,
            memory.exact_bytes,
            memory.bits_per_value,
            prefill,
            sum(times),
            shared,
            None if watcher is None else watcher.result(),
            by_part(memory),
        )

    def forget(self) -> None:
        """Drop the prompt that is kept for other caches."""
        self.prompt = None

    def fill(self, cache: CompressedCache, prompt: Prompt) -> float:
        """Give a cache a prompt that is known; returns the seconds that this took."""
        self.synchronize()
        start = time.perf_counter()
        prompt.fill(cache, is_attached(self.model))
        self.synchronize()
        return time.perf_counter() - start

    def _prefill(self, cache: CompressedCache, item: Encoded, watcher: Watcher | None) -> tuple[Tensor, float, bool]:
        """Logits after the prompt, seconds, and whether another cache's run computed the prompt, or its first part."""
        first, *more = item.parts
        ids, start = torch.tensor([first], device=self.device), time.perf_counter()
        with read_again(self.model, cache, ids):
            told = time.perf_counter() - start
            logits, seconds, shared = self._begin(cache, item, first, watcher)
        if more and asking(cache):
            end_prompt(cache)
        for part in more:
            logits, spent = self._step(part, cache, watcher)
            seconds += spent
        return logits, seconds + told, shared

    def _begin(
        self, cache: CompressedCache, item: Encoded, first: list[int], watcher: Watcher | None
    ) -> tuple[Tensor, float, bool]:
        """The same for the part of the prompt that is read at once."""
        known = self.prompt[1] if self.prompt is not None and self.prompt[0] is item else None
        shared = known is not None and can_share(cache)
        if known is not None and shared:
            logits, seconds = known.logits, known.seconds + self.fill(cache, known)
            if watcher is not None and known.seen is not None:
                watcher.adopt(known.seen)
        else:
            logits, seconds = self._step(first, cache, watcher)
            if self.share and known is None and is_exact(cache.recipe):
                self.prompt = item, Prompt.of(cache, logits, seconds, None if watcher is None else watcher.seen())
        return logits, seconds, shared

    def predictions(self, cache: CompressedCache, prompt: list[int], answer: list[int]) -> Tensor:
        """Log-probabilities `[answer tokens, vocabulary]`: prefill at once, then the answer token by token."""
        with read_again(self.model, cache, torch.tensor([prompt], device=self.device)):
            rows = [self._step(prompt, cache)[0]]
        rows += [self._step([token], cache)[0] for token in answer[:-1]]
        return log_probs_of(rows)

    def _step(
        self, tokens: list[int], cache: CompressedCache, watcher: Watcher | None = None, measure: bool = False
    ) -> tuple[Tensor, float]:
        """Logits after `tokens`, and the seconds that this took; descents that it causes are counted here."""
        ids = torch.tensor([tokens], device=self.device)
        with nullcontext(nullcontext) if watcher is None else watcher.update(measure) as watch:
            self.synchronize()
            noted = 0.0 if watcher is None else watcher.seconds
            start = time.perf_counter()
            with watch():
                given = {self.word: cache, "use_cache": True, **self.options}
                logits = self.model(ids, **given).logits[0, -1]
            cache.commit()
            self.synchronize()
            seconds = time.perf_counter() - start
        if watcher is not None:
            seconds -= watcher.seconds - noted
        return logits, seconds

    def _greedy(self, best: list[int], item: Encoded, cache: CompressedCache) -> list[int]:
        """Tokens of greedy decoding. While they are the answer's, the teacher-forced steps were the same steps."""
        if best[:-1] == item.answer[:-1] and (item.most <= len(best) or best[-1] in self.ends):
            return self.until_end(best[: item.most])
        tokens = [best[0]]
        while len(tokens) < item.most and tokens[-1] not in self.ends:
            tokens.append(int(self._step(tokens[-1:], cache)[0].argmax()))
        return tokens

    def until_end(self, tokens: list[int]) -> list[int]:
        """Tokens up to the first that ends a text."""
        for i, token in enumerate(tokens):
            if token in self.ends:
                return tokens[: i + 1]
        return tokens

    def decode(self, prompt: list[int], generated: list[int]) -> str:
        """The text of generated tokens."""
        # With the prompt, because tokenizers strip a space before what they take for the first word.
        options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        before = self.tokenizer.decode(prompt, **options)
        both = self.tokenizer.decode([*prompt, *generated], **options)
        if both.startswith(before):
            return str(both[len(before) :])
        return str(self.tokenizer.decode(generated, **options))

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device.type in ("cuda", "mps", "xpu"):
            getattr(torch, self.device.type).synchronize()


def log_probs_of(rows: list[Tensor]) -> Tensor:
    """Log-probabilities of logits, which must be numbers."""
    log_probs = torch.stack(rows).float().log_softmax(-1)
    if torch.isnan(log_probs).any():
        raise CompareError("the model's logits must be numbers, found nan")
    return log_probs


def _ends(model: Any, tokenizer: Any) -> set[int]:
    config = getattr(model, "generation_config", None)
    ends: set[int] = set()
    for found in (getattr(config, "eos_token_id", None), getattr(tokenizer, "eos_token_id", None)):
        ends.update(found if isinstance(found, list | tuple) else [] if found is None else [found])
    return ends


def unlikely(number: str, item: Encoded, exact: Run, tokenizer: Any) -> str | None:
    """What to say of an answer that the model would not give with the exact cache; None if there is nothing.

    Of the tokens below e^-8 the last one is named. Not for `code`, whose answers are text cut off somewhere, and where
    several continuations are right.
    """
    nll = _nll(exact, item)
    places = [place for place, value in enumerate(nll) if value > UNLIKELY]
    if not places or item.sample.task == "code":
        return None
    place, of = places[-1], len(nll)
    token = quoted(str(tokenizer.decode([item.answer[place]])))
    which = f"the last of {of}" if place == of - 1 else f"token {place + 1} of {of}"
    end = " (does it end where the model ends?)" if place == of - 1 else ""
    return (
        f"sample {number}: the exact cache itself gives {token}, {which} in the answer, a probability of "
        f"{math.exp(-nll[place]):.1e}, below e^-8. The model would not write this answer, so its negative "
        f"log-likelihood says little of a cache; check the answers{end}. Said once"
    )


def row(planned: Planned, arm: str, item: Encoded, run: Run, exact: Run) -> Row:
    """The row of an arm on a sample, whose predictions are compared with the exact cache's.

    `nll`, `kl` and `top1` are over the answer's tokens after the first, whose prediction is the prefill's and reads
    no stored token: `nll_first`. They are absent if the answer is one token. So is what is said of attention, and also
    where it was not watched; its lists have an entry per layer of the model, None where a layer is not compressed.
    """
    nll = _nll(run, item)
    read = len(nll) - 1
    kl = divergence(exact.log_probs, run.log_probs)
    same = (exact.log_probs.argmax(-1) == run.log_probs.argmax(-1)).float().tolist()
    if not all(map(math.isfinite, [*nll, *kl])):
        raise CompareError("the predictions must be finite, found a token of the answer with probability 0")
    metrics = {
        "score": run.score,
        "nll": _mean(nll[1:]),
        "nll_first": nll[0],
        "kl": _mean(kl[1:]),
        "top1": _mean(same[1:]),
        "bits": run.bits,
        "peak_bytes": run.peak_bytes,
        "final_bytes": run.final_bytes,
        "exact_bytes": run.exact_bytes,
        "prefill_seconds": run.prefill_seconds,
        "decode_seconds": run.decode_seconds,
        "step_seconds": run.decode_seconds / read if read else None,
        **({} if run.attention is None else run.attention.means),
    }
    facts = {
        "prompt_tokens": len(item.prompt),
        "answer_tokens": len(item.answer),
        "decode_steps": read,
        "nll_steps": nll[1:],
        "kl_steps": kl[1:],
        "first_divergence": _diverges(exact.generated, run.generated),
        "shared_prefill": run.shared,
        "memory": dict(run.memory),
        **({} if run.attention is None else {f"{field}_layers": x for field, x in run.attention.layers.items()}),
    }
    shown = {name: value for name, value in metrics.items() if value is not None}
    return Row(arm, planned.task, planned.sample, shown, facts=facts, output=run.text)


def _nll(run: Run, item: Encoded) -> list[float]:
    answer = torch.tensor(item.answer, device=run.log_probs.device)
    found: list[float] = (-run.log_probs.gather(1, answer[:, None])[:, 0]).tolist()
    return found


def _diverges(one: list[int] | None, other: list[int] | None) -> int | None:
    """The place of the first token in which two texts differ, if both were generated."""
    if one is None or other is None:
        return None
    for i, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return i
    return None if len(one) == len(other) else min(len(one), len(other))


def by_part(memory: Memory) -> dict[str, int]:
    """Bytes of the parts of a cache that are there."""
    return {part: bytes_ for part in PARTS if (bytes_ := memory.total(part))}


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None
