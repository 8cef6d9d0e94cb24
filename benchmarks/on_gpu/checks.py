"""Whether results are right, before any is timed.

A step without graphs is compared with PyTorch's code: the attention of each layer, for the same query and stores, and
the logits of the whole step. A step with graphs must be the step without to the bit.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

import kvpolicy
from kvpolicy.attention import backend
from kvpolicy.hf.models import cache_word

from .rows import Check


def roundoff(dtype: torch.dtype) -> float:
    """The largest relative error of rounding to a type."""
    return torch.finfo(dtype).eps / 2


def attention_bound(dtype: torch.dtype) -> float:
    """How far a layer's attention may be from float32: its output is rounded once, and so are the weights of values.

    Queries times scales and weights are float16 even for bfloat16 models, finer than the output. So the error stays
    near that of one rounding, whose root mean square is about 0.4 of the largest.
    """
    return roundoff(dtype)


def logits_bound(dtype: torch.dtype, layers: int) -> float:
    """How far logits may be apart that two right computations give.

    On either way some sixteen results of a layer are rounded, norms, projections, products and sums, and as many after
    the last layer. Such errors, of root mean square 0.4 roundoffs each, add up as the steps of a random walk do. Half
    as much again is for what is not random.
    """
    return 1.5 * 0.4 * (2 * 16 * (layers + 1)) ** 0.5 * roundoff(dtype)


def distance(found: Tensor, right: Tensor) -> float:
    """The norm of the difference, relative to that of what is right."""
    return float((found.float() - right.float()).norm() / right.float().norm())


@contextmanager
def by_reference() -> Iterator[None]:
    """PyTorch's code alone serves attention."""
    with patch.object(backend, "others", tuple):
        yield


class Beside:
    """Calls an `attend`, and again with PyTorch's code in float32."""

    def __init__(self, attend: Any, every: int) -> None:
        self.attend, self.every, self.calls = attend, every, 0
        self.errors: list[float] = []
        self.told: list[float] = []
        self.kinds: set[str] = set()

    def __call__(self, tiers: Any, query: Tensor, *args: Any, observer: Any = None, **options: Any) -> Tensor:
        compared = not self.calls % self.every
        self.calls += 1
        twin = copy.deepcopy(observer) if compared else None
        found: Tensor = self.attend(tiers, query, *args, observer=observer, **options)
        self.kinds.update(tiers.backends)
        if compared:
            with by_reference():
                right = self.attend(tiers, query.float(), *args, observer=twin, **options)
            self.errors.append(distance(found, right))
            if twin is not None:
                self.told += [distance(a, b) for a, b in _told(observer, twin)]
        return found


def _told(observer: Any, twin: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """What two observers were told of each kind, without the columns that are free."""
    for one, other in zip(observer.found, twin.found, strict=True):
        if one is not None and other is not None:
            columns = min(one[0].shape[-1], other[0].shape[-1])
            yield one[0][..., :columns], other[0][..., :columns]


def logits_of(model: Any, cache: Any, token: Tensor) -> Tensor:
    found: Tensor = model(token, **{cache_word(model): cache}, logits_to_keep=1).logits
    return found


def attention_checks(model: Any, cache: Any, token: Tensor, every: int = 1) -> tuple[list[Check], Tensor]:
    """Of a step of `cache`, each layer's attention against PyTorch's code, and the step's logits."""
    module = importlib.import_module("kvpolicy.hf.attach")
    beside = Beside(module.attend, every)
    with patch.object(module, "attend", beside), kvpolicy.attach(model, graphs=False):
        logits = logits_of(model, cache, token)
    bound = attention_bound(model.dtype)
    checks = [Check("attention", max(beside.errors, default=float("nan")), bound)]
    if beside.told:
        checks.append(Check("attention received", max(beside.told), bound))
    if "reference" in beside.kinds:
        print(f"  served by {sorted(beside.kinds)}", flush=True)
    return checks, logits


def eager_checks(model: Any, cache: Any, token: Tensor) -> list[Check]:
    """Of a step of a copy of `cache` without graphs: attention by layer, and the logits against PyTorch's code."""
    checks, found = attention_checks(model, copy.deepcopy(cache), token)
    twin = copy.deepcopy(cache)
    with by_reference(), kvpolicy.attach(model, graphs=False):
        right = logits_of(model, twin, token)
    return [*checks, logits_check(model, found, right)]


def logits_check(model: Any, found: Tensor, right: Tensor) -> Check:
    bound = logits_bound(model.dtype, model.config.num_hidden_layers)
    return Check("logits", distance(found, right), bound)


def graph_checks(model: Any, cache: Any, token: Tensor, steps: int = 6) -> list[Check]:
    """Of steps of copies of `cache`: those with graphs against those without, to the bit."""
    found = []
    for graphs in (False, True):
        twin = copy.deepcopy(cache)
        with kvpolicy.attach(model, graphs=graphs) as handle:
            found.append(torch.cat([logits_of(model, twin, token).clone() for _ in range(steps)]))
    if handle.graphs is None or not handle.graphs.replayed:
        print(f"  no step was replayed: {dict(handle.graphs.reasons) if handle.graphs else 'no GPU'}", flush=True)
        return []
    return [Check("graphs", float((found[0] - found[1]).abs().max()), 0.0)]
