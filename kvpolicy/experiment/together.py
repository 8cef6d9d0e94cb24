"""Samples that run together: one batch, padded on the left, each row fed its own answer."""

from __future__ import annotations

import copy
import inspect
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kvpolicy.experiment.experiment import is_exact
from kvpolicy.experiment.prefill import Prompt, can_share
from kvpolicy.experiment.run import Encoded, Run, Runner, by_part, log_probs_of
from kvpolicy.hf.prepare import read_again
from kvpolicy.tasks.scorers import score

if TYPE_CHECKING:
    from kvpolicy.hf.cache import CompressedCache


class Together:
    """Runs batches as a `Runner` runs samples.

    The rows of a batch end at different lengths; what is fed to one that has ended is marked as padding. Bytes are
    those of the batch, padding that a cache keeps included, and shared by its rows in proportion to their tokens. Times
    are those of the batch, divided by its rows. Attention is not watched.
    """

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        tokenizer = runner.tokenizer
        known = (getattr(tokenizer, "pad_token_id", None), *sorted(runner.ends), 0)
        self.pad = next(token for token in known if isinstance(token, int))
        self.placed = "position_ids" in inspect.signature(runner.model.forward).parameters

    def run(self, cache: CompressedCache, items: Sequence[Encoded]) -> list[Run]:
        """One run for each sample."""
        feed = _Feed(self, [item.prompt for item in items])
        logits, prefill, shared = self._prefill(cache, items, feed)
        generates = self.runner.generate and any(item.sample.generate for item in items)
        fresh = (copy.deepcopy(cache), feed.copy()) if generates else None
        memory = cache.memory()
        peak, steps, times = memory.bytes, [logits], []
        for k in range(max(len(item.answer) for item in items) - 1):
            tokens = [item.answer[k] if k < len(item.answer) - 1 else None for item in items]
            logits, seconds = feed.step(tokens, cache)
            steps.append(logits)
            times.append(seconds)
            memory = cache.memory()
            peak = max(peak, memory.bytes)
        found = [log_probs_of([x[i] for x in steps[: len(item.answer)]]) for i, item in enumerate(items)]
        texts = None if fresh is None else self._greedy(found, items, *fresh)
        share = _Shares(memory, feed.real, feed.mask.shape[1])
        runs = []
        for i, item in enumerate(items):
            generated = None if texts is None or not item.sample.generate else texts[i]
            text = None if generated is None else self.runner.decode(item.prompt, generated)
            runs.append(
                Run(
                    found[i],
                    generated,
                    text,
                    None if text is None else score(item.sample, text),
                    round(peak * share.of[i]),
                    round(memory.bytes * share.of[i]),
                    round(share.exact * share.of[i]),
                    8 * memory.bytes / share.values if share.values else 0.0,
                    prefill / len(items),
                    sum(times[: len(item.answer) - 1]) / len(items),
                    shared,
                    memory={part: round(n * share.of[i]) for part, n in by_part(memory).items()},
                )
            )
        return runs

    def _prefill(self, cache: CompressedCache, items: Sequence[Encoded], feed: _Feed) -> tuple[Tensor, float, bool]:
        runner, key = self.runner, tuple(map(id, items))
        known = runner.prompt[1] if runner.prompt is not None and runner.prompt[0] == key else None
        start = time.perf_counter()
        with read_again(runner.model, cache, feed.ids, feed.given):
            told = time.perf_counter() - start
            if known is not None and can_share(cache):
                return known.logits, known.seconds + told + runner.fill(cache, known), True
            logits, seconds = feed.step(None, cache)
        if runner.share and known is None and is_exact(cache.recipe):
            runner.prompt = key, Prompt.of(cache, logits, seconds, mask=feed.given)
        return logits, seconds + told, False

    def _greedy(
        self, found: list[Tensor], items: Sequence[Encoded], cache: CompressedCache, feed: _Feed
    ) -> list[list[int]]:
        """Tokens of greedy decoding, each row until it ends or has as many as its answer."""
        best = [x.argmax(-1).tolist() for x in found]
        ends, pairs = self.runner.ends, list(zip(best, items, strict=True))
        if all(x[:-1] == item.answer[:-1] and (item.most <= len(x) or x[-1] in ends) for x, item in pairs):
            return [self.runner.until_end(tokens[: item.most]) for tokens, item in pairs]
        texts = [tokens[:1] for tokens in best]

        def goes_on(i: int) -> bool:
            return len(texts[i]) < items[i].most and texts[i][-1] not in ends

        while any(map(goes_on, range(len(items)))):
            logits, _ = feed.step([texts[i][-1] if goes_on(i) else None for i in range(len(items))], cache)
            chosen = logits.argmax(-1).tolist()
            for i in [i for i in range(len(items)) if goes_on(i)]:
                texts[i].append(chosen[i])
        return texts


class _Feed:
    """The tokens of a batch: what the model is given next, and which of all are padding."""

    def __init__(self, together: Together, prompts: Sequence[list[int]]) -> None:
        self.together = together
        longest, device = max(map(len, prompts)), together.runner.device
        padded = [[together.pad] * (longest - len(x)) + x for x in prompts]
        self.ids = torch.tensor(padded, device=device)
        mask = [[0] * (longest - len(x)) + [1] * len(x) for x in prompts]
        self.mask = torch.tensor(mask, device=device)
        self.real = [len(x) for x in prompts]
        """Tokens of each row."""

    def copy(self) -> _Feed:
        other = copy.copy(self)
        other.real = list(self.real)
        return other

    @property
    def given(self) -> Tensor | None:
        """The mask, if it hides anything."""
        return None if all(n == self.mask.shape[1] for n in self.real) else self.mask

    def step(self, tokens: Sequence[int | None] | None, cache: CompressedCache) -> tuple[Tensor, float]:
        """Logits `[rows, vocabulary]` after the prompts, or after a token of each row that goes on; and seconds."""
        runner, ids = self.together.runner, self.ids
        if tokens is not None:
            ids = torch.tensor([[self.together.pad if x is None else x] for x in tokens], device=ids.device)
            goes_on = [int(x is not None) for x in tokens]
            self.mask = torch.cat([self.mask, torch.tensor(goes_on, device=ids.device)[:, None]], dim=1)
            self.real = [n + more for n, more in zip(self.real, goes_on, strict=True)]
        options: dict[str, Any] = {runner.word: cache, "use_cache": True, **runner.options}
        if self.given is not None:
            options["attention_mask"] = self.mask
            if self.together.placed:
                places = (self.mask.cumsum(-1) - 1).clamp(min=0)
                options["position_ids"] = places[:, -ids.shape[1] :]
        runner.synchronize()
        start = time.perf_counter()
        logits = runner.model(ids, **options).logits[:, -1]
        cache.commit()
        runner.synchronize()
        return logits, time.perf_counter() - start


class _Shares:
    """How the bytes of a batch of some width are shared by its rows, which hold `real` tokens each."""

    def __init__(self, memory: Any, real: Sequence[int], width: int) -> None:
        total = sum(real)
        self.of = [n / total for n in real]
        filled = total / (len(real) * width)
        self.values, self.exact = memory.values * filled, memory.exact_bytes * filled
