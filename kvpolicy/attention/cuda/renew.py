"""Launches of a graph, which read other tokens at each replay."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from kvpolicy.attention.cuda.graph import Launch, change
from kvpolicy.attention.cuda.kernel import THREADS
from kvpolicy.attention.cuda.layout import MAPS
from kvpolicy.attention.cuda.piece import indices_of
from kvpolicy.attention.cuda.plan import Plan, columns_of
from kvpolicy.interfaces.backend import AttentionOptions, Part

__all__ = ["Renewal", "arguments_of", "spaces_of", "transformed"]


class Renewal:
    """Lets the launch of a layer read what is there now, and those of other layers that stand alike."""

    def __init__(self, plan: Plan, part: Part, options: AttentionOptions) -> None:
        self.plan, self.gaps, self.spaces = plan, part.gaps, spaces_of(plan, part)
        self.columns = columns_of(part, options)
        self.slots = indices_of(part)
        self.indices = [index.data_ptr() for index in self.slots]

    def __call__(
        self, graph: int, known: Launch, addresses: Sequence[int], stores: Mapping[str, Sequence[Any]]
    ) -> str | None:
        """Give a launch of an instantiated graph the pages at some addresses; returns why not, if it can't.

        Args:
            graph: the handle of the graph.
            known: the launch.
            addresses: those of all pages of a layer.
            stores: those of the layer.
        """
        plan, (query, new, _) = self.plan, known.call
        *_, partial, scores, _, _, zeros = known.tensors
        if scores is not None and self.columns != scores.shape[-1]:
            return "attention weights need more room"
        if self.gaps:
            return "its attention has gaps"
        if self.spaces != known.spaces:
            return "its attention has other transforms"
        if not all(twin.take(transformed(stores[side])[i].chain) for side, i, twin in known.chains):
            return "transforms keep something else"
        room = partial.numel(), zeros.numel(), known.tensors[2].shape
        if plan.partial > room[0] or plan.lines * plan.turns > room[1] or plan.out != room[2]:
            return "a launch needs more room"
        pointers = *addresses, *self.indices, new[0].data_ptr(), new[1].data_ptr()
        arguments, grid = arguments_of(plan, pointers, query, known.mapped, known.tensors)
        change(graph, known.node, plan.kernel, arguments, grid, THREADS)
        return None


def arguments_of(
    plan: Plan, pointers: Iterable[int], query: Tensor, mapped: Sequence[Tensor], tensors: Iterable[Tensor | None]
) -> tuple[bytes, tuple[int, int, int]]:
    """The arguments of a launch, and its grid."""
    asked = [x.data_ptr() for x in mapped] + [0] * (MAPS - 1 - len(mapped))
    addresses = [0 if x is None else x.data_ptr() for x in tensors]
    packed = plan.addresses.pack(query.data_ptr(), *asked, *addresses, *pointers)
    return plan.numbers + packed + plan.layout, (plan.parts, plan.lines, plan.turns)


def transformed(stores: Iterable[Any]) -> list[Any]:
    """Those of the stores of a side that hold tokens behind transforms."""
    return [x for x in stores if x is not None and x.length and getattr(x, "chain", None) is not None]


def spaces_of(plan: Plan, part: Part) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Which of `transformed` make the spaces of keys, and of values; -1 for none. Stores may be empty for a while."""
    numbers = []
    for views, chosen in ((part.keys, plan.maps), (part.values, plan.spaces)):
        own = [id(store) for store in transformed(view.store for view in views)]
        numbers.append(tuple(-1 if i < 0 else own.index(id(views[i].store)) for i in chosen))
    return numbers[0], numbers[1]
