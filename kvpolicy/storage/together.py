"""Stores of several layers in which the same happens: what costs calls for each of them is done for all at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kvpolicy.storage.affine import AffineStore
from kvpolicy.storage.coded import NOTHING
from kvpolicy.storage.exact import ExactStore
from kvpolicy.storage.fused import divisors_of
from kvpolicy.storage.gather import filled, gather_all
from kvpolicy.storage.later import Later, remove_all
from kvpolicy.storage.pages import Leaving, Pages

__all__ = ["append_coded", "coded_alike", "gather_from", "layers_beside", "remove_coded"]

AT_ONCE = 1 << 26
"""Bytes of tokens of several layers that are brought side by side at most."""


def coded_alike(stores: Sequence[Any]) -> list[AffineStore]:
    """The stores, if all are of codes that are kept in one way; else none."""
    found = [store for store in stores if type(store) is AffineStore]
    if len(found) < len(stores):
        return []
    # Levels may be given for some places in a model alone.
    plain = all(s.beside is None and not s.by_position and s.scales.levels is None for s in found)
    return found if plain and all(_kind(store) == _kind(found[0]) for store in found) else []


def _kind(store: AffineStore) -> tuple[Any, ...]:
    held = [store.parts[name] for name in ("codes", "exact")]
    shapes = [
        (pages.length, *[(x.dtype, x.device, x.shape[:2], x.shape[3]) for x in pages.pages[:1]]) for pages in held
    ]
    return id(store.quantizer), store.head_dim, store.row_heads, store.front is None, shapes


def gather_from(stores: Sequence[Any], index: Tensor, dtype: torch.dtype) -> Tensor | None:
    """What `Store.gather` of a store of each layer gives; None where that is to be asked.

    Args:
        stores: the stores, which hold as many tokens.
        index: `[layers, batch or 1, kv_heads or 1, tokens]`.
        dtype: of what is decoded.

    Returns:
        `[layers, batch, kv_heads, tokens, head_dim]`.
    """
    if all(type(store) is ExactStore for store in stores):
        return _of_pages([store.parts["exact"] for store in stores], index)
    coded = coded_alike(stores)
    if not coded or coded[0].front is not None:
        return None
    first, exact = coded[0], [store.parts["exact"] for store in coded]
    held = first.parts["codes"].length
    if not held:
        return _of_pages(exact, index)
    at = index.clamp(max=held - 1)
    found = _decoded(coded, at, dtype)
    if found is None or not exact[0].length:
        return found
    waiting = _of_pages(exact, (index - held).clamp_(min=0))
    return None if waiting is None else torch.where((index >= held).unsqueeze(4), waiting, found)


def _decoded(stores: list[AffineStore], at: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Coded tokens."""
    first, parts = stores[0], [[store.parts[name] for store in stores] for name in ("codes", "params")]
    codes = _of_pages(parts[0], at)
    if first.by_channel:
        numbers = [store.groups.numbers for store in stores if store.groups.numbers is not None]
        groups = _of_pages(numbers, at) if len(numbers) == len(stores) else None
        if groups is None:
            return None
        at = groups.squeeze(4)
    params = _of_pages(parts[1], at)
    if codes is None or params is None:
        return None
    out = codes.new_empty((*codes.shape[:4], first.head_dim), dtype=dtype)
    first._dequantize(codes, params, out)
    chains = [store.chain for store in stores if store.chain is not None]
    if chains:
        kept = [divisors_of(chain) for chain in chains]
        divisors = [d for d in kept if d is not None]
        if len(divisors) == len(stores) and all(d.shape == divisors[0].shape for d in divisors):
            out.copy_(out.float().mul_(torch.stack(divisors).float()))
        else:
            for store, x in zip(stores, out.unbind(0), strict=True):
                x.copy_(store._finished(x, NOTHING))
    return out


def _of_pages(pages: Sequence[Pages], index: Tensor) -> Tensor | None:
    """Tokens of `whole` tensors of one kind; None where they are of several."""
    if any(own.front is not None or len(own.pages) != 1 for own in pages):
        return None
    tensors = [own.pages[0] for own in pages]
    like = [(x.dtype, x.device, x.shape[:2], x.shape[3]) for x in tensors]
    return gather_all(tensors, index) if all(own == like[0] for own in like) else None


def append_coded(
    stores: Sequence[AffineStore], tokens: Sequence[Tensor], empty: Sequence[Tensor | None], full: bool
) -> None:
    """`append` of each store, its tokens being one arrival; all are coded in one go."""
    first, holes = stores[0], [x for x in empty if x is not None]
    if len(holes) == len(stores) and first.by_channel and not first.group_size and not first.parts["exact"].length:
        tokens, empty = _filled(tokens, holes), [None] * len(stores)
    later = Later(soon=True)
    for store, x, own in zip(stores, tokens, empty, strict=True):
        store.append(x, own, None, full, later)
    later.run()


def _filled(tokens: Sequence[Tensor], empty: Sequence[Tensor]) -> list[Tensor]:
    rows, found = tokens[0].shape[0], []
    for first in range(0, len(tokens), most := layers_beside(tokens[0].nbytes)):
        holes = [own.expand(rows, -1, -1) for own in empty[first : first + most]]
        found += filled(torch.cat(list(tokens[first : first + most])), torch.cat(holes)).split(rows)
    return found


def layers_beside(each: int) -> int:
    """Of how many layers tokens of so many bytes are brought side by side at a time."""
    return max(1, AT_ONCE // max(1, each))


def remove_coded(stores: Sequence[AffineStore], leaving: Sequence[Leaving], empty: Sequence[Tensor | None]) -> None:
    """`remove` of each store."""
    first = stores[0]
    if first.by_channel and first.parts["exact"].length:
        for store, own, holes in zip(stores, leaving, empty, strict=True):
            store.remove(own, holes)
        return
    for name in ("codes",) if first.by_channel else ("codes", "params"):
        remove_all([store.parts[name] for store in stores], leaving)
    if first.by_channel:
        remove_all([store.groups.numbers for store in stores if store.groups.numbers is not None], leaving)
        for store in stores:
            store.groups.forget([store.parts["params"]])
