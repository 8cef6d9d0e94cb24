"""The model class of lm-evaluation-harness that reads a compressed cache."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from tqdm import tqdm

from kvpolicy.errors import CompareError
from kvpolicy.harness import NAME
from kvpolicy.harness.scoring import Context, Score, Scorer, batches, ordered
from kvpolicy.hf.cache import CompressedCache, make_cache
from kvpolicy.hf.layer import TieredLayer
from kvpolicy.hf.models import apply_template, attached, cache_word
from kvpolicy.hf.prepare import read_again
from kvpolicy.hf.source import ModelSource, check_model
from kvpolicy.recipe.load import load_recipe
from kvpolicy.words import in_words

Request = tuple[Any, list[int], list[int]]
"""A key for the harness's own cache, or None for a rolling window; a context and a continuation."""


@register_model(NAME)
class CompressedLM(HFLM):
    """A model of transformers whose every score and text comes through a compressed cache.

    Its name in lm-evaluation-harness is `kvpolicy`, and it takes the arguments of `hf` besides its own.

    - `loglikelihood`: a context is the prompt, read at once but for its last `held_back` tokens. These and the
      continuation are read token by token through the cache. The choices of one context share its prompt.
    - `loglikelihood_rolling`: windows as `hf` cuts them. The prompt of a window is its first `prefill` tokens, by
      default half of them, and always those that it is only conditioned on. They are scored by the prompt's own exact
      attention; all others through the cache.
    - `generate_until`: a fresh cache for each batch.

    Args:
        pretrained: a directory, an id of the hub, a GGUF file, or a model of transformers, which is left as it was.
        recipe: what `load_recipe` takes.
        held_back: tokens at a context's end that are read through the cache. With 0 the first token of a continuation
            is predicted by the prompt, as in generation; such a prediction reads no stored token.
        prefill: tokens of a rolling window's prompt.
        **options: those of `HFLM`.

    Raises:
        CompareError: an argument is not valid, or there is no such model.
        RecipeError: the recipe is not valid, or does not fit the model.
    """

    def __init__(
        self,
        pretrained: Any,
        recipe: Any = None,
        held_back: int = 1,
        prefill: int | None = None,
        device: str | None = None,
        **options: Any,
    ) -> None:
        if recipe is None:
            raise CompareError("model kvpolicy needs a recipe, found none; write --model_args ...,recipe=NAME")
        self.held_back, self.prefill = _number("held_back", held_back, 0), prefill
        if prefill is not None:
            _number("prefill", prefill, 1)
        self.recipe = load_recipe(recipe)
        if isinstance(pretrained, str | os.PathLike):
            pretrained, options = _placed(os.fspath(pretrained), options)
            options["device"] = device or ("cuda" if torch.cuda.is_available() else "cpu")
        super().__init__(pretrained, **options)
        if self.backend != "causal":
            raise CompareError(f"model kvpolicy takes causal language models, found one for {self.backend}")
        self._word, self._reads = cache_word(self.model), False
        self._seen = {"predictions": 0, "from_cache": 0}
        self._bits: list[float] = []
        with self._attached():
            self._fresh()  # what does not fit fails here

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation, and whether greedy decoding would write it."""
        with self._attached():
            return super().loglikelihood(requests, disable_tqdm=disable_tqdm)  # type: ignore[no-any-return]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of each text."""
        with self._attached():
            return super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)  # type: ignore[no-any-return]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """A continuation of each text."""
        with self._attached():
            return super().generate_until(requests, disable_tqdm=disable_tqdm)  # type: ignore[no-any-return]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as the tokenizer's chat template writes it.

        Raises:
            CompareError: it has none.
        """
        if not getattr(self.tokenizer, "chat_template", None):
            apply_template(self.tokenizer, chat_history)
        return super().apply_chat_template(chat_history, add_generation_prompt)  # type: ignore[no-any-return]

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes into its results: the model, the recipe, and how much was read from the cache."""
        bits = sum(self._bits) / len(self._bits) if self._bits else None
        about = {
            "recipe": self.recipe.to_yaml(),
            "held_back": self.held_back,
            "prefill": self.prefill,
            "attached": self._reads,
            "bits_per_value": bits,
            **self._seen,
        }
        return {**super().get_model_info(), "kvpolicy": about}

    @contextmanager
    def _attached(self) -> Iterator[None]:
        """The model is attached where it can be, so that rows of a batch may be padded."""
        with attached(self.model, True) as self._reads:
            if not self._reads and str(self.batch_size) != "1":
                raise CompareError(
                    "a model that can't be attached tells no padding to a compressed cache, so batch_size must be 1, "
                    f"found {self.batch_size}"
                )
            yield

    def _fresh(self) -> CompressedCache:
        cache = make_cache(self.recipe, self.model)
        for layer in cache.layers:
            if isinstance(layer, TieredLayer) and not self._reads:
                layer.check_attached()
        return cache

    def _precise(self) -> AbstractContextManager[Any]:
        kind = self.mixed_precision_dtype
        return torch.autocast(device_type=self.device.type, dtype=kind, enabled=kind is not None)

    def _model_generate(self, context: Any, max_length: int, stop: list[str], **generation_kwargs: Any) -> Any:
        cache = self._fresh()
        given = {"cache_implementation": None, **generation_kwargs, self._word: cache}
        with read_again(self.model, cache, context, generation_kwargs.get("attention_mask")):
            found = super()._model_generate(context, max_length, stop, **given)
        self._bits.append(cache.memory().bits_per_value)
        return found

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        contexts, places = self._contexts(requests)
        scorer = Scorer(self.model, self._fresh, self.softmax_dtype or torch.float32, self._precise)
        found: dict[int, tuple[float, bool]] = {}
        hidden = disable_tqdm or self.rank != 0
        with tqdm(total=len(requests), disable=hidden, desc="Running loglikelihood requests") as bar:
            for batch in batches(contexts, self._sizes(contexts, override_bs), self._reads):
                for index, scores in zip(batch, scorer.score([contexts[i] for i in batch]), strict=True):
                    for place, score in zip(places[index], scores, strict=True):
                        found[place] = self._answer(requests[place][0], score)
                        bar.update(1)
                self._bits.append(scorer.bits)
        return [found[place] for place in range(len(requests))]

    def _contexts(self, requests: Sequence[Request]) -> tuple[list[Context], list[list[int]]]:
        """The requests by their contexts, and which request each continuation is."""
        known: dict[tuple[Any, ...], tuple[Context, list[int]]] = {}
        for place, (key, context, continuation) in enumerate(requests):
            tokens = (context + continuation)[-(self.max_length + 1) :]
            scored = len(tokens) - len(continuation)
            if scored < 1:
                raise CompareError(
                    f"a continuation must fit the model's max_length, {self.max_length}, with a token before it, found "
                    f"{len(continuation)} tokens; give a larger max_length if the model has more positions"
                )
            if key is None:  # a window
                prefill = min(max(self.prefill or len(tokens) // 2, scored), len(tokens) - 1)
                shared = prefill
            else:
                prefill, shared = max(scored - self.held_back, 1), scored
            head = tuple(tokens[:shared])
            entry = known.setdefault((head, prefill, scored), (Context(head, prefill, scored), []))
            entry[0].tails.append(tuple(tokens[shared:]))
            entry[1].append(place)
        return [context for context, _ in known.values()], [places for _, places in known.values()]

    def _answer(self, key: Any, score: Score) -> tuple[float, bool]:
        answer = (score.log_likelihood, score.greedy)
        self._seen["predictions"] += score.tokens
        self._seen["from_cache"] += score.through
        if key is not None:  # a window is no answer to a request
            self.cache_hook.add_partial("loglikelihood", key, answer)
        return answer

    def _sizes(self, contexts: Sequence[Context], override: int | None) -> Callable[[int], int]:
        """How many contexts run together, beginning with one at a place; the harness tries it out if it is to."""
        if self.batch_size != "auto" or override is not None:
            size = int(self.batch_size if override is None else override)
            return lambda place: size
        self.batch_sizes: dict[int, int] = {}
        asked: list[Request] = []
        for context in (contexts[i] for i in ordered(contexts)):
            tail = max(context.tails, key=len)
            asked.append((None, list(context.tokens), list(tail)))
        self.batch_schedule: float = min(float(self.batch_schedule), max(len(asked), 1))
        return lambda place: int(self._batch_scheduler(place, asked))


def _placed(name: str, options: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The model's home and HFLM's options for it, once it is known to be there."""
    revision, trusted = options.get("revision"), bool(options.get("trust_remote_code"))
    source = ModelSource(name, revision=None if revision == "main" else revision, trust_remote_code=trusted)
    place = source.place()
    if not options.get("subfolder") and not options.get("gguf_file"):
        check_model(source)
    return place.home, {**options, **({"gguf_file": place.file} if place.file else {})}


def _number(name: str, value: Any, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise CompareError(f"{name} must be an integer of at least {least}, found {in_words(value)}")
    return value
