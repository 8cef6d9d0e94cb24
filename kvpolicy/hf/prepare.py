"""Prompts that a model reads more than once before its cache is used."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kvpolicy.errors import CacheError
from kvpolicy.hf.cache import CompressedCache, make_cache
from kvpolicy.hf.calls import WORDS, names_of, parts_of
from kvpolicy.hf.layer import TieredLayer
from kvpolicy.hf.modes import watching
from kvpolicy.hf.passes import is_attached
from kvpolicy.interfaces.prompt_scorer import PromptScorer, noted, settled, spans_of
from kvpolicy.layer.view import View

__all__ = ["asking", "end_prompt", "prepare", "read_again"]


@torch.no_grad()
def prepare(
    model: Any,
    cache: CompressedCache,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    instruction: Sequence[int] = (),
) -> CompressedCache:
    """Fill a cache with a prompt that the model reads again to tell what of it matters, and end the prompt.

    For recipes whose scorer asks for it, such as `kvzip`. Afterwards the cache holds what was chosen; each question
    about the prompt goes on from it, or from a copy (`copy.deepcopy(cache)`).

    Args:
        model: the model, attached and in evaluation mode.
        cache: an empty cache for it.
        input_ids: the prompt, `[batch, tokens]`.
        attention_mask: 1 for real tokens, 0 for padding, `[batch, tokens]`. None: no padding.
        instruction: tokens that stand before each part that is fed again, such as those of "Repeat the previous context
            exactly."

    Returns:
        The cache.

    Raises:
        CacheError: the recipe asks for no such scores, the cache holds tokens, the model is not attached, or the prompt
            or the mask does not fit.
    """
    if not asking(cache):
        raise CacheError(
            f"prepare must be given a cache whose recipe ranks tokens by a prompt read again, found recipe "
            f"{cache.recipe.name!r}; use generate alone"
        )
    with read_again(model, cache, input_ids, attention_mask, instruction=instruction):
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.to(input_ids.device).long()
        _run(model, cache, input_ids, (mask.cumsum(1) - 1).clamp(min=0), mask)
        end_prompt(cache)
    return cache


@contextmanager
def read_again(
    model: Any,
    cache: CompressedCache,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    instruction: Sequence[int] = (),
) -> Iterator[None]:
    """Within, an empty cache knows what the tokens of a prompt score, and the prompt is given to it.

    A cache whose recipe doesn't ask for it is left alone. Takes what `prepare` takes, and raises the same.
    """
    scorers = asking(cache)
    if not scorers:
        yield
        return
    _check(model, cache, scorers, input_ids, attention_mask)
    real = torch.ones_like(input_ids) if attention_mask is None else attention_mask.to(input_ids.device)
    told: dict[int, list[Tensor]] = {layer: [] for layer in scorers}
    with torch.no_grad():
        for row, kept in zip(input_ids, real.bool(), strict=True):
            found = _scores(model, scorers, row[kept].unsqueeze(0), list(instruction))
            for layer, scores in found.items():
                whole = scores.new_zeros((1, scores.shape[1], len(row)))
                whole[..., kept.to(scores.device)] = scores
                told[layer].append(whole)
    try:
        for layer, rows in told.items():
            cache.layers[layer].tiers.told = torch.cat(rows)
        yield
    finally:
        for layer in told:
            cache.layers[layer].tiers.told = None


def end_prompt(cache: CompressedCache) -> None:
    """End the prompt, as a first single token would: what comes is no part of it."""
    cache.guard.commit(1)


def asking(cache: CompressedCache) -> dict[int, PromptScorer]:
    """The scorer of each layer that asks for the prompt to be read again; empty where none does."""
    layers = {i: x.tiers for i, x in enumerate(cache.layers) if isinstance(x, TieredLayer)}
    return {i: scorer for i, tiers in layers.items() if (scorer := tiers.placement.scores.told) is not None}


def _check(
    model: Any, cache: CompressedCache, found: dict[int, PromptScorer], ids: Tensor, mask: Tensor | None
) -> None:
    """Refuse what can't be read again."""
    if len(set(found.values())) > 1:
        raise CacheError("all layers must ask for the same scores of a prompt, found several scorers; use one")
    if cache.get_seq_length():
        raise CacheError(f"prepare must be given an empty cache, found {cache.get_seq_length()} tokens; reset() it")
    if not is_attached(model):
        raise CacheError("prepare must be given an attached model; use: with kvpolicy.attach(model): ...")
    if ids.ndim != 2 or not ids.shape[1] or (mask is not None and mask.shape != ids.shape):
        shape = None if mask is None else tuple(mask.shape)
        raise CacheError(f"a prompt and its mask must be [batch, tokens], found {tuple(ids.shape)} and {shape}")
    if mask is not None and not mask.bool().any(1).all():
        raise CacheError("each row of a prompt must have a token that is no padding, found one without; leave it out")


def _scores(model: Any, scorers: dict[int, PromptScorer], ids: Tensor, instruction: list[int]) -> dict[int, Tensor]:
    """What the tokens of one row score in each layer: `[1, kv_heads, tokens]`."""
    scorer, length = next(iter(scorers.values())), ids.shape[1]
    exact, found = make_cache("full", model), dict[int, Tensor]()
    _run(model, exact, ids)
    slides = any(not isinstance(layer, TieredLayer) for layer in exact.layers)  # which can't be cropped
    for span in spans_of(scorer, length):
        fed = torch.cat([ids.new_tensor([instruction]).view(1, -1), ids[:, slice(*span)]], dim=1)

        def note(module: nn.Module, query: Tensor, key: Any, *rest: Any, span: tuple[int, int] = span) -> None:
            layer: Any = module.layer_idx
            if layer not in scorers:
                return
            keys = key.dense() if isinstance(key, View) else key
            scaling = rest[2].get("scaling") or query.shape[3] ** -0.5
            tiers = exact.layers[layer].tiers
            scores = noted(scorer, query, keys, span, scaling, tiers.site_of("keys"))
            if layer not in found:
                found[layer] = scores.new_full((1, scores.shape[1], length), -torch.inf)
            found[layer][..., slice(*span)] = scores

        token = watching.set(note)
        try:
            one = copy.deepcopy(exact) if slides else exact
            _run(model, one, fed, torch.arange(length, length + fed.shape[1], device=ids.device).unsqueeze(0))
        finally:
            watching.reset(token)
        if not slides:
            exact.crop(length)
    return settled(scorer, found)


def _run(model: Any, cache: Any, ids: Tensor, places: Tensor | None = None, mask: Tensor | None = None) -> None:
    owner, _ = parts_of(model)
    names = names_of(owner)
    word = next(w for w in WORDS if w in names)
    more: dict[str, Any] = {} if places is None or "position_ids" not in names else {"position_ids": places}
    if "logits_to_keep" in names:
        more["logits_to_keep"] = 1
    if mask is not None and not bool(mask.all()):
        more["attention_mask"] = mask
    owner(ids, **{word: cache, "use_cache": True}, **more)
