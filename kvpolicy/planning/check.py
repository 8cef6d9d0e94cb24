"""What to fear of a model before its cache is compressed: outliers of keys, and what bits cost on a text."""

from __future__ import annotations

import heapq
import inspect
import math
import os
import textwrap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from kvpolicy.errors import CacheError, KvpolicyError, PlanError
from kvpolicy.hf.cache import make_cache
from kvpolicy.hf.fingerprint import blocks_of
from kvpolicy.hf.model_config import config_of, head_dim_of
from kvpolicy.hf.models import attached, cache_word, load_model, one_thread, positions_of
from kvpolicy.hf.predictions import divergence
from kvpolicy.hf.source import check_model, source_of
from kvpolicy.hf.suitability import compressible, set_apart
from kvpolicy.planning.found import Check, KeyLayer, Probe
from kvpolicy.planning.sizes import check_probe
from kvpolicy.words import clip, model_name

__all__ = ["check"]

BITS, GROUPINGS = (8, 4, 2), ("token", "channel")
PROPOSED = {
    (2, "token"): "logquant",
    (2, "channel"): "kivi",
    (4, "token"): "logquant:nbits=4",
    (4, "channel"): "balanced",
    (8, "token"): "logquant:nbits=8",
    (8, "channel"): "balanced:nbits=8",
}
"""The bundled recipe for bits and groups of keys, that which costs least first."""
SMALL = 1 << 24
"""Parameters of a model that runs fastest on one thread."""


def check(
    model: Any = None,
    *,
    tokenizer: Any = None,
    text: str | os.PathLike[str] | None = None,
    tokens: int = 512,
    limit: float = 0.05,
    device: str | None = None,
) -> Check:
    """Look at a model's keys, try widths and groupings of codes on a text, and propose a recipe.

    The text is cut to `tokens`. Its first half is the prompt, which is kept in so many bits whole; the other half is
    predicted with that, and the predictions are compared with those of the exact cache.

    Args:
        model: a causal language model of transformers, a directory, an id of the Hugging Face hub, a GGUF file, or a
            `ModelSource`; by default the bundled model. It is left as it was.
        tokenizer: the tokenizer of a model given as an object.
        text: a text file in UTF-8 such as the model is to read; by default source code of Python's own library.
        tokens: tokens of the text that are used.
        limit: the KL divergence, nats per token, up to which a width counts as safe.
        device: where a model given by its name is loaded; by default CUDA where there is one.

    Returns:
        Key statistics by layer, a probe for each width and grouping, warnings and a proposal.

    Raises:
        PlanError: an argument is out of range, the text is too short, or no layer of the model can be compressed.
        CompareError: the model can't be loaded.
    """
    check_probe(tokens, limit)
    content = _library() if text is None else _read(text)
    source = source_of(model, device)
    given = source is not None
    if not given and tokenizer is None:
        raise PlanError("a model given as an object must come with its tokenizer, found none; say tokenizer=...")
    name, path = type(model).__name__, None
    if source is not None:
        name, path = ("the bundled model", None) if source.bundled else (model_name(str(source.name)), str(source.name))
        check_model(source)
        model, tokenizer = load_model(source)
    positions = positions_of(model)
    tokens = min(tokens, positions or tokens)
    ids = _ids(content, tokenizer, tokens).to(next(model.parameters()).device)
    training = model.training
    try:
        with torch.no_grad(), one_thread(given and sum(p.numel() for p in model.parameters()) < SMALL):
            found = _checked(model.eval(), ids, limit, name)
        return replace(found, own_text=text is None, path=path)
    finally:
        model.train(training)


def _checked(model: Any, ids: Tensor, limit: float, name: str) -> Check:
    try:
        config = config_of(model)
    except CacheError as error:
        raise PlanError(str(error)) from error
    parts = list(DynamicCache(config=config).layers)
    set_apart(parts, config.get_text_config(decoder=True))
    chosen = compressible(parts)
    if not chosen:
        kinds = ", ".join(sorted({type(part).__name__ for part in parts})) or "none"
        raise PlanError(f"a model must have full-attention layers to be compressed, found {kinds}; no recipe helps it")
    half, word = ids.shape[1] // 2, cache_word(model)
    cache = DynamicCache(config=config)
    exact = _predicted(model, ids, half, word, cache)
    layers = tuple(_keys(model, i, cache.layers[i].keys, len(parts)) for i in chosen)
    dims = {i: head_dim_of(config.get_text_config(decoder=True), i) for i in chosen}
    probes = [_probe(model, ids, half, word, exact, bits, per, dims) for bits in BITS for per in GROUPINGS]
    best = next((recipe for (bits, per), recipe in PROPOSED.items() if _safe(probes, bits, per, limit)), "full")
    shown = _divergence(exact, _with(model, best, ids, half, word))
    apart = {i: type(part).__name__ for i, part in enumerate(parts) if i not in chosen}
    sizes = tuple(sorted({dim for dim in dims.values() if dim}))
    return Check(name, ids.shape[1], False, layers, tuple(probes), best, shown, limit, sizes, apart)


