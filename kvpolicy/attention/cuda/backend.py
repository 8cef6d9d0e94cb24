"""The backend of NVIDIA GPUs: stores and new tokens of a layer in one launch."""

from __future__ import annotations

import functools
import threading
import warnings
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from kvpolicy.attention.cuda.again import Again, watch
from kvpolicy.attention.cuda.compile import missing
from kvpolicy.attention.cuda.copy import copy, shift
from kvpolicy.attention.cuda.encode import encode, variant_of
from kvpolicy.attention.cuda.graph import Launch, Recording, current
from kvpolicy.attention.cuda.kernel import launch
from kvpolicy.attention.cuda.layout import Declined, scan
from kvpolicy.attention.cuda.observe import sums
from kvpolicy.attention.cuda.piece import indices_of
from kvpolicy.attention.cuda.plan import Plan, columns_of, make_plan
from kvpolicy.attention.cuda.renew import Renewal, arguments_of, spaces_of, transformed
from kvpolicy.attention.cuda.scratch import counters, partials
from kvpolicy.attention.cuda.spaces import joined, mapped
from kvpolicy.hookspecs import hookimpl
from kvpolicy.interfaces.backend import AttentionOptions, AttentionSpec, Backend, Encoding, Part, StoreView

HEAD_DIMS = (64, 80, 96, 128, 256)
MOST_ROWS = 256
"""Query rows of a KV head (queries x query heads) at most; with more it is faster to decode the tokens once."""
FORMATS = {kind + flat for kind in ("exact", "affine", "affine+transforms") for flat in ("", "+flat")}
PLANS = 256
"""Plans that are kept: one for each step of the last ones, and each kind of layer."""
_plans: dict[Any, Plan | str] = {}
_found = threading.local()
"""What `declines` found out for `attend`, which follows."""


class Cuda(Backend):
    """Reads packed codes and exact tokens in one launch per layer, on NVIDIA GPUs from compute capability 8.0 on."""

    kind: Literal["cuda"] = "cuda"
    priority: ClassVar[int] = 10
    requires: ClassVar[str | None] = "cuda"
    device: ClassVar[str | None] = "cuda"
    watches: ClassVar[bool] = True

    def refuses(self, spec: AttentionSpec) -> str | None:
        if spec.device != "cuda" or torch.version.cuda is None:
            return f"it is for NVIDIA GPUs, not for device {spec.device}"
        if torch.cuda.get_device_capability() < (8, 0):
            return "it is for cards from compute capability 8.0 on"
        if spec.dtype not in (torch.float16, torch.bfloat16):
            return f"it computes for float16 and bfloat16, not for {spec.dtype}"
        if spec.head_dim not in HEAD_DIMS or spec.value_dim not in HEAD_DIMS:
            return f"head_dim must be one of {HEAD_DIMS}, found {spec.head_dim} and {spec.value_dim} of values"
        if spec.groups * spec.queries > MOST_ROWS:
            return f"{spec.groups * spec.queries} query rows of a KV head are more than {MOST_ROWS}"
        others = sorted({*spec.keys, *spec.values} - FORMATS)
        if others:
            return f"it does not read the format {', '.join(others)}"
        reason = missing()
        if reason is not None:
            _tell(reason)
        return reason

    def declines(self, query: Tensor, part: Part, mask: Tensor | None, options: AttentionOptions) -> str | None:
        try:
            _found.call = (part, *_planned(query, part, mask, options))
        except Declined as reason:
            return str(reason)
        return None

    def attend(
        self, query: Tensor, part: Part, mask: Tensor | None, options: AttentionOptions
    ) -> tuple[Tensor, Tensor]:
        known = _found.__dict__.pop("call", None)
        if known is None or known[0] is not part:
            known = (part, *_planned(query, part, mask, options))
        _, plan, pointers, places = known
        return _attend(plan, pointers, places, query, part, mask, options)

    def again(self, query: Tensor, part: Part, options: AttentionOptions) -> Again | None:
        if part.gaps or current() is not None:
            return None
        known = _found.__dict__.get("call")
        plan = known[1] if known is not None and known[0] is part else _planned(query, part, None, options)[0]
        if options.observer is not None and part.slots is not None:
            return None
        _found.__dict__.pop("call", None)
        return Again(plan, query, indices_of(part), columns_of(part, options))

    def observe(self, query: Tensor, keys: Tensor, mask: Tensor | None, options: AttentionOptions) -> bool:
        dim, groups = query.shape[3], query.shape[1] // keys.shape[1]
        exact = AttentionSpec(
            ("exact",), ("exact",), query.device.type, query.dtype, dim, dim, groups, 1, False, False, False, False
        )
        if keys.dtype != query.dtype or self.refuses(exact) is not None:
            return False
        return sums(query, keys, options.observer, mask, options)

    def copies(self, tokens: Sequence[Tensor], addresses: Sequence[int], steps: tuple[int, int, int]) -> bool:
        return _able() and copy(tokens, addresses, steps)

    def shifts(self, pages: Sequence[Tensor], sources: Sequence[Tensor], places: Sequence[Tensor]) -> bool:
        return _able() and shift(pages, sources, places)

    def encodes(self, encoding: Encoding) -> bool:
        return variant_of(encoding) is not None and _able()

    def encode(self, encoding: Encoding, pieces: Sequence[tuple[Tensor, ...]]) -> None:
        variant = variant_of(encoding)
        assert variant is not None
        encode(variant, pieces)


