"""Greedy generation through a compressed cache, for the command line."""

from __future__ import annotations

import os
from typing import Any, TextIO

import torch

from kvpolicy.arguments import check_generation
from kvpolicy.errors import CompareError, KvpolicyError
from kvpolicy.hf.cache import make_cache
from kvpolicy.hf.models import attached, cache_word, load_model, one_thread, positions_of
from kvpolicy.hf.prepare import read_again
from kvpolicy.hf.source import ModelSource, check_model, is_bundled
from kvpolicy.recipe.load import load_recipe
from kvpolicy.words import clip


def generate_text(
    prompt: str,
    recipe: Any,
    model: str | os.PathLike[str] | ModelSource | None,
    tokens: int,
    device: str | None,
    out: TextIO,
    attach: bool = True,
) -> str:
    """Write the continuation of a prompt to `out` as it is made.

    Args:
        prompt: the text to continue.
        recipe: what `load_recipe` takes.
        model: as `load_model` takes it.
        tokens: tokens to generate at most.
        device: where the model goes.
        out: where the text goes.
        attach: let the model read the compressed stores directly; one that can't be attached runs unattached, with a
            warning.

    Returns:
        What the cache held in the end, on one line.

    Raises:
        CompareError: the model can't be loaded, or the prompt is empty or too long.
        RecipeError: the recipe is not valid, or does not fit the model.
    """
    limit = check_model(model)
    check_generation(prompt, tokens, limit)
    loaded = load_recipe(recipe)
    network, tokenizer = load_model(model, device)
    ids = tokenizer(prompt, return_tensors="pt", verbose=False).input_ids.to(network.device)
    _check_length(ids.shape[1], tokens, positions_of(network))
    with attached(network, attach), torch.inference_mode(), one_thread(is_bundled(model)):
        cache = make_cache(loaded, network)
        try:
            with read_again(network, cache, ids):
                output = network.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    **{cache_word(network): cache},
                    streamer=_Streamer(tokenizer, out),
                    max_new_tokens=tokens,
                    do_sample=False,
                    num_beams=1,
                    temperature=None,
                    top_p=None,
                    top_k=None,
                    cache_implementation=None,
                )
        except (KvpolicyError, OSError):
            raise
        except Exception as error:
            raise CompareError(f"the model can't be run: {type(error).__name__}: {clip(str(error), 400)}") from error
    new = output.shape[1] - ids.shape[1]
    return f"{loaded.name}: prompt of {ids.shape[1]:,} tokens, {new:,} new; cache {cache.memory()}"


def _check_length(prompt: int, tokens: int, limit: int | None) -> None:
    if prompt == 0:
        raise CompareError("the prompt must hold at least one token, found none; give a longer text")
    if limit is not None and prompt + tokens > limit:
        raise CompareError(
            f"prompt and new tokens must fit the model's max_position_embeddings, {limit}, "
            f"found {prompt} + {tokens}; shorten the prompt or give a smaller --max-new-tokens"
        )


class _Streamer:
    """Writes what generation makes, once no later token can change it."""

    def __init__(self, tokenizer: Any, out: TextIO) -> None:
        self.tokenizer, self.out = tokenizer, out
        self.prompt: list[int] | None = None
        self.tokens: list[int] = []
        self.written = ""

    def put(self, value: torch.Tensor) -> None:
        tokens = value.flatten().tolist()
        if self.prompt is None:
            # Its end, because tokenizers strip a space before what they take for the first word.
            self.prompt = tokens[-8:]
            return
        self.tokens += tokens
        self._write(self._text())

    def end(self) -> None:
        self._write(self._text(), last=True)
        if not self.written.endswith("\n"):
            self.out.write("\n")
        self.out.flush()

    def _text(self) -> str:
        before = self._decode(self.prompt or [])
        both = self._decode([*(self.prompt or []), *self.tokens])
        return both[len(before) :] if both.startswith(before) else self._decode(self.tokens)

    def _decode(self, tokens: list[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _write(self, text: str, last: bool = False) -> None:
        # A character cut between two tokens is shown as this one until it is whole.
        whole = text if last else text.rstrip("\ufffd")
        if whole.startswith(self.written) and len(whole) > len(self.written):
            self.out.write(whole[len(self.written) :])
            self.out.flush()
            self.written = whole
