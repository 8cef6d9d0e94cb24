"""Whether a model still computes what it computed when a graph of it was captured, as far as that can be seen."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

ADAPTERS = ("_active_adapter", "_disable_adapters", "merged_adapters", "scaling")
"""What PEFT's layers go by at each call."""
OWN = ("transformers.", "kvpolicy.hf.passes")
"""Where hooks come from that do nothing in a step that is replayed."""


class ModelState:
    """Where the weights of a model lie, which modules it has, their adapters, their forwards and hooks."""

    def __init__(self, owner: nn.Module) -> None:
        modules = list(owner.modules())
        self._parts = [part for m in modules for part in (m._parameters, m._buffers, m._modules) if part]
        self._modules = [m.__dict__ for m in modules if m is not owner]
        self._adapters = [m.__dict__ for m in modules if "_active_adapter" in m.__dict__]
        self._was = self._now()

    def unfit(self) -> str | None:
        """Why a step of the model can't be replayed, if that is known beforehand."""
        if any(True for _ in self._hooks()):
            return "hooks inside the model"
        weights = (x for part in self._parts for x in part.values() if isinstance(x, Tensor))
        if any(x.numel() and not x.data_ptr() for x in weights):
            return "weights that do not lie in memory"
        return None

    def same(self) -> bool:
        """Whether nothing has changed."""
        return self._was == self._now()

    def _now(self) -> tuple[Any, ...]:
        weights = [x.data_ptr() if isinstance(x, Tensor) else id(x) for part in self._parts for x in part.values()]
        adapters = [repr([own.get(name) for name in ADAPTERS]) for own in self._adapters]
        return weights, adapters, [id(own.get("forward")) for own in self._modules], list(self._hooks())

    def _hooks(self) -> Iterator[int]:
        """The hooks inside the model, which a replay would not run."""
        for own in self._modules:
            for name in ("_forward_hooks", "_forward_pre_hooks"):
                if own[name]:
                    yield from (id(hook) for hook in own[name].values() if not _harmless(hook))


def _harmless(hook: Any) -> bool:
    return str(getattr(getattr(hook, "func", hook), "__module__", "")).startswith(OWN)
