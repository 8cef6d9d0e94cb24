"""The backend that serves everything, in PyTorch: the oracle of all others.

Softmax(QK^T)V does not depend on the order of the tokens, so nothing is sorted back. Scores of all stores of a part
stand side by side as columns, in float32; each store then adds its share of the output.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

import torch
from torch import Tensor

from kvpolicy.attention.mask import Queries, mask_scores
from kvpolicy.attention.products import add_values, as_float, key_scores
from kvpolicy.hookspecs import hookimpl
from kvpolicy.interfaces.backend import AttentionOptions, AttentionSpec, Backend, Part

SCORES = 1 << 24
"""Scores computed at a time; more queries than fit take another turn over the stores."""


class Reference(Backend):
    """Reads packed codes where they lie and decodes other stores block by block; on any device."""

    kind: Literal["reference"] = "reference"
    priority: ClassVar[int] = 0

    def refuses(self, spec: AttentionSpec) -> str | None:
        return None

    def attend(
        self, query: Tensor, part: Part, mask: Tensor | None, options: AttentionOptions
    ) -> tuple[Tensor, Tensor]:
        found = [self.some(q, part, mask, options, first, query.shape[2], True) for first, q in _turns(query, part)]
        outs, sums = [out for out, _ in found], [lse for _, lse in found if lse is not None]
        return _together(outs), _together(sums)

    def output(self, query: Tensor, part: Part, mask: Tensor | None, options: AttentionOptions) -> Tensor:
        """The first of what `attend` gives."""
        of = query.shape[2]
        return _together([self.some(q, part, mask, options, first, of)[0] for first, q in _turns(query, part)])

    def some(
        self,
        query: Tensor,
        part: Part,
        mask: Tensor | None,
        options: AttentionOptions,
        first: int,
        of: int,
        sums: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """`attend` for some of `of` queries, the first of which is number `first`; logarithms only if `sums`."""
        keys, values = part.new if part.new is not None else (None, None)
        batch, heads, queries, _ = query.shape
        rows = as_float(query).mul(options.scaling).reshape(batch, part.kv_heads, -1, query.shape[3])
        held, new = part.width, 0 if keys is None else keys.shape[2]
        shape = (*rows.shape[:3], held + new)
        scores = rows.new_zeros(shape) if part.gaps else rows.new_empty(shape)
        for store, where, _ in part.keys:
            if store.length:
                key_scores(store, rows, scores, where)
        if keys is not None:
            scores[..., held:] = rows @ as_float(keys).transpose(2, 3)
        asked = Queries(torch.arange(first, first + queries), of, new - of)
        scores, divisor, lse = weights(scores, part, mask, options, asked, sums)
        if values is None:
            out = rows.new_zeros((*rows.shape[:3], part.value_dim))
        else:
            out = (scores[..., held:] if held else scores) @ as_float(values)
        for store, where, _ in part.values:
            if store.length:
                add_values(store, scores, out, where)
        if divisor is not None:
            out.div_(divisor)
        return out.view(batch, heads, queries, -1), lse


def only_new(keys: Tensor) -> Part:
    """A part of nothing but new tokens, without values."""
    return Part((), (), 0, False, lambda: torch.empty(0, dtype=torch.int64), keys.shape[1], 0, (keys, keys[..., :0]))


def _turns(query: Tensor, part: Part) -> Iterator[tuple[int, Tensor]]:
    """As many queries as are computed at a time, with the number of the first of them."""
    batch, heads, queries, _ = query.shape
    width = part.width + (0 if part.new is None else part.new[0].shape[2])
    step = max(1, SCORES // (batch * heads * width))
    if queries <= step:
        yield 0, query
        return
    for first in range(0, queries, step):
        yield first, query[:, :, first : first + step]


def _together(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def weights(
    scores: Tensor, part: Part, mask: Tensor | None, options: AttentionOptions, queries: Queries, sums: bool = False
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """What scores `[batch, kv_heads, rows, columns]` become, what divides the output yet, and `lse` of `attend`.

    They are those of `queries`, written over, and the observer is told of them. A query that nothing hides sees some
    token, so that the softmax is PyTorch's own.
    """
    hidden = mask is not None or part.gaps
    if not (hidden or sums or options.sinks is not None or options.observer is not None):
        if options.softcap is not None or queries.of > 1:
            _weigh(scores.unflatten(2, (-1, len(queries.at))), part, mask, options, queries)
        return scores.softmax(-1), None, None
    shaped = scores.unflatten(2, (-1, len(queries.at)))
    _weigh(shaped, part, mask, options, queries)
    watched = options.observer is not None and (hidden or queries.of > 1)
    visible = shaped > -torch.inf if watched else None
    total, lse = exponentials(shaped, options.sinks, hidden)
    if options.observer is None:
        return scores, total.flatten(2, 3), lse.flatten(1, 2)
    shaped.div_(total)
    options.observer.watch(queries.at + queries.offset, shaped, visible, slice(0, part.kv_heads), part.kv_heads)
    return scores, None, lse.flatten(1, 2)


def _weigh(scores: Tensor, part: Part, mask: Tensor | None, options: AttentionOptions, queries: Queries) -> None:
    """Cap and mask scores `[batch, kv_heads, groups, queries, columns]` in place."""
    if options.softcap is not None:
        scores.div_(options.softcap).tanh_().mul_(options.softcap)
    new = 0 if part.new is None else part.new[0].shape[2]
    if mask is not None or part.gaps or (queries.of > 1 and new):
        mask_scores(scores, mask, queries, part, new)


def exponentials(scores: Tensor, sinks: Tensor | None, maybe_none: bool = True) -> tuple[Tensor, Tensor]:
    """Replace scores by their exponentials.

    Args:
        scores: `[batch, kv_heads, groups, queries, columns]`.
        sinks: a score per head that is summed with the rest.
        maybe_none: whether there may be a query that sees nothing.

    Returns:
        What divides them, `[batch, kv_heads, groups, queries, 1]`, and the logarithm of the sum of the exponentials of
        the scores as they were, `[batch, kv_heads, groups, queries]`.
    """
    largest = scores.amax(-1, keepdim=True)
    if sinks is not None:
        sinks = sinks.float().view(1, *scores.shape[1:3], 1, 1)
        largest = torch.maximum(largest, sinks)
    if maybe_none:
        largest = largest.masked_fill_(largest == -torch.inf, 0.0)
    total = scores.sub_(largest).exp_().sum(-1, keepdim=True)
    if sinks is not None:
        total += (sinks - largest).exp_()
    lse = total.log().add_(largest).squeeze(-1)
    return (total.masked_fill_(total == 0, 1.0) if maybe_none else total), lse


REFERENCE = Reference()


@hookimpl
def kvpolicy_backends() -> list[type[Backend]]:
    """The backend of this file."""
    return [Reference]
