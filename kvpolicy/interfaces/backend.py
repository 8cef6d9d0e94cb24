"""The base class of backends: who computes attention over what a layer holds."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol, TypeAlias

from kvpolicy.errors import PluginError
from kvpolicy.interfaces.component import TRY, Component
from kvpolicy.interfaces.quantizer import Rounding

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = [
    "SLOT_BITS",
    "AttentionOptions",
    "AttentionSpec",
    "Backend",
    "Encoding",
    "Part",
    "Ranges",
    "Segment",
    "Slots",
    "StoreView",
    "Stored",
    "Stretches",
]

SLOT_BITS = 27
"""Bits of a slot that say where in its store a value lies; those above say in which store."""
Ranges: TypeAlias = tuple[tuple[int, int], ...]
"""Numbers from the first to the last + 1."""

Stretches: TypeAlias = tuple[tuple[int, int, int], ...]
"""Tokens of a store that are neighbours among the columns, too: of each stretch its first token, the column of that,
and how many they are."""


class Stored(Protocol):
    """A store, as far as every backend can read it. What else a format offers is documented with its store."""

    @property
    def format(self) -> str:
        """What is kept: `exact`, `affine` (packed codes, a scale and an offset per group) or another word."""
        ...

    @property
    def length(self) -> int:
        """Tokens held."""
        ...

    def decoded(self, block: int, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
        """All tokens in order, decoded some `block` at a time, each with the index of its first token."""
        ...


class StoreView(NamedTuple):
    """A store, and where its tokens stand among the columns of the scores."""

    store: Any
    """A `Stored`."""
    columns: int | Tensor
    """From this column on, or an index for each token: `[tokens]` or `[batch, kv_heads or 1, tokens]`."""
    stretches: Callable[[], Stretches] | None = None
    """Where columns are an index `[tokens]`, the same as the host knows it."""


class Segment(NamedTuple):
    """Neighbouring tokens of a store of keys, as far as the host knows where their values lie."""

    tokens: int
    ranges: Ranges
    """All slots of these tokens lie in one of these; -1 is among them if some may have no value."""
    together: bool
    """Whether their values are neighbours in the same order: those of the only range."""


class Slots(NamedTuple):
    """Where the values of a store's keys lie: in which store of values, and which of its tokens they are."""

    places: Tensor
    """For each token of the store of keys the number of the store of values << `SLOT_BITS`, plus the number of the
    token in it; -1 for none. int32 `[tokens]` or `[batch, kv_heads or 1, tokens]`, on the device of the layer."""
    segments: tuple[Segment, ...]
    """The same in short: all tokens of the store, in order."""


@dataclass(frozen=True)
class Part:
    """Tokens whose keys and whose values lie in some stores, and perhaps those that are just coming in."""

    keys: tuple[StoreView, ...]
    values: tuple[StoreView, ...]
    width: int
    """Columns of the tokens that are held."""
    gaps: bool
    """Whether some of these columns hold no token."""
    positions: Callable[[], Tensor]
    """The slot of each of these columns, -1 where no token is: `[columns]` or `[batch, kv_heads or 1, columns]`."""
    kv_heads: int
    value_dim: int
    """Channels of a value."""
    new: tuple[Tensor, Tensor] | None = None
    """Keys and values `[batch, kv_heads, tokens, head_dim]` that are just coming in; their columns are the last."""
    slots: Callable[[], tuple[Slots, ...]] | None = None
    """Where columns are an index whose stretches are many, or unknown to the host: the slots of each of `keys`. All
    layers whose tokens are in the same places share them."""
    numbers: tuple[int, ...] = ()
    """The number of each store of `values`, by which slots name it."""


class AttentionSpec(NamedTuple):
    """What a backend is asked to serve."""

    keys: tuple[str, ...]
    """The formats of the stores of keys."""
    values: tuple[str, ...]
    device: str
    """The type of the device, such as `cuda`."""
    dtype: torch.dtype
    head_dim: int
    value_dim: int
    groups: int
    """Query heads of a KV head."""
    queries: int
    masked: bool
    """Whether there is a mask."""
    softcap: bool
    sinks: bool
    by_head: bool
    """Whether rows or KV heads hold different tokens."""


