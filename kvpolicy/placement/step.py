"""Where the tokens of a cache are after an update, as far as position decides: one value for all layers alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import ReferenceType, ref

import numpy as np
from numpy.typing import NDArray

from kvpolicy.interfaces.backend import Slots, Stretches
from kvpolicy.interfaces.policy import RankPolicy
from kvpolicy.placement.by_row import Moved, each_of, moved_by_row, old_moves, tiers_of_slots
from kvpolicy.placement.counts import Change, Counts
from kvpolicy.placement.moves import EMPTY, AllMoves, ColumnMap, stretches_of
from kvpolicy.placement.padding import Padding
from kvpolicy.placement.planner import Placement, State
from kvpolicy.placement.selection import due
from kvpolicy.placement.slots import STORES, scattered, slots_by_position

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from kvpolicy.placement.attention_scores import Counted

Ints = NDArray[np.int64]
T = TypeVar("T")
Bools = NDArray[np.bool_]
LINKS = 5
"""Steps that a step remembers as its successors: an update takes four at most."""


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
    by_head: bool = False
    """Whether stores hold other tokens for each row or head. Orders of stores are then no part of `rows`."""
    prompt: int | None = None
    """Slots of the prompt, once it has ended and policies ask for it."""
    plan: AllMoves | None = None
    """How stores came from the step before to this one, unless `by_head`."""
    before: tuple[State, ...] = ()
    """`rows` before the update, if `by_head`."""
    ended: bool = False
    """Whether this is the step in which the prompt ended."""
    quiet: bool = False
    """Whether nothing that was held before may have moved, if `by_head`."""
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
            elif hasattr(x, "data_ptr"):
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

    def advance(self, n: int, padding: Padding | None) -> Step:
        """Let `n` more tokens in; `padding` speaks of all slots up to then."""
        return self._follow(("advance", n), padding, lambda: self._advance(n, padding))

    def end_prompt(self) -> Step:
        """The prompt ends with the tokens seen."""
        return self._follow(("end prompt",), self.padding, self._end_prompt)

    def _end_prompt(self) -> Step:
        if not self.placement.prompted:  # nothing moves: the number is all that is asked for
            return self._then(prompt=self.seen)
        if not self.by_head:
            state, plan = self.placement.end_prompt(self.state)
            return self._then(rows=(state,), plan=plan, prompt=self.seen)
        after = each_of(self.placement.end_prompt_row, self.rows)
        return self._then(rows=after, before=self.rows, prompt=self.seen, ended=True)

    def _advance(self, n: int, padding: Padding | None) -> Step:
        start, stop = self.seen, self.seen + n
        if not self.by_head:
            state, plan = self.placement.advance(self.state, n, self.prompt)
            return self._then(rows=(state,), seen=stop, padding=padding, plan=plan)
        rows, by_row = self.rows, self.by_row
        if padding is not None and padding.before(stop) and not by_row:
            rows, by_row = rows * padding.batch, True
        if by_row:
            assert padding is not None
            counts = padding.count(start, stop)
        else:
            counts = [n]
        prompts = self.prompts() if self.by_row == by_row else self.prompts() * len(rows)
        advance = self.placement.advance_row
        after = each_of(lambda row, some, prompt: advance(row, some, prompt) if some else row, rows, counts, prompts)
        return self._then(
            rows=after,
            before=rows,
            seen=stop,
            padding=padding,
            by_row=by_row,
            quiet=not self._flows(rows, after) and not self._ranks(rows, after),
        )

    def _flows(self, before: tuple[State, ...], after: tuple[State, ...]) -> bool:
        """Whether any token left a tier that selects by position; if there is none, whether several came to a row."""
        placement = self.placement
        if not placement.ranked:
            return not placement.ranks or any(a.seen > b.seen + 1 for b, a in zip(before, after, strict=True))
        return any(
            len(b.tiers[0]) != len(a.tiers[0]) + b.seen - a.seen
            or any(len(x) != len(y) for x, y in zip(a.tiers[1:], b.tiers[1:], strict=False))
            for a, b in zip(before, after, strict=True)
        )

    def _ranks(self, before: tuple[State, ...], after: tuple[State, ...]) -> bool:
        policies = [policy for policy in self.placement.policies if isinstance(policy, RankPolicy)]
        # Where tokens compete as they arrive, none does without a flow, but in the first tier.
        if self.placement.ranked:
            policies = [policy for policy in policies if policy.among != "arrival" or policy.every > 1]
        return any(due(p, a.seen, b.seen, False) for p in policies for a, b in zip(before, after, strict=True))

    def scattered(self) -> Step:
        """The same placement, stores from now on by row and head."""
        if self.by_head:
            return self
        row = State(self.state.seen, self.state.tiers[: self.placement.ranked], {})
        return self._follow(("scattered",), self.padding, lambda: self._then(rows=(row,), by_head=True))

    def crop(self, length: int) -> Step:
        """Forget the slots from `length` on, where some may have been promised to the last tier only."""
        return self._follow(("crop", length), self.padding, lambda: self._crop(length))

    def _crop(self, length: int) -> Step:
        seen, padding = min(self.seen, length), self.padding
        padding = padding.crop(seen) if padding is not None else None
        prompt = None if self.prompt is None or length < self.prompt else self.prompt  # within it: it goes on
        if not self.by_head:
            state, plan = self.placement.crop(self.state, length)
            return self._then(rows=(state,), seen=seen, padding=padding, plan=plan, prompt=prompt)
        real = self.padding.count(0, length) if self.by_row and self.padding is not None else [length]
        rows = each_of(self.placement.crop_row, self.rows, real)
        return self._then(rows=rows, seen=seen, padding=padding, prompt=prompt)

    def select(self, rows: Ints) -> Step:
        """Keep the batch rows `rows`, in that order, repeats included."""
        if self.padding is None:
            return self
        padding = self.padding.select(rows)
        chosen = tuple(self.rows[r] for r in rows) if self.by_row else self.rows
        key = ("select", rows.tobytes())
        return self._follow(key, padding, lambda: self._then(rows=chosen, padding=padding))

    def _then(self, **changed: Any) -> Step:
        """A step that differs from this one, without what belongs to how this one came about."""
        made = object.__new__(Step)
        own = {"plan": None, "before": (), "ended": False, "quiet": False}
        made.__dict__ = {**self.__dict__, **own, "_next": None, "_before": None, "_derived": {}, **changed}
        return made

    def _once(self, key: Any, make: Callable[[], T]) -> T:
        if key not in self._derived:
            self._derived[key] = make()
        found: T = self._derived[key]
        return found

    @property
    def width(self) -> int:
        """Tokens held, where all rows and heads hold the same."""
        found: int | None = self._derived.get("width")  # each layer asks at each step
        return self._once("width", self._held) if found is None else found

    def _held(self) -> int:
        return sum([order.length for order in self.state.stores["keys"]])

    def layout(self, side: str) -> tuple[list[int | Tensor], int]:
        """`Placement.layout`, kept."""
        side = "keys" if self.placement.alike else side
        return self._once(("layout", side), lambda: self.placement.layout(self.state, side))

    def columns(self, device: torch.device) -> ColumnMap:
        """Where attention finds the tokens of each store, on a device."""
        return self._once(("columns", device), lambda: self._columns(device))

    def _columns(self, device: torch.device) -> ColumnMap:
        def placed(where: list[int | Tensor]) -> list[int | Tensor]:
            return [at if isinstance(at, int) else at.to(device, non_blocking=True) for at in where]

        keys, values = self.placement.columns(self.state, lambda side: self.layout(side)[0])
        known = {
            side: [self._stretches(f"{side} {s}", at) for s, at in enumerate(where)]
            for side, where in (("keys", keys), ("values", values))
        }
        many = any(not isinstance(at, int) and scattered(at.numpy()) for at in (*keys, *values))
        slots = (lambda: self._slots(device)) if many and len(values) <= STORES else None
        return ColumnMap(
            placed(keys), placed(values), self.width, False, lambda: self._in_columns(device), known, slots
        )

    def _slots(self, device: torch.device) -> tuple[Slots, ...]:
        """Where the values of the keys of each store lie, on a device."""
        stores = self.state.stores
        every = (slots_by_position(keys, stores["values"], device) for keys in stores["keys"])
        return self._once(("value slots", device), lambda: tuple(every))

    def _stretches(self, name: str, columns: int | Tensor) -> Callable[[], Stretches] | None:
        """The neighbours among columns that are an index, once somebody asks; all layers share the answer."""
        if isinstance(columns, int):
            return None
        return lambda: self._once(("stretches", name), lambda: stretches_of(columns.numpy()))

    def _in_columns(self, device: torch.device) -> Tensor:
        find = self.placement.in_columns
        return self._once(("in columns", device), lambda: find(self.state).to(device, non_blocking=True))

    def prompts(self) -> list[int | None]:
        """Tokens of the prompt, by row; None while it goes on."""
        if self.prompt is not None and self.by_row and self.padding is not None:
            return [*self.padding.count(0, self.prompt)]
        return [self.prompt] * len(self.rows)

    def new_slots(self, n: int, device: torch.device) -> Tensor:
        """The slots of the `n` newest tokens, `EMPTY` where they are padding: `[rows or 1, 1, n]`."""
        return self._once(("slots", n, device), lambda: self._new_slots(n, device))

    def _new_slots(self, n: int, device: torch.device) -> Tensor:
        import torch

        if self.padding is None or not self.padding.before(self.seen):  # nothing is copied to a device
            return torch.arange(self.seen - n, self.seen, device=device).view(1, 1, n)
        slots = np.arange(self.seen - n, self.seen, dtype=np.int64)[None]
        slots = np.where(self.padding.real[:, self.seen - n : self.seen], slots, EMPTY)
        return torch.from_numpy(slots).unsqueeze(1).to(device, non_blocking=True)

    @property
    def moved_alike(self) -> list[tuple[int, int]] | None:
        """What `moved` says of the only row, if there is one."""
        if self.by_row:
            return None
        (own,) = self._moved
        return [*zip(own.slots[: own.old].tolist(), own.into[: own.old].tolist(), strict=True)]

    def moved(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Slots held before that came to another tier by position, ascending, and the tier: `[rows or 1, 1, moved]`.

        Rows where fewer moved are filled up with slots that there are none of.
        """
        import torch

        def found() -> tuple[Tensor, Tensor]:
            slots, tiers = (torch.from_numpy(x) for x in old_moves(self._moved))
            dtypes = torch.int32, self.placement.tier_dtype
            return slots.to(dtypes[0]).to(device, non_blocking=True), tiers.to(dtypes[1]).to(device, non_blocking=True)

        return self._once(("moved", device), found)

    def tiers_of_slots(self, n: int, device: torch.device) -> Tensor:
        """The tier that each of the `n` newest slots came to by position, 0 of padding: `[rows or 1, 1, n]`."""
        import torch

        def found() -> Tensor:
            first, last = self.tiers_of_new if n and not self.by_row else (0, 1)
            if first == last:
                return torch.full((1, 1, n), first, dtype=self.placement.tier_dtype, device=device)
            tiers = torch.from_numpy(tiers_of_slots(self._moved, n, self.seen))
            return tiers.to(self.placement.tier_dtype).to(device, non_blocking=True)

        return self._once(("tiers of slots", n, device), found)

    @property
    def tiers_of_new(self) -> tuple[int, int]:
        """The first and the last tier that new tokens came to by position; `ranked` if they are ranked."""

        def found() -> tuple[int, int]:
            every = np.concatenate([own.into[own.old :] for own in self._moved])
            return (int(every.min()), int(every.max())) if len(every) else (0, 0)

        return self._once("tiers of new", found)

    @property
    def _moved(self) -> list[Moved]:
        """Of each row what came to another tier by position."""
        padding = self.padding if self.by_row else None
        ranked = self.placement.ranked
        return self._once("moved", lambda: moved_by_row(ranked, self.before, self.rows, padding, self.seen))

    def counted(self, tokens: int, padding: Padding | None, keep: int) -> Counted:
        """Which of the queries of `tokens` more tokens count for policies that rank by attention; see `Counted.of`."""
        key = "counted", tokens, keep
        known = self._derived.get(key)
        if known is None or known[0] is not padding:
            from kvpolicy.placement.attention_scores import Counted

            over = self.placement.scores.prompt_only and self.prompt is not None
            found = Counted.of(self.placement.kinds, tokens, self.seen, padding, keep, over)
            known = self._derived[key] = padding, found
        counted: Counted = known[1]
        return counted

    def counts(self, before: Ints, judged: Ints, known: Mapping[int, Ints] | None = None) -> Counts:
        """How many tokens each tier holds after this step.

        Args:
            before: those it held before.
            judged: of these, the tokens that competed already.
            known: of tiers that selected, what stayed there, where the device alone knew.
        """
        change = Change(self.placement, self.before, self.rows, self.prompts(), self.ended)
        if known:
            return change.counts(before, judged, known)
        key = ("counts", before.shape, before.tobytes(), judged.shape, judged.tobytes())
        return self._once(key, lambda: change.counts(before, judged, {}))

    def ages(self, positions: Tensor) -> Tensor:
        """How many real tokens were seen from each of `positions` on, itself included.

        `[batch, kv_heads or 1, tokens]`; rows may be those of several layers, one layer's after another's.
        """
        ages = self.seen - positions
        if not self.by_row or self.padding is None:
            return ages
        later = self._once(("later", positions.device), lambda: self._later().to(positions.device, non_blocking=True))
        later = later.repeat(positions.shape[0] // later.shape[0], 1)
        at = positions.clamp(min=0, max=later.shape[1] - 1)
        return ages - later[:, None].expand(-1, positions.shape[1], -1).gather(2, at)

    def in_text(self, slots: Tensor) -> Tensor:
        """The position among its row's real tokens of each of `slots`; see `ages`."""
        import torch

        if len(self.rows) == 1:
            return (self.rows[0].seen - self.ages(slots)).clamp(min=0)
        seen = torch.tensor([row.seen for row in self.rows] * (slots.shape[0] // len(self.rows)))
        return (seen.to(slots.device, non_blocking=True).view(-1, 1, 1) - self.ages(slots)).clamp(min=0)

    def _later(self) -> Tensor:
        import torch

        assert self.padding is not None
        return torch.from_numpy(self.padding.from_each(self.seen))


def _alike(a: Padding | None, b: Padding | None, stop: int) -> bool:
    if a is None:
        return b is None or not b.before(stop)
    return a.alike(b, stop)
