"""The transforms of a store, one after the other, and what they keep."""

from __future__ import annotations

import copy
import weakref
from typing import Any

import torch
from torch import Tensor

from kvpolicy.errors import CacheError, PluginError, RecipeError
from kvpolicy.interfaces.checks import adjoined, fitted, needed, transformed
from kvpolicy.interfaces.component import TRY, check_answer
from kvpolicy.interfaces.site import Site
from kvpolicy.interfaces.transform import Transform
from kvpolicy.storage.late import LateRows

__all__ = ["QUERIES", "Chain"]

QUERIES = "transforms.queries"
"""How what was found of queries is saved, as long as it is of use."""


class Chain:
    """Transforms, applied left to right, with what each found on the first tokens that came.

    Raises:
        RecipeError: a transform doesn't fit the place of the store, or needs what is not there.
    """

    def __init__(self, transforms: tuple[Transform, ...], site: Site) -> None:
        for i, transform in enumerate(transforms):
            try:
                _check_needs(transform, site, i)
                check_answer(transform, "check", site)
            except RecipeError as error:
                raise error.at("transforms", i) from None
        self.transforms, self.site = transforms, site
        needs = [needed(transform) for transform in transforms]
        self.placed = ["positions" in own for own in needs]
        """Which of them are given positions."""
        self.by_position = any(self.placed)
        self.asks = any("queries" in own for own in needs)
        """Whether anything that is kept depends on queries."""
        self.asked: Tensor | None = None
        """The least and the greatest of each channel of the queries so far, until something was coded."""
        self.state: list[dict[str, Tensor]] = []
        """What each transform keeps: `[batch or 1, kv_heads or 1, ...]`; empty before the first tokens."""
        self.late = LateRows()
        self._linear: bool | None = None
        self._taken: list[weakref.ref[Tensor]] = []

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_taken": []}

    @property
    def wants_queries(self) -> bool:
        """Whether it must still be told of queries."""
        return self.asks and (not self.state or self.late.rows is not None)

    def heed(self, queries: Tensor) -> None:
        """Take in the least and the greatest of each channel of some queries, `[batch, kv_heads, 2, head_dim]`."""
        if not self.wants_queries:
            return
        if self.asked is not None:
            least, greatest = (
                f(self.asked, queries).select(2, i) for i, f in enumerate((torch.minimum, torch.maximum))
            )
            queries = torch.stack([least, greatest], dim=2)
        with torch.inference_mode(False):
            self.asked = queries.detach().clone()

    @property
    def linear(self) -> bool:
        """Whether queries can be mapped in place of keys, and weighted sums in place of values."""
        if self._linear is None and self.state:
            one = torch.zeros((*self._lines(), 1, self.site.head_dim), device=self._device())
            self._linear = not self.by_position and isinstance(self._adjoint(one), Tensor)
        return bool(self._linear)

    @property
    def fixed(self) -> bool:
        """Whether it keeps nothing, so that it does the same in all stores of a quantizer."""
        return bool(self.state) and not any(self.state) and not self.by_position and self.late.rows is None

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
        if fresh and self.asks and self.asked is None:
            raise CacheError(
                f"transform {self.transforms[0].kind!r} must be shown queries before keys are coded, found none; use: "
                "with kvpolicy.attach(model): ... from the first token on"
            )
        for i, transform in enumerate(self.transforms):
            if fresh:
                state.append(fitted(transform, y.to(x.dtype), self.asked, self.site))
            elif self.late.rows is not None:
                state[i] = self.late.chosen(state[i], fitted(transform, y.to(x.dtype), self.asked, self.site))
            y = transformed(transform, "forward", y, state[i], positions if self.placed[i] else None)
        if fresh or self.late.rows is not None:
            self._keep(state)
            self.late.note(x)
            self.asked = self.asked if self.late.rows is not None else None
        return y.to(x.dtype)

    def begin(self, x: Tensor) -> None:
        """Find what a transform that is alone keeps of the first tokens; `fixed` says then whether that is nothing."""
        if not self.state and len(self.transforms) == 1 and not self.asks:
            self._keep([fitted(self.transforms[0], x, None, self.site)])
            self.late.note(x)

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
        for i in reversed(range(len(self.transforms))):
            places = positions if self.placed[i] else None
            y = transformed(self.transforms[i], "inverse", y, self.state[i], places)
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
        for i, transform in enumerate(self.transforms):
            state = fitted(transform, y.to(x.dtype), self.asked, self.site)
            kinds.append({name: (t.dtype, *t.shape) for name, t in sorted(state.items())})
            y = transformed(transform, "forward", y, state, places if self.placed[i] else None)
        return kinds

    def select(self, rows: Tensor) -> None:
        self.late.select(rows)
        if self.asked is not None:
            with torch.inference_mode(False):
                self.asked = self.asked.index_select(0, rows.to(self.asked.device, non_blocking=True))
        for state in self.state:
            for name, t in state.items():
                if t.shape[0] > 1:  # one that is the same in all rows stays so
                    with torch.inference_mode(False):
                        state[name] = t.index_select(0, rows.to(t.device, non_blocking=True))

    def to(self, device: torch.device) -> None:
        self.late.to(device)
        self.asked = None if self.asked is None else self.asked.to(device, non_blocking=True)
        self.state = [{name: t.to(device, non_blocking=True) for name, t in kept.items()} for kept in self.state]

    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        asked = {} if self.asked is None or self.state else {QUERIES: self.asked}
        return asked | {f"transforms.{i}.{name}": t for i, kept in enumerate(self.state) for name, t in kept.items()}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of `tensors`, once something was coded, or else of queries alone."""
        if QUERIES in tensors:
            self.asked = tensors[QUERIES]
            return
        state: list[dict[str, Tensor]] = [{} for _ in self.transforms]
        for name, t in tensors.items():
            _, number, own = name.split(".", 2)
            state[int(number)][own] = t
        self._keep(state)


def _check_needs(transform: Transform, site: Site, place: int) -> None:
    needs = needed(transform)
    if "queries" in needs and site.side != "keys":
        raise RecipeError(
            f"transform {transform.kind!r} needs queries, which meet keys alone, found it at values; write it below "
            "keys"
        )
    if "queries" in needs and place:
        raise RecipeError(
            f"transform {transform.kind!r} needs queries as they come and must be the first of its list, found {place} "
            "before it; exchange them"
        )
    if "calibration" in needs and not site.fitted:
        raise RecipeError(
            f"transform {transform.kind!r} needs a calibration, and the recipe names none; make one by kvpolicy "
            "calibrate METHOD --model DIR --text FILE --out CALIBRATION, and write calibration: CALIBRATION"
        )