def _safe(probes: list[Probe], bits: int, per: str, limit: float) -> bool:
    """Whether so many bits are, and no wider ones in the same groups are not."""
    own = [probe for probe in probes if probe.keys == per and probe.bits >= bits]
    return all(probe.kl is not None and probe.kl <= limit for probe in own)


def _predicted(model: Any, ids: Tensor, half: int, word: str, cache: Any) -> Tensor:
    """Log-probabilities of what follows each token of the second half, on the CPU."""
    model(input_ids=ids[:, :half], use_cache=True, **{word: cache})
    logits = model(input_ids=ids[:, half:], use_cache=True, **{word: cache}).logits
    found: Tensor = logits[0].float().log_softmax(-1).cpu()
    return found


def _with(model: Any, recipe: Any, ids: Tensor, half: int, word: str) -> Tensor:
    with _quiet(model):
        return _predicted(model, ids, half, word, make_cache(recipe, model))


@contextmanager
def _quiet(model: Any) -> Iterator[None]:
    """The model reads the stores where it can, so that nothing but codes differs."""
    with attached(model, wanted=True):
        yield


def _divergence(exact: Tensor, other: Tensor) -> float:
    return math.fsum(found := divergence(exact, other)) / len(found)


def _probe(
    model: Any, ids: Tensor, half: int, word: str, exact: Tensor, bits: int, per: str, dims: Mapping[int, int | None]
) -> Probe:
    size: Any = 32 if per == "channel" else "auto"
    keys = {"kind": "int", "nbits": bits, "per": per, "group_size": size}
    values = {"kind": "int", "nbits": bits, "per": "token", "group_size": "auto"}
    recipe = {"name": f"{bits} bits, keys per {per}", "tiers": [{"keys": keys, "values": values}]}
    try:
        return Probe(bits, per, _divergence(exact, _with(model, recipe, ids, half, word)))
    except KvpolicyError as error:
        return Probe(bits, per, None, clip(str(error), 300))


def _keys(model: Any, layer: int, keys: Tensor, count: int) -> KeyLayer:
    """How far the largest channels of a layer's keys stand out, and the largest bias of what makes them."""
    x = keys[0].float()
    level = x.abs().mean(1)  # [kv_heads, head_dim]
    spread = x.amax(1) - x.amin(1)
    ratio = float((level.amax(1) / level.median(1).values.clamp(min=1e-12)).max())
    offset = x.mean(1).abs() / spread.clamp(min=1e-12)
    blocks = blocks_of(model, count)
    bias = 0.0
    for name, module in blocks[layer].named_modules() if blocks else ():
        found = getattr(module, "bias", None)
        if name.rpartition(".")[2] == "k_proj" and isinstance(found, Tensor):
            bias = max(bias, float(found.abs().max()))
    return KeyLayer(layer, float(x.abs().max()), ratio, float(offset.max()), bias)


def _read(path: str | os.PathLike[str]) -> str:
    shown = clip(str(path), 300)
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise PlanError(f"{shown}: must be text in UTF-8, found other bytes; save it as UTF-8") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise PlanError(f"{shown}: must be a text file that can be read, found {reason}") from error


def _library() -> str:
    """A text that every Python brings."""
    return inspect.getsource(heapq) + inspect.getsource(textwrap)


def _ids(content: str, tokenizer: Any, tokens: int) -> Tensor:
    found = tokenizer(content[: tokens * 64], verbose=False)["input_ids"][:tokens]
    if len(found) < 32:
        raise PlanError(f"the text must have at least 32 tokens, found {len(found)}; give a longer one (--text)")
    return torch.tensor([found])
