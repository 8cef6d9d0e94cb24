"""The transforms of a store, one after the other, and what they keep."""

from __future__ import annotations

import copy
import weakref
from typing import Any

import torch
from torch import Tensor

from kvpolicy.errors import PluginError, RecipeError
from kvpolicy.interfaces.checks import adjoined, fitted, transformed
from kvpolicy.interfaces.component import TRY, check_answer
from kvpolicy.interfaces.site import Site
from kvpolicy.interfaces.transform import Transform
from kvpolicy.storage.late import LateRows

__all__ = ["Chain"]


class Chain:
    """Transforms, applied left to right, with what each found on the first tokens that came.

    Raises:
        RecipeError: a transform doesn't fit the place of the store, or needs what is not there.
    """

    def __init__(self, transforms: tuple[Transform, ...], site: Site) -> None:
        for i, transform in enumerate(transforms):
            try:
                _check_needs(transform, site)
                check_answer(transform, "check", site)
            except RecipeError as error:
                raise error.at("transforms", i) from None
        self.transforms, self.site = transforms, site
        self.by_position = any("positions" in transform.needs for transform in transforms)
        self.state: list[dict[str, Tensor]] = []
        """What each transform keeps: `[batch or 1, kv_heads or 1, ...]`; empty before the first tokens."""
        self.late = LateRows()
        self._linear: bool | None = None
        self._taken: list[weakref.ref[Tensor]] = []

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_taken": []}

    @property
    def linear(self) -> bool:
        """Whether queries can be mapped in place of keys, and weighted sums in place of values."""
        if self._linear is None and self.state:
            one = torch.zeros((*self._lines(), 1, self.site.head_dim), device=self._device())
            self._linear = not self.by_position and isinstance(self._adjoint(one), Tensor)
        return bool(self._linear)

    def _lines(self) -> list[int]:
        """Rows and heads that tell themselves apart in what is kept."""
        return [max((t.shape[i] for kept in self.state for t in kept.values()), default=1) for i in (0, 1)]

    def _device(self) -> torch.device:
        return next((t.device for kept in self.state for t in kept.values()), torch.device("cpu"))

    @property
    def invertible(self) -> bool:
        """Whether the inverse gives back, roughly, what goes through; true of what was kept by this class itself."""
        if not self.state:
            return True
        x = torch.linspace(-1.0, 2.0, self.site.head_dim, device=self._device()).expand(*self._lines(), 1, -1)
        places = torch.zeros((1, 1, 1), dtype=torch.int32, device=x.device)
        return bool((self.inverse(self.forward(x, places), places) - x).abs().max() < 0.05)

    def forward(self, x: Tensor, positions: Tensor | None) -> Tensor:
        """What is to be coded of `x`, in its type; the first time what is to be kept is found."""
        y, fresh, state = x.float(), not self.state, list(self.state)
        for i, transform in enumerate(self.transforms):
            if fresh:
                state.append(fitted(transform, y.to(x.dtype), self.site))
            elif self.late.rows is not None:
                state[i] = self.late.chosen(state[i], fitted(transform, y.to(x.dtype), self.site))
            y = transformed(transform, "forward", y, state[i], positions)
        if fresh or self.late.rows is not None:
            self._keep(state)
            self.late.note(x)
        return y.to(x.dtype)

    def _keep(self, state: list[dict[str, Tensor]]) -> None:
        with torch.inference_mode(False):  # or they could not be used outside
            self.state = [{name: t.detach().clone() for name, t in kept.items()} for kept in state]

    def twin(self) -> Chain:
        """The same transforms, with memory of their own for what they keep; see `take`."""
        found = copy.copy(self)
        found._taken = []
        found._keep(self.state)
        return found

    def _known(self) -> list[Tensor | None]:
        """What was taken last, as far as it is still there."""
        return [taken() for taken in self._taken]

    def take(self, other: Chain) -> bool:
        """Keep, in the same memory, what `other` keeps; whether that could be done."""
        pairs = [(own, kept) for own, kept in zip(self.state, other.state, strict=False)]
        fits = len(self.state) == len(other.state) and all(own.keys() == kept.keys() for own, kept in pairs)
        tensors = [(own[name], kept[name]) for own, kept in pairs for name in own] if fits else []
        if not fits or any(a.shape != b.shape or a.dtype != b.dtype or a.device != b.device for a, b in tensors):
            return False
        if len(self._taken) != len(tensors) or any(
            a() is not b for a, (_, b) in zip(self._taken, tensors, strict=True)
        ):
            for own, kept in tensors:
                own.copy_(kept, non_blocking=True)
            self._taken = [weakref.ref(kept) for _, kept in tensors]
        return True

    def inverse(self, y: Tensor, positions: Tensor | None) -> Tensor:
        """What the numbers that were coded stand for, in float32."""
        y = y.float()
        for transform, state in zip(reversed(self.transforms), reversed(self.state), strict=True):
            y = transformed(transform, "inverse", y, state, positions)
        return y

    def adjoint(self, q: Tensor) -> Tensor:
        """Queries whose products with what was coded are those of `q` with what it stands for; where it is `linear`.

        Raises:
            PluginError: a transform that gave an adjoint before gives none.
        """
        mapped = self._adjoint(q)
        if isinstance(mapped, Transform):
            raise PluginError(
                f"transform {mapped.kind!r} must give an adjoint always or never, found None after a tensor. {TRY}"
            )
        return mapped

    def _adjoint(self, q: Tensor) -> Tensor | Transform:
        """That, or the first transform that has no adjoint."""
        for transform, state in zip(self.transforms, self.state, strict=True):
            mapped = adjoined(transform, q, state)
            if mapped is None:
                return transform
            q = mapped
        return q

    def check_state(self, x: Tensor) -> None:
        """Whether what each transform keeps of the tokens `x` is the same in kind, however many there are.

        Raises:
            PluginError: it isn't.
        """
        some = [self._fitted_to(x[:, :, :n]) for n in (x.shape[2] // 2, x.shape[2])]
        for transform, few, many in zip(self.transforms, *some, strict=True):
            if few != many:
                raise PluginError(
                    f"transform {transform.kind!r} must keep nothing per token, and the same of any tokens, found fit "
                    f"give {few} of {x.shape[2] // 2} tokens and {many} of {x.shape[2]}. {TRY}"
                )

    def _fitted_to(self, x: Tensor) -> list[dict[str, tuple[Any, ...]]]:
        """Types and shapes of what each transform keeps of some tokens."""
        places, kinds, y = torch.arange(x.shape[2], device=x.device).view(1, 1, -1), [], x.float()
        for transform in self.transforms:
            state = fitted(transform, y.to(x.dtype), self.site)
            kinds.append({name: (t.dtype, *t.shape) for name, t in sorted(state.items())})
            y = transformed(transform, "forward", y, state, places)
        return kinds

    def select(self, rows: Tensor) -> None:
        self.late.select(rows)
        for state in self.state:
            for name, t in state.items():
                if t.shape[0] > 1:  # one that is the same in all rows stays so
                    with torch.inference_mode(False):
                        state[name] = t.index_select(0, rows.to(t.device, non_blocking=True))

    def to(self, device: torch.device) -> None:
        self.late.to(device)
        self.state = [{name: t.to(device, non_blocking=True) for name, t in kept.items()} for kept in self.state]

    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for kept in self.state for t in kept.values())

    def tensors(self) -> dict[str, Tensor]:
        return {f"transforms.{i}.{name}": t for i, kept in enumerate(self.state) for name, t in kept.items()}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of `tensors`, once something was coded."""
        state: list[dict[str, Tensor]] = [{} for _ in self.transforms]
        for name, t in tensors.items():
            _, number, own = name.split(".", 2)
            state[int(number)][own] = t
        self._keep(state)


def _check_needs(transform: Transform, site: Site) -> None:
    for need in sorted(transform.needs - {"positions"}):
        if need == "queries" or not site.fitted:
            raise RecipeError(
                f"transform {transform.kind!r} needs {need}, which no cache can give it yet; use one that needs none"
            )
