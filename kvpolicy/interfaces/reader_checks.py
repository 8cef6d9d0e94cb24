"""What readers return, checked as `checks.py` does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from kvpolicy.errors import PluginError
from kvpolicy.interfaces.checks import versions
from kvpolicy.interfaces.component import TRY, call
from kvpolicy.interfaces.reader import Reader
from kvpolicy.interfaces.site import Site

__all__ = ["page_count", "page_scores", "summarized"]


def _fail(reader: Reader, rule: str, found: str) -> PluginError:
    return PluginError(f"reader {reader.kind!r}: {rule}, found {found}. {TRY}")


def _shown(value: Any) -> str:
    if not isinstance(value, Tensor):
        return f"{value!r:.80}"
    return f"{tuple(value.shape)} in {value.dtype} on {value.device}"


def page_count(reader: Reader) -> int:
    """Pages that each query reads.

    Raises:
        PluginError: it raised, or returned something else.
    """
    found = call(reader, "count")
    if type(found) is not int or found < 1:
        raise _fail(reader, "count must return an integer, 1 or more", _shown(found))
    return found


def summarized(
    reader: Reader, keys: Tensor, real: Tensor, site: Site, known: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """What a reader keeps of pages, `[batch, kv_heads, pages, ...]`, by name; `known` is what it kept of others.

    Raises:
        PluginError: it raised, returned something else, or wrote to what it was given.
    """
    before = versions([keys, real])
    found = call(reader, "summarize", keys, real, site)
    if not isinstance(found, dict) or not found or not all(_fits(t, keys) for t in found.values()):
        shown = {n: _shown(t) for n, t in found.items()} if isinstance(found, dict) else type(found).__name__
        wanted = f"{(*keys.shape[:3], '...')} on {keys.device}"
        raise _fail(reader, f"summarize must return named float tensors {wanted}", str(shown))
    kinds, others = ({n: (t.shape[3:], t.dtype) for n, t in x.items()} for x in (found, known or found))
    if kinds != others:
        raise _fail(reader, "summarize must return the same tensors each time", f"{kinds} after {others}")
    if versions([keys, real]) != before:
        raise _fail(reader, "summarize must leave its arguments as they are", "them changed")
    return dict(found)


def _fits(t: Any, keys: Tensor) -> bool:
    fits = isinstance(t, Tensor) and t.is_floating_point() and t.device == keys.device
    return fits and t.shape[:3] == keys.shape[:3]


def page_scores(reader: Reader, query: Tensor, summary: Mapping[str, Tensor], site: Site) -> Tensor:
    """What a reader scores pages by: `[batch, kv_heads, groups or 1, pages]`.

    Raises:
        PluginError: it raised, returned something else, or wrote to what it was given.
    """
    given = [query, *summary.values()]
    before = versions(given)
    found = call(reader, "score", query, dict(summary), site)
    batch, heads, groups, _ = query.shape
    shapes = [(batch, heads, n, given[1].shape[2]) for n in (groups, 1)]
    fits = isinstance(found, Tensor) and found.is_floating_point() and found.device == query.device
    if not fits or tuple(found.shape) not in shapes:
        wanted = f"{shapes[0]} on {query.device}, or with 1 in place of {groups}"
        raise _fail(reader, f"score must return a float tensor {wanted}", _shown(found))
    if versions(given) != before:
        raise _fail(reader, "score must leave its arguments as they are", "them changed")
    result: Tensor = found
    return result