@functools.cache
def _able() -> bool:
    """Whether there are kernels that do something else than to attend."""
    served = torch.version.cuda is not None and torch.cuda.get_device_capability() >= (8, 0)
    return served and missing() is None


@functools.cache
def _tell(reason: str) -> None:
    """Warn, once in a process, that the extra is installed in part."""
    warnings.warn(
        f"attention on compressed caches is slow on this cuda device, since {reason}; pip install 'kvpolicy[cuda]', "
        f"with cuda-bindings of the CUDA that torch was built with, {torch.version.cuda}",
        stacklevel=2,
    )


def _planned(
    query: Tensor, part: Part, mask: Tensor | None, options: AttentionOptions
) -> tuple[Plan, list[int], Tensor | None]:
    """The plan for a part, where its pages lie, and which column of the mask each token has."""
    places = _places(part) if part.width and (mask is not None or (part.gaps and part.slots is None)) else None
    laid, pointers = scan(part)
    if (query.data_ptr() | pointers[-1] | pointers[-2]) % 16:
        raise Declined("numbers at addresses that are no multiple of 16 bytes")
    key = (
        laid, query.dtype, query.shape, query.stride(), query.get_device(), part.kv_heads, part.value_dim,
        None if mask is None else (mask.dtype, mask.shape, mask.stride()),
        None if places is None else (places.dtype, places.stride()),
        options.scaling, options.softcap, options.alone, options.observer is not None and columns_of(part, options),
    )  # fmt: skip
    plan = _plans.get(key)
    if plan is None:
        try:
            plan = make_plan(query, part, mask, places, options)
        except Declined as reason:
            plan = str(reason)
        if len(_plans) >= PLANS:
            _plans.clear()
        _plans[key] = plan
    if isinstance(plan, str):
        raise Declined(plan)
    return plan, pointers, places


def _places(part: Part) -> Tensor:
    """The slot of each column, as runs count them."""
    found = part.positions()
    if part.slots is None:
        return found
    return torch.cat([_of_columns(found, view) for view in part.keys], dim=-1)


def _of_columns(x: Tensor, view: StoreView) -> Tensor:
    """Of numbers of columns, in the last dimension, those of a store's tokens."""
    if isinstance(view.columns, int):
        return x[..., view.columns : view.columns + view.store.length]
    return x.gather(x.ndim - 1, view.columns)


