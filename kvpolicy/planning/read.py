"""A model's config, wherever it is, into the shape of the model."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from kvpolicy.errors import CompareError, PlanError
from kvpolicy.hf.source import GGUF, ModelSource
from kvpolicy.planning.plain import plain_shape
from kvpolicy.planning.shape import DTYPES, ModelShape
from kvpolicy.planning.sooner import with_meta_kernels
from kvpolicy.words import clip, in_words, model_name, quoted, suggest

__all__ = ["read_shape"]

MOST = 1 << 20
"""Layers, heads, channels of a model at most: beyond this a config is taken for damaged."""


def read_shape(model: Any, dtype: str | None = None) -> ModelShape:
    """The shape of a model.

    Args:
        model: a config of transformers or a model, a mapping as in config.json, or the path of a config.json or of a
            directory that holds one, or the id of a model on the Hugging Face hub, of which the config alone is read.
        dtype: the type that it runs in; by default that of its config, or bfloat16.

    Raises:
        PlanError: there is no config, or it describes no model that a plan can be made for.
    """
    if dtype is not None and dtype not in DTYPES:
        raise PlanError(
            f"dtype must be one of {', '.join(DTYPES)}, found {in_words(dtype)}{suggest(str(dtype), DTYPES)}"
        )
    name, found = _config(model)
    if isinstance(found, Mapping):
        _check_numbers(name, found)
        shape = plain_shape(name, found)
        if shape is None:
            with_meta_kernels()
            from kvpolicy.planning.transformers_shape import config_from, shape_from

            shape = shape_from(name, config_from(name, found))
        given = found.get("dtype", found.get("torch_dtype"))
    else:
        with_meta_kernels()
        from kvpolicy.planning.transformers_shape import shape_from

        shape = shape_from(name, found)
        given = getattr(found, "dtype", None)
    return _typed(shape, dtype, given)


def _typed(shape: ModelShape, dtype: str | None, given: Any) -> ModelShape:
    named = str(given).removeprefix("torch.")
    if dtype is None and named not in DTYPES:
        why = "names no dtype" if given in (None, "auto") else f"names the dtype {clip(named, 40)}"
        shape = replace(shape, notes=(*shape.notes, f"the config {why}: counted in bfloat16; --dtype says another"))
    return replace(shape, dtype=dtype or (named if named in DTYPES else "bfloat16"))


def _config(model: Any) -> tuple[str, Any]:
    """A name, and a config of transformers or a mapping."""
    if isinstance(model, Mapping):
        return str(model.get("_name_or_path") or model.get("model_type") or "model"), model
    if not isinstance(model, str | os.PathLike):
        config = getattr(model, "config", model)
        if not hasattr(config, "get_text_config"):
            raise PlanError(
                "model must be a config.json, a directory that holds one, the id of a model on the hub, or a config of "
                f"transformers, found {in_words(model)}"
            )
        return str(getattr(config, "name_or_path", "") or config.model_type), config
    text = os.fspath(model)
    if text.endswith(GGUF):
        return _named(text)
    path, shown = Path(text), quoted(text)
    try:
        file = path / "config.json" if path.is_dir() else path
        raw = file.read_bytes() if file.is_file() else None
        there = path.exists()
    except (OSError, ValueError) as error:
        raise PlanError(f"{shown}: the config can't be read: {getattr(error, 'strerror', None) or error}") from error
    if raw is None and there:
        raise PlanError(f"{shown}: a model directory must hold config.json, found none")
    if raw is None:
        return _named(text)
    try:
        found = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise PlanError(f"{shown}: config.json must be JSON, found {clip(str(error))}") from error
    if not isinstance(found, dict):
        raise PlanError(f"{shown}: config.json must be a JSON object, found {in_words(found)}")
    return model_name(str(path if path.is_dir() or path.name != "config.json" else path.parent)), found


def _named(text: str) -> tuple[str, Any]:
    """The config of a GGUF file, or of a model on the hub."""
    with_meta_kernels()
    from kvpolicy.hf.models import read_config

    try:
        return Path(text).name if text.endswith(GGUF) else text, read_config(ModelSource(text))
    except CompareError as error:
        raise PlanError(f"{error}; a config.json will do, too") from error


def _check_numbers(name: str, config: Mapping[str, Any]) -> None:
    """Refuse sizes that no model has, before anything is built of them."""
    parts = [("", config), *((f"{key}.", part) for key, part in config.items() if isinstance(part, Mapping))]
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
             "head_dim", "vocab_size")  # fmt: skip
    for start, part in parts:
        for key in sizes:
            value = part.get(key)
            if value is None:
                continue
            most = MOST if key != "vocab_size" else 1 << 26
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
                raise PlanError(
                    f"{clip(name)}: {start}{key} of a config must be an integer from 1 to {most:,}, found "
                    f"{in_words(value)}"
                )
