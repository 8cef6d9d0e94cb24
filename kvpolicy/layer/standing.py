"""What is known of how a layer stands: of layers that stand alike, and move together, it is known for all at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from kvpolicy.storage.clock import Clock

_kinds: dict[Any, Kind] = {}


class Kind:
    """Of layers all that stays the same while they hold tokens. There is one for each, so that they compare fast."""

    def __init__(self, words: Any) -> None:
        self.words = words

    @classmethod
    def of(cls, words: Any) -> Kind:
        """The kind with these words."""
        return _kinds.setdefault(words, cls(words))

    def __deepcopy__(self, memo: dict[int, Any]) -> Kind:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return Kind.of, (self.words,)


class Standing:
    """Where the tokens of some layers lie in their pages, the same in all of them."""

    __slots__ = ("kind", "marks", "moved")

    def __init__(self, kind: Kind, moved: int, marks: list[Any] | None = None) -> None:
        self.kind = kind
        self.moved = moved
        """The clock up to which this holds."""
        self.marks = marks
        """Those of all pages, if they were looked up."""


class Stood:
    """The standing of a layer, and its own addresses. Copies of the layer have none."""

    __slots__ = ("addresses", "grown", "standing")

    def __init__(self, standing: Standing, addresses: list[int], grown: int) -> None:
        self.standing, self.addresses = standing, addresses
        self.grown = grown
        """The clock up to which the addresses hold."""

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()


class Movable(Protocol):
    """A layer that moves, of which it is known how it stands."""

    stood: Stood | None


class Moving:
    """Groups of layers that move together, each group the same; what was known of them is known after that."""

    def __init__(self) -> None:
        self.before = Clock.moved
        self.after: dict[int, Standing] = {}
        self.stood: list[tuple[Movable, Stood, Standing]] = []

    def move(self, layers: Sequence[Movable]) -> None:
        """These layers make the same moves."""
        after: dict[int, Standing] = {}
        for layer in layers:
            stood, layer.stood = layer.stood, None
            if stood is None or stood.standing.moved != self.before:
                continue
            then = after.get(id(stood.standing))
            if then is None:
                then = after[id(stood.standing)] = Standing(stood.standing.kind, 0)
            self.stood.append((layer, stood, then))

    def end(self) -> None:
        """All of them have moved, and nothing else has."""
        for layer, stood, then in self.stood:
            if stood.grown == Clock.grown:
                then.moved, stood.standing = Clock.moved, then
                layer.stood = stood
