"""Who computes the attention of a layer, and how what several backends computed becomes one."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache, lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from kvpolicy.attention.reference import REFERENCE
from kvpolicy.errors import PluginError
from kvpolicy.interfaces.backend import AttentionOptions, AttentionSpec, Backend, Part, StoreView
from kvpolicy.interfaces.checks import versions
from kvpolicy.interfaces.component import TRY, call, guarded
from kvpolicy.plugins import registry


@lru_cache(1)
def others() -> tuple[Backend, ...]:
    """The installed backends that are asked before the reference, in the order in which they are."""
    return tuple(backend for backend in registry().usable_backends() if backend.priority > 0)


@cache
def tell_missing(device: str) -> None:
    """Warn, once in a process, of backends for a type of device that need a library which is not installed."""
    for info in registry().backends.values():
        if info.missing is not None and info.cls.device == device:
            warnings.warn(
                f"attention on compressed caches is slow on this {device} device, since backend {info.kind!r} needs "
                f"{info.missing}, which is not installed: pip install '{info.distribution}[{info.cls.requires}]'",
                stacklevel=2,
            )


def asked(device: str) -> bool:
    """Whether any backend but the reference is for a type of device."""
    return any(backend.device in (None, device) for backend in others())


@lru_cache(4096)
def chosen(spec: AttentionSpec, watched: bool = False) -> Backend:
    """The first backend that serves `spec`, and tells observers if that is asked.

    Raises:
        PluginError: a backend answers otherwise than by a text or None.
    """
    for backend in others():
        if backend.device not in (None, spec.device) or (watched and not backend.watches):
            continue
        if _reason(backend, "refuses", spec) is None:
            return backend
    return REFERENCE


def _reason(backend: Backend, method: str, *given: object) -> str | None:
    reason = call(backend, method, *given)
    if reason is not None and not isinstance(reason, str):
        raise PluginError(
            f"backend {backend.kind!r}: {method} must return a reason or None, found {reason!r:.80}. {TRY}"
        )
    return reason


def serving(query: Tensor, part: Part, mask: Tensor | None, options: AttentionOptions, by_head: bool) -> Backend:
    """Who serves a part."""
    backend = chosen(spec_of(query, part, mask, options, by_head), options.observer is not None)
    if backend is REFERENCE or _reason(backend, "declines", query, part, mask, options) is None:
        return backend
    return REFERENCE


def split(part: Part) -> list[Part]:
    """The parts in which keys lie in one store and values in one, as far as the order of the columns tells them apart.

    Stores whose tokens are not neighbours among the columns stay together, with all that overlaps them.
    """
    views = [view for view in (*part.keys, *part.values) if view.store.length]
    if part.gaps or not views or any(not isinstance(view.columns, int) for view in views):
        return [part]
    spans = [[(int(v.columns), int(v.columns) + v.store.length) for v in side] for side in (part.keys, part.values)]
    cuts = sorted({at for side in spans for span in side for at in span if span[0] < span[1]})
    both = [at for at in cuts if all(not any(a < at < b for a, b in side) for side in spans)]
    parts: list[Part] = []
    for first, last in pairwise(both):
        sides = [_within(side, first, last) for side in (part.keys, part.values)]
        found = replace(part, keys=sides[0], values=sides[1], width=last - first, new=None)
        parts.append(replace(found, positions=_shifted(part, first, last)))
    if part.new is not None:
        parts.append(replace(part, keys=(), values=(), width=0, positions=_shifted(part, 0, 0)))
    return parts


def _within(views: Sequence[StoreView], first: int, last: int) -> tuple[StoreView, ...]:
    inside = [v for v in views if isinstance(v.columns, int) and v.store.length and first <= v.columns < last]
    return tuple(StoreView(v.store, v.columns - first) for v in inside if isinstance(v.columns, int))


def _shifted(part: Part, first: int, last: int) -> Callable[[], Tensor]:
    return lambda: part.positions()[..., first:last]


def assigned(
    query: Tensor, part: Part, mask: Tensor | None, options: AttentionOptions, by_head: bool
) -> list[tuple[Backend, Part]]:
    """Who serves which part: one backend all of it, or each the pieces that it can; the reference all that is left."""
    device = query.device.type
    tell_missing(device)
    if not asked(device):
        return [(REFERENCE, part)]
    whole = serving(query, part, mask, options, by_head)
    if whole is not REFERENCE or options.observer is not None:
        return [(whole, part)]
    apart = replace(options, alone=False)
    pieces = [(serving(query, piece, mask, apart, by_head), piece) for piece in split(part)]
    if all(backend is REFERENCE for backend, _ in pieces):
        return [(REFERENCE, part)]
    return pieces


def spec_of(query: Tensor, part: Part, mask: Tensor | None, options: AttentionOptions, by_head: bool) -> AttentionSpec:
    """What a backend is asked to serve."""
    keys = tuple([view.store.format for view in part.keys])
    values = tuple([view.store.format for view in part.values])
    if part.new is not None:
        keys, values = (*keys, "exact"), (*values, "exact")
    _, heads, queries, dim = query.shape
    return AttentionSpec(
        keys,
        values,
        query.device.type,
        query.dtype,
        dim,
        part.value_dim,
        heads // part.kv_heads,
        queries,
        mask is not None,
        options.softcap is not None,
        options.sinks is not None,
        by_head,
    )


def computed(
    backend: Backend, query: Tensor, part: Part, mask: Tensor | None, options: AttentionOptions
) -> tuple[Tensor, Tensor]:
    """What a backend gives for a part, checked.

    Raises:
        PluginError: it raised, returned something else, or wrote to `query`.
    """
    if backend is REFERENCE:
        return REFERENCE.attend(query, part, mask, options)
    before = versions((query,))
    found = call(backend, "attend", query, part, mask, options)
    parts = found if isinstance(found, tuple) and all(isinstance(x, Tensor) for x in found) else ()
    batch, heads, queries, _ = query.shape
    shapes = [(batch, heads, queries, part.value_dim), (batch, heads, queries)]
    if [x.shape for x in parts] != shapes:
        what = [tuple(x.shape) for x in parts] or type(found).__name__
        raise PluginError(f"backend {backend.kind!r}: attend must return tensors of {shapes}, found {what}. {TRY}")
    types = ({torch.float32, query.dtype} if options.alone else {torch.float32}), {torch.float32}
    if any(x.dtype not in own or x.device != query.device for x, own in zip(parts, types, strict=True)):
        kinds = [f"{x.dtype} on {x.device}" for x in parts]
        raise PluginError(
            f"backend {backend.kind!r}: attend must return float32 on {query.device}, found {kinds}. {TRY}"
        )
    if versions((query,)) != before:
        raise PluginError(f"backend {backend.kind!r}: attend must leave the query as it is, found it changed. {TRY}")
    return parts[0], parts[1]


def computed_again(
    backend: Backend,
    query: Tensor,
    part: Part,
    options: AttentionOptions,
    addresses: list[int],
    stores: Mapping[str, Sequence[Any]],
) -> tuple[Callable[..., Tensor | None], Tensor] | None:
    """What serves the parts of other layers as well, and what it gives for this one, checked; None if nothing does.

    Raises:
        PluginError: it raised, or returned something else.
    """
    again: Callable[..., Tensor | None] | None = call(backend, "again", query, part, options)
    if again is None:
        return None
    given = query, part.new, addresses, stores, options.sinks, options.observer
    out: Any = guarded(backend, "what again returns", lambda: again(*given))
    if out is None:
        return None
    batch, heads, queries, _ = query.shape
    wanted = (batch, queries, heads, part.value_dim), query.dtype, query.device
    found = (tuple(out.shape), out.dtype, out.device) if isinstance(out, Tensor) else (type(out).__name__,)
    if found != wanted:
        raise PluginError(
            f"backend {backend.kind!r}: what again returns must give {', '.join(map(str, wanted))}, found "
            f"{', '.join(map(str, found))}. {TRY}"
        )
    return again, out


def observed(backend: Backend, query: Tensor, keys: Tensor, mask: Tensor | None, options: AttentionOptions) -> bool:
    """Whether a backend told an observer of a prompt's attention, its answer checked.

    Raises:
        PluginError: it raised, or answered otherwise than by a bool.
    """
    if not backend.watches or backend.device not in (None, query.device.type):
        return False
    done = call(backend, "observe", query, keys, mask, options)
    if not isinstance(done, bool):
        raise PluginError(f"backend {backend.kind!r}: observe must return a bool, found {done!r:.80}. {TRY}")
    return done


def merged(found: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Partial results, outputs and logarithms of sums, as one."""
    if len(found) == 1:
        return found[0]
    lse = torch.stack([part for _, part in found])
    total = lse.logsumexp(0)
    shares = (lse - total.masked_fill(total == -torch.inf, 0.0)).exp_()
    out = torch.stack([part for part, _ in found])
    return (out * shares.unsqueeze(-1)).sum(0), total