@dataclass(frozen=True)
class AttentionOptions:
    """What the model asks of its attention besides queries, keys and values."""

    scaling: float
    """Factor of the products."""
    softcap: float | None = None
    """Scores become `softcap * tanh(scores / softcap)`."""
    sinks: Tensor | None = None
    """A score per head that takes part in the softmax and adds nothing: `[heads]`."""
    observer: Any = None
    """Is told of the attention weights, by `observer.watch(at, weights, visible, heads, of)`: the numbers of the
    queries among the tokens that come in; weights and what could be seen (None: all), `[batch, kv_heads, groups,
    queries, columns]`; which KV heads these are, and how many there are. Only backends that say that they `watch` get
    one."""
    alone: bool = False
    """Whether nothing is to be merged with the result. The output may then be in the type of the query."""
    lse: Tensor | None = None
    """For `observe`, the logarithm of the sum of the exponentials of each query's scores where it is known already:
    float32 `[batch, heads, queries]`."""


class Encoding(NamedTuple):
    """How tokens are coded: what a store of packed codes keeps of them."""

    dtype: torch.dtype
    """The type of the tokens."""
    head_dim: int
    nbits: int
    group: int
    """Channels of a token, or tokens of a channel, that share a scale; per channel 0 for all tokens of a piece."""
    by_channel: bool
    rounding: Rounding
    rotated: bool
    """Whether a Hadamard matrix comes first, as of `Transform.butterflies`, rounded to the type of the tokens."""
    kept: torch.dtype
    """The type in which scales are kept, those before offsets: `[..., numbers]`, twice as many with offsets. As
    float8_e4m3, which stores hold as bytes, they are rounded up and offsets down, and codes are the nearest then."""
    divided: bool = False
    """Whether channels are divided first, as of `Transform.divides`, rounded to the type of the tokens."""