def _attend(
    plan: Plan,
    pointers: list[int],
    places: Tensor | None,
    query: Tensor,
    part: Part,
    mask: Tensor | None,
    options: AttentionOptions,
) -> tuple[Tensor, Tensor]:
    batch, heads, queries, _ = query.shape
    device, graph = query.get_device(), current()
    out = query.new_empty(plan.out, dtype=plan.dtype)
    lse = query.new_empty((batch, heads, queries), dtype=torch.float32)
    partial = zeros = sinks = scores = sums = None
    if graph is not None:
        partial, zeros = _room(plan, graph)
    elif plan.partial:
        partial = partials(plan.partial, device)
        zeros = counters(plan.lines * plan.turns, device)
    if options.sinks is not None:
        sinks = options.sinks.float().contiguous()
    if options.observer is not None:
        lines = (batch, part.kv_heads, heads // part.kv_heads * queries)
        shape = (*lines, columns_of(part, options))  # what policies keep of them is summed up before the next layer
        scores = query.new_empty(shape, dtype=torch.float32) if graph is None else graph.room(*shape)
        if part.slots is not None:  # nothing is written where no token is
            scores.fill_(-torch.inf)
        sums = query.new_empty((*lines, 1), dtype=torch.float32)
    maps = [mapped(_chain(part.keys[view].store, graph), query, part.kv_heads) for view in plan.maps]
    tensors = (mask, places, out, lse, partial, scores, sums, sinks, zeros)
    arguments, grid = arguments_of(plan, pointers, query, maps, tensors)
    launch(plan.kernel, arguments, grid, device)
    if graph is not None:
        _record(graph, plan, query, part, mask, options, tensors, maps)
    if scores is not None and sums is not None:
        scores = scores if part.slots is None else _in_columns(scores, part)
        new = 0 if part.new is None else part.new[0].shape[2]
        watch(options.observer, scores, sums, queries, new, mask is not None or part.gaps or queries > 1)
    if plan.spaces != (-1,):
        chains = [None if view < 0 else _chain(part.values[view].store, graph) for view in plan.spaces]
        out = joined(out, chains, part.kv_heads, query.dtype if options.alone else torch.float32)
    return out.transpose(1, 2), lse


def _chain(store: Any, graph: Recording | None) -> Any:
    """The transforms of a store; in a graph their twin, as the next replay may be with another store."""
    if graph is None:
        return store.chain
    twin = graph.chains.get(id(store.chain))
    if twin is None:
        graph.unfit = "its attention has transforms that just began"
        return store.chain
    return twin


def _room(plan: Plan, graph: Recording) -> tuple[Tensor, Tensor]:
    """What the blocks of a launch use among themselves, where a graph captures it."""
    if plan.partial > graph.partials.numel() or plan.lines * plan.turns > graph.counters.numel():
        graph.unfit = "a launch needs more room"
    return graph.partials, graph.counters


def _record(
    graph: Recording,
    plan: Plan,
    query: Tensor,
    part: Part,
    mask: Tensor | None,
    options: AttentionOptions,
    tensors: tuple[Tensor | None, ...],
    mapped: list[Tensor],
) -> None:
    """Note a launch that a graph has captured, if nothing of it but its arguments changes from step to step."""
    watched = options.observer is not None and not options.observer.room
    if mask is not None or part.gaps or watched or not options.alone:
        graph.unfit = "its attention has a mask, or gaps"
    spaces = spaces_of(plan, part)
    held = {side: transformed(view.store for view in getattr(part, side)) for side in ("keys", "values")}
    own = [(side, i) for side, numbers in zip(("keys", "values"), spaces, strict=True) for i in numbers if i >= 0]
    graph.add(
        query.get_device(),
        stores=tuple(view.store for view in (*part.keys, *part.values)),
        call=(query, part.new, options),
        tensors=tensors,
        mapped=tuple(mapped),
        chains=tuple((side, i, _chain(held[side][i], graph)) for side, i in own),
        spaces=spaces,
    )


def renewal(known: Launch, part: Part) -> tuple[Renewal, list[int]] | str:
    """What lets a launch of a graph read a part as it is now, and where its pages lie; or why it can't.

    Args:
        known: the launch.
        part: the part, its new tokens those of the launch.
    """
    query, _, options = known.call
    try:
        plan, pointers, _ = _planned(query, part, None, options)
    except Declined as reason:
        return str(reason)
    found = Renewal(plan, part, options)
    return found, pointers[: len(pointers) - len(found.indices) - 2]


def _in_columns(scores: Tensor, part: Part) -> Tensor:
    """Scores whose columns are those of keys, store by store, and of new tokens, in the columns of the part."""
    *lines, width = scores.shape
    held = sum(view.store.length for view in part.keys)
    found = scores.new_full((*lines, part.width + width - held), -torch.inf)
    found[..., part.width :] = scores[..., held:]
    first = 0
    for view in part.keys:
        own = scores[..., first : first + view.store.length]
        first += view.store.length
        if isinstance(view.columns, int):
            found[..., view.columns : view.columns + view.store.length] = own
        else:
            found.scatter_(3, view.columns.unsqueeze(-2).expand_as(own), own)
    return found


@hookimpl
def kvpolicy_backends() -> list[type[Backend]]:
    """The backend of this file."""
    return [Cuda]
