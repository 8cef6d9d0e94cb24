"""Where the tokens of a cache are after an update, as far as position decides: one value for all layers alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any
from weakref import ReferenceType, ref

import numpy as np
from numpy.typing import NDArray

from kvpolicy.interfaces.policy import RankPolicy
from kvpolicy.placement.moves import Plan
from kvpolicy.placement.padding import Padding
from kvpolicy.placement.planner import Placement, State
from kvpolicy.placement.selection import due

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Ints = NDArray[np.int64]
LINKS = 4
"""Steps that a step remembers as its successors: an update takes three at most."""


@dataclass(eq=False)
class Step:
    """The placement of all tokens let in so far. A value: an update gives another one.

    All layers with the same tiers make the same steps, one after the other. The first to make one computes it, and the
    others find it as the successor of the step where they stand. A layer that is given something else makes steps of
    its own. What follows from a step (layouts, tensors for a device) is kept with it.
    """

    placement: Placement
    rows: tuple[State, ...]
    """Tiers by position: of all rows alike, or of each row once some have padding (`by_row`)."""
    seen: int = 0
    """Slots of the text that were let in, padding and dropped tokens included."""
    padding: Padding | None = None
    """Which of these are padding, where some are."""
    by_row: bool = False
    """Whether each row has positions of its own, which are not its slots."""
    spread: bool = False
    """Whether stores hold other tokens for each row or head. Orders of stores are then no part of `rows`."""
    prompt: int = 0
    """Slots seen before the first update of a single token; counted once stores are spread."""
    prompting: bool = True
    plan: Plan | None = None
    """How stores came from the step before to this one, unless spread."""
    drops: dict[str, list[Ints]] | None = None
    """After a crop: what each store dropped, unless spread."""
    turns: list[tuple[int, int]] = field(default_factory=list)
    """Tokens seen by each of `rows`, before and after."""
    quiet: bool = False
    """Whether nothing that was held before may have moved, if spread."""
    _next: tuple[tuple[Any, ...], Step] | None = field(default=None, repr=False)
    _before: ReferenceType[Step] | None = field(default=None, repr=False)
    _derived: dict[Any, Any] = field(default_factory=dict, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_next": None, "_before": None, "_derived": {}}

    @classmethod
    def first(cls, placement: Placement) -> Step:
        """Where an empty cache stands."""
        return cls(placement, (placement.start(),))

    @property
    def state(self) -> State:
        """The placement in all rows."""
        return self.rows[0]

    @property
    def bytes(self) -> int:
        """Bytes of the tensors that were derived from this step."""
        found: dict[int, int] = {}
        todo = list(self._derived.values())
        while todo:
            x = todo.pop()
            if isinstance(x, (list, tuple)):
                todo += x
            elif hasattr(x, "nbytes"):
                found[id(x)] = x.nbytes
        return sum(found.values())

    def _follow(self, key: tuple[Any, ...], padding: Padding | None, make: Callable[[], Step]) -> Step:
        """The successor that belongs to `key` and `padding`, made unless another layer made it."""
        known = self._next
        if known is not None and known[0] == key and _alike(known[1].padding, padding, known[1].seen):
            return known[1]
        made = make()
        self._derived = {}  # of use to layers that stand here, and these move on
        made._before = ref(self)
        self._next = key, made
        oldest: Step | None = self
        for _ in range(LINKS):
            oldest = oldest._before() if oldest is not None and oldest._before is not None else None
        if oldest is not None:
            oldest._next = None
        return made

    def advance(self, n: int, of: int, padding: Padding | None) -> Step:
        """Let `n` more tokens in, the first of an update of `of`; `padding` speaks of all slots up to then."""
        return self._follow(("advance", n, of), padding, lambda: self._advance(n, of, padding))

    def _advance(self, n: int, of: int, padding: Padding | None) -> Step:
        start, stop = self.seen, self.seen + n
        if not self.spread:
            state, plan = self.placement.advance(self.state, n, of)
            return replace(self._bare(), rows=(state,), seen=stop, padding=padding, plan=plan)
        rows, by_row = self.rows, self.by_row
        if padding is not None and padding.before(stop) and not by_row:
            rows, by_row = rows * padding.batch, True
        before = rows
        if by_row:
            assert padding is not None
            counts, whole = padding.count(start, stop), padding.count(start, start + of)
        else:
            counts, whole = [n], [of]
        rows = tuple(
            self.placement.advance_row(row, some, all_of) if some else row
            for row, some, all_of in zip(rows, counts, whole, strict=True)
        )
        prompting = self.prompting and (of > 1 or start == 0)
        turns = [(a.seen, b.seen) for a, b in zip(before, rows, strict=True)]
        return replace(
            self._bare(),
            rows=rows,
            seen=stop,
            padding=padding,
            by_row=by_row,
            prompting=prompting,
            prompt=stop if prompting else self.prompt,
            turns=turns,
            quiet=not self._flows(before, rows) and not self._ranks(turns),
        )

    def _flows(self, before: tuple[State, ...], after: tuple[State, ...]) -> bool:
        """Whether any token left a tier that selects by position, or there is none."""
        if not self.placement.ranked:
            return True
        return any(
            len(b.tiers[0]) != len(a.tiers[0]) + b.seen - a.seen
            or any(len(x) != len(y) for x, y in zip(a.tiers[1:], b.tiers[1:], strict=False))
            for a, b in zip(before, after, strict=True)
        )

    def _ranks(self, turns: list[tuple[int, int]]) -> bool:
        policies = [policy for policy in self.placement.policies if isinstance(policy, RankPolicy)]
        return any(due(policy, *turn) for policy in policies for turn in turns)

    def scattered(self) -> Step:
        """The same placement, stores from now on by row and head."""
        if self.spread:
            return self
        row = State(self.state.seen, self.state.tiers[: self.placement.ranked], {}, self.state.through)
        return self._follow(("scattered",), self.padding, lambda: replace(self._bare(), rows=(row,), spread=True))

    def crop(self, length: int) -> Step:
        """Forget the slots from `length` on, where some may have been promised to the last tier only."""
        return self._follow(("crop", length), self.padding, lambda: self._crop(length))

    def _crop(self, length: int) -> Step:
        seen, padding = min(self.seen, length), self.padding
        padding = padding.crop(seen) if padding is not None else None
        if not self.spread:
            state, drops = self.placement.crop(self.state, length)
            return replace(self._bare(), rows=(state,), seen=seen, padding=padding, drops=drops)
        real = self.padding.count(0, length) if self.by_row and self.padding is not None else [length]
        rows = tuple(self.placement.crop_row(row, n) for row, n in zip(self.rows, real, strict=True))
        prompting = self.prompting or length <= self.prompt
        return replace(
            self._bare(),
            rows=rows,
            seen=seen,
            padding=padding,
            prompting=prompting,
            prompt=min(self.prompt, length),
        )

    def select(self, rows: Ints) -> Step:
        """Keep the batch rows `rows`, in that order, repeats included."""
        if self.padding is None:
            return self
        padding = self.padding.select(rows)
        chosen = tuple(self.rows[r] for r in rows) if self.by_row else self.rows
        key = ("select", rows.tobytes())
        return self._follow(key, padding, lambda: replace(self._bare(), rows=chosen, padding=padding))

    def _bare(self) -> Step:
        """This step without what belongs to how it came about, for `replace`."""
        return replace(self, plan=None, drops=None, turns=[], quiet=False, _next=None, _before=None, _derived={})

    def _once(self, key: Any, make: Callable[[], Any]) -> Any:
        if key not in self._derived:
            self._derived[key] = make()
        return self._derived[key]

    def layout(self, side: str) -> tuple[list[int | Tensor], int]:
        """`Placement.layout`, kept."""
        side = "keys" if self.placement.alike else side
        return self._once(("layout", side), lambda: self.placement.layout(self.state, side))  # type: ignore[no-any-return]

    def columns(self) -> tuple[list[int | Tensor], list[int | Tensor], Tensor]:
        """`Placement.columns`, kept."""
        return self._once("columns", lambda: self.placement.columns(self.state, self.layout))  # type: ignore[no-any-return]

    def prompts(self) -> list[int]:
        """Tokens of the prompt, by row."""
        if self.by_row and self.padding is not None:
            return self.padding.count(0, self.prompt)
        return [self.prompt] * len(self.rows)

    def tiers_by_slot(self, device: torch.device) -> Tensor:
        """The tier of each slot as far as it depends on position, `[batch or 1, slots]`."""
        return self._once(("tiers", device), lambda: self._tiers_by_slot().to(device))  # type: ignore[no-any-return]

    def _tiers_by_slot(self) -> Tensor:
        import torch

        found = np.full((len(self.rows), self.seen), self.placement.ranked, dtype=np.int16)
        for r, row in enumerate(self.rows):
            slots = self.padding.slots(r, self.seen) if self.by_row and self.padding is not None else None
            for i, held in enumerate(row.tiers[: self.placement.ranked]):
                found[r, held if slots is None else slots[held]] = i
        return torch.from_numpy(found).to(self.placement.tier_dtype)

    def ages(self, positions: Tensor) -> Tensor:
        """How many real tokens were seen from each of `positions` on, itself included."""
        if not self.by_row or self.padding is None:
            return self.seen - positions
        known = self._once(("ages", positions.device), lambda: self._ages(positions.device))
        found: Tensor = known[:, None].expand(-1, positions.shape[1], -1).gather(2, positions.clamp(min=0))
        return found

    def _ages(self, device: torch.device) -> Tensor:
        import torch

        assert self.padding is not None
        return torch.from_numpy(self.padding.ages(self.seen)).to(device)


def _alike(a: Padding | None, b: Padding | None, stop: int) -> bool:
    if a is None:
        return b is None or not b.before(stop)
    return a.alike(b, stop)
