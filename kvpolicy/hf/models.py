"""Loads a language model and its tokenizer, and knows how it is called."""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from kvpolicy.errors import CacheError, CompareError
from kvpolicy.hf.source import BUNDLED as BUNDLED
from kvpolicy.hf.source import ModelSource, Place, hub_answers, not_from_hub, source_of, unreachable
from kvpolicy.words import clip

GIVE_ONE = "name a tokenizer (--tokenizer, from Python ModelSource(tokenizer=...))"


def load_model(model: str | os.PathLike[str] | ModelSource | None = None, device: str | None = None) -> tuple[Any, Any]:
    """A causal language model in evaluation mode, and its tokenizer.

    Args:
        model: a directory, an id of the Hugging Face hub, a GGUF file, or a `ModelSource`; by default the bundled
            model.
        device: where the model goes, such as `cpu` or `cuda:1`; by default CUDA where there is one, else the CPU.

    Raises:
        CompareError: there is no such model, it is incomplete or no causal language model, or lacks a tokenizer.
        MissingDependencyError: a package that such a model needs is not installed.
    """
    source = source_of(model, device)
    if source is None:
        raise CompareError(f"a model to load must be given by its name, found {type(model).__name__}")
    place = source.place()
    import torch

    target = None
    if source.device_map is None:
        target = source.device or ("cuda" if torch.cuda.is_available() else "cpu")
        _check_torch_device(target)
    common = _common(source, place)
    tokenizer = _load_tokenizer(source, place, common)
    loaded = _load_weights(source, place, common)
    if target is None:
        return loaded.eval(), tokenizer
    try:
        return loaded.to(target).eval(), tokenizer
    except (RuntimeError, AssertionError) as error:
        raise CompareError(f"device {target!r} can't hold the model: {_first_line(error)}") from error


def read_config(source: ModelSource) -> Any:
    """The config of a model that is given by its name, with the dtype that it would be loaded in.

    Raises:
        CompareError: there is no such model.
        MissingDependencyError: a package that such a model needs is not installed.
    """
    from transformers import AutoConfig

    place = source.place()
    given = {"gguf_file": place.file} if place.file else {}
    try:
        config = AutoConfig.from_pretrained(place.home, **_common(source, place), **given)
    except Exception as error:
        if not place.local and (why := unreachable(place, error)):
            raise not_from_hub(place, why) from error
        raise CompareError(f"{place.shown}: the config can't be loaded: {_cause(error)}") from error
    if source.dtype not in (None, "auto") or (place.file and source.dtype is None):
        config.dtype = source.dtype or "float32"
    return config


def load_config(source: ModelSource) -> tuple[Any, Any]:
    """`read_config`, and the model's tokenizer.

    Raises:
        CompareError: there is no such model, or it lacks a tokenizer.
    """
    place = source.place()
    tokenizer = _load_tokenizer(source, place, _common(source, place))
    return read_config(source), tokenizer


def _common(source: ModelSource, place: Place) -> dict[str, Any]:
    """What is said of every part of a model."""
    return {
        "local_files_only": place.local or not hub_answers(),
        "trust_remote_code": source.trust_remote_code,
        **({} if source.revision is None else {"revision": source.revision}),
    }


def _load_tokenizer(source: ModelSource, place: Place, common: dict[str, Any]) -> Any:
    from transformers import AutoTokenizer

    if source.tokenizer is None:
        home, options = place.home, {**common, **({"gguf_file": place.file} if place.file else {})}
    else:
        home = os.fspath(source.tokenizer)
        here = os.path.isdir(home)
        local = here or not hub_answers()
        options = {"trust_remote_code": source.trust_remote_code, "local_files_only": local}
        place = Place(home, None, here)
    try:
        tokenizer = AutoTokenizer.from_pretrained(home, **options)
    except Exception as error:
        if not place.local and (why := unreachable(place, error)):
            raise not_from_hub(place, why, "tokenizer" if source.tokenizer is not None else "model") from error
        raise CompareError(f"{place.shown}: the tokenizer can't be loaded: {_cause(error)}; {GIVE_ONE}") from error
    if len(tokenizer) <= len(tokenizer.get_added_vocab()):  # made from the class's defaults where there are no files
        raise CompareError(f"{place.shown}: the model must have a tokenizer, found none; {GIVE_ONE}")
    return tokenizer


def _load_weights(source: ModelSource, place: Place, common: dict[str, Any]) -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    options = dict(common)
    if source.dtype is not None or place.file:
        options["dtype"] = source.dtype or "float32"
    if source.device_map is not None:
        options["device_map"] = source.device_map
    if place.file:
        options["gguf_file"] = place.file
    shown = place.local and logging.is_progress_bar_enabled()
    if shown:
        logging.disable_progress_bar()
    try:
        model, info = AutoModelForCausalLM.from_pretrained(place.home, output_loading_info=True, **options)
    except Exception as error:
        if not place.local and (why := unreachable(place, error)):
            raise not_from_hub(place, why) from error
        raise CompareError(f"{place.shown}: the model can't be loaded: {_cause(error)}") from error
    finally:
        if shown:
            logging.enable_progress_bar()
    missing = sorted(info.get("missing_keys") or ())
    if missing:
        raise CompareError(
            f"{place.shown}: the weights must be complete, found {len(missing)} missing, such as {missing[0]}; "
            "they would be random. Fetch the whole model"
        )
    return model


def apply_template(tokenizer: Any, messages: Any, **options: Any) -> Any:
    """A conversation as the tokenizer's chat template writes it; `options` go to its `apply_chat_template`.

    Raises:
        CompareError: it has no chat template.
    """
    if not getattr(tokenizer, "chat_template", None):
        name = clip(str(getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__), 300)
        raise CompareError(
            f"the tokenizer of {name} must have a chat template to write a conversation, found none; {GIVE_ONE} that "
            "has one, or do without a template"
        )
    return tokenizer.apply_chat_template(messages, **options)


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


def positions_of(model: Any) -> int | None:
    """The positions of a model in memory, where its config says how many."""
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def _check_torch_device(device: str) -> None:
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise CompareError(f"device {device!r} can't be used: {_first_line(error)}") from error


def _cause(error: BaseException) -> str:
    if "trust_remote_code" in str(error):
        return "it brings code of its own, which runs only if it is trusted (--trust-remote-code)"
    return _first_line(error)


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    first, _, rest = text.partition("\n")
    if first.rstrip().endswith(":"):  # a list follows
        first = f"{first} {' '.join(rest.split())[:200]}"
    return f"{type(error).__name__}: {clip(first, 400)}" if text else type(error).__name__
