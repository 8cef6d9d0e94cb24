"""The attention function under a name of transformers' registry, while attached models use that name."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvpolicy.errors import CacheError

EAGER = "eager_attention_forward"
_overrides: dict[tuple[int, str], Override] = {}
_eager: WeakKeyDictionary[type, tuple[dict[str, Any], str]] = WeakKeyDictionary()
"""Where the eager function of a class of modules is: its file's names, and its own among them."""


class Override:
    """Puts a function where the registry has another, from the first user to the last."""

    def __init__(self, interface: AttentionInterface, name: str, function: Callable[..., Any]) -> None:
        self.interface, self.name = interface, name
        self.before: Callable[..., Any] | None = interface.get(name)
        """None for "eager", which each modeling file has for itself."""
        self.somebodys = name in vars(interface).get("_local_mapping", {})
        """Whether that was somebody's own override too, which lies in the same place."""
        self.function = functools.partial(function, self.before)
        self.users: set[object] = set()

    @property
    def stands(self) -> bool:
        """Whether the registry still has this function."""
        return self.interface.get(self.name) is self.function

    def add(self, user: object) -> None:
        if not self.users:
            self.interface[self.name] = self.function
            _overrides[id(self.interface), self.name] = self
        self.users.add(user)

    def remove(self, user: object) -> None:
        """Take a user's share back; after the last one the registry is as it was, but for what others changed."""
        self.users.discard(user)
        if self.users or _overrides.get((id(self.interface), self.name)) is not self:
            return
        del _overrides[id(self.interface), self.name]
        if self.stands:
            del self.interface[self.name]
            if self.somebodys and self.before is not None:
                self.interface[self.name] = self.before


def override(interface: AttentionInterface, name: str, function: Callable[..., Any]) -> Override:
    """The override of a name, new if there is none that stands.

    Args:
        interface: the registry.
        name: of an attention implementation.
        function: is called with what stood there before (None: see `eager_of`), then as an attention function.
    """
    found = _overrides.get((id(interface), name))
    return found if found is not None and found.stands else Override(interface, name, function)


def interface_of(decoder: PreTrainedModel) -> AttentionInterface:
    """The registry that a model's attention looks its function up in."""
    for cls in type(decoder).__mro__:
        found = getattr(sys.modules.get(cls.__module__), "ALL_ATTENTION_FUNCTIONS", None)
        if isinstance(found, AttentionInterface):
            return found
    return ALL_ATTENTION_FUNCTIONS


def eager_of(module: Any, caller: FrameType | None) -> Callable[..., Any]:
    """The function that a module's file has for the implementation "eager".

    Args:
        module: an attention module.
        caller: the frame that calls the attention function. A file may have several; the one meant is named there.

    Raises:
        CacheError: there is none.
    """
    where = _eager.get(type(module))
    if where is None:
        where = _eager[type(module)] = _find_eager(module, caller)
    found: Callable[..., Any] = where[0][where[1]]
    return found


def _find_eager(module: nn.Module, caller: FrameType | None) -> tuple[dict[str, Any], str]:
    if caller is not None:
        for name in caller.f_code.co_names:
            if name.endswith(EAGER) and name in caller.f_globals:
                return caller.f_globals, name
    for cls in type(module).__mro__:
        names = vars(sys.modules.get(cls.__module__, sys))
        if EAGER in names:
            return names, EAGER
    raise CacheError(f"{type(module).__name__} must come with a function {EAGER}, found none")