class Backend(Component):
    """Computes attention of queries over a part of what a layer holds.

    Backends are asked in the order of their `priority`, the highest first. The first that does not refuse serves all of
    a layer, or, if nobody does, a part of it. What several backends computed is merged by the logarithms of their sums.

    Example:
        A backend that decodes each store and calls PyTorch::

            class Decoding(Backend):
                kind: Literal["decoding"] = "decoding"
                priority: ClassVar[int] = 1

                def refuses(self, spec):
                    return "it takes one query at a time" if spec.queries > 1 else None

                def attend(self, query, part, mask, options):
                    ...
    """

    _role: ClassVar[str] = "backend"
    priority: ClassVar[int] = 0
    """Who is asked first. That of the reference is 0: a backend below it is never asked."""
    device: ClassVar[str | None] = None
    """The type of the device that it is for, such as `cuda`: it is asked for no other. None: any."""
    requires: ClassVar[str | None] = None
    """Name of an optional library that it imports when used (also the name of the extra), or None."""
    watches: ClassVar[bool] = False
    """Whether it tells observers of the attention weights."""

    @abstractmethod
    def refuses(self, spec: AttentionSpec) -> str | None:
        """Why it can't serve this; None if it can. The same answer each time: it is asked once for each `spec`."""

    def declines(self, query: Tensor, part: Part, mask: Tensor | None, options: AttentionOptions) -> str | None:
        """Why it can't serve this very part, though it serves its spec; None if it can. Arguments as in `attend`.

        Asked each time, right before `attend`.
        """
        return None

    @abstractmethod
    def attend(
        self, query: Tensor, part: Part, mask: Tensor | None, options: AttentionOptions
    ) -> tuple[Tensor, Tensor]:
        """Attention over one part, as if there were no other.

        Args:
            query: `[batch, heads, queries, head_dim]`, the newest `queries` of the tokens coming in, in the model's
                dtype. If the part has those tokens, a query sees none that is newer.
            part: what is attended.
            mask: boolean (True attends) or additive, `[batch or 1, kv_heads or 1, groups or 1, queries or 1, slots]`;
                its columns are slots of the text, the tokens coming in last. None: all is seen.
            options: the rest.

        Returns:
            The output `[batch, heads, queries, head_dim of values]` in float32 (or the type of the query, if
            `options.alone`), zero where nothing is seen; and the logarithm of the sum of the exponentials of the
            scores, sinks included: float32 `[batch, heads, queries]`, minus infinity where nothing is seen.
        """

    def again(self, query: Tensor, part: Part, options: AttentionOptions) -> Callable[..., Tensor | None] | None:
        """What attends in place of `attend` for parts that differ from this one in addresses alone, or None.

        Other layers have such parts, right after this one: like stores with as many tokens in as many pages, without a
        mask. It is called with their query, new tokens, addresses of pages (of keys, then of values), stores by side
        (those that hold tokens are in the order of the part; what transforms keep differs), sinks and observer. It
        returns the output `[batch, queries, heads, head_dim of values]` in the type of the query, or None if `attend`
        is to be asked.
        """
        return None

    def copies(self, tokens: Sequence[Tensor], addresses: Sequence[int], steps: tuple[int, int, int]) -> bool:
        """Write tokens of several layers to where their stores keep them, at a small cost for each.

        Args:
            tokens: of each layer, `[batch, kv_heads, tokens, width]`, of one shape and type.
            addresses: where the first number of each is to stand; numbers of a token are neighbours.
            steps: bytes from row to row there, from head to head, and from token to token.

        Returns:
            Whether that was done; if not, nothing was written.
        """
        return False

    def shifts(self, pages: Sequence[Tensor], sources: Sequence[Tensor], places: Sequence[Tensor]) -> bool:
        """Move tokens within the pages of several layers, at a small cost for each.

        Args:
            pages: `[batch, kv_heads, room, width]` of each layer, of one shape and type.
            sources: which tokens move, int64 `[batch or 1, kv_heads or 1, tokens]`. None of them is in `places`, but
                for some that move to where nothing counts any more.
            places: where to.

        Returns:
            Whether that was done; if not, nothing was written.
        """
        return False

    def observe(self, query: Tensor, keys: Tensor, mask: Tensor | None, options: AttentionOptions) -> bool:
        """Tell `options.observer` what queries of a prompt's first part attend to, without an output.

        An observer whose `sums` is true need not be told of each query: `observer.add_sums(kind, weights, seen, heads)`
        for each kind of scores in `observer.counted` gives the weights of the queries that count, summed over these and
        over the `heads` of a KV head, `[batch, kv_heads, tokens]`, and how many of them could see a token,
        `[batch or 1, kv_heads or 1, tokens]`.

        Args:
            query: `[batch, heads, queries, head_dim]`, the newest of the tokens.
            keys: all keys there are, `[batch, kv_heads, tokens, head_dim]`.
            mask: as transformers gives it; None: a query sees all tokens that are not newer.
            options: as in `attend`.

        Returns:
            Whether it did. The default does not: the reference then computes the weights.
        """
        return False

    def encodes(self, encoding: Encoding) -> bool:
        """Whether it can code tokens in the place of PyTorch, with the same result. The same answer each time."""
        return False

    def encode(self, encoding: Encoding, pieces: Sequence[tuple[Tensor, ...]]) -> None:
        """Code tokens, and write what is kept of them. It must not wait for the device.

        Args:
            encoding: one that it `encodes`.
            pieces: of each the tokens, `[batch, kv_heads, tokens, head_dim]`, per channel whole groups; where packed
                codes go, uint8 `[batch, kv_heads, tokens, width]`, plane by plane; and where scales and offsets go,
                `[batch, kv_heads, tokens or groups, numbers]`. What is written to is contiguous from the tokens on.
                If it is `divided` divisors come fourth, `[batch or 1, kv_heads or 1, 1, head_dim]` in the tokens' type.
        """
        raise PluginError(f"backend {self.kind!r} must have encode where it encodes, found none. {TRY}")
