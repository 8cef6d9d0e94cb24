"""Loads a language model and its tokenizer from a local directory, and knows how it is called. Nothing is ever
downloaded."""

from __future__ import annotations

import inspect
import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kvpolicy.errors import CacheError, CompareError
from kvpolicy.words import clip, quoted

BUNDLED = Path(__file__).parents[1] / "model"
"""The directory of the bundled model."""


def load_model(path: str | os.PathLike[str] | None = None, device: str | None = None) -> tuple[Any, Any]:
    """A causal language model in evaluation mode, and its tokenizer.

    Args:
        path: a Hugging Face model directory; by default the bundled model.
        device: where the model goes, such as `cpu` or `cuda:1`; by default CUDA where there is one, else the CPU.

    Raises:
        CompareError: the directory is missing or incomplete, or its model is no causal language model.
    """
    directory = BUNDLED if path is None else Path(path)
    check_model(directory)
    import torch

    target = device or ("cuda" if torch.cuda.is_available() else "cpu")
    _check_torch_device(target)
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    options = {"local_files_only": True, "trust_remote_code": False}
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, **options)
    except Exception as error:
        raise CompareError(f"{directory}: the tokenizer can't be loaded: {_first_line(error)}") from error
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True, **options)
    except Exception as error:
        raise CompareError(f"{directory}: the model can't be loaded: {_first_line(error)}") from error
    finally:
        if shown:
            logging.enable_progress_bar()
    missing = sorted(info.get("missing_keys") or ())
    if missing:
        raise CompareError(
            f"{directory}: the weights must be complete, found {len(missing)} missing, such as {missing[0]}; "
            "they would be random. Fetch the whole model"
        )
    try:
        return model.to(target).eval(), tokenizer
    except (RuntimeError, AssertionError) as error:
        raise CompareError(f"device {target!r} can't hold the model: {_first_line(error)}") from error


def cache_word(model: Any) -> str:
    """The word by which a model's forward and `generate` take a cache, and by which the output gives it back.

    It is `cache` in transformers 5.24 and newer, and `past_key_values` before. A model whose code is older than the
    library keeps its own word; a wrapper that only passes arguments on has that of the model inside it.
    """
    from transformers import GenerationMixin

    from kvpolicy.hf.calls import WORDS

    inner = [type(module).forward for module in model.modules()]
    for function in (*inner, GenerationMixin.prepare_inputs_for_generation):
        for word in inspect.signature(function).parameters:
            if word in WORDS:
                return word
    return WORDS[-1]


@contextmanager
def one_thread(wanted: bool) -> Iterator[None]:
    """One thread of torch. For a model as small as the bundled one more threads only wait for each other."""
    import torch

    before = torch.get_num_threads()
    if wanted:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def attached(model: Any, wanted: bool) -> Iterator[bool]:
    """Attach a model, and leave it as it was; says whether it is attached.

    One that is attached already is used as it is. One that can't be attached is used unattached, with a warning.

    Raises:
        CompareError: the model must not be attached, and is.
    """
    from kvpolicy.hf.attach import attach, is_attached

    if is_attached(model):
        if not wanted:
            raise CompareError(
                f"attach=False needs a model that is not attached, and this {type(model).__name__} is; "
                "detach its handle first"
            )
        yield True
        return
    handle = None
    if wanted:
        try:
            handle = attach(model)
        except CacheError as error:
            warnings.warn(f"the model runs unattached: {error}", stacklevel=4)
    try:
        yield handle is not None
    finally:
        if handle is not None:
            handle.detach()


def check_model(path: str | os.PathLike[str] | None) -> int | None:
    """The positions of the model in a directory, where its config says how many; nothing is loaded.

    Raises:
        CompareError: it is no directory of a model.
    """
    directory = BUNDLED if path is None else Path(path)
    shown = clip(str(directory), 300)
    try:
        is_directory, config = directory.is_dir(), directory / "config.json"
        raw = config.read_bytes() if config.is_file() else None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise CompareError(f"model must be a local directory, found {quoted(str(directory))}: {reason}") from error
    if not is_directory:
        raise CompareError(
            f"model must be a local Hugging Face model directory, found no directory {quoted(str(directory))}; "
            "download the model first, nothing is fetched here"
        )
    if raw is None:
        raise CompareError(
            f"{shown}: a model directory must hold config.json, found none; "
            "give the directory that save_pretrained wrote"
        )
    try:
        found = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise CompareError(f"{shown}: config.json must be JSON, found {clip(str(error))}") from error
    if not isinstance(found, dict):
        raise CompareError(f"{shown}: config.json must be a JSON object, found a {type(found).__name__}")
    return _positions(found)


def positions_of(model: Any) -> int | None:
    """The positions of a model in memory, where its config says how many."""
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def _positions(config: dict[str, Any]) -> int | None:
    # Of a model of several parts these may be the decoder's; which of them is, is told when it is loaded.
    parts = [
        part for part in (config, *map(config.get, ("text_config", "decoder", "generator"))) if isinstance(part, dict)
    ]
    named = [part.get(key) for part in parts for key in ("max_position_embeddings", "n_positions")]
    return max((n for n in named if type(n) is int and n > 0), default=None)


def _check_torch_device(device: str) -> None:
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise CompareError(f"device {device!r} can't be used: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    first, _, rest = text.partition("\n")
    if first.rstrip().endswith(":"):  # a list follows
        first = f"{first} {' '.join(rest.split())[:200]}"
    return f"{type(error).__name__}: {clip(first, 400)}" if text else type(error).__name__
