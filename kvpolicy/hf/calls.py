"""Calls of forward: their arguments under the names of every release of transformers, and the models on their way."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from kvpolicy.errors import CacheError

WORDS = ("cache", "past_key_values")
"""What forward calls its cache: from transformers 5.24 on, and before."""

BY_NAME = "*"
"""Parts arguments that have a place from those that are given by name only, as in a signature."""
PLACED = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


class PassAware(ABC):
    """A cache that is told when a forward pass begins and ends."""

    layers: list[Any]
    lease: object
    """Keeps the hooks of the model that the cache was made for; None if it was made for a config."""

    @abstractmethod
    def begin(self, tokens: int, mask: Any = None, attached: bool = False) -> None:
        """A pass begins that brings `tokens` tokens, with its attention mask."""

    @abstractmethod
    def announce(self, tokens: int, mask: Any, attached: bool) -> None:
        """Within a pass, an inner model is called with so many tokens, or with the mask that an outer one lacks."""

    @abstractmethod
    def finish(self, failed: bool = False) -> None:
        """The pass has ended, by an exception if it `failed`."""


@dataclass(slots=True)
class Call:
    """The arguments of a call of forward."""

    names: tuple[str, ...]
    """What `names_of` says of the module."""
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def _at(self, name: str) -> int | None:
        """The place of an argument that was given by its place."""
        places = self.names[: self.names.index(BY_NAME)] if BY_NAME in self.names else self.names
        at = places.index(name) if name in places else len(self.args)
        return at if at < len(self.args) else None

    def get(self, name: str, default: Any = None) -> Any:
        if name in self.kwargs:
            return self.kwargs[name]
        at = self._at(name)
        return default if at is None else self.args[at]

    def _values(self) -> Iterator[Any]:
        yield from self.kwargs.values()
        yield from self.args

    def compressed(self) -> PassAware | None:
        """The compressed cache among the arguments, whatever its name."""
        return next((x for x in self._values() if isinstance(x, PassAware)), None)

    @property
    def word(self) -> str | None:
        """What forward calls its cache."""
        return next((w for w in WORDS if w in self.names), None)

    @property
    def has_cache(self) -> bool:
        return any(isinstance(x, Cache) for x in self._values()) or any(self.get(w) is not None for w in WORDS)

    def unasked(self) -> Cache | None:
        """A cache of transformers that was never used, unless the caller of `generate` gave it."""
        found = next((x for x in self._values() if isinstance(x, Cache)), None)
        if found is None or isinstance(found, PassAware) or getattr(found, "_is_user_defined", False):
            return None
        return None if any(getattr(x, "is_initialized", True) for x in found.layers) else found

    def with_cache(self, cache: PassAware) -> tuple[Any, dict[str, Any]]:
        """The arguments with a cache, under the name that forward has for it."""
        word = self.word
        assert word is not None
        at = self._at(word)
        if at is not None:
            return (*self.args[:at], cache, *self.args[at + 1 :]), self.kwargs
        return self.args, {**{k: v for k, v in self.kwargs.items() if k not in WORDS}, word: cache}

    def mask(self) -> Tensor | None:
        """Its attention mask, 2-D or 4-D."""
        found = self.get("attention_mask")
        return found if isinstance(found, Tensor) and found.ndim in (2, 4) else None

    def tokens(self) -> int:
        """Tokens of a row that the call brings."""
        for found in (self.get("input_ids"), self.get("inputs_embeds"), *self.args):
            if isinstance(found, Tensor):
                return found.shape[1]
        return 0


def names_of(module: nn.Module) -> tuple[str, ...]:
    """What a module's forward calls its arguments: those that have a place, `BY_NAME`, those that are given by name.

    `*args` and `**kwargs` are taken to go on to the forward that this one replaces, or to that of a model inside.
    """
    places: tuple[str, ...] = ()
    words: dict[str, None] = {}
    starred = named = True
    for parameters in _forwards(module):
        here = tuple(p.name for p in parameters if p.kind in PLACED)
        if starred and here[: len(places)] == places:
            places = here
        if named:
            words.update((p.name, None) for p in parameters if p.kind in (*PLACED, inspect.Parameter.KEYWORD_ONLY))
        kinds = {p.kind for p in parameters}
        starred = starred and inspect.Parameter.VAR_POSITIONAL in kinds
        named = named and inspect.Parameter.VAR_KEYWORD in kinds and not any(w in words for w in WORDS)
        if not starred and not named:
            break
    return (*places, BY_NAME, *(w for w in words if w not in places))


def _forwards(module: nn.Module) -> Iterator[list[inspect.Parameter]]:
    """The parameters of a module's own forward, of those of its classes, and of those of the models inside."""
    yield list(inspect.signature(module.forward).parameters.values())
    for model in (m for m in module.modules() if m is module or isinstance(m, PreTrainedModel)):
        for cls in type(model).__mro__:
            if cls is not nn.Module and "forward" in vars(cls):
                yield list(inspect.signature(vars(cls)["forward"]).parameters.values())[1:]


def parts_of(model: Any) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The model that generates, and the decoder inside it that is given the cache."""
    found = [m for m in model.modules() if isinstance(m, PreTrainedModel)] if isinstance(model, nn.Module) else []
    if not found:
        raise CacheError(f"attach needs a transformers model, found {type(model).__name__}")
    owner = found[0]
    if getattr(owner.config, "is_encoder_decoder", False):
        raise CacheError(f"attach serves decoder models; {type(owner).__name__} is an encoder-decoder")
    text = owner.config.get_text_config(decoder=True)
    inner = [m for m in found if m.config is text]
    return owner, (inner or found)[-1]


def path_between(owner: nn.Module, decoder: nn.Module) -> list[nn.Module]:
    """The models from `owner` down to `decoder`, both included."""
    inside = [m for m in owner.modules() if isinstance(m, PreTrainedModel)]
    return [m for m in inside if any(x is decoder for x in m.modules())]
