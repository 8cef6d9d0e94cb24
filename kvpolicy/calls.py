"""Calls of forward: their arguments under the names of every release of transformers, and the models on their way."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from kvpolicy.errors import CacheError

if TYPE_CHECKING:
    from kvpolicy.cache import CompressedCache

__all__ = ["WORDS", "Call", "PassAware", "names_of", "parts_of", "path_between"]

WORDS = ("cache", "past_key_values")
"""What forward calls its cache: from transformers 5.24 on, and before."""


class PassAware:
    """A cache that is told when a forward pass begins and ends."""


@dataclass(slots=True)
class Call:
    """The arguments of a call of forward."""

    names: tuple[str, ...]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def get(self, name: str, default: Any = None) -> Any:
        if name in self.kwargs:
            return self.kwargs[name]
        if name in self.names:
            at = self.names.index(name)
            if at < len(self.args):
                return self.args[at]
        return default

    def _values(self) -> Iterator[Any]:
        yield from self.kwargs.values()
        yield from self.args

    def compressed(self) -> CompressedCache | None:
        """The compressed cache among the arguments, whatever its name."""
        return cast("CompressedCache | None", next((x for x in self._values() if isinstance(x, PassAware)), None))

    @property
    def word(self) -> str | None:
        """What forward calls its cache."""
        return next((w for w in WORDS if w in self.names), None)

    @property
    def has_cache(self) -> bool:
        return any(isinstance(x, Cache) for x in self._values()) or any(self.get(w) is not None for w in WORDS)

    def with_cache(self, cache: CompressedCache) -> tuple[Any, dict[str, Any]]:
        """The arguments with a cache, under the name that forward has for it."""
        word = self.word
        assert word is not None
        at = self.names.index(word)
        if at < len(self.args):
            return (*self.args[:at], cache, *self.args[at + 1 :]), self.kwargs
        return self.args, {**{k: v for k, v in self.kwargs.items() if k not in WORDS}, word: cache}

    def mask(self) -> Tensor | None:
        found = self.get("attention_mask")
        return found if isinstance(found, Tensor) and found.ndim == 2 else None

    def tokens(self) -> int:
        """Tokens of a row that the call brings."""
        for found in (self.get("input_ids"), self.get("inputs_embeds"), *self.args):
            if isinstance(found, Tensor):
                return found.shape[1]
        return 0


def names_of(module: nn.Module) -> tuple[str, ...]:
    """What a module's forward calls its arguments, in order."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    for forward, first in ((module.forward, 0), (type(module).forward, 1)):
        names = tuple(p.name for p in inspect.signature(forward).parameters.values() if p.kind in kinds)[first:]
        if names:
            return names
    return ()


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
